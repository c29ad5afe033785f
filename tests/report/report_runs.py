"""Pools, metrics and settings of runs that the tests of the report write."""

from __future__ import annotations

from pathlib import Path

from megatron_sip.config import RunConfig, load_config
from megatron_sip.pool import ORIGINAL, REWRITE, ROLLOUT, Candidate, Criterion, PairId, Pool, Scores, choose
from megatron_sip.training.metrics import means, pool_sums
from megatron_sip.training.stream import Judged

TEXTS = ("the original suffix", "its rewrite", "one rollout", "another rollout")


def config(folder: Path, name: str = "a run") -> RunConfig:
    overrides = [f"run.dir={folder}", "log.wandb=disabled", "train.train_iters=40", "pool={rollouts: 2}", "teacher={model: m, judges: [{kind: likelihood}]}"]
    loaded = load_config(None, overrides)
    loaded.run.name = name
    return loaded


def judged(step: int, values: tuple[float | None, ...] = (2.0, 1.0, -1.0, 0.5), prefix: str = "What came before", texts: tuple[str, ...] = TEXTS) -> Judged:
    """A pool of four with its scores and what was chosen."""
    sources = ((ORIGINAL, 0), (REWRITE, 0), (ROLLOUT, 0), (ROLLOUT, 1))
    candidates = tuple(Candidate(source, (1, 2, 3, 4, 5), text, index=k) for (source, k), text in zip(sources, texts))
    pool = Pool(PairId("tokens/wiki_text_document", step, 256), (7, 8, 9, 10), prefix, candidates, texts[0])
    guards = [{"guarded": False}, {"guarded": False}, {"guarded": True}, {"guarded": False}]
    scores = Scores((Criterion("likelihood", 1.0, values, tuple(float(v is not None) for v in values)),), {"likelihood": {"candidates": guards}})
    return Judged(choose(pool, scores, 0.5), pool, scores)


def step_metrics(step: int, pools: list[Judged]) -> dict[str, float]:
    """What the loop hands to the writer in a step."""
    return {
        **means(pool_sums(pools)), "loss": 5.0 - step / 100, "loss/nll": 4.5 - step / 100, "grad_norm": 1.0, "lr": 1e-3, "consumed_pairs": 16.0 * step,
        "time/step": 2.0, "time/rollout": 0.5, "time/wait_judge": 1.0, "time/train": 0.4, "time/sync": 0.0, "time/other": 0.1, "tokens_per_second": 2048.0,
        **({"eval/suffix_nll": 4.4 - step / 100} if step % 10 == 0 else {}),
    }
