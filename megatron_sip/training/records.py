"""What a run writes down: metrics, pools to read, the ledger, recorded outcomes.

In: a step's sums and judged pools on every rank. Out: ``metrics.jsonl``, console and wandb (rank 0), ``audit.jsonl`` (rank 0), ``ledger/dpR.jsonl``
and ``debug.save_pools`` (one lead per replica). Opening them drops what lies past the step from which the run goes on.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch.distributed as dist

from megatron_sip.config import RunConfig, dump_config
from megatron_sip.health import Health
from megatron_sip.policy.runtime import Runtime
from megatron_sip.training.bank import Recorder
from megatron_sip.training.checkpoint import Progress
from megatron_sip.training.checkpoint_files import write_durably
from megatron_sip.training.guard import Verdict
from megatron_sip.training.jsonl import JsonLines, read_jsonl
from megatron_sip.training.ledger import Ledger
from megatron_sip.training.metrics import MetricsWriter, audit_record, means, merge_sums, pool_sums
from megatron_sip.training.resources import Resources
from megatron_sip.training.stream import Judged, StepStream

# Of what the teacher's clients count, by kind (judge, rewrite).
_ADDED = ("questions", "requests", "prompt_tokens", "completion_tokens", "cached_prompt_tokens")


class Records:
    """One rank's part of the records.

    Attributes:
        stalled: seconds that the training waited for checkpoints since the last :meth:`step`.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, progress: Progress) -> None:
        self._config, self._runtime, self._progress = config, runtime, progress
        self.stalled = 0.0
        self._writer: MetricsWriter | None = None
        self._audit: JsonLines | None = None
        self._ledger: Ledger | None = None
        self._recorder: Recorder | None = None
        self._health = Health(config.health)
        self._resources = Resources(runtime.device, first_on_node=os.environ.get("LOCAL_RANK", "0") == "0")
        step, generating = progress.step, config.debug.generate_only
        if runtime.is_lead and config.debug.save_pools is not None:
            self._recorder = Recorder(config.debug.save_pools, runtime.dp_rank, step, runtime.dp_size)
        if runtime.is_lead and not generating:
            self._ledger = Ledger(config.run.dir, runtime.dp_rank, runtime.dp_size, step)
        if runtime.rank == 0 and not generating:
            self._writer = MetricsWriter(config, step, progress.wall, progress.wandb_id)
            progress.wandb_id = self._writer.run_id
            self._audit = JsonLines(config.run.dir / "audit.jsonl", step)
            for record in list(read_jsonl(config.run.dir / "metrics.jsonl"))[-config.health.window:]:
                self._health.look(record["step"], record)
            write_durably(config.run.dir / "run.yaml", dump_config(config))

    def trained(self, step: int, stream: StepStream, *, skipped: bool) -> None:
        """The step is done; on leads, before anything else is written of it."""
        share = len(stream.pairs)
        first = self._progress.consumed_pairs - self._config.train.global_batch_size + self._runtime.dp_rank * share
        outcomes = [item.outcome for item in stream.judged]
        self._ledger.write(step, first, [pair.id for pair in stream.pairs], outcomes, skipped=skipped)
        if self._recorder is not None:
            self._recorder.write(step, outcomes)

    def generated(self, step: int, stream: StepStream) -> None:
        """``debug.generate_only``: outcomes without training."""
        if self._recorder is not None:
            self._recorder.write(step, [item.outcome for item in stream.judged])

    def step(self, step: int, sums: dict[str, float], stream: StepStream | None, own: dict[str, float], asked: dict[str, float], lr: float,
             seconds: float) -> list[str]:
        """Gather a step's numbers and write them; all ranks call it. Returns what the health of judge and rollouts gives cause to say, on rank 0.

        Args:
            sums: this rank's sums of loss and evaluation.
            own: this rank's times and gradient norm; rank 0's are shown.
            asked: what the teacher's client of this rank measured; questions and tokens are added up, of the rest rank 0's is shown: percentiles
                and rates cannot be added up.
        """
        added = {key: value for key, value in asked.items() if key.partition("/")[2] in _ADDED}
        mine = {**sums, **self._resources.sums(), **added}
        if stream is not None:
            mine |= self._sums(stream, step)
            mine["pool/from_bank"] = stream.from_bank
        gathered: list[Any] = [None] * self._runtime.world_size
        dist.all_gather_object(gathered, mine)
        stalled, self.stalled = self.stalled, 0.0
        if self._writer is None:
            return []
        merged = merge_sums(gathered)
        metrics = means(merged)
        for key in ("eval loss/nll", "eval n/valid"):
            metrics.pop(key, None)
        if merged.get("eval n/valid"):
            metrics["eval/suffix_nll"] = merged["eval loss/nll"] / merged["eval n/valid"]
        times = sum(value for key, value in own.items() if key.startswith("time/"))
        shown = {key: value for key, value in asked.items() if key not in added}
        metrics |= {"lr": lr, "consumed_pairs": self._progress.consumed_pairs, **own, **shown, "time/other": max(0.0, seconds - times),
                    "time/save": stalled, "time/step": seconds, "tokens_per_second": self._tokens(merged) / seconds}
        if self._progress.bad_steps:
            metrics["guard/skipped"] = 1.0
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self._writer.write(step, metrics)
        for record in self._to_audit(stream, step):
            self._audit.write(record)
        self._audit.flush()
        self._progress.wall = self._writer.wall
        return self._health.look(step, metrics)

    def suspects(self, step: int, verdict: Verdict, stream: StepStream | None) -> None:
        """Pairs of a bad step to audit.jsonl; all ranks call it."""
        mine = []
        if stream is not None:
            for number in verdict.suspects.get(self._runtime.dp_rank, []):
                mine += [_suspect(step, item, verdict.problem) for item in self._trained_in(stream, number)]
        gathered: list[Any] = [None] * self._runtime.world_size
        dist.all_gather_object(gathered, mine)
        if self._audit is not None:
            for record in (record for part in gathered for record in part):
                self._audit.write(record)
            self._audit.flush(durable=True)

    def _sums(self, stream: StepStream, step: int) -> dict[str, float]:
        return pool_sums(stream.judged, step)

    def _tokens(self, merged: dict[str, float]) -> float:
        return self._config.train.global_batch_size * self._config.seq_length

    def _to_audit(self, stream: StepStream, step: int) -> list[dict[str, Any]]:
        pools = [item for item in stream.judged if item.pool is not None]
        return [audit_record(step, item) for item in pools[: self._config.log.audit_pools]]

    def _trained_in(self, stream: StepStream, number: int) -> list[Judged]:
        """What the microbatch ``number`` of a step was made of."""
        size = self._config.train.micro_batch_size
        return stream.judged[number * size : (number + 1) * size]

    def sync(self) -> None:
        """Bring everything to the disk, before a checkpoint that says it is there."""
        if self._ledger is not None:
            self._ledger.sync()
        for lines in (self._writer, self._audit):
            if lines is not None:
                lines.flush(durable=True)

    def close(self) -> None:
        for part in (self._writer, self._audit, self._recorder, self._ledger):
            if part is not None:
                part.close()


def _suspect(step: int, item: Judged, problem: str) -> dict[str, Any]:
    """A pair of a bad step, with its texts where it had a pool."""
    pair = item.outcome.pair
    record = audit_record(step, item) if item.pool is not None else {
        "step": step, "pair": {"dataset": pair.dataset, "document": pair.document, "offset": pair.offset}}
    return {**record, "outcome": "bad step", "reason": problem}
