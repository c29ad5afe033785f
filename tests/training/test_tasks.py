"""What the answers of a judge and a rewriter earn, and that training asks word for word what a policy run asks."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path

import pytest

from megatron_sip.config import JudgeSection, RewriterSection, RunConfig
from megatron_sip.pool import ORIGINAL, REWRITE, Candidate, Criterion, PairId, Pool, Scores
from megatron_sip.teacher.judge import VerdictJudge
from megatron_sip.teacher.rewriter import Rewriter
from megatron_sip.teacher.samples import Sample
from megatron_sip.training.tasks import JudgeTask, RewriteTask, make_task

PREFIX, SUFFIX = "They met in the old town hall by the river", " and talked about the coming harvest until it was late."
QUALITY = Sample("1", "quality", {"prefix": PREFIX, "candidate_a": SUFFIX, "candidate_b": " late was it."}, "A", "1", "words shuffled", "d", "x")
SAFETY = Sample("2", "safety", {"candidate": SUFFIX}, "yes", "2", "original", "d", "x")
SAFE = Sample("3", "rewrite", {"prefix": PREFIX, "suffix": SUFFIX}, "safe", "3", "original", "d", "x")
UNSAFE = Sample("4", "rewrite", {"prefix": PREFIX, "suffix": SUFFIX + " You idiots."}, "unsafe", "4", "unsafe inserted", "d", "x")


def make_config(task: str = "judge", **grpo) -> RunConfig:
    return RunConfig.model_validate(
        {
            "pool": {"original": False, "rewrite": False, "rollouts": 4},
            "teacher": {"model": "m", "judges": [{"kind": "quality"}]},
            "model": {"max_position_embeddings": 4096},
            "grpo": {"task": task, **grpo},
        }
    )


class _Recorder:
    """Stands in the place of a fleet: keeps the prompts that a policy run would send."""

    list_size = 1

    def __init__(self) -> None:
        self.prompts: list[str] = []

    async def ask(self, kind, path, body, read, **more):
        class Server:
            dialect = "choice"

        self.prompts.append(body(Server())["messages"][0]["content"])

    def note(self, *args) -> None:
        pass


@pytest.mark.parametrize("reasoning", [True, False])
def test_the_judge_is_trained_on_the_questions_of_a_policy_run(reasoning: bool) -> None:
    task, fleet = JudgeTask(make_config(reasoning=reasoning, **({} if reasoning else {"answer_length": 1}))), _Recorder()
    for sample, texts in ((QUALITY, (QUALITY.real, QUALITY.spoilt)), (SAFETY, (SUFFIX,))):
        section = (
            JudgeSection(kind=sample.task, reasoning=reasoning, order="both")
            if sample.task == "quality"
            else JudgeSection(kind="safety", reasoning=reasoning)
        )
        pool = Pool(PairId("d", 0, 0), (), PREFIX, tuple(Candidate("rollout", (), text) for text in texts), SUFFIX)
        asyncio.run(VerdictJudge(section, "j", "m", fleet, 0).score(pool))
    asked = [_without_fence(prompt) for prompt in fleet.prompts]
    trained = [_without_fence(task.prompt(sample)) for sample in (QUALITY, SAFETY)]
    assert len(asked) == 3 and trained == [asked[0], asked[2]]  # the second one is in the other order
    assert task.choices(QUALITY) == (None if reasoning else ("A", "B")) and task.choices(SAFETY) == (None if reasoning else ("yes", "no"))


def _without_fence(prompt: str) -> str:
    import re

    return re.sub(r"\b[0-9a-f]{16}\b", "F", prompt)


def test_verdicts_are_rewarded_after_reasons_only() -> None:
    answers = ['{"reasoning": "B is scrambled", "verdict": "A"}', '{"reasoning": "hm", "verdict": "B"}', "A", '{"verdict": "A"', "verdict: A", ""]
    rewards = JudgeTask(make_config()).rewards(QUALITY, answers).result()
    assert [(r.value, r.usable) for r in rewards] == [(1.0, True), (0.0, True), *[(0.0, False)] * 4]
    plain = JudgeTask(make_config(dialect="plain")).rewards(SAFETY, ["It is calm.\nVerdict: yes", "Verdict: no", "It says yes"]).result()
    assert [(r.value, r.usable) for r in plain] == [(1.0, True), (0.0, True), (0.0, False)]
    short = JudgeTask(make_config(reasoning=False, answer_length=1)).rewards(SAFETY, ["yes", "no", "maybe"]).result()
    assert [(r.value, r.usable) for r in short] == [(1.0, True), (0.0, True), (0.0, False)]


def scored(values: dict[str, float | None], answered: float = 1.0):
    asked: list[Pool] = []

    def ask(pool: Pool) -> Future[Scores]:
        asked.append(pool)
        done: Future[Scores] = Future()
        done.set_result(Scores(tuple(Criterion(name, 0.5, (0.4, value), (1.0, answered)) for name, value in values.items())))
        return done

    return ask, asked


def test_safe_suffixes_are_to_be_copied() -> None:
    ask, asked = scored({"quality": 1.0})
    lead = "town hall by the river"
    answers = [lead + SUFFIX, SUFFIX.strip(), lead + SUFFIX.replace("late", "early"), "I'm sorry, I cannot do that.", "", f'"{lead}{SUFFIX}"']
    rewards = RewriteTask(make_config("rewrite"), ask).rewards(SAFE, answers).result()
    assert [(r.value, r.usable) for r in rewards] == [(1.0, True), (1.0, True), (0.0, True), (0.0, False), (0.0, False), (1.0, True)] and not asked


def test_rewrites_of_unsafe_suffixes_earn_half_quality_and_half_safety() -> None:
    ask, asked = scored({"quality": 0.6, "safety": 1.0})
    task = make_task(make_config("rewrite"), ask)
    rewards = task.rewards(UNSAFE, ["town hall by the river" + SUFFIX, "As an AI language model, no."]).result()
    assert [r.value for r in rewards] == [pytest.approx(0.8), 0.0] and len(asked) == 1
    assert [(c.source, c.text) for c in asked[0].candidates] == [(ORIGINAL, UNSAFE.texts["suffix"]), (REWRITE, SUFFIX)]


@pytest.mark.parametrize("values, answered", [({"quality": None, "safety": 1.0}, 1.0), ({"quality": 0.6, "safety": 1.0}, 0.2)])
def test_a_judge_that_did_not_answer_gives_no_reward(values, answered) -> None:
    ask, _ = scored(values, answered)
    [reward] = RewriteTask(make_config("rewrite"), ask).rewards(UNSAFE, [SUFFIX]).result()
    assert reward.value is None and reward.usable


def test_an_error_of_the_judge_reaches_the_trainer() -> None:
    def ask(pool: Pool) -> Future[Scores]:
        done: Future[Scores] = Future()
        done.set_exception(RuntimeError("lost"))
        return done

    with pytest.raises(RuntimeError, match="lost"):
        RewriteTask(make_config("rewrite"), ask).rewards(UNSAFE, [SUFFIX, SUFFIX]).result()


def test_the_rewriter_is_trained_on_the_prompts_of_a_policy_run(tmp_path: Path) -> None:
    template = Path(__file__).resolve().parents[2] / "configs" / "prompts" / "rewrite_trained.txt"
    config, fleet = make_config("rewrite"), _Recorder()
    config.teacher.rewriter = RewriterSection(template=template)
    rewriter = Rewriter(config.teacher.rewriter, "m", fleet, tmp_path)
    asyncio.run(rewriter.rewrite(PREFIX, SUFFIX))
    rewriter.close()
    prompt = RewriteTask(config, scored({})[0]).prompt(SAFE)
    assert fleet.prompts == [prompt]
    assert "\ntown hall by the river" + SUFFIX + "\n" in prompt  # the last five words of the prefix come first
