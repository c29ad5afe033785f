"""A plan as text for people and as plain values for programs. Every number is computed unless its line says measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_sip.planning import memory
from megatron_sip.planning.costs import Server
from megatron_sip.planning.plan import Plan
from megatron_sip.planning.simulate import simulate

_WHAT = {
    "mfu_train": "share of peak FLOP/s in forward and backward", "mfu_prefill": "share of peak FLOP/s when servers read prompts",
    "decode_bandwidth": "share of peak memory bandwidth when servers write",
    "prefix_cache": "share of the shareable prompt tokens that the cache spares",
    "sync_bandwidth": "bytes/s of the folder through which weights go to rollout servers, each way",
    "step_overhead": "s a step outside forward and backward", "answer_tokens": "tokens of a verdict without reasoning",
    "reasoning_tokens": "tokens of a verdict with reasoning",
    "judge_spread": "nats between candidates for strategies that go on from answers", "judge_tokens": "judge tokens a policy token",
    "characters_per_token": "characters a token of the templates, unless teacher.model has a tokenizer",
    "chat_tokens": "tokens that a chat template adds",
    "vocab_size": "of the policy", "latency_sigma": "sigma of the lognormal latency of answers",
    "utilisation": "largest planned share of a server's time",
    "memory_share": "largest planned share of a board's memory", "pool_routing": "all questions of a pool go to one server",
}


def as_json(plan: Plan, checks: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Plain values: tokens, FLOPs, bytes, seconds, hours, watt hours."""
    work, options = plan.work, plan.options
    return {
        "measured": asdict(options.measured) if options.measured else None,
        "assumptions": asdict(options.assume),
        "hardware": {"trainer_and_rollout": asdict(plan.gpu), "judge": asdict(plan.judge_gpu), "source": "vendor data sheets"},
        "policy_parameters": plan.policy.total, "judge_parameters": plan.judge.total if plan.judge else None,
        "step": {
            "pools": work.pools, "candidates": work.candidates, "judge_questions": work.questions, "judge_requests": work.requests,
            "rewrites": work.rewrites,
            "asked": {one.name: {"questions": one.questions * work.pools, "requests": one.requests * work.pools, "rounds": list(one.rounds),
                                 "fewest_questions": one.limits[0] * work.pools, "most_questions": one.limits[1] * work.pools,
                                 "prompt_tokens": one.prompt_tokens * work.pools,
                                 "answer_tokens": one.questions * one.answer_tokens * work.pools} for one in work.asked},
            "train_tokens": work.rows * work.sequence, "rollout_tokens": work.pools * work.rollouts * work.suffix,
            "training_flops": asdict(plan.training), "rollouts": asdict(plan.rollouts),
            "judging": {name: asdict(one) for name, one in plan.judging.items()},
        },
        "run": {"steps": plan.steps, "judge_questions": plan.run_questions, "rewrites": plan.run_rewrites},
        "trainer_gpus": plan.trainer_gpus,
        "staleness": {str(staleness): {
            "rollout_gpus": one.rollout_gpus, "judge_gpus": one.judge_gpus, "step_seconds": one.step_seconds, "wait_share": one.wait_share,
            "judge_questions_per_second": work.questions / one.step_seconds, "judge_requests_per_second": work.requests / one.step_seconds,
            "reachable": one.reachable, "judge_utilisation": one.judge_utilisation, "rollout_utilisation": one.rollout_utilisation,
            "run_hours": plan.run_seconds[staleness] / 3600, "gpu_hours": plan.gpus(staleness) * plan.run_seconds[staleness] / 3600,
            "watt_hours": None if options.measured and not options.board_power else plan.watts(staleness) * plan.run_seconds[staleness] / 3600,
            "simulated": checks.get(staleness),
        } for staleness, one in plan.sizing.items()},
        "memory_bytes_a_gpu": {"trainer": asdict(plan.trainer_memory), "judge": _judge_memory(plan) if plan.judge and not options.measured else None},
    }


def _judge_memory(plan: Plan) -> dict[str, float]:
    """Weights, and the cache of ``teacher.concurrency`` of the longest requests."""
    one = Server(plan.judge, plan.judge_gpu, plan.judge_tensor_parallel, plan.options.assume)
    weights, cache = memory.server(one, plan.config.teacher.concurrency, max(asked.longest for asked in plan.work.asked))
    return {"weights": weights, "key_value_cache": cache, "tensor_parallel": plan.judge_tensor_parallel}


def simulated(plan: Plan, staleness: int, steps: int, seed: int) -> dict[str, float]:
    """The planned fleet by discrete events."""
    found = simulate(plan.sizing[staleness].pipeline, steps, staleness, seed)
    skip = steps // 3  # at staleness 1 the first step asks for two; the fleet works that off in a few steps
    return {"steps": steps - skip, "step_seconds": found.step_seconds(skip), "wait_share": found.wait_share(skip), "slots_busy": found.slots_busy}


