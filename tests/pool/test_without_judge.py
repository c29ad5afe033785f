"""Pools that no judge has to see."""

from __future__ import annotations

import itertools
import json

import pytest

from megatron_sip.pool import ORIGINAL, REWRITE, ROLLOUT, Candidate, Dropped, PairId, Pool, Preference, without_judge

PAIR = PairId("tokens/wiki", 3, 0)


def make_pool(sources: tuple[str, ...]) -> Pool:
    seen = itertools.count()
    candidates = tuple(Candidate(s, (5,), s, index=next(seen) if s == ROLLOUT else 0) for s in sources)
    return Pool(PAIR, (1, 2), "prefix", candidates, "original")


def test_every_pool_of_up_to_four() -> None:
    """The only candidate; else the rewrite over rollout 0, never another one and never the original; else dropped."""
    for n in range(1, 5):
        for sources in itertools.product((ORIGINAL, REWRITE, ROLLOUT), repeat=n):
            if sources.count(ORIGINAL) > 1 or sources.count(REWRITE) > 1:
                continue
            result = without_judge(make_pool(sources))
            if n == 1:
                assert isinstance(result, Preference)
                assert (result.chosen.source, result.rejected, result.pool_size) == (sources[0], None, 1)
            elif REWRITE in sources and ROLLOUT in sources:
                assert isinstance(result, Preference)
                assert (result.chosen.label, result.rejected.label) == (REWRITE, "rollout 0")
                assert (result.pool_size, result.totals, result.tie) == (n, (), False)
            else:
                missing = REWRITE if REWRITE not in sources else ROLLOUT
                assert isinstance(result, Dropped)
                assert (result.pair, result.reason, result.detail) == (
                    PAIR,
                    f"no_{missing}",
                    f"rewrite_over_rollout needs a {missing}",
                )
                continue
            assert result.rollouts == sources.count(ROLLOUT)
            assert Preference.from_json(json.loads(json.dumps(result.to_json()))) == result


@pytest.mark.parametrize(
    ("source", "index", "label"),
    [(ORIGINAL, 0, "original"), (REWRITE, 0, "rewrite"), (ROLLOUT, 0, "rollout 0"), (ROLLOUT, 15, "rollout 15")],
)
def test_labels_tell_rollouts_apart(source: str, index: int, label: str) -> None:
    assert Candidate(source, (1,), "", index=index).label == label


def test_a_pair_has_an_identity_to_read() -> None:
    assert str(PAIR) == "tokens/wiki:3:0"
