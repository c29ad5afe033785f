"""The training loop: composes everything else.

    data.pairs          next pairs of the step (the cursor is one integer)
    training.services   starts servers, gives the lead ranks tokenizer, rollout engine and teacher
    training.stream     pairs -> judged outcomes, in the order in which they are judged
    training.bank       what was judged, on disk, until it is trained and saved
    training.schedule   microbatches through Megatron's forward/backward schedule; the loss is objective.blend
    training.heldout    what the policy writes on held-out prefixes, every n steps
    training.guard      is the step fit to change the weights?
    training.checkpoint save beside the training, verify, resume
    training.records    metrics.jsonl, wandb, audit.jsonl, the ledger of trained pairs
    training.watch      what a rank is doing, and the end of it when it hangs

A step either happens on every rank or on none: before the optimizer touches anything, all ranks exchange what they saw of it. When one
had to give up (teacher lost, rollouts of other weights, numbers that are not finite), the run saves the state after the last whole step
and leaves with an exit code of its own.
"""

from __future__ import annotations

import copy
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_sip.config import RunConfig
from megatron_sip.data.pairs import Pair, build_pairs
from megatron_sip.policy import runtime as policy_runtime
from megatron_sip.policy.model import build_policy, make_reference, wrap_ddp
from megatron_sip.policy.optimizer import build_optimizer
from megatron_sip.policy.weights import load_init
from megatron_sip.training import checkpoint as checkpoints
from megatron_sip.training import checkpoint_files, guard
from megatron_sip.training.bank import Bank, Page, Replay
from megatron_sip.training.checkpoint import Progress, Saver
from megatron_sip.training.checkpoint_files import CheckpointError
from megatron_sip.training.guard import StepReport, Verdict
from megatron_sip.training.heldout import HeldOut
from megatron_sip.training.metrics import merge_sums, say
from megatron_sip.training.plan import StepPlan, plan_step
from megatron_sip.training.records import Records
from megatron_sip.training.schedule import Schedule, heldout_pairs
from megatron_sip.training.services import RunServices
from megatron_sip.training.stream import Judged, Stopped, StepStream
from megatron_sip.training.watch import Watch

EXIT_DONE, EXIT_FAILED = 0, 1
EXIT_MORE = 85  # saved, more to do: a signal or train.exit_after
EXIT_LOST = 86  # saved, but a server was lost or a step was bad: remove the cause, then resume
_MARGIN = 0.8  # share of the ranks' deadline that a lead may wait for answers in one step


