"""One typed tree for a whole run.

In: a YAML file (``--config``), which may name a ``base`` file, and dotted overrides (``optimizer.lr=1e-4``).
Out: a validated :class:`RunConfig`; ``--help`` and ``--print_config`` are generated from the same tree.

    sections.py    every setting, its type, default and meaning
    evaluation.py  the same, of evaluations
    rules.py       what sections must agree about; layouts
    tree.py        the sections together
    load.py        YAML in, YAML and help text out

Unknown keys, wrong types and impossible parallel layouts are refused here, before anything starts.
"""

from megatron_sip.config.evaluation import EvaluationSection, EvaluatorSection
from megatron_sip.config.load import describe, dump_config, load_config, parse_section
from megatron_sip.config.rules import check_layout
from megatron_sip.config.sections import (
    CheckpointSection,
    ConfigError,
    DataSection,
    DebugSection,
    GrpoSection,
    HealthSection,
    JudgeSection,
    LogSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    ParallelSection,
    PoolSection,
    RewriterSection,
    RolloutSection,
    RunSection,
    Section,
    TeacherSection,
    TrainSection,
)
from megatron_sip.config.tree import RunConfig

__all__ = [
    "CheckpointSection",
    "ConfigError",
    "DataSection",
    "DebugSection",
    "EvaluationSection",
    "EvaluatorSection",
    "GrpoSection",
    "HealthSection",
    "JudgeSection",
    "LogSection",
    "ModelSection",
    "ObjectiveSection",
    "OptimizerSection",
    "ParallelSection",
    "PoolSection",
    "RewriterSection",
    "RolloutSection",
    "RunConfig",
    "RunSection",
    "Section",
    "TeacherSection",
    "TrainSection",
    "check_layout",
    "describe",
    "dump_config",
    "load_config",
    "parse_section",
]
