"""Record and replay of judged pairs (``debug.save_pools``, ``debug.load_pools``).

In: outcomes of a step. Out: JSON lines ``{"step", "preference"}`` or ``{"step", "dropped"}``; and back by (step, pair).
Each data parallel rank records into its own file ``NAME.dpR``; replay reads all of them, so the layout may differ.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from megatron_sip.config import ConfigError
from megatron_sip.pool import Dropped, PairId, Preference
from megatron_sip.training.jsonl import JsonLines, read_jsonl


class Recorder:
    def __init__(self, path: Path, dp_rank: int, last_step: int) -> None:
        self._lines = JsonLines(path.with_name(f"{path.name}.dp{dp_rank}"), last_step)

    def write(self, step: int, outcomes: list[Preference | Dropped]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Dropped):
                self._lines.write({"step": step, "dropped": asdict(outcome)})
            else:
                self._lines.write({"step": step, "preference": outcome.to_json()})
        self._lines.flush(durable=True)

    def close(self) -> None:
        self._lines.close()


class Replay:
    """Recorded outcomes by (step, pair).

    Raises:
        ConfigError: no such file, or a record of another form (names the file).
    """

    def __init__(self, path: Path) -> None:
        files = sorted([*path.parent.glob(path.name + ".dp*"), *([path] if path.is_file() else [])])
        if not files:
            raise ConfigError(f"debug.load_pools: neither {path} nor {path}.dp* exists; record them with debug.save_pools={path}")
        self.path = path
        self._outcomes: dict[tuple[int, PairId], Preference | Dropped] = {}
        for file in files:
            try:
                for record in read_jsonl(file):
                    outcome = _outcome(record)
                    self._outcomes[record["step"], outcome.pair] = outcome
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"debug.load_pools: {file} does not hold recorded pools: {error}") from None

    def outcome(self, step: int, pair: PairId) -> Preference | Dropped:
        try:
            return self._outcomes[step, pair]
        except KeyError:
            raise ConfigError(f"debug.load_pools: {self.path} has nothing for pair {pair} at step {step}; it was recorded with other "
                              "data, seed or batch size, or for fewer steps") from None


def _outcome(record: dict) -> Preference | Dropped:
    if "dropped" in record:
        data = dict(record["dropped"])
        return Dropped(**{**data, "pair": PairId(**data["pair"])})
    return Preference.from_json(record["preference"])
