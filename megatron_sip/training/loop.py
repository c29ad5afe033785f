"""The training loop: composes everything else.

    data.pairs          next pairs of the step (the cursor is one integer)
    training.services   starts servers, gives the lead ranks tokenizer, rollout engine and teacher
    training.stream     pairs -> judged outcomes, in the order in which they are judged
    training.exchange   the lead's microbatches on every rank of its model replica
    training.schedule   Megatron's forward/backward schedule over policy and reference, with the loss of objective.blend
    training.checkpoint save, resume
    training.metrics    console, metrics.jsonl, wandb, audit.jsonl

A step either happens on every rank or on none: before the optimizer touches anything, all ranks agree whether one of
them had to give up (teacher lost, rollouts of other weights, a loss that is not finite). Then the run saves the state
after the last whole step and leaves with an exit code of its own.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_sip.config import ConfigError, RunConfig, check_layout, dump_config
from megatron_sip.data.pairs import Pair, Pairs, build_pairs
from megatron_sip.policy import runtime as policy_runtime
from megatron_sip.policy.model import build_policy, finalize_gradients, make_reference, wrap_ddp
from megatron_sip.policy.optimizer import build_optimizer
from megatron_sip.policy.weights import load_init
from megatron_sip.pool import ORIGINAL, Candidate, Preference
from megatron_sip.training import checkpoint as checkpoints
from megatron_sip.training.bank import Recorder, Replay
from megatron_sip.training.checkpoint import CheckpointError, Progress
from megatron_sip.training.exchange import Exchange
from megatron_sip.training.jsonl import JsonLines
from megatron_sip.training.metrics import MetricsWriter, audit_record, means, merge_sums, pool_sums, say
from megatron_sip.training.microbatch import Microbatch, collate
from megatron_sip.training.plan import StepPlan, plan_step
from megatron_sip.training.schedule import forward_backward
from megatron_sip.training.services import RunServices
from megatron_sip.training.stream import Judged, StepStream

EXIT_DONE, EXIT_FAILED = 0, 1
EXIT_MORE = 85  # saved, more to do: a signal or train.exit_after
EXIT_LOST = 86  # saved, but teacher or rollout servers were lost: restart them, then resume


class Trainer:
    """One run on one rank. ``run()`` returns the exit code; ``close()`` stops everything that was started."""

    def __init__(self, config: RunConfig, runtime: policy_runtime.Runtime, tokenizer: Any) -> None:
        self.config, self.runtime, self.tokenizer = config, runtime, tokenizer
        self.stop_signal = 0
        self.progress = Progress()
        self.services = RunServices(config, runtime, tokenizer)
        self.writer: MetricsWriter | None = None
        self.audit: JsonLines | None = None
        self.recorder: Recorder | None = None
        self.replay: Replay | None = None

    # -- life of a run ------------------------------------------------------------------------------------------

    def run(self) -> int:
        found = checkpoints.newest(self.config.run.dir)
        if found is not None:
            checkpoints.check_resume(found, self.config, self.runtime, self.tokenizer.fingerprint)
            if checkpoints.read_meta(found)["step"] >= self.config.train.train_iters:
                self._say(f"nothing to do: {found} is the last step of the run")
                return EXIT_DONE
        self._build()
        self.services.start(self.policy)  # servers come up while data and checkpoint are read
        self._open_data()
        if found is not None:
            self.progress = checkpoints.load(found, self.config, self.policy, self.optimizer, self.scheduler)
            self._say(f"resumed from {found} after step {self.progress.step}, {self.progress.consumed_pairs} pairs")
        self._open_outputs()
        self.services.wait_ready()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)
        return self._steps()

    def _steps(self) -> int:
        train = self.config.train
        while self.progress.step < train.train_iters:
            failure = self._step(self.progress.step + 1)
            stop = bool(self.stop_signal) or failure is not None or self.progress.step == train.exit_after
            done = self.progress.step == train.train_iters
            interval = self.config.checkpoint.interval
            if self.progress.step and (stop or done or (interval and self.progress.step % interval == 0)):
                saved = self._save(last=stop or done)
                if not saved and (stop or done):
                    return EXIT_FAILED
            if failure is not None:
                self._say(f"stopped in step {self.progress.step + 1}, which was thrown away: {failure}\n"
                          f"Everything up to step {self.progress.step} is saved; start the same command again to go on.")
                return EXIT_LOST
            if done:
                return EXIT_DONE
            if stop:
                why = signal.Signals(self.stop_signal).name if self.stop_signal else "train.exit_after"
                self._say(f"{why}: saved after step {self.progress.step} of {train.train_iters}; start the same command again to go on")
                return EXIT_MORE
        return EXIT_DONE

    def close(self) -> None:
        self.services.close()
        for part in (self.writer, self.audit, self.recorder):
            if part is not None:
                part.close()

    # -- building -----------------------------------------------------------------------------------------------

    def _build(self) -> None:
        config = self.config
        self.policy = build_policy(config, self.runtime, self.tokenizer.vocab_size)
        if config.model.init_from is not None:
            load_init(self.policy, config, config.model.init_from)
        self.model = wrap_ddp(self.policy, config)
        self.optimizer, self.scheduler = build_optimizer(config, self.model)
        self.policy.config.grad_scale_func = self.optimizer.scale_loss
        self.policy.config.finalize_model_grads_func = self._finalize
        parameters = torch.tensor(sum(p.numel() for p in self.policy.parameters()), dtype=torch.float64, device=self.runtime.device)
        dist.all_reduce(parameters)
        parallel, context = config.parallel, config.parallel.context_parallel_size
        self._say(f"policy: {int(parameters) // (self.runtime.dp_size * context) / 1e6:.1f} M parameters on {self.runtime.world_size} ranks "
                  f"(TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size} x CP{context} x DP{self.runtime.dp_size})")

    def _open_data(self) -> None:
        config = self.config
        self.train_pairs, self.valid_pairs = build_pairs(
            config.data, config.run.seed, config.train.train_iters * config.train.global_batch_size, self._eval_pairs(),
            self.tokenizer.fingerprint)
        for dataset in self.train_pairs.datasets:
            self._say(dataset.describe())
        peers = self.runtime.world_size // self.runtime.dp_size - 1
        self.exchange = Exchange(self.runtime.store, self.runtime.dp_rank, peers, self.runtime.is_lead, self.runtime.timeout, f"rank {self.runtime.rank}")

    def _open_outputs(self) -> None:
        config, step = self.config, self.progress.step
        if config.debug.load_pools is not None and self.runtime.is_lead:
            self.replay = Replay(config.debug.load_pools)
        if config.debug.save_pools is not None and self.runtime.is_lead:
            self.recorder = Recorder(config.debug.save_pools, self.runtime.dp_rank, step)
        if self.runtime.rank == 0:
            self.writer = MetricsWriter(config, step, self.progress.wall, self.progress.wandb_id)
            self.progress.wandb_id = self.writer.run_id
            self.audit = JsonLines(config.run.dir / "audit.jsonl", step)
            (config.run.dir / "run.yaml").write_text(dump_config(config), encoding="utf-8")

    # -- one step -----------------------------------------------------------------------------------------------

    def _step(self, step: int) -> str | None:
        """Run a step. Returns None, or why it had to be thrown away (the same on every rank)."""
        began = time.monotonic()
        plan = plan_step(self.config, step)
        self._sync_reference(step, plan)
        synced = time.monotonic()
        if plan.rollouts and self.config.debug.load_pools is None:
            problem = self.services.sync(self.policy, step)
            if problem is not None:
                return problem
        sync_seconds = time.monotonic() - synced

        stream = self._stream(step, plan) if self.runtime.is_lead else None
        training = time.monotonic()
        sums = self._forward_backward(step, plan, stream)
        train_seconds = time.monotonic() - training

        failure = self._agree(self._failure(stream, sums))
        if failure is not None:
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            return failure
        grad_norm = self._update()
        self.progress.step = step
        self.progress.consumed_pairs += self.config.train.global_batch_size
        evaluation = self._evaluate(step)

        waited = stream.waited if stream else 0.0
        generating = 0.0 if stream is None else stream.generating
        own = {"time/rollout": generating, "time/wait_judge": waited, "time/train": train_seconds - waited, "time/sync": sync_seconds}
        self._report(step, sums, stream, own, grad_norm, evaluation, time.monotonic() - began)
        return None

    def _stream(self, step: int, plan: StepPlan) -> StepStream:
        stream = StepStream(self.config, step, plan, self._my_pairs(), self.services.for_stream)
        if self.config.debug.load_pools is None:
            stream.start()
        return stream

    def _my_pairs(self) -> list[Pair]:
        """This replica's share of the step: a contiguous slice, fixed by the cursor."""
        share = self.config.train.global_batch_size // self.runtime.dp_size
        first = self.progress.consumed_pairs + self.runtime.dp_rank * share
        return [self.train_pairs[i] for i in range(first, first + share)]

    def _forward_backward(self, step: int, plan: StepPlan, stream: StepStream | None) -> dict[str, float]:
        """Gradients of the step; sums of this rank's metrics (empty but on the last stage)."""
        train = self.config.train
        count = train.global_batch_size // (train.micro_batch_size * self.runtime.dp_size)
        self.policy.reference_active = plan.paired and self.policy.reference is not None
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

        def make() -> Microbatch:
            outcomes = self._replayed(step, stream) if self.replay is not None else stream.take(train.micro_batch_size)
            return collate(outcomes, self.config.data.prefix_length, self.config.data.suffix_length, paired=plan.paired,
                           nll_on=plan.nll_on)

        batches = self.exchange.microbatches(f"train-{step}", count, make)
        rows = train.micro_batch_size * (2 if plan.paired else 1)
        return self._schedule(batches, count, rows, forward_only=False)

    def _schedule(self, batches: Iterator[Microbatch], count: int, rows: int, *, forward_only: bool) -> dict[str, float]:
        parts = forward_backward(self.config, self.runtime, self.policy, self.model, batches, count, rows, forward_only=forward_only)
        return merge_sums({key: value.item() for key, value in part.items()} for part in parts)

    def _replayed(self, step: int, stream: StepStream) -> list[Any]:
        first, n = len(stream.judged), self.config.train.micro_batch_size
        outcomes = [self.replay.outcome(step, pair.id) for pair in stream.pairs[first : first + n]]
        stream.judged += [Judged(outcome) for outcome in outcomes]
        return outcomes

    def _finalize(self, model: Any, num_pairs: torch.Tensor | None = None, **kwargs: Any) -> None:
        """Megatron's gradient reduction; afterwards ``num_pairs`` is that of the whole global batch."""
        finalize_gradients(model, num_pairs, **kwargs)
        self.global_pairs = int(num_pairs)

    def _update(self) -> float | None:
        """Optimizer step; None when no pair of the whole batch carried loss (then nothing moves but the schedule)."""
        grad_norm = None
        if self.global_pairs > 0:
            _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        return None if grad_norm is None else float(grad_norm)

    def _sync_reference(self, step: int, plan: StepPlan) -> None:
        """Make the reference when it is first needed, and copy the policy into a synced one every n steps."""
        if not plan.paired or self.config.objective.reference == "none":
            return
        since = step - 1 - self.config.pool.rollouts_start_step
        due = self.config.objective.reference == "synced" and since % self.config.objective.reference_sync_interval == 0
        if self.policy.reference is None:
            make_reference(self.policy, self.config)
        elif due:
            self.policy.sync_reference()

    def _failure(self, stream: StepStream | None, sums: dict[str, float]) -> str | None:
        if stream is not None and stream.failure is not None:
            return f"{type(stream.failure).__name__}: {stream.failure}"
        if not math.isfinite(sums.get("loss", 0.0)):
            return f"the loss is {sums['loss']}; look at the last lines of {self.config.run.dir / 'metrics.jsonl'} and lower optimizer.lr"
        tolerance, tokens = self.config.rollout.logprob_tolerance, sums.get("n/rollout_tokens", 0.0)
        replayed = self.config.debug.load_pools is not None  # such rollouts may be of any weights
        if tokens and not replayed and not sums["rollout/logprob_diff"] / tokens <= tolerance:
            return (f"rollouts were not written by the policy's weights: their log-probabilities differ from the policy's by "
                    f"{sums['rollout/logprob_diff'] / tokens:.4f} per token on average (largest {sums['max/rollout_logprob_diff']:.4f}, "
                    f"rollout.logprob_tolerance={tolerance}). The engine missed a weight sync, computes in another dtype (raise the tolerance "
                    "for bfloat16), or serves another model")
        return None

    def _agree(self, failure: str | None) -> str | None:
        """The first rank's failure, on all ranks; also the strongest signal that any rank got."""
        flags = torch.tensor([0 if failure is None else self.runtime.world_size - self.runtime.rank, self.stop_signal],
                             dtype=torch.int64, device=self.runtime.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self.stop_signal = int(flags[1])
        if int(flags[0]) == 0:
            return None
        told = [failure]
        dist.broadcast_object_list(told, src=self.runtime.world_size - int(flags[0]))
        return told[0]

    # -- beside the step ----------------------------------------------------------------------------------------

    def _eval_pairs(self) -> int:
        """Held-out pairs of one evaluation, rounded up to whole microbatches (interleaved: groups of them) on every replica."""
        if not self.config.train.eval_interval:
            return 0
        parallel = self.config.parallel
        group = parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size > 1 else 1
        unit = self.config.train.micro_batch_size * self.runtime.dp_size * group
        return -(-self.config.train.eval_pairs // unit) * unit

    def _evaluate(self, step: int) -> dict[str, float]:
        """Mean cross entropy of the original suffix of held-out pairs, nats per token."""
        train = self.config.train
        if not train.eval_interval or (step % train.eval_interval and step != train.train_iters):
            return {}
        share = self._eval_pairs() // self.runtime.dp_size
        pairs = iter(range(self.runtime.dp_rank * share, (self.runtime.dp_rank + 1) * share))

        def make() -> Microbatch:
            outcomes = [original_only(self.valid_pairs[i]) for _, i in zip(range(train.micro_batch_size), pairs)]
            return collate(outcomes, self.config.data.prefix_length, self.config.data.suffix_length, paired=False, nll_on="suffix")

        self.policy.gather_params()
        self.policy.reference_active = False
        self.model.eval()
        count = share // train.micro_batch_size
        with torch.no_grad():
            sums = self._schedule(self.exchange.microbatches(f"eval-{step}", count, make), count, train.micro_batch_size, forward_only=True)
        self.model.train()
        return {f"eval {key}": value for key, value in sums.items() if key in ("loss/nll", "n/valid")}

    def _report(self, step: int, sums: dict[str, float], stream: StepStream | None, own: dict[str, float], grad_norm: float | None,
                evaluation: dict[str, float], seconds: float) -> None:
        mine = {**sums, **evaluation}
        if stream is not None:
            mine |= pool_sums(stream.judged)
            if self.recorder is not None:
                self.recorder.write(step, [item.outcome for item in stream.judged])
        asked = self.services.metrics()  # drained on every lead, shown of the first: percentiles cannot be added up
        gathered: list[Any] = [None] * self.runtime.world_size
        dist.all_gather_object(gathered, mine)
        if self.runtime.rank != 0:
            return
        merged = merge_sums(gathered)
        metrics = means(merged)
        for key in ("eval loss/nll", "eval n/valid"):
            metrics.pop(key, None)
        if merged.get("eval n/valid"):
            metrics["eval/suffix_nll"] = merged["eval loss/nll"] / merged["eval n/valid"]
        if grad_norm is not None:
            metrics["grad_norm"] = grad_norm
        tokens = self.config.train.global_batch_size * self.config.seq_length
        metrics |= {"lr": self.optimizer.param_groups[0]["lr"], "consumed_pairs": self.progress.consumed_pairs, **own, **asked,
                    "time/other": max(0.0, seconds - sum(own.values())), "time/step": seconds, "tokens_per_second": tokens / seconds}
        self.writer.write(step, metrics)
        for item in [item for item in stream.judged if item.pool is not None][: self.config.log.audit_pools]:
            self.audit.write({**audit_record(step, item)})
        self.audit.flush()
        self.progress.wall = self.writer.wall

    def _save(self, *, last: bool) -> bool:
        shared = [self.progress.wall, self.progress.wandb_id]
        dist.broadcast_object_list(shared, src=0)
        self.progress.wall, self.progress.wandb_id = shared
        began = time.monotonic()
        try:
            path = checkpoints.save(self.config, self.runtime, self.policy, self.optimizer, self.scheduler, self.progress,
                                    self.tokenizer.vocab_size, self.tokenizer.fingerprint)
        except CheckpointError as error:
            self._say(f"WARNING: {error}" + ("" if last else "\nTraining goes on; the next checkpoint is tried as planned."))
            return False
        self._say(f"saved {path} in {time.monotonic() - began:.1f} s")
        return True

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_signal = number
        self._say(f"{signal.Signals(number).name}: this step is finished and saved first" + (" (again to leave at once)" if number == signal.SIGINT else ""))

    def _say(self, text: str) -> None:
        if self.runtime.rank == 0:
            say(text)


def original_only(pair: Pair) -> Preference:
    """A pool of the original alone."""
    return Preference(pair.id, pair.prefix_ids, Candidate(ORIGINAL, pair.suffix_ids, ""), None)
