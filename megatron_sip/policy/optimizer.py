"""AdamW with Megatron's (distributed) optimizer around it, its schedule, and its state in checkpoints.

In: the data parallel model. Out: ``optimizer.step() -> (success, gradient norm, None)`` and a scheduler in units of steps.

Without Transformer Engine or Apex, Megatron falls back to torch's AdamW, whose state differs from theirs in one entry,
``step``. The faults which that causes when a checkpoint is loaded are repaired here.
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_sip.config import ConfigError, RunConfig
from megatron_sip.policy.model import DataParallel

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_RATES = ("max_lr", "min_lr", "start_wd", "end_wd")  # the same for all groups here
_HYPERPARAMETERS = ("lr", "max_lr", "min_lr", "betas", "eps", "weight_decay", "wd_mult", "lr_mult")


def build_optimizer(config: RunConfig, model: DataParallel) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW (fp32 main weights under bfloat16) and its schedule.

    ``scheduler.step(increment=1)`` follows each optimizer step. As in Megatron-LM the first step of a warm-up has rate 0.

    Raises:
        ConfigError: the warm-up is not shorter than the decay.
    """
    settings = config.optimizer
    decay = settings.lr_decay_iters or config.train.train_iters
    if settings.lr_warmup_iters >= decay:
        name = "optimizer.lr_decay_iters" if settings.lr_decay_iters else "train.train_iters"
        raise ConfigError(f"optimizer.lr_warmup_iters = {settings.lr_warmup_iters} must be smaller than {name} = {decay}; lower it")
    bf16 = config.model.params_dtype == "bfloat16"
    optimizer = get_megatron_optimizer(OptimizerConfig(
        optimizer="adam", lr=settings.lr, min_lr=settings.min_lr, weight_decay=settings.weight_decay, clip_grad=settings.clip_grad,
        adam_beta1=settings.adam_beta1, adam_beta2=settings.adam_beta2, adam_eps=settings.adam_eps,
        bf16=bf16, params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer, overlap_param_gather=config.parallel.overlap_param_gather,
    ), list(model), use_gloo_process_groups=False)
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            _allocate_state(part.optimizer)
            if isinstance(part, DistributedOptimizer):
                _keep_step_on_load(part)
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=settings.lr, min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters, lr_decay_steps=decay, lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay, end_wd=settings.weight_decay, wd_incr_steps=decay, wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True,  # of a checkpoint only the step counts
    )
    return optimizer, scheduler


def optimizer_sharded_state(optimizer: MegatronOptimizer, model_state: ShardedStateDict, *, is_loading: bool) -> ShardedStateDict:
    """What dist_checkpointing saves or, with ``is_loading``, fills in.

    Args:
        model_state: the very ``policy.sharded_state_dict()`` that is saved or loaded beside it.
    """
    state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=dict(_SHARDING))
    inner = state.get("optimizer", state).get("state")
    if inner and not is_loading and any(isinstance(part.optimizer, torch.optim.AdamW) for part in optimizer.chained_optimizers):
        inner.setdefault("common_step", torch.tensor(0.0))  # Megatron leaves a step of 0 out, and torch cannot load without
    return state


def load_optimizer_state(optimizer: MegatronOptimizer, state: ShardedStateDict) -> None:
    """Take over a state that ``dist_checkpointing.load`` returned for :func:`optimizer_sharded_state`.

    Learning rate, betas, epsilon and weight decay stay those of the configuration.
    """
    settings = [{key: group[key] for key in _HYPERPARAMETERS if key in group} for group in optimizer.param_groups]
    for saved in state.get("optimizer", state)["param_groups"]:
        # Megatron-Core 0.17 and newer find a group's saved twin by its rates too.
        saved.update({key: optimizer.param_groups[0][key] for key in _RATES if key in optimizer.param_groups[0]})
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            _separate_steps(part.optimizer)


def _allocate_state(adam: torch.optim.AdamW) -> None:
    """Give every parameter its state at once, as torch's AdamW would at the first step.

    Megatron reads the step from the state when it saves or prepares to load, and finds none before the first step.
    """
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter),
                                     "exp_avg_sq": torch.zeros_like(parameter)}


def _keep_step_on_load(part: DistributedOptimizer) -> None:
    """Megatron copies every entry of a parameter's state from the checkpoint, which holds no ``step`` per parameter: KeyError.

    The step has been restored from the parameter group by then; hand the current value over to the copy.
    """
    original = part._set_main_param_and_optimizer_states

    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        original(model_param, {**tensors, "step": state["step"]})

    part._set_main_param_and_optimizer_states = set_states


def _separate_steps(adam: torch.optim.AdamW) -> None:
    """Megatron restores one ``step`` tensor shared by all parameters, which AdamW then advances once for each of them."""
    for state in adam.state.values():
        state["step"] = state["step"].clone()
