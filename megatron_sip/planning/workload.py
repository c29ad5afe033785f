"""Configuration -> what a step asks: questions, requests, rounds, tokens of prompts and answers, and what prompts have in common.

The prompts of a pool form a tree: the pool's mark, rubric and prefix are common to all, the first candidate to some, the rest to the
samples of one question. A server that has read a node has it in its prefix cache, so what is read of a node is its tokens for every server
that any of its requests went to. The questions of one request (``teacher.questions_per_request``) go to one server.
(The mark is the pool's own and stands in the rubric's second paragraph, so pools share next to nothing.)

Candidates with the same text are asked about once, guarded candidates of a likelihood judge never, and an answer that failed is asked again:
none of this is counted. What strategies ask that depends on answers is estimated (see asking.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template

from megatron_sip.config import JudgeSection, RunConfig
from megatron_sip.planning import PlanError
from megatron_sip.planning.asking import limits, prompts_of, requests_of, touched
from megatron_sip.planning.hardware import Assumptions
from megatron_sip.teacher import TeacherError
from megatron_sip.teacher.judge import verdict_request
from megatron_sip.teacher.questions import CHOICES, Question, load_template
from megatron_sip.training.plan import StepPlan

FENCE = "0123456789abcdef"


@dataclass(frozen=True)
class Level:
    """One level of the tree: ``tokens`` of each of its nodes. ``touched``: (requests that a node stands in, number of such nodes)."""

    tokens: float
    touched: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Asked:
    """What one judge, or the rewriter, is asked about one pool.

    Attributes:
        rounds: questions; each round waits for the answers of the one before.
        requests: that they are sent in, by servers that take lists.
        levels: see the module.
        answer_tokens: of one question.
        limits: fewest and most questions, whatever the answers are.
    """

    name: str
    rounds: tuple[int, ...]
    requests: int
    levels: tuple[Level, ...]
    answer_tokens: float
    limits: tuple[int, int]

    @property
    def questions(self) -> int:
        return sum(self.rounds)

    @property
    def prompt_tokens(self) -> float:
        """Of all questions together, as sent."""
        return self.questions * sum(level.tokens for level in self.levels)

    @property
    def longest(self) -> float:
        """Tokens of one question, prompt and answer."""
        return sum(level.tokens for level in self.levels) + self.answer_tokens

    def computed_tokens(self, servers: float, efficiency: float) -> float:
        """Prompt tokens that are really computed when the pool's requests go to ``servers`` servers at random."""
        distinct = sum(level.tokens * nodes * spread(servers, requests) for level in self.levels for requests, nodes in level.touched)
        return self.prompt_tokens - efficiency * (self.prompt_tokens - distinct)


def spread(servers: float, requests: int) -> float:
    """Expected number of servers that get at least one of so many requests."""
    return 1.0 if servers <= 1 or requests <= 1 else servers * (1.0 - (1.0 - 1.0 / servers) ** requests)


@dataclass(frozen=True)
class Workload:
    """One step of a run.

    Attributes:
        pools: pairs of the step that get a pool.
        candidates: in each pool.
        judges, rewriter: questions a pool; ``rewriter`` None if nobody rewrites or all rewrites are cached.
        rows: sequences through forward and backward.
        reference_rows: sequences through the reference's forward.
        sequence, prefix, suffix: tokens.
    """

    pools: int
    candidates: int
    judges: tuple[Asked, ...]
    rewriter: Asked | None
    rollouts: int
    rows: int
    reference_rows: int
    sequence: int
    prefix: int
    suffix: int

    @property
    def questions(self) -> int:
        """Judge questions of the step."""
        return self.pools * sum(judge.questions for judge in self.judges)

    @property
    def requests(self) -> int:
        """That the judge questions of the step are sent in."""
        return self.pools * sum(judge.requests for judge in self.judges)

    @property
    def rewrites(self) -> int:
        return self.pools if self.rewriter else 0

    @property
    def asked(self) -> tuple[Asked, ...]:
        return self.judges + ((self.rewriter,) if self.rewriter else ())


