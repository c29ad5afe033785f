"""Training a teacher: the policy's trainer with other parts in three places.

    Prompts        samples of tools/build_teacher_data.py -> prompts in an endless, seeded order; the cursor is one integer, as for pairs
    GroupStream    prompts -> answers -> rewards: :class:`Group`
    GroupSchedule  groups -> rows -> microbatches through the same forward/backward schedule, with the GRPO loss
    GroupRecords   rewards and answers in metrics.jsonl and audit.jsonl

Model, import of Hugging Face weights, optimizer, rollout engine, hand-over of weights, guard, checkpoints, signals and resume are
those of :class:`megatron_sip.training.loop.Trainer`. A step has ``train.global_batch_size`` prompts with ``pool.rollouts`` answers each; a
microbatch has ``train.micro_batch_size`` answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.config import ConfigError, RunConfig
from megatron_sip.data.chat_tokenizer import ChatTokenizer
from megatron_sip.data.order import Permutation
from megatron_sip.pool import PairId
from megatron_sip.rollout.engine import Rollout
from megatron_sip.teacher.samples import TASKS, Sample, read_samples
from megatron_sip.training.answers import Answers, Group, collate_answers, padded_length, rows_of, sequences_of
from megatron_sip.training.bank import Page
from megatron_sip.training.loop import Trainer
from megatron_sip.training.plan import StepPlan, plan_step
from megatron_sip.training.records import Records
from megatron_sip.training.schedule import Schedule
from megatron_sip.training.stream import Judged, StepStream, rollout_seed
from megatron_sip.training.tasks import Reward, Task, make_task


@dataclass(frozen=True)
class Prompt:
    """A sample as the model reads it. ``allowed``: the only tokens of an answer, if it has one token.

    ``prefix_ids``: of the conversation up to where the model answers.
    """

    id: PairId
    prefix_ids: tuple[int, ...]
    allowed: tuple[int, ...] | None
    sample: Sample


class Prompts:
    """``prompts[i]`` is a function of configuration and i: every sample once an epoch, in an order shuffled anew for each.

    The two orders of a pair follow each other: whoever answers A to both earns a half, so in a step a habit of position is worth nothing.

    Raises:
        TeacherError: see :func:`read_samples`.
        ConfigError: no prompt fits into ``grpo.prompt_length``.
    """

    def __init__(self, config: RunConfig, files: Sequence[Path], task: Task, tokenizer: ChatTokenizer) -> None:
        self._seed, self._task, self._tokenizer = config.run.seed, task, tokenizer
        samples, longest = read_samples(files, TASKS[config.grpo.task]), 0
        self._lines: list[tuple[int, Sample]] = []
        for number, sample in enumerate(samples):
            length = len(tokenizer.prompt(task.prompt(sample)))
            longest = max(longest, length)
            if length <= config.grpo.prompt_length:
                self._lines.append((number, sample))
        self.left_out, self.longest = len(samples) - len(self._lines), longest
        if not self._lines:
            raise ConfigError(
                f"grpo.prompt_length={config.grpo.prompt_length}, but each of {len(samples)} prompts is longer (the longest has {longest} tokens); "
                "raise it, or make samples of fewer words"
            )
        self._name = ",".join(str(file) for file in files)
        pairs: dict[str, list[int]] = {}
        for place, (_, sample) in enumerate(self._lines):
            pairs.setdefault(sample.pair, []).append(place)
        self._pairs = list(pairs.values())
        self._order = lru_cache(maxsize=2)(self._shuffled)  # steps to come may be of the next epoch

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self._lines)

    def __getitem__(self, index: int) -> Prompt:
        epoch, place = divmod(index, len(self))
        return self.at(self._order(epoch)[place])

    def _shuffled(self, epoch: int) -> list[int]:
        """Places in the files, in the order of an epoch."""
        shuffled = Permutation(len(self._pairs), self._seed, epoch)
        return [place for i in range(len(shuffled)) for place in self._pairs[shuffled[i]]]

    def at(self, place: int) -> Prompt:
        """By its place in the files."""
        number, sample = self._lines[place]
        choices = self._task.choices(sample)
        allowed = None if choices is None else tuple(self._tokenizer.single(choice) for choice in choices)
        return Prompt(PairId(self._name, number, 0), tuple(self._tokenizer.prompt(self._task.prompt(sample))), allowed, sample)


@dataclass
class GroupStream(StepStream):
    """One step on one model replica: :meth:`take` gives a :class:`Group` a prompt. Nothing is kept in a bank: page is None."""

    task: Task | None = None

    def _write(self, pairs: Sequence[Prompt]) -> list[list[Rollout]]:
        more: dict[str, Any] = {"allowed": [pair.allowed for pair in pairs]} if pairs[0].allowed is not None else {}
        return self._timed(
            lambda: self.services.engine.generate(
                [pair.prefix_ids for pair in pairs],
                self.plan.rollouts,
                seeds=[rollout_seed(self.config.run.seed, self.step, pair) for pair in pairs],
                max_tokens=self.config.grpo.answer_length,
                **more,
            )
        )

    def _when_rewritten(self, index: int, rewrite: None, rollouts: list[Rollout]) -> None:
        prompt = self.pairs[index]
        texts = [self.services.tokenizer.answer(rollout.token_ids) for rollout in rollouts]
        self.task.rewards(prompt.sample, texts).add_done_callback(self._safely(lambda done: self._rewarded(index, rollouts, texts, done)))

    def _rewarded(self, index: int, rollouts: list[Rollout], texts: list[str], done: Future[list[Reward]]) -> None:
        rewards, prompt = done.result(), self.pairs[index]
        notes = tuple({"text": text, "reward": reward.value, **reward.note} for text, reward in zip(texts, rewards, strict=True))
        group = Group(
            prompt.id,
            prompt.prefix_ids,
            tuple(rollouts),
            tuple(reward.value for reward in rewards),
            tuple(reward.usable for reward in rewards),
            notes,
        )
        self._done.put((index, Judged(group)))

    def _abandoned(self, pair: Prompt) -> Judged:
        return Judged(Group(pair.id, pair.prefix_ids))


class GroupSchedule(Schedule):
    """Schedules with as many microbatches as the answers of a step need; the lead says how many, and how long their sequences are."""

    def gradients(self, step: int, plan: StepPlan, take: Any) -> list[dict[str, float]]:
        """See :meth:`Schedule.gradients`; ``take`` gives groups."""
        config, runtime = self._config, self._runtime
        self._policy.reference_active = plan.referenced and self._policy.reference is not None
        self.drop_gradients()
        size, sequences, others, shape = config.train.micro_batch_size, [], 0, None
        if runtime.is_lead:
            # By sample, not by arrival: then it does not matter whose rewards came first.
            groups = sorted(take(config.train.global_batch_size // runtime.dp_size), key=lambda group: group.pair.document)
            rows, others = rows_of(groups, scale=config.grpo.scale_rewards, keep_zero=config.grpo.kl_weight > 0)
            sequences = sequences_of(rows, share=self._policy.shares_prefix)
            parallel = config.parallel
            unit = parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size > 1 else 1
            shape = [max(1, -(-len(sequences) // (size * unit))) * unit, padded_length(rows, config)]
        count, length = self._exchange.tell(f"shape-{step}", shape)
        made = iter(range(count))

        def make() -> Answers:
            at = next(made)
            return collate_answers(sequences[at * size : (at + 1) * size], size, length, 0 if at else others)

        batches = self._exchange.microbatches(f"train-{step}", count, make, Answers)
        return self._run(batches, count, paired=False, forward_only=False, length=length)


class GroupRecords(Records):
    """Rewards instead of preferences."""

    def _sums(self, stream: GroupStream, step: int) -> dict[str, float]:
        return group_sums([item.outcome for item in stream.judged], self._config.grpo.answer_length)

    def _tokens(self, merged: dict[str, float]) -> float:
        return merged.get("n/tokens", 0.0)

    def _to_audit(self, stream: GroupStream, step: int) -> list[dict[str, Any]]:
        return [self._record(stream, item.outcome, step) for item in stream.judged[: self._config.log.audit_pools]]

    def _record(self, stream: GroupStream, group: Group, step: int) -> dict[str, Any]:
        sample = next(prompt.sample for prompt in stream.pairs if prompt.id == group.pair)
        return {
            "step": step,
            "sample": sample.id,
            "task": sample.task,
            "kind": sample.kind,
            "label": sample.label,
            "outcome": group.fate,
            "texts": sample.texts,
            "answers": list(group.notes),
        }

    def _trained_in(self, stream: GroupStream, number: int) -> list[Judged]:
        """Rows of a microbatch are of any group: all of them are named, once."""
        return stream.judged if number == 0 else []


def group_sums(groups: Sequence[Group], longest: int) -> dict[str, float]:
    """Sums over one rank's groups of a step; an answer of ``longest`` tokens was cut off, unless one is all it may have."""
    answers = [(answer, reward, usable) for group in groups for answer, reward, usable in zip(group.answers, group.rewards, group.usable)]
    rewards = [reward for _, reward, _ in answers if reward is not None]
    return {
        "n/groups": len(groups),
        **{f"grpo/{fate}": sum(group.fate == fate for group in groups) for fate in ("uniform", "no_reward")},
        "n/answers": len(answers),
        "answer/length": sum(len(answer.token_ids) for answer, *_ in answers),
        "answer/truncated": sum(len(answer.token_ids) == longest > 1 for answer, *_ in answers),
        "answer/unusable": sum(not usable for *_, usable in answers),
        "answer/no_reward": len(answers) - len(rewards),
        "reward": float(np.sum(rewards)) if rewards else 0.0,
        "n/rewarded": len(rewards),
        "n/tokens": sum(len(group.prompt_ids) + len(answer.token_ids) for group in groups for answer in group.answers),
    }