def as_text(plan: Plan, checks: dict[int, dict[str, float]]) -> str:
    """The report."""
    return "\n".join(_lines(plan, checks))


def _lines(plan: Plan, checks: dict[int, dict[str, float]]) -> Iterator[str]:
    config, work, options = plan.config, plan.work, plan.options
    rates = options.measured
    yield f"Plan of {config.run.name}: {plan.steps:,} steps of {work.pools} pairs, policy of {_count(plan.policy.total)} parameters"
    if plan.judge is not None:
        active = f", {_count(plan.judge.active)} active" if plan.judge.active < plan.judge.total else ""
        yield f"judge of {_count(plan.judge.total)} parameters{active}"
    yield "Computed, not measured; built on the assumptions at the end." if rates is None else (
        f"Times are from rates measured on {rates.trainer_gpus} trainer, {rates.rollout_gpus} rollout and {rates.judge_gpus} judge device(s)"
        + (f", {rates.steps} steps." if rates.steps else "."))
    if rates is not None and not rates.judge_was_bottleneck:
        yield "The trainer hardly waited when they were measured: the judge can do more than they say, and numbers of judges are upper limits."

    yield from _head("Asked in a step" + ("" if plan.steps == 1 else " (with full pools)"))
    yield f"  pools {work.pools} x {work.candidates} candidates ({work.rollouts} rollouts)"
    for one in work.asked:
        yield (f"  {one.name:<11} {one.questions * work.pools:>12,} questions   {_count(one.prompt_tokens * work.pools):>8} prompt tokens   "
               f"{_count(one.questions * one.answer_tokens * work.pools):>8} answer tokens")
        if len(one.rounds) > 1 or one.limits[0] != one.limits[1]:
            least, most = (count * work.pools for count in one.limits)
            yield (f"  {'':<11} in {len(one.rounds)} rounds that wait for each other; " + (
                f"estimated, between {least:,} and {most:,} questions, by the answers" if least != most else "as many whatever the answers are"))
    yield (f"  {'judges':<11} {work.questions:>12,} questions   in {work.requests:,} requests; whole run {_count(plan.run_questions)} questions; "
           f"rewrites {work.rewrites:,}, whole run {_count(plan.run_rewrites)}")
    yield (f"  trained tokens {work.rows * work.sequence:,} ({work.rows} sequences of {work.sequence}), rollout tokens "
           f"{work.pools * work.rollouts * work.suffix:,}")

    yield from _head("FLOPs of a step")
    training, judging = plan.training, sum(one.prefill_flops + one.decode_flops for one in plan.judging.values())
    rolling = plan.rollouts.prefill_flops + plan.rollouts.decode_flops
    total = training.flops + judging + rolling
    yield (f"  trainer   {training.flops:9.2e}  {training.flops / total:4.0%}   forward + backward {training.forward_backward:.2e}, reference "
           f"{training.reference:.2e}, recomputed {training.recompute:.2e}")
    yield (f"  rollouts  {rolling:9.2e}  {rolling / total:4.0%}   prefill {plan.rollouts.prefill_flops:.2e}, decode "
           f"{plan.rollouts.decode_flops:.2e}; decode moves {plan.rollouts.decode_bytes:.2e} bytes")
    for name, one in plan.judging.items():
        yield (f"  {name:<9} {one.prefill_flops + one.decode_flops:9.2e}  {(one.prefill_flops + one.decode_flops) / total:4.0%}   prefill "
               f"{one.prefill_flops:.2e}, decode {one.decode_flops:.2e}; decode moves {one.decode_bytes:.2e} bytes")
    for one in work.asked:
        servers = 1.0 if options.assume.pool_routing else plan.sizing[options.staleness].judge_gpus / plan.judge_tensor_parallel
        if one.prompt_tokens:
            yield (f"  {one.name}: the prefix cache spares {1 - one.computed_tokens(servers, options.assume.prefix_cache) / one.prompt_tokens:.0%} "
                   "of the prompt tokens")

    yield from _head("GPUs that keep the trainer busy")
    yield f"  trainer {plan.trainer_gpus} ({_layout(plan)})"
    yield "                                staleness 0    staleness 1"
    rows = (("rollout GPUs", lambda s: f"{s.rollout_gpus:,}" if s.rollout_gpus else "(trainer)"), ("judge GPUs", lambda s: f"{s.judge_gpus:,}"),
            ("seconds a step", lambda s: f"{s.step_seconds:.3g}"), ("  of which the trainer waits", lambda s: f"{s.wait_share:.1%}"),
            ("judges busy", lambda s: f"{s.judge_utilisation:.0%}"),
            ("judge questions a second", lambda s: f"{work.questions / s.step_seconds:,.4g}"),
            ("judge requests a second", lambda s: f"{work.requests / s.step_seconds:,.4g}"))
    for name, show in rows:
        yield f"  {name:<28}{show(plan.sizing[0]):>12}{show(plan.sizing[1]):>15}"
    parts = plan.sizing[options.staleness].pipeline
    yield (f"  parts of a step at staleness {options.staleness}: sync {parts.sync_seconds:.3g} s, rollouts {parts.rollout_seconds:.3g} s in "
           f"{parts.chunks} chunk(s), rewriting {parts.rewriting_seconds:.3g} s, judging {parts.judging_seconds:.3g} s, training "
           f"{parts.training_seconds:.3g} s, update {parts.update_seconds:.3g} s")
    if not plan.sizing[1].reachable:
        yield (f"  No fleet surely brings the waiting at staleness 1 below {options.target_wait:.0%}: sync, rollouts and the slowest answers take "
               "two such steps, however many servers there are. Fewer trainer GPUs, cached rewrites, a faster sync, a larger rollout.batch_size or "
               "shorter answers help.")
    yield ("  Named are, at staleness 0, the fewest with which more would shorten the step by less than a fifth; at 1, with which the trainer "
           f"waits less than {options.target_wait:.0%}.")
    for staleness, found in checks.items():
        yield (f"  simulated at staleness {staleness} ({found['steps']} steps): {found['step_seconds']:.3g} s a step, the trainer waits "
               f"{found['wait_share']:.1%}, slots busy {found['slots_busy']:.0%}")

    yield from _head("Whole run")
    yield "                                staleness 0    staleness 1"
    hours = {s: plan.run_seconds[s] / 3600 for s in (0, 1)}
    yield f"  {'hours':<28}{hours[0]:>12,.4g}{hours[1]:>15,.4g}"
    yield f"  {'GPU-hours':<28}{plan.gpus(0) * hours[0]:>12,.4g}{plan.gpus(1) * hours[1]:>15,.4g}"
    if rates is None or options.board_power:
        watts = {s: plan.watts(s) for s in (0, 1)}
        yield f"  {'MWh, boards at full power':<28}{watts[0] * hours[0] / 1e6:>12,.4g}{watts[1] * hours[1] / 1e6:>15,.4g}"
    else:
        yield "  energy: give --board-power, the watts of one measured device"

    if rates is None:
        yield from _memory(plan)
    yield from _head("Assumptions (flags)")
    if rates is None:
        for gpu in {plan.gpu.name: plan.gpu, plan.judge_gpu.name: plan.judge_gpu}.values():
            yield (f"  {gpu.name}: {gpu.flops / 1e12:.0f} TFLOP/s dense bf16, {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.memory / 1e9:.0f} GB, "
                   f"{options.board_power or gpu.power:.0f} W (vendor data sheet" + (", power as given)" if options.board_power else ")"))
        for name, value in asdict(options.assume).items():
            yield f"  --{name.replace('_', '-')} {value if isinstance(value, bool) else format(value, 'g')}   {_WHAT[name]}"
    cached = "; rewrites are cached" if options.rewrites_cached else ""
    yield f"  every rollout has its full length, no two candidates are alike, no answer fails{cached}"
    if rates is not None:
        yield "  rates grow in proportion to the number of devices"


