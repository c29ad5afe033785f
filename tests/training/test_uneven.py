"""Steps in which ranks have different amounts of work: the numbers are those of one process, and nobody waits for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sip import train
from tests.training.runs import arguments, assert_same, execute, finish

STEPS = 5
_DROPPED = {"reason": "no_answer", "detail": "made by a test"}


def uneven(records: list[dict]) -> list[dict]:
    """Step 2: the second half of the batch (a whole replica of two) without an answer; 3: single pairs and a whole microbatch
    without; 4: all tied; 5: pools of different sizes, some of one candidate, one suffix of a single token."""
    changed = []
    for number, record in enumerate(records):
        step, place = record["step"], number % 8
        if step > STEPS:
            continue
        preference = record.get("preference")
        drop = step == 2 and place >= 4 or step == 3 and place in (0, 2, 3, 5)
        if drop and preference:
            record = {"step": step, "dropped": {"pair": preference["pair"], **_DROPPED}}
        elif step == 4 and preference:
            preference |= {"tie": True}
        elif step == 5 and preference and place in (1, 4):
            preference |= {"rejected": None, "pool_size": 1, "rollouts": 0, "totals": []}
        elif step == 5 and preference and place == 6:
            preference["rejected"] = {**preference["chosen"], "token_ids": preference["chosen"]["token_ids"][:1], "logprobs": None}
        changed.append(record)
    return changed


@pytest.fixture(scope="module")
def pools(whole, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("uneven") / "pools.jsonl"
    records = list(map(json.loads, (whole / "pools.jsonl.dp0").read_text().splitlines()))
    path.write_text("".join(json.dumps(record) + "\n" for record in uneven(records)))
    return path


OBJECTIVES = {"blend": ("objective.nll_weight=1",), "dpo": ("objective.nll_weight=0", "pool.rollouts_start_step=0")}


def overrides(pools: Path, objective: str) -> list[str]:
    return [f"debug.load_pools={pools}", f"train.train_iters={STEPS}", "train.eval_interval=0", "checkpoint.interval=0", *OBJECTIVES[objective]]


@pytest.fixture(scope="module")
def expected(world, pools, tmp_path_factory) -> dict[str, dict]:
    found = {}
    for objective in OBJECTIVES:
        run = tmp_path_factory.mktemp(objective) / "run"
        assert train.main(arguments(world, run, "http://127.0.0.1:9/v1", *overrides(pools, objective))) == 0
        found[objective] = world.metrics(run)
    return found


def test_only_what_carries_loss_counts(expected):
    blend, dpo = expected["blend"], expected["dpo"]
    assert blend[2]["pool/dropped_rate"] == dpo[2]["pool/dropped_rate"] == 0.5 and blend[3]["pool/dropped_rate"] == 0.5
    assert "loss/dpo" not in blend[4] and blend[4]["loss"] == blend[4]["loss/nll"]  # ties keep their likelihood
    assert "loss" not in dpo[4] and "grad_norm" not in dpo[4]  # and carry nothing else: no update
    assert blend[5]["grad_norm"] > 0 and dpo[5]["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("layout", ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "use_distributed_optimizer=true",
                                    "use_distributed_optimizer=false"])
def test_two_processes_give_one_process_numbers(world, pools, expected, tmp_path, layout, objective):
    run = tmp_path / "run"
    output = finish(execute(arguments(world, run, "http://127.0.0.1:9/v1", f"parallel.{layout}", *overrides(pools, objective)), processes=2))
    assert sorted(world.metrics(run)) == list(range(1, STEPS + 1)), output
    assert_same(world.metrics(run), expected[objective], tolerance=1e-5)
