"""What sections must agree about: the rules between them, and whether a layout fits a number of processes.

In: a :class:`~megatron_sip.config.tree.RunConfig`. Out: one sentence a contradiction, with keys and remedy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_sip.config.sections import ConfigError, DebugSection, GrpoSection, ParallelSection

if TYPE_CHECKING:
    from megatron_sip.config.tree import RunConfig


def contradictions(config: RunConfig) -> list[str]:
    """Sentences, none for a configuration that can run."""
    problems = []
    pool, objective, teacher = config.pool, config.objective, config.teacher
    size = pool.original + pool.rewrite + pool.rollouts
    if size == 0:
        problems.append("pool: no candidate at all; set pool.original, pool.rewrite or pool.rollouts")
    if objective.nll_weight == 0 and objective.dpo_weight == 0:
        problems.append("objective: nll_weight and dpo_weight are both 0, nothing would be trained; set one of them")
    if objective.dpo_weight > 0 and size < 2:
        problems.append(f"objective.dpo_weight={objective.dpo_weight} needs a chosen and a rejected candidate, but the pool has {size}; "
                        "set pool.rollouts or pool.rewrite, or objective.dpo_weight=0")
    if pool.rollouts_start_step > 0 and not pool.original:
        problems.append("pool.rollouts_start_step > 0 trains on the original alone until then; it needs pool.original=true")
    if pool.rollouts_start_step > 0 and objective.nll_weight == 0:
        problems.append("pool.rollouts_start_step > 0 leaves only NLL until then; set objective.nll_weight > 0")
    if pool.selection == "rewrite_over_rollout" and not (pool.rewrite and pool.rollouts):
        problems.append("pool.selection=rewrite_over_rollout needs pool.rewrite=true and pool.rollouts >= 1")
    if config.asks_judge and not teacher.judges:
        problems.append("teacher.judges is empty but the pool has several candidates; name a judge, e.g. teacher.judges=[{kind: quality}], "
                        "or set pool.selection=rewrite_over_rollout")
    if config.asks_judge and not pool.original and any(judge.strategy == "pivot" for judge in teacher.judges):
        problems.append("teacher.judges: strategy=pivot compares each candidate with the original, but pool.original=false; set it to true or choose "
                        "another strategy")
    for name, section in (("teacher", teacher), ("teacher.rewriter", teacher.rewriter)):
        if section.urls and section.replicas_file:
            problems.append(f"{name}.urls and {name}.replicas_file both say where the servers are; unset one")
    if teacher.rewriter.model not in (None, teacher.model) and not (teacher.rewriter.urls or teacher.rewriter.replicas_file):
        problems.append(f"teacher.rewriter.model={teacher.rewriter.model} needs servers that serve it: set teacher.rewriter.urls or replicas_file")
    if config.asks_teacher and not teacher.model:
        problems.append("teacher.model is not set but the run asks a teacher; give the folder of the post-trained model")
    if config.seq_length > config.model.max_position_embeddings:
        names, parts = "data.prefix_length + data.suffix_length", (config.data.prefix_length, config.data.suffix_length)
        if config.grpo is not None:
            names, parts = "grpo.prompt_length + grpo.answer_length", (config.grpo.prompt_length, config.grpo.answer_length)
        problems.append(f"{names} = {parts[0]} + {parts[1]} = {config.seq_length} > model.max_position_embeddings = {config.model.max_position_embeddings}")
    if config.optimizer.min_lr > config.optimizer.lr:
        problems.append(f"optimizer.min_lr={config.optimizer.min_lr} > optimizer.lr={config.optimizer.lr}")
    if config.debug.save_pools and config.debug.load_pools:
        problems.append("debug.save_pools and debug.load_pools exclude each other; unset one")
    if config.debug.generate_only and config.debug.replaying:
        problems.append("debug.generate_only makes pools, debug.load_pools and debug.train_only take finished ones; unset one")
    if config.debug.load_pools and config.debug.train_only:
        problems.append("debug.train_only takes pools from the run folder, debug.load_pools from a file; unset one")
    problems += _evaluation_problems(config)
    if config.grpo is not None:
        problems += _grpo_problems(config, config.grpo)
    return problems


def _evaluation_problems(config: RunConfig) -> list[str]:
    evaluation, problems = config.evaluation, []
    if evaluation.max_tokens is not None and evaluation.max_tokens > config.data.suffix_length:
        problems.append(f"evaluation.max_tokens={evaluation.max_tokens} > data.suffix_length={config.data.suffix_length}, the longest that rollout engines write")
    for evaluator in evaluation.evaluators:
        if not evaluator.urls:
            problems.append(f"evaluation.evaluators: {evaluator.model} has no urls, and a run starts no servers for it; name running ones")
        if config.asks_judge and any((judge.kind, config.teacher.model) == (evaluator.kind, evaluator.model) for judge in config.teacher.judges):
            problems.append(f"evaluation.evaluators: kind={evaluator.kind} of {evaluator.model} is the judge that trains this run, and would praise what it was "
                            "asked to praise; name another model")
    return problems


def _grpo_problems(config: RunConfig, grpo: GrpoSection) -> list[str]:
    pool, judges = config.pool, config.teacher.judges
    problems = []
    if pool.original or pool.rewrite or pool.rollouts < 2 or pool.rollouts_start_step or pool.rollouts_ramp_steps:
        problems.append("grpo: a group is pool.rollouts answers to one prompt, at least 2; set pool: {original: false, rewrite: false, rollouts: 16}")
    if config.evaluation.interval:
        problems.append("grpo: evaluation.* continues prefixes, which a teacher in training does not; set evaluation.interval=0 (train.eval_interval measures its reward)")
    if config.debug != DebugSection():
        problems.append("grpo: pools are neither recorded nor replayed; unset debug.*")
    if config.train.loss_spike_factor:
        problems.append("grpo: the loss is near 0 whatever the answers are worth, so train.loss_spike_factor finds nothing; set it to 0")
    if grpo.kl_weight > 0 and config.objective.reference == "none":
        problems.append("grpo.kl_weight > 0 needs objective.reference=frozen or synced")
    if not grpo.reasoning and grpo.task == "judge":
        if grpo.answer_length != 1:
            problems.append(f"grpo.reasoning=false answers with one token, but grpo.answer_length={grpo.answer_length}; set it to 1")
        if config.rollout.engine != "in_process":
            problems.append("grpo.reasoning=false chooses among the tokens of the verdicts, which the in-process sampler does; set rollout.engine=in_process")
        if grpo.dialect != "choice":
            problems.append(f"grpo.reasoning=false asks for nothing but the verdict; unset grpo.dialect={grpo.dialect}")
    if grpo.task == "rewrite" and any(judge.kind == "likelihood" for judge in judges):
        problems.append("grpo.task=rewrite adds scores in 0 … 1; kind=likelihood gives nats per token: use quality and safety")
    return problems


def check_layout(config: RunConfig, world_size: int) -> int:
    """Return the data parallel size of ``config`` on ``world_size`` ranks.

    Raises:
        ConfigError: for an impossible layout, with the arithmetic in the message.
    """
    model, parallel, train = config.model, config.parallel, config.train
    tp, pp, cp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    lengths = "data.prefix_length + data.suffix_length" if config.grpo is None else "grpo.prompt_length + grpo.answer_length"
    problems = []

    def divides(what: str, value: int, by: str, divisor: int, remedy: str) -> bool:
        if value % divisor == 0:
            return True
        problems.append(f"{what} = {value} is not divisible by {by} = {divisor} (remainder {value % divisor}); {remedy}")
        return False

    names, sizes, replica = "tensor x pipeline", f"{tp} x {pp}", tp * pp * cp
    if cp > 1:
        names, sizes = f"{names} x context", f"{sizes} x {cp}"
    if not divides("world size", world_size, f"{names} parallel size", replica,
                   f"start a multiple of {sizes} = {replica} processes or change parallel.*"):
        raise ConfigError(problems[0])
    dp = world_size // replica
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    divides("model.num_attention_heads", heads, "tensor_model_parallel_size", tp, "change one of them")
    divides("model.num_query_groups", groups, "tensor_model_parallel_size", tp, "change one of them")
    divides("model.num_attention_heads", heads, "model.num_query_groups", groups, "change one of them")
    divides("model.hidden_size", model.hidden_size, "model.num_attention_heads", heads, "change one of them")
    divides("model.ffn_hidden_size", model.ffn_hidden_size, "tensor_model_parallel_size", tp, "change one of them")
    if virtual == 1:
        divides("model.num_layers", model.num_layers, "pipeline_model_parallel_size", pp, "change one of them")
    elif pp == 1:
        problems.append(f"parallel.virtual_pipeline_model_parallel_size = {virtual} needs pipeline_model_parallel_size > 1")
    else:
        divides("model.num_layers", model.num_layers, f"pipeline x virtual pipeline parallel size = {pp} x {virtual}", pp * virtual,
                "change one of them")
    if config.grpo is not None:  # microbatches hold answers, and the last one may be filled up
        divides("train.global_batch_size", train.global_batch_size, "data parallel size", dp, "change one of them")
    elif divides("train.global_batch_size", train.global_batch_size, f"micro_batch_size x data parallel size = {train.micro_batch_size} x {dp}",
               train.micro_batch_size * dp, "change train.global_batch_size or train.micro_batch_size") and virtual > 1:
        divides("microbatches of a step", train.global_batch_size // (train.micro_batch_size * dp), "pipeline_model_parallel_size", pp,
                "the interleaved schedule takes them in such groups: change train.global_batch_size or train.micro_batch_size")
    if cp > 1:
        divides(lengths, config.seq_length, "2 x context_parallel_size", 2 * cp,
                "each rank takes two pieces of the sequence: change the lengths")
    if parallel.sequence_parallel:
        if tp == 1:
            problems.append("parallel.sequence_parallel needs tensor_model_parallel_size > 1")
        divides(lengths, config.seq_length,
                "tensor_model_parallel_size" if cp == 1 else f"tensor x context parallel size = {tp} x {cp}", tp * cp,
                "sequence parallel splits the sequence evenly: change the lengths")
    if cp > 1 and config.objective.shared_prefix is True:
        problems.append("objective.shared_prefix=true packs whole sequences, and context parallel ranks hold pieces of them; set it to auto or "
                        "parallel.context_parallel_size=1")
    problems += _overlap_problems(parallel) + _recompute_problems(parallel)
    if config.needs_engine and config.rollout.engine == "in_process" and replica > 1:
        problems.append(f"rollout.engine=in_process samples within one process, but {names} parallel size = {sizes} = {replica}; "
                        "set rollout.engine=vllm")
    if problems:
        raise ConfigError("\n".join(problems))
    return dp


def _overlap_problems(parallel: ParallelSection) -> list[str]:
    problems = [f"parallel.{name} needs parallel.use_distributed_optimizer=true" for name in ("overlap_grad_reduce", "overlap_param_gather")
                if getattr(parallel, name) and not parallel.use_distributed_optimizer]
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        problems.append("parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true")
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        problems.append("parallel.ddp_bucket_size means nothing without parallel.overlap_grad_reduce=true")
    return problems


def _recompute_problems(parallel: ParallelSection) -> list[str]:
    method, layers = parallel.recompute_method, parallel.recompute_num_layers
    if parallel.recompute_granularity == "full":
        return [] if method and layers else ["parallel.recompute_granularity=full needs recompute_method (uniform or block) and recompute_num_layers"]
    if method or layers:
        return ["parallel.recompute_method and recompute_num_layers belong to recompute_granularity=full; unset them or set it"]
    return []