def workload(config: RunConfig, plan: StepPlan, assume: Assumptions, *, rewrites_cached: bool = False, comparisons: int | None = None,
             clients: int = 1) -> Workload:
    """The work of one step.

    Args:
        rewrites_cached: all rewrites are in the cache already (a second run on the same pairs).
        comparisons: pairs of a pool that a quality judge compares, in one round, instead of those of its strategy.
        clients: data parallel ranks, which share ``teacher.concurrency``; no list is longer than a share.

    Raises:
        PlanError: a template cannot be read; more comparisons than there are pairs.
    """
    counter = token_counter(config, assume)
    prefix, suffix = config.data.prefix_length * assume.judge_tokens, config.data.suffix_length * assume.judge_tokens
    size = plan.original + plan.rewrite + plan.rollouts
    per_request = min(config.teacher.questions_per_request, max(1, config.teacher.concurrency // clients))
    judges, rewriter = (), None
    try:
        if plan.judged:
            judges = tuple(_judge(judge, size, prefix, suffix, counter, assume, comparisons, per_request) for judge in config.teacher.judges)
        if plan.rewrite and not rewrites_cached:
            template = load_template("rewrite", config.teacher.rewriter.template)
            tokens = sum(_levels(template, (), {"prefix": prefix, "suffix": suffix}, counter)) + assume.chat_tokens
            rewriter = Asked("rewrite", (1,), 1, (Level(tokens, ((1, 1),)),), min(suffix, config.teacher.rewriter.max_tokens), (1, 1))
    except TeacherError as error:
        raise PlanError(str(error)) from None
    rows = config.train.global_batch_size * (2 if plan.paired else 1)
    reference = rows if plan.paired and config.objective.reference != "none" else 0
    return Workload(config.train.global_batch_size, size, judges, rewriter, plan.rollouts, rows, reference, config.seq_length,
                    config.data.prefix_length, config.data.suffix_length)


def _judge(judge: JudgeSection, size: int, prefix: float, suffix: float, counter: Callable[[str], float], assume: Assumptions,
           comparisons: int | None, per_request: int) -> Asked:
    if judge.kind == "likelihood":
        # Two prompts a question; servers compute prompts anew when their log-probabilities are wanted.
        return Asked("likelihood", (size,), requests_of((size,), per_request), (Level(prefix + 2 * suffix, ((1, size),)),), 1.0, (size, size))
    answer = 1.0 if judge.use_logprobs else float(min(judge.max_tokens, assume.reasoning_tokens if judge.reasoning else assume.answer_tokens))
    template = load_template(judge.kind, judge.template)
    lengths = {"prefix": prefix, "reference": suffix, "candidate": suffix, "candidate_a": suffix, "candidate_b": suffix}
    closing = counter(_closing(judge))
    if judge.kind != "quality":
        head, tail, _ = _levels(template, ("candidate",), lengths, counter)
        rounds, parts = [[candidate for candidate in range(size) for _ in range(judge.samples)]], (head, tail)
        names = [lambda _: None, lambda candidate: candidate]
        least = most = size * judge.samples
    else:
        shown = _compared(comparisons, size, judge) if comparisons is not None else prompts_of(judge, size, assume.judge_spread)
        rounds, parts = [[prompt for prompt in some for _ in range(judge.samples)] for some in shown], _levels(
            template, ("candidate_a", "candidate_b"), lengths, counter)
        names = [lambda _: None, lambda prompt: prompt[0], lambda prompt: prompt]
        least, most = limits(judge, size) if comparisons is None else (sum(map(len, rounds)),) * 2
    tokens = [parts[0] + assume.chat_tokens, *parts[1:-1], parts[-1] + closing]
    levels = tuple(Level(one, touched([list(map(name, some)) for some in rounds], per_request)) for one, name in zip(tokens, names, strict=True))
    counts = tuple(map(len, rounds))
    return Asked(judge.kind, counts, requests_of(counts, per_request), levels, answer, (least, most))


def _compared(comparisons: int, size: int, judge: JudgeSection) -> list[list[tuple[int, int]]]:
    """So many pairs in one round; with every step round the circle each candidate stands first once."""
    pairs = [(i, (i + step) % size) for step in range(1, size // 2 + 1) for i in range(size if 2 * step < size else size // 2)]
    if not 1 <= comparisons <= len(pairs):
        raise PlanError(f"--comparisons={comparisons}: a pool of {size} candidates has 1 to {len(pairs)} pairs")
    return [[shown for i, j in pairs[:comparisons] for shown in ([(i, j), (j, i)] if judge.order == "both" else [(i, j)])]]


def _closing(judge: JudgeSection) -> str:
    """What a request adds below the template, to a server with structured outputs."""
    if judge.use_logprobs:
        return ""
    return verdict_request("", judge, Question("", CHOICES[judge.kind]), "choice")["messages"][0]["content"]


def _levels(template: Template, varying: tuple[str, ...], lengths: dict[str, float], counter: Callable[[str], float]) -> tuple[float, float, float]:
    """Tokens before the first text that varies within a pool, from there to the second, and from there on."""
    levels, seen, at = [0.0, 0.0, 0.0], 0, 0
    text = template.safe_substitute(fence=FENCE, words="100")
    for match in template.pattern.finditer(text):
        name = match["named"] or match["braced"]
        levels[min(seen, 2)] += counter(text[at : match.start()])
        at = match.end()
        if name is None:
            continue
        seen += name in varying
        levels[min(seen, 2)] += lengths[name]
    levels[min(seen, 2)] += counter(text[at:])
    return levels[0], levels[1], levels[2]


def token_counter(config: RunConfig, assume: Assumptions) -> Callable[[str], float]:
    """Tokens of a piece of template: by the judge's own tokenizer where ``teacher.model`` is a folder with one, else by characters."""
    path = Path(config.teacher.model or "") / "tokenizer.json"
    if config.teacher.model and path.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        return lambda text: float(len(tokenizer.encode(text, add_special_tokens=False).ids))
    return lambda text: len(text) / assume.characters_per_token