def _memory(plan: Plan) -> Iterator[str]:
    one = plan.trainer_memory
    other = f" ({plan.judge_gpu.memory / 1e9:.0f} judge)" if plan.judge_gpu != plan.gpu else ""
    yield from _head(f"Memory a GPU, GB of {plan.gpu.memory / 1e9:.0f}{other}")
    yield (f"  trainer  {one.total / 1e9:6.1f} = weights {one.weights / 1e9:.1f} + gradients {one.gradients / 1e9:.1f} + optimizer "
           f"{one.optimizer / 1e9:.1f}{' (distributed)' if plan.config.parallel.use_distributed_optimizer else ''} + reference "
           f"{one.reference / 1e9:.1f} + activations about {one.activations / 1e9:.1f}")
    if plan.judge is not None:
        found = _judge_memory(plan)
        weights, cache = found["weights"], found["key_value_cache"]
        yield (f"  judge    {(weights + cache) / 1e9:6.1f} = weights {weights / 1e9:.1f} + cache of {plan.config.teacher.concurrency} requests "
               f"{cache / 1e9:.1f}, TP{plan.judge_tensor_parallel}")
    if plan.work.rollouts and plan.sizing[0].rollout_gpus:
        yield (f"  rollouts {plan.policy.total * 2 / plan.rollout_tensor_parallel / 1e9:6.1f} = weights, without cache, "
               f"TP{plan.rollout_tensor_parallel}")


def _layout(plan: Plan) -> str:
    parallel = plan.config.parallel
    return (f"TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size} x CP{parallel.context_parallel_size} x "
            f"DP{plan.data_parallel}")


def _head(title: str) -> Iterator[str]:
    yield ""
    yield title


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def meaning(name: str) -> str:
    """What an assumption says, in a few words."""
    return _WHAT[name]
