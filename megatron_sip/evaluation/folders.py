"""A model as it is named on a command line -> a Hugging Face folder, and the settings of the run that trained it.

In: a Hugging Face folder, or a run, its ``checkpoints`` or one of them. Out: :class:`Source`, and a folder that transformers loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_sip.config import RunConfig, load_config
from megatron_sip.evaluation import EvaluationError


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: as it was named.
        folder: Hugging Face folder, or a checkpoint that has to be exported.
        is_checkpoint: which of them.
        run: settings of the run that trained it; None for a Hugging Face folder outside of a run.
        run_file: the file that says so.
    """

    name: str
    folder: Path
    is_checkpoint: bool
    run: RunConfig | None = None
    run_file: Path | None = None

    def hf_folder(self, scratch: Path) -> Path:
        """The Hugging Face folder; a checkpoint is exported below ``scratch``.

        Raises:
            ConfigError: the checkpoint or its tokenizer cannot be read.
            OSError: no room.
        """
        if not self.is_checkpoint:
            return self.folder
        from megatron_sip.policy.export import export  # Megatron takes seconds to import

        export(self.folder, scratch)
        return scratch


def locate(path: Path) -> Source:
    """Find the model behind ``path``; of a run, the newest checkpoint.

    Raises:
        EvaluationError: nothing of that kind is there.
        ConfigError: its run.yaml is damaged.
    """
    if not path.is_dir():
        raise EvaluationError(f"{path} is not a folder; give a Hugging Face folder, a run, or a checkpoint of one (RUN/checkpoints/iter_...)")
    if (path / "config.json").is_file():
        beside = path.parent / "run.yaml"
        if (path.parent / "checkpoints").is_dir() and beside.is_file():  # an export inside its run
            return Source(str(path), path, False, load_config(beside), beside)
        return Source(str(path), path, False)
    found = path if (path / "meta.json").is_file() else _newest(path)
    if found is None:
        raise EvaluationError(f"{path} is neither a Hugging Face folder (it has no config.json) nor a run with a checkpoint (it has no iter_... "
                              "folder); give one of them")
    settings = found / "run.yaml"
    if not settings.is_file():
        raise EvaluationError(f"{found} is not a whole checkpoint: it has no run.yaml; give an earlier one")
    run = load_config(settings)
    if run.grpo is not None:
        raise EvaluationError(f"{found} is a teacher in training ({settings} has a grpo section), which continues no text; measure it with "
                              f"tools/measure_{'judge' if run.grpo.task == 'judge' else 'rewriter'}.py")
    return Source(str(path), found, True, run, settings)


def _newest(path: Path) -> Path | None:
    candidates = [*path.glob("iter_[0-9]*"), *path.glob("checkpoints/iter_[0-9]*")]
    return max((folder for folder in candidates if folder.is_dir()), key=lambda folder: (len(folder.name), folder.name), default=None)
