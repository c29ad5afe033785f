"""Packed microbatches: the loss sees the rows of whole sequences, whatever the model ran."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_sip.pool import ORIGINAL, ROLLOUT, Candidate, Dropped, PairId, Preference
from megatron_sip.training.microbatch import collate
from megatron_sip.training.packing import packed_inputs

P, S, V, CPU = 5, 4, 11, torch.device("cpu")


def outcomes(rng: np.random.Generator) -> list[Preference | Dropped]:
    def candidate(source: str, n: int) -> Candidate:
        return Candidate(source, tuple(int(x) for x in rng.integers(1, V, n)), "")

    found: list[Preference | Dropped] = []
    for i, (chosen, rejected) in enumerate([(S, S), (2, S), (S, 1)]):
        prefix = tuple(int(x) for x in rng.integers(1, V, P))
        found.append(Preference(PairId("d", i, 0), prefix, candidate(ORIGINAL, chosen), candidate(ROLLOUT, rejected), pool_size=2))
    return [*found[:2], Dropped(PairId("d", 9, 0), "no_answer"), found[2]]


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("nll_on", ["suffix", "all"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_cross_entropy_goes_where_that_of_whole_sequences_stands(paired: bool, nll_on: str, multiple: int) -> None:
    """A model whose prediction depends on its token and its position alone."""
    table = torch.randn(P + S, V, V, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    batch = collate(outcomes(np.random.default_rng(3)), P, S, paired=paired, nll_on=nll_on)
    plain = batch.model_inputs(CPU)
    whole = -table[plain["position_ids"], plain["tokens"]].gather(-1, plain["labels"][..., None]).squeeze(-1)
    wanted = torch.from_numpy(batch.suffix_mask > 0)
    wanted[:4] |= torch.from_numpy(batch.nll_mask > 0)

    inputs = packed_inputs(batch, P, S, multiple, CPU)
    needed, tokens = inputs["needed"], inputs["tokens"]
    assert tokens.shape == inputs["position_ids"].shape
    assert tokens.shape == ((4, -(-(P + 2 * S) // multiple) * multiple) if paired else (4, P + S))
    assert len(needed.labels) == int(wanted.sum())  # logits where they are needed and nowhere else
    states = table[inputs["position_ids"].t(), tokens.t()].flatten(0, 1)  # position by position, as Megatron holds them
    found = torch.zeros(needed.shape).flatten().index_copy(0, needed.target, -states[needed.source].gather(-1, needed.labels[:, None]).squeeze(-1))
    torch.testing.assert_close(found.view(needed.shape), torch.where(wanted, whole, 0.0))


def test_prefixes_that_cannot_be_shared_are_refused() -> None:
    made = outcomes(np.random.default_rng(3))
    short = Preference(PairId("d", 1, 0), (1, 2, 3), made[0].chosen, made[0].rejected, pool_size=2)
    with pytest.raises(ValueError, match="pair 1 .* prefixes of 3 and 3 tokens .* the same 5. Set objective.shared_prefix=false"):
        packed_inputs(collate([made[0], short], P, S, paired=True, nll_on="suffix"), P, S, 1, CPU)
    batch = collate(made[:2], P, S, paired=True, nll_on="suffix")
    batch.tokens[2, 0] += 1
    with pytest.raises(ValueError, match="pair 0"):
        packed_inputs(batch, P, S, 1, CPU)
