"""Configuration -> what a step asks: questions, tokens of their prompts and answers, and what prompts have in common.

The prompts of a pool form a tree: the pool's mark, rubric and prefix are common to all, the first candidate to some, the rest to the
samples of one question. A level of the tree is ``tokens`` long, has ``nodes`` in a pool, and ``leaves`` requests below each node. A server
that has read a node has it in its prefix cache, so that what is read of it is ``tokens`` for every server that any of its requests went to.
(The mark is the pool's own and stands in the rubric's second paragraph, so pools share next to nothing.)

Counts are upper limits: candidates with the same text are asked about once, and an answer that failed is asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template

from megatron_sip.config import JudgeSection, RunConfig
from megatron_sip.planning import PlanError
from megatron_sip.planning.hardware import Assumptions
from megatron_sip.teacher import TeacherError
from megatron_sip.teacher.questions import load_template
from megatron_sip.training.plan import StepPlan

FENCE = "0123456789abcdef"


@dataclass(frozen=True)
class Level:
    tokens: float
    nodes: int
    leaves: int


@dataclass(frozen=True)
class Asked:
    """What one judge, or the rewriter, is asked about one pool.

    Attributes:
        questions: requests.
        levels: see the module.
        answer_tokens: of one request.
    """

    name: str
    questions: int
    levels: tuple[Level, ...]
    answer_tokens: float

    @property
    def prompt_tokens(self) -> float:
        """Of all requests together, as sent."""
        return sum(level.tokens * level.nodes * level.leaves for level in self.levels)

    @property
    def longest(self) -> float:
        """Tokens of one request, prompt and answer."""
        return sum(level.tokens for level in self.levels) + self.answer_tokens

    def computed_tokens(self, servers: float, efficiency: float) -> float:
        """Prompt tokens that are really computed when the pool's requests go to ``servers`` servers at random."""
        distinct = sum(level.tokens * level.nodes * spread(servers, level.leaves) for level in self.levels)
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
    def rewrites(self) -> int:
        return self.pools if self.rewriter else 0

    @property
    def asked(self) -> tuple[Asked, ...]:
        return self.judges + ((self.rewriter,) if self.rewriter else ())


def workload(config: RunConfig, plan: StepPlan, assume: Assumptions, *, rewrites_cached: bool = False, comparisons: int | None = None) -> Workload:
    """The work of one step.

    Args:
        rewrites_cached: all rewrites are in the cache already (a second run on the same pairs).
        comparisons: pairs of a pool that a quality judge compares, instead of all of them.

    Raises:
        PlanError: a template cannot be read; more comparisons than there are pairs.
    """
    counter = token_counter(config, assume)
    prefix, suffix = config.data.prefix_length * assume.judge_tokens, config.data.suffix_length * assume.judge_tokens
    size = plan.original + plan.rewrite + plan.rollouts
    judges, rewriter = (), None
    try:
        if plan.judged:
            judges = tuple(_judge(judge, size, prefix, suffix, counter, assume, comparisons) for judge in config.teacher.judges)
        if plan.rewrite and not rewrites_cached:
            head, texts, tail = _levels(load_template("rewrite", config.teacher.rewriter.template), (), {"prefix": prefix, "suffix": suffix}, counter)
            tokens = head + texts + tail + assume.chat_tokens
            rewriter = Asked("rewrite", 1, (Level(tokens, 1, 1),), min(suffix, config.teacher.rewriter.max_tokens))
    except TeacherError as error:
        raise PlanError(str(error)) from None
    rows = config.train.global_batch_size * (2 if plan.paired else 1)
    reference = rows if plan.paired and config.objective.reference != "none" else 0
    return Workload(config.train.global_batch_size, size, judges, rewriter, plan.rollouts, rows, reference, config.seq_length,
                    config.data.prefix_length,
                    config.data.suffix_length)


def _judge(judge: JudgeSection, size: int, prefix: float, suffix: float, counter: Callable[[str], float], assume: Assumptions,
           comparisons: int | None) -> Asked:
    if judge.kind == "likelihood":
        # Two prompts a request; servers compute prompts anew when their log-probabilities are wanted.
        return Asked("likelihood", size, (Level(prefix + 2 * suffix, size, 1),), 1.0)
    answer = float(min(judge.max_tokens, assume.reasoning_tokens if judge.reasoning else assume.answer_tokens))
    template = load_template(judge.kind, judge.template)
    lengths = {"prefix": prefix, "reference": suffix, "candidate": suffix, "candidate_a": suffix, "candidate_b": suffix}
    if judge.kind != "quality":
        head, tail, _ = _levels(template, ("candidate",), lengths, counter)
        leaves = size * judge.samples
        return Asked(judge.kind, leaves, (Level(head + assume.chat_tokens, 1, leaves), Level(tail, size, judge.samples)), answer)
    pairs = size * (size - 1) // 2
    if comparisons is not None:
        if not 1 <= comparisons <= pairs:
            raise PlanError(f"--comparisons={comparisons}: a pool of {size} candidates has 1 to {pairs} pairs")
        pairs = comparisons
    prompts = pairs * (2 if judge.order == "both" else 1)
    questions, firsts = prompts * judge.samples, min(size, prompts)
    head, first, rest = _levels(template, ("candidate_a", "candidate_b"), lengths, counter)
    # Leaves of a first candidate: on average; rounded so that the levels add up to the prompts as sent.
    shared = questions // firsts
    levels = [Level(head + assume.chat_tokens, 1, questions), Level(first, firsts, shared), Level(rest, prompts, judge.samples)]
    if left := questions - firsts * shared:
        levels.insert(2, Level(first, left, 1))
    return Asked("quality", questions, tuple(levels), answer)


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