class TeacherTrainer(Trainer):
    """One run on one rank, of a judge or a rewriter."""

    def _open_data(self) -> None:
        config = self.config
        teacher = self.services.for_stream.teacher
        # Ranks that are no lead ask nobody, and read the same samples.
        self._task = make_task(config, teacher.judge if teacher is not None else None if self.runtime.is_lead else _nobody)
        self.train_pairs = Prompts(config, config.grpo.data, self._task, self.tokenizer)
        self.valid_pairs = Prompts(config, config.grpo.validation, self._task, self.tokenizer) if config.train.eval_interval else None
        for name, prompts in (("training", self.train_pairs), ("held-out", self.valid_pairs)):
            if prompts is not None:
                self._say(
                    f"{len(prompts)} {name} samples, {prompts.left_out} left out as longer than {config.grpo.prompt_length} tokens; "
                    f"the longest has {prompts.longest}"
                )

    def _make_schedule(self) -> Schedule:
        return GroupSchedule(self.config, self.runtime, self.policy, self.model, self.optimizer)

    def _open_outputs(self) -> None:
        self.records = GroupRecords(self.config, self.runtime, self.progress)

    def _make_stream(self, step: int, plan: StepPlan, page: Page | None, patience: float) -> StepStream:
        return GroupStream(self.config, step, plan, self._pairs_of(step), self.services.for_stream, None, patience, self._stopping, task=self._task)

    def _evaluate(self, step: int) -> dict[str, float]:
        """Mean reward of one answer to each of ``train.eval_pairs`` held-out prompts, by the weights of this step."""
        train, engine = self.config.train, self.services.for_stream.engine
        if not train.eval_interval or (step % train.eval_interval and step != train.train_iters):
            return {}
        self._wait_for_rollouts(step)  # the weights that the engine holds must not change under them
        problem = self.services.sync(self.policy, step + 1)
        if problem is not None:
            self._say(f"WARNING: no evaluation of step {step}: {problem}")
            return {}
        if not self.runtime.is_lead or engine is None:
            return {}
        number = min(train.eval_pairs, len(self.valid_pairs))
        mine = [
            self.valid_pairs.at(i)
            for i in np.linspace(0, len(self.valid_pairs) - 1, number).round().astype(int)[self.runtime.dp_rank :: self.runtime.dp_size]
        ]
        stream = GroupStream(
            self.config,
            0,
            replace(plan_step(self.config, step), rollouts=1),
            mine,
            self.services.for_stream,
            None,
            0.5 * self.runtime.timeout.total_seconds(),
            task=self._task,
        )
        stream.start()
        rewards = [reward for group in stream.take(len(mine)) for reward in group.rewards if reward is not None]
        stream.close()
        if stream.failure is not None:
            self._say(f"WARNING: the evaluation of step {step} has {len(rewards)} of {len(mine)} rewards: {stream.failure}")
        return {"eval/reward": float(np.sum(rewards)), "n/eval_rewarded": len(rewards)} if rewards else {}


def _nobody(pool: Any) -> Future:
    raise RuntimeError("only the lead of a replica asks")
