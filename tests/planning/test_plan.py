"""The tool, its report and its refusals; plans that must order themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sip.config import load_config
from megatron_sip.planning.plan import Options, make_plan

ROOT = Path(__file__).resolve().parents[2]


def tool(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/plan_run.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120)


def plan_of(name: str, *overrides: str, **options):
    return make_plan(load_config(ROOT / "configs" / f"{name}.yaml", overrides), Options(**options))


def test_report() -> None:
    done = tool("configs/continual_safety.yaml", "--judge-parameters", "8e9", "--gpu", "h200", "--mfu-train", "0.3", "train.train_iters=1000",
                "--simulate", 3,
                "train.global_batch_size=8")
    assert done.returncode == 0, done.stderr
    assert "6,120 questions" in done.stdout and "whole run 6.12 M" in done.stdout
    assert "Computed, not measured" in done.stdout and "--mfu-train 0.3 " in done.stdout and "H200: 989 TFLOP/s dense bf16, 4.80 TB/s" in done.stdout
    for part in ("FLOPs of a step", "GPUs that keep the trainer busy", "Whole run", "Memory a GPU", "vendor data sheet", "simulated at staleness 1"):
        assert part in done.stdout


def test_json_holds_the_same_numbers() -> None:
    done = tool("configs/scratch_rfnll.yaml", "--judge-parameters", "8e9", "--json", "--trainer-gpus", 8, "--judge-gpus", 16, "--board-power", 500)
    found = json.loads(done.stdout)
    plan = plan_of("scratch_rfnll", judge_parameters=8e9, trainer_gpus=8, judge_gpus=16)
    assert found["step"]["judge_questions"] == 3840 and found["run"]["judge_questions"] == 80_640_000
    judge = found["memory_bytes_a_gpu"]["judge"]
    assert judge["weights"] == 16e9 and judge["key_value_cache"] == pytest.approx(64 * max(a.longest for a in plan.work.asked) * 2 * 2 * 32 * 8 * 128)
    one = found["staleness"]["1"]
    assert one["judge_gpus"] == 16 and one["step_seconds"] == pytest.approx(plan.sizing[1].step_seconds)
    assert one["gpu_hours"] == pytest.approx((8 + 16 + one["rollout_gpus"]) * one["run_hours"]) and one["watt_hours"] == pytest.approx(500 * one["gpu_hours"])
    assert one["run_hours"] == pytest.approx(21_000 * one["step_seconds"] / 3600)


def test_a_run_without_a_teacher_needs_no_judge() -> None:
    done = tool("configs/ntp_1b.yaml", "--json")
    found = json.loads(done.stdout)
    assert found["judge_parameters"] is None and found["staleness"]["0"]["judge_gpus"] == 0 and found["staleness"]["0"]["wait_share"] == 0


@pytest.mark.parametrize("arguments, says", [
    (["--gpu", "V100"], "unknown GPU 'V100'; known: A100, H100, H200, B200, L40S"),
    ([], "the judge's size is not known"),
    (["--judge-parameters", "8e9", "--trainer-gpus", "3", "parallel.tensor_model_parallel_size=2"],
     "impossible layout on 3 trainer GPUs: world size = 3 is not divisible"),
    (["--judge-parameters", "8e9", "--policy-parameters", "70e9"], "impossible layout: the trainer needs"),
    (["--judge-parameters", "700e9", "--judge-tensor-parallel", "4"], "impossible layout: the judge needs"),
    (["--judge-parameters", "70e9", "--judge-gpus", "3"], "--judge-gpus=3 is not a multiple of"),
    (["--judge-parameters", "8e9", "--utilisation", "0"], "--utilisation=0.0 must be above 0"),
    (["--judge-parameters", "8e9", "--measured", "nowhere.yaml"], "measured rates nowhere.yaml cannot be read"),
    (["--judge-parameters", "8e9", "optimizer.lrr=1"], "unknown key optimizer.lrr"),
])
def test_refusals(arguments, says) -> None:
    done = tool("configs/scratch_1b.yaml", *arguments)
    assert done.returncode == 2 and done.stdout == "" and says in done.stderr and done.stderr.startswith("error: ")


def test_imports_neither_torch_nor_megatron() -> None:
    code = ("import sys; sys.path.insert(0, 'tools'); import plan_run; sys.stdout = open('/dev/null', 'w')\n"
            "code = plan_run.main(['configs/scratch_1b.yaml', '--judge-parameters', '8e9', '--simulate', '1'])\n"
            "sys.exit(code or ','.join({'torch', 'megatron', 'transformers'} & set(sys.modules)) or 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_more_to_judge_needs_more_judges() -> None:
    judges = [plan_of("scratch_1b", f"pool.rollouts={rollouts}", judge_parameters=size, rewrites_cached=True).sizing[1].judge_gpus
              for rollouts, size in ((1, 8e9), (4, 8e9), (4, 70e9))]
    assert judges == sorted(set(judges))


def test_fewer_questions_need_fewer_judges_unless_their_rounds_take_too_long() -> None:
    judges = ["teacher.judges=[{kind: quality, strategy: %s}]" % name for name in ("all_pairs", "adaptive", "tournament")]
    gpus = [plan_of("continual_quality", one, judge_parameters=8e9).sizing[1].judge_gpus for one in judges]
    assert gpus[2] < gpus[0] < gpus[1]  # adaptive: fewer questions than all pairs, but in many rounds, for which servers have to be nearly idle
    done = tool("configs/continual_quality.yaml", "--judge-parameters", "8e9", judges[1])
    assert "rounds that wait for each other; estimated, between 7,424 and 30,720 questions" in done.stdout
    done = tool("configs/continual_quality.yaml", "--judge-parameters", "8e9", judges[2], "--json")
    asked = json.loads(done.stdout)["step"]["asked"]["quality"]
    assert asked["rounds"] == [8, 8, 4, 2] and asked["questions"] == asked["most_questions"] == 22 * 256
    assert asked["requests"] == 4 * 256


def test_one_server_a_pool_needs_fewer_judges() -> None:
    from megatron_sip.planning.hardware import Assumptions

    spread, together = (plan_of("continual_quality", judge_parameters=8e9, assume=Assumptions(pool_routing=routing)).sizing[1].judge_gpus
                        for routing in (False, True))
    assert together < spread


def test_where_no_fleet_is_enough_the_plan_says_so() -> None:
    plan = plan_of("scratch_rfnll", judge_parameters=8e9, trainer_gpus=64)
    assert not plan.sizing[1].reachable and plan.sizing[1].judge_gpus > 0
    assert plan_of("scratch_1b", judge_parameters=8e9, trainer_gpus=1).sizing[1].reachable
