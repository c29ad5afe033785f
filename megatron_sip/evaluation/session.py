"""One evaluation from its command line to its report; what tools/evaluate.py does.

In: parsed flags. Out: a :class:`~.report.Report`. What can be wrong with flags and files is found before a model is loaded or a server started.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.config import DataSection, JudgeSection, PoolSection, RunConfig, RunSection, TeacherSection, load_config
from megatron_sip.evaluation import EvaluationError
from megatron_sip.evaluation.evaluators import Evaluator, Evaluators, parse_evaluators
from megatron_sip.evaluation.folders import Source, locate
from megatron_sip.evaluation.independence import TrainingJudge, training_judges
from megatron_sip.evaluation.report import Report
from megatron_sip.evaluation.suites import Context, Section, suites


@dataclass(frozen=True)
class Settings:
    """What flags and configurations come to.

    Attributes:
        data, seed, quorum: as in the run.
        judges: that trained A or B, as far as is known.
        evaluators: to be asked.
        notes: for the report.
    """

    source_a: Source
    source_b: Source
    data: DataSection
    seed: int
    quorum: float
    judges: list[TrainingJudge]
    evaluators: list[Evaluator]
    notes: tuple[str, ...] = ()


def settle(arguments: argparse.Namespace) -> Settings:
    """Settings of the configuration (``--config``, else the run.yaml of A, else of B), then the flags.

    Raises:
        ConfigError, EvaluationError: something is missing, damaged or contradicts itself.
    """
    a, b = locate(arguments.model), locate(arguments.against)
    config = load_config(arguments.config, arguments.overrides) if arguments.config is not None else _of_runs(a, b, arguments.overrides)
    if config is None and not arguments.data:
        raise EvaluationError(f"neither {a.name} nor {b.name} is a run, so its data is not known; give --config, or --data and --tokenizer-model")
    if config is None and arguments.overrides:
        raise EvaluationError("section.key=value needs --config, or a run to be evaluated")
    data, teacher = (config.data, config.teacher) if config is not None else (DataSection(), TeacherSection())
    if arguments.data:
        data.blend = [(1.0, Path(prefix)) for prefix in arguments.data]
    if arguments.tokenizer_model:
        data.tokenizer_model = arguments.tokenizer_model
    judges, notes = _judges_of(a, b, config, arguments)
    evaluators = parse_evaluators(arguments.evaluator, judges, allow_training_judge=arguments.allow_training_judge, device=arguments.device)
    if not arguments.evaluator and not arguments.no_judge and (own := own_judges(teacher, arguments)):
        evaluators = [own]
    if arguments.evaluator and notes:
        notes = (*notes, "It is therefore not known whether an evaluator is independent.")
    seed, quorum = (config.run.seed, config.pool.quorum) if config is not None else (RunSection().seed, PoolSection().quorum)
    return Settings(a, b, data, seed, quorum, judges, evaluators, notes if arguments.evaluator else ())


def own_judges(teacher: TeacherSection, arguments: argparse.Namespace) -> Evaluator | None:
    """The run's judges, marked; None without a model. EvaluationError: servers of no model."""
    if arguments.teacher_model:
        teacher.model = arguments.teacher_model
    if arguments.teacher_url:
        teacher.urls = arguments.teacher_url
    if not teacher.model:
        if arguments.teacher_url:
            raise EvaluationError("--teacher-url names servers, but nothing says which model they serve; give --teacher-model as well")
        return None
    # Two continuations are one pair; pivot would look for the original among them.
    asked = teacher.judges or [JudgeSection(kind="likelihood")]
    judges = [judge.model_copy(update={"strategy": "all_pairs", "swiss_rounds": None}) for judge in asked]
    return Evaluator("judge", teacher.model_copy(update={"judges": judges}), trained_on=True, of_run=True)


def run(arguments: argparse.Namespace) -> Report:
    """Evaluate; what was started is stopped in every case.

    Raises:
        ConfigError, EvaluationError, DataError, TeacherError, ServerError, OSError: with the flag, file or server and the remedy.
    """
    settings = settle(arguments)
    wanted = [(suite, prepared) for suite in suites() if (prepared := suite.prepare(arguments)) is not None]
    _check_places(arguments)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evaluate-")))
        evaluators = Evaluators(settings.evaluators, seed=settings.seed, quorum=settings.quorum, device=arguments.device,
                                timeout=arguments.judge_timeout, scratch=scratch, say=_say)
        stack.callback(evaluators.close)
        evaluators.check()
        context = _load(arguments, settings, scratch, evaluators)
        sections: list[Section] = []
        for suite, prepared in wanted:
            sections += suite.run(context, prepared)
    return Report(format=2, model_a=settings.source_a.name, model_b=settings.source_b.name, seed=settings.seed, max_tokens=context.max_tokens,
                  temperature=arguments.temperature, evaluators=tuple(one.told() for one in settings.evaluators), notes=settings.notes,
                  sections=tuple(sections))


def _load(arguments: argparse.Namespace, settings: Settings, scratch: Path, evaluators: Evaluators) -> Context:
    from transformers.utils.logging import disable_progress_bar

    from megatron_sip.data.tokenizer import Tokenizer
    from megatron_sip.evaluation.embedding import SentenceEmbedder
    from megatron_sip.evaluation.models import TrainedModel
    from megatron_sip.evaluation.toxicity import ToxicityClassifier

    disable_progress_bar()
    tokenizer = Tokenizer(settings.data.tokenizer_model)
    parts: dict[str, Any] = {"embedder": None if arguments.no_embedding else SentenceEmbedder(arguments.device),
                             "classifier": None if arguments.no_toxicity else ToxicityClassifier()}
    for name, source in (("model_a", settings.source_a), ("model_b", settings.source_b)):
        if source.is_checkpoint:
            _say(f"exporting {source.folder}")
        parts[name] = TrainedModel(source.hf_folder(scratch / name), vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id,
                                   temperature=arguments.temperature, top_p=arguments.top_p, batch_size=arguments.batch_size, device=arguments.device)
    return Context(tokenizer=tokenizer, seed=settings.seed, max_tokens=arguments.max_tokens or settings.data.suffix_length, data=settings.data,
                   pairs=arguments.pairs, evaluators=evaluators, device=arguments.device, say=_say, **parts)


def _of_runs(a: Source, b: Source, overrides: list[str]) -> RunConfig | None:
    file = a.run_file or b.run_file
    return None if file is None else load_config(file, overrides)


def _judges_of(a: Source, b: Source, config: RunConfig | None, arguments: argparse.Namespace) -> tuple[list[TrainingJudge], tuple[str, ...]]:
    """Judges that trained the models, from each model's own run.yaml or else from --config; and for which model nothing says so."""
    judges, notes = [], []
    for source in (a, b):
        if source.run is not None:
            judges += training_judges(source.run, str(source.run_file))
        elif config is not None and arguments.config is not None:
            judges += training_judges(config, str(arguments.config))
        else:
            notes.append(f"Nothing says which judges trained {source.name} (it has no run.yaml, and --config is not given).")
    return list(dict.fromkeys(judges)), tuple(notes)


def _check_places(arguments: argparse.Namespace) -> None:
    """Optional packages, and the place of the report, before models are loaded."""
    from megatron_sip.evaluation import toxicity

    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        if arguments.output.is_dir() or not os.access(arguments.output.parent, os.W_OK):
            raise EvaluationError(f"--output {arguments.output} cannot be written: it is a folder, or its folder takes no files; give another file")
    if not arguments.no_toxicity and not toxicity.installed():
        toxicity.ToxicityClassifier()  # says what is missing


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