class Trainer:
    """One run on one rank. ``run()`` returns the exit code; ``close()`` stops everything that was started."""

    def __init__(self, config: RunConfig, runtime: policy_runtime.Runtime, tokenizer: Any) -> None:
        self.config, self.runtime, self.tokenizer = config, runtime, tokenizer
        self.stop_signal, self._signalled = 0, 0.0
        self.progress = Progress()
        self.services = RunServices(config, runtime, tokenizer)
        self.watch = Watch(f"rank {runtime.rank}")
        self.saver: Saver | None = None
        self.records: Records | None = None
        self.bank: Bank | None = None
        self.replay: Replay | None = None
        self.heldout: HeldOut | None = None
        self._writing = False  # some rank's checkpoint writer is at work
        self._streams: dict[int, StepStream] = {}  # steps whose pools are under way; on leads
        self._alarm = ""  # why health.action=stop ends the run
        self._opened = 0  # the last step whose pools were begun

    # -- life of a run ------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train until the last step, a signal or a failure; returns the exit code."""
        with self.watch.during("looking for a checkpoint", self._patience(60)):
            found = checkpoints.find_whole(self.config, self.runtime, self._say)
        if found is not None:
            checkpoints.check_resume(found, self.config, self.runtime, self.tokenizer.fingerprint)
            if checkpoint_files.step_of(found) >= self.config.train.train_iters:
                self._say(f"nothing to do: {found} is the last step of the run")
                return EXIT_DONE
        with self.watch.during("building model and optimizer", self._patience(30)):
            self._build()
            self.services.start(self.policy)  # servers come up while data and checkpoint are read
        with self.watch.during("opening data and records, loading the checkpoint", self._patience(60)):
            self._open_data()
            if found is not None:
                self.progress = checkpoints.load(found, self.config, self.policy, self.optimizer, self.scheduler)
                self._say(f"resumed from {found} after step {self.progress.step}, {self.progress.consumed_pairs} pairs")
            self._open_outputs()
        with self.watch.during("waiting for servers", self._patience() + self.config.teacher.ready_timeout + self.config.rollout.ready_timeout
                               + sum(each.ready_timeout for each in self.config.evaluation.evaluators)):
            if self.heldout is not None:
                self.heldout.wait_ready(resumed=found is not None)
            self.services.wait_ready()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)
        return self._generate() if self.config.debug.generate_only else self._steps()

    def _steps(self) -> int:
        train = self.config.train
        while self.progress.step < train.train_iters:
            failure = self._step(self.progress.step + 1)
            stop = bool(self.stop_signal or self._alarm) or failure is not None or self.progress.step == train.exit_after
            done = self.progress.step == train.train_iters
            with self.watch.during(f"saving step {self.progress.step}", self._patience() + 60 * self.config.checkpoint.timeout_minutes):
                saved = self._save(last=stop or done)
            if not saved and (stop or done):
                return EXIT_FAILED
            if failure is not None and not self.stop_signal:
                self._say(f"stopped in step {self.progress.step + 1}, which was thrown away: {failure}\n"
                          f"Everything up to step {self.progress.step} is saved; start the same command again to go on.")
                return EXIT_LOST
            if done:
                return EXIT_DONE
            if self._alarm:
                self._say(f"stopped and saved after step {self.progress.step} (health.action=stop): {self._alarm}")
                return EXIT_LOST
            if stop:
                why = signal.Signals(self.stop_signal).name if self.stop_signal else "train.exit_after"
                more = f" (step {self.progress.step + 1} was given up: {failure})" if failure else ""
                self._say(f"{why}: saved after step {self.progress.step} of {train.train_iters}{more}; start the same command again to go on")
                return EXIT_MORE
        return EXIT_DONE

    def close(self) -> None:
        """Stop everything that was started. May be called twice."""
        self.watch.close()
        self.services.close()
        for part in (self.saver, self.records, self.heldout, *self._streams.values()):
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
        self.schedule = self._make_schedule()
        self.saver = Saver(config, self.runtime, self.policy, self.optimizer, self.scheduler, self.tokenizer.vocab_size, self.tokenizer.fingerprint)
        parameters = torch.tensor(sum(p.numel() for p in self.policy.parameters()), dtype=torch.float64, device=self.runtime.device)
        dist.all_reduce(parameters)
        parallel, context = config.parallel, config.parallel.context_parallel_size
        self._say(f"policy: {int(parameters) // (self.runtime.dp_size * context) / 1e6:.1f} M parameters on {self.runtime.world_size} ranks "
                  f"(TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size} x CP{context} x DP{self.runtime.dp_size})")

    def _make_schedule(self) -> Schedule:
        return Schedule(self.config, self.runtime, self.policy, self.model, self.optimizer)

    def _open_data(self) -> None:
        config = self.config
        self.train_pairs, self.valid_pairs = build_pairs(
            config.data, config.run.seed, config.train.train_iters * config.train.global_batch_size, heldout_pairs(config, self.runtime.dp_size),
            self.tokenizer.fingerprint)
        for dataset in self.train_pairs.datasets:
            self._say(dataset.describe())
        if config.evaluates:
            self.heldout = HeldOut(config, self.runtime, self.tokenizer, self.services.heldout_engine, self._stopping)

    def _open_outputs(self) -> None:
        debug = self.config.debug
        if self.runtime.is_lead:
            if debug.load_pools is not None:
                self.replay = Replay(debug.load_pools)
            else:
                # Pools that were generated without training are of other weights: they are for debug.train_only.
                settings = checkpoints.fingerprint(self.config)
                mark = f"{settings}g" if debug.generate_only else settings
                self.bank = Bank(self.config.run.dir, self.runtime.dp_rank, mark, frozenset({settings, f"{settings}g"} if debug.replaying else {mark}))
        self.records = Records(self.config, self.runtime, self.progress)

    # -- one step -----------------------------------------------------------------------------------------------

    def _step(self, step: int) -> str | None:
        """Run a step. Returns None, or why it had to be thrown away (the same on every rank)."""
        began = time.monotonic()
        plan = plan_step(self.config, step)
        if step == self.config.pool.rollouts_start_step + 1:
            self.progress.recent_losses = []  # another loss begins
        self._sync_reference(step, plan)
        synced = time.monotonic()
        problem = self._hand_over_weights(step)
        if problem is not None:
            return problem
        sync_seconds, opened = time.monotonic() - synced, self._open_streams(step)
        stream = self._streams.pop(step, None)

        training = time.monotonic()
        # One process waits for its own teacher as long as that answers; with others around, the lead gives up before them.
        limit = 2 * self._patience() if self.runtime.world_size > 1 else float("inf")
        with self.watch.during(f"step {step}: forward and backward", limit):
            parts = self.schedule.gradients(step, plan, None if stream is None else stream.take)
        train_seconds = time.monotonic() - training
        sums = merge_sums(parts)

        with self.watch.during(f"step {step}: update", self._patience()):
            failure, verdict = self._agree(step, self._report(stream, parts, sums), stream)
            if failure is not None:
                self.schedule.drop_gradients()
                return failure
            grad_norm = self._update(skip=verdict.problem is not None)
        self._advance(step, verdict)
        if stream is not None:
            self.records.trained(step, stream, skipped=verdict.problem is not None)
            stream.close()
        with self.watch.during(f"step {step}: evaluation", self._patience()):
            heldout = self._evaluate(step)
        waited = stream.waited if stream else 0.0
        self._wait_for_rollouts(step)
        evaluating = time.monotonic()
        heldout |= self._evaluate_writing(step)
        own = {"time/rollout": sum(each.generating for each in opened), "time/wait_judge": waited, "time/train": train_seconds - waited,
               "time/sync": sync_seconds}
        if self._writing_is_due(step):
            own["evaluation/seconds"] = time.monotonic() - evaluating
        if verdict.problem is None and grad_norm is not None:
            own["grad_norm"] = grad_norm
        with self.watch.during(f"step {step}: gathering metrics", self._patience()):
            warnings = self.records.step(step, {**sums, **heldout}, stream, own, self.services.metrics(), self.optimizer.param_groups[0]["lr"],
                                         time.monotonic() - began)
            self._warn(warnings)
        return None

    def _warn(self, warnings: list[str]) -> None:
        """Say what is wrong with judge or rollouts (rank 0 knows); with ``health.action=stop`` all ranks take it as a reason to stop."""
        for warning in warnings:
            say(f"WARNING: {warning}")
        if self.config.health.action == "stop":
            told = ["\n".join(warnings)]
            dist.broadcast_object_list(told, src=0)
            self._alarm = told[0]

    @property
    def _ahead(self) -> int:
        """Steps whose pools are made while the one before trains."""
        return 0 if self.config.debug.replaying or self.config.debug.generate_only else self.config.train.staleness

    def _steps_to_open(self, step: int) -> list[int]:
        """Steps whose pools begin with the weights from which ``step`` starts; the same on every rank."""
        last = min(step + self._ahead, self.config.train.train_iters)
        return list(range(max(step, self._opened + 1), last + 1))

    def _hand_over_weights(self, step: int) -> str | None:
        """Make the weights from which ``step`` starts the ones that write. Returns what went wrong, the same on every rank."""
        if self.config.debug.replaying or not any(plan_step(self.config, each).rollouts for each in self._steps_to_open(step)):
            return None
        with self.watch.during(f"step {step}: handing weights to the rollout engine", self._patience() + self.config.rollout.request_timeout):
            return self.services.sync(self.policy, step)

    def _open_streams(self, step: int) -> list[StepStream]:
        """Begin with the pools of ``step`` and, with ``train.staleness``, of the next one; on leads."""
        steps = self._steps_to_open(step)
        self._opened = max([self._opened, *steps])
        streams = {each: self._stream(each) for each in steps} if self.runtime.is_lead else {}
        self._streams |= streams
        return list(streams.values())

    def _stream(self, step: int) -> StepStream:
        plan = plan_step(self.config, step)
        # With other ranks around, the lead must not wait longer than they do.
        patience = _MARGIN * self.runtime.timeout.total_seconds() if self.runtime.world_size > 1 else float("inf")
        page = self.bank.page(step) if self.bank is not None and plan.asks else None
        stream = self._make_stream(step, plan, page, patience)
        if self.replay is None:
            stream.start()
        else:
            stream.hand_out([Judged(self.replay.outcome(step, pair.id)) for pair in stream.pairs])
        return stream

    def _make_stream(self, step: int, plan: StepPlan, page: Page | None, patience: float) -> StepStream:
        return StepStream(self.config, step, plan, self._pairs_of(step), self.services.for_stream, page, patience, self._stopping)

    def _pairs_of(self, step: int) -> list[Pair]:
        """This replica's share of a step to come: a contiguous slice, fixed by the cursor."""
        batch = self.config.train.global_batch_size
        share = batch // self.runtime.dp_size
        first = self.progress.consumed_pairs + (step - self.progress.step - 1) * batch + self.runtime.dp_rank * share
        return [self.train_pairs[i] for i in range(first, first + share)]

    def _wait_for_rollouts(self, step: int) -> None:
        """The next weights must not reach the engine before it has written what it was asked for; and a checkpoint of this step wants
        the next one's rollouts in the bank, since a resume cannot write them with these weights."""
        with self.watch.during(f"step {step}: waiting for rollouts of the next step", self._patience() + self.config.rollout.request_timeout):
            for stream in self._streams.values():
                stream.written.wait()

    def _report(self, stream: StepStream | None, parts: list[dict[str, float]], sums: dict[str, float]) -> StepReport:
        """What this rank saw of the step."""
        lost = stream.failure if stream is not None else None
        failure = None if lost is None else f"{type(lost).__name__}: {lost}"
        tolerance, tokens = self.config.rollout.logprob_tolerance, sums.get("n/rollout_tokens", 0.0)
        # Rollouts of older weights differ; that they are of the right ones is then left to the versions that the engine reports.
        comparable = tokens > 0 and not self.config.debug.replaying and self._ahead == 0
        other_weights = comparable and sums["rollout/logprob_diff"] / tokens > tolerance
        if other_weights and failure is None:
            failure = (f"rollouts were not written by the policy's weights: their log-probabilities differ from the policy's by "
                       f"{sums['rollout/logprob_diff'] / tokens:.4f} per token on average (largest {sums['max/rollout_logprob_diff']:.4f}, "
                       f"rollout.logprob_tolerance={tolerance}). The engine missed a weight sync, computes in another dtype (raise the tolerance "
                       "for bfloat16), or serves another model")
        return StepReport(
            self.runtime.rank, self.runtime.dp_rank, failure, isinstance(lost, Stopped), other_weights, self.stop_signal, self.saver.writing,
            [(part["loss"], part["n/loss"]) for part in parts], self.schedule.gradient_is_finite())

    def _agree(self, step: int, mine: StepReport, stream: StepStream | None) -> tuple[str | None, Verdict | None]:
        """Exchange reports: why the step has to be thrown away, or the verdict on its numbers; the same on every rank."""
        reports: list[Any] = [None] * self.runtime.world_size
        dist.all_gather_object(reports, mine)
        self.stop_signal = max(report.stop_signal for report in reports)
        self._writing = any(report.writing for report in reports)
        failures = sorted((report.stopped, report.rank, report.failure) for report in reports if report.failure is not None)
        if failures:
            if stream is not None and stream.page is not None and any(report.other_weights for report in reports):
                stream.page.forget()  # or a resume would train on the same rollouts again
            if not failures[0][0]:
                self.stop_signal = 0  # a lost server or a bad step is told, whatever else was asked
            return failures[0][2], None
        verdict = guard.look(reports, self.progress.recent_losses, self.config.train)
        if verdict.problem is None:
            return None, verdict
        self.records.suspects(step, verdict, stream)
        train, pairs = self.config.train, f"its pairs stand in {self.config.run.dir / 'audit.jsonl'}"
        if train.bad_step == "skip" and self.progress.bad_steps + 1 < train.max_bad_steps:
            self._say(f"WARNING: step {step} is skipped: {verdict.problem}; {pairs}")
            return None, verdict
        self.stop_signal = 0
        if train.bad_step == "skip":
            return f"{verdict.problem}, and {self.progress.bad_steps} steps before it were bad (train.max_bad_steps={train.max_bad_steps}); {pairs}", None
        return f"{verdict.problem}; {pairs}. Lower optimizer.lr, or set train.bad_step=skip", None

    def _update(self, *, skip: bool) -> float | None:
        """Optimizer step; None when the step is skipped or no pair of the whole batch carried loss (then nothing moves but the schedule)."""
        grad_norm = None
        if skip:
            self.schedule.drop_gradients()
        elif self.schedule.global_pairs > 0:
            _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        return None if grad_norm is None else float(grad_norm)

    def _advance(self, step: int, verdict: Verdict) -> None:
        progress = self.progress
        progress.step = step
        progress.consumed_pairs += self.config.train.global_batch_size
        progress.bad_steps = 0 if verdict.problem is None else progress.bad_steps + 1
        if verdict.problem is None:
            progress.recent_losses = guard.remember(progress.recent_losses, verdict.loss)

    def _sync_reference(self, step: int, plan: StepPlan) -> None:
        """Make the reference when it is first needed, and copy the policy into a synced one every n steps."""
        if not plan.referenced or not self.config.has_reference:
            return
        since = step - 1 - self.config.pool.rollouts_start_step
        due = self.config.objective.reference == "synced" and since % self.config.objective.reference_sync_interval == 0
        if self.policy.reference is None:
            make_reference(self.policy, self.config)
        elif due:
            self.policy.sync_reference()

    def _evaluate(self, step: int) -> dict[str, float]:
        interval = self.config.train.eval_interval
        due = interval and (step % interval == 0 or step == self.config.train.train_iters)
        return self.schedule.heldout_loss(step, self.valid_pairs) if due else {}

    def _writing_is_due(self, step: int) -> bool:
        return self.heldout is not None and (step % self.config.evaluation.interval == 0 or step == self.config.train.train_iters)

    def _evaluate_writing(self, step: int) -> dict[str, float]:
        """Sums of what the weights after this step write. No rollout is under way, and the next step hands over the same weights once more."""
        if not self._writing_is_due(step):
            return {}
        with self.watch.during(f"step {step}: evaluation of what the policy writes", self._patience(5) + self.config.rollout.request_timeout
                               + self.config.evaluation.judge_timeout * len(self.config.evaluation.evaluators)):
            problem = self.services.sync_heldout(self.policy, step + 1)
            if problem is not None:
                self._say(f"WARNING: step {step} is not evaluated: the weights did not reach the rollout engine: {problem}")
                return {}
            return self.heldout.measure(step)

    # -- beside the steps ---------------------------------------------------------------------------------------

    def _generate(self) -> int:
        """``debug.generate_only``: pools of all steps with the weights as they are, into the bank."""
        while self.progress.step < self.config.train.train_iters and not self.stop_signal:
            step, began = self.progress.step + 1, time.monotonic()
            if (problem := self._hand_over_weights(step)) is not None:
                raise RuntimeError(problem)
            self._open_streams(step)
            stream = self._streams.pop(step, None)
            if stream is not None:
                stream.take(len(stream.pairs))
            problem, _ = self._agree(step, self._report(stream, [], {}), stream)
            if problem is not None:
                self._say(f"stopped in step {step}: {problem}; what was judged is kept, start the same command again to go on")
                return EXIT_LOST
            self._advance(step, Verdict(None))
            if stream is not None:
                self.records.generated(step, stream)
            self._say(f"step {step}: pools generated in {time.monotonic() - began:.1f} s, nothing trained")
            if step == self.config.train.exit_after:
                break
        return EXIT_MORE if self.progress.step < self.config.train.train_iters else EXIT_DONE

    def _save(self, *, last: bool) -> bool:
        """Begin, go on with or finish a checkpoint. Returns False when one that was due could not be written."""
        interval, step = self.config.checkpoint.interval, self.progress.step
        due = step > 0 and (last or (interval and step % interval == 0)) and not checkpoint_files.folder_of(self.config.run.dir, step).exists()
        if self.saver.pending and (due or last or not self._writing):
            self._finish_save(last=False)  # of an earlier step
            due = due and not checkpoint_files.folder_of(self.config.run.dir, step).exists()
        if not due:
            return True
        began = time.monotonic()
        shared = [self.progress.wall, self.progress.wandb_id]
        dist.broadcast_object_list(shared, src=0)
        self.progress.wall, self.progress.wandb_id = shared
        try:
            self.records.sync()
            self.saver.begin(copy.deepcopy(self.progress))
        except CheckpointError as error:
            return self._not_saved(error, last)
        self._save_began, self._stalled = began, time.monotonic() - began
        self.records.stalled += self._stalled
        if last or not self.config.checkpoint.async_save:
            return self._finish_save(last=last)
        return True

    def _finish_save(self, *, last: bool) -> bool:
        began = time.monotonic()
        try:
            path = self.saver.finish()
        except CheckpointError as error:
            return self._not_saved(error, last)
        finally:
            stalled = time.monotonic() - began
            self.records.stalled += stalled
        self._say(f"saved {path} in {time.monotonic() - self._save_began:.1f} s, of which training waited {self._stalled + stalled:.2f} s")
        if self.bank is not None and self.runtime.rank == 0:
            self.bank.forget_until(checkpoint_files.oldest_to_resume_from(self.config.run.dir, self.config.checkpoint.keep))
        return True

    def _not_saved(self, error: CheckpointError, last: bool) -> bool:
        self._say(f"WARNING: {error}" + ("" if last else "\nTraining goes on; the next checkpoint is tried as planned."))
        return False

    def _patience(self, extra_minutes: float = 0.0) -> float:
        """Seconds after which something hangs: collectives end by their own deadline before."""
        return 2 * self.runtime.timeout.total_seconds() + 60 * extra_minutes

    def _stopping(self) -> float:
        return time.monotonic() - self._signalled if self.stop_signal else 0.0

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.stop_signal:
            self._signalled = time.monotonic()
        self.stop_signal = number
        self._say(f"{signal.Signals(number).name}: this step is finished and saved first" + (" (again to leave at once)" if number == signal.SIGINT else ""))

    def _say(self, text: str) -> None:
        if self.runtime.rank == 0:
            say(text)
