"""The whole tree: :class:`RunConfig`, of sections."""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_sip.config.evaluation import EvaluationSection
from megatron_sip.config.rules import contradictions
from megatron_sip.config.sections import (
    CheckpointSection,
    DataSection,
    DebugSection,
    GrpoSection,
    HealthSection,
    LogSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    ParallelSection,
    PoolSection,
    RolloutSection,
    RunSection,
    Section,
    TeacherSection,
    TrainSection,
)


class RunConfig(Section):
    """A whole run. Every field is documented by ``python -m megatron_sip.train --help``."""

    run: RunSection = Field(default_factory=RunSection, description="Name, folder and seed.")
    data: DataSection = Field(default_factory=DataSection, description="What is read.")
    model: ModelSection = Field(default_factory=ModelSection, description="The policy (Llama shape).")
    parallel: ParallelSection = Field(default_factory=ParallelSection, description="Layout over ranks; what is left of the world size is data parallel.")
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection, description="AdamW and its schedule.")
    train: TrainSection = Field(default_factory=TrainSection, description="Batch, steps and evaluation.")
    pool: PoolSection = Field(default_factory=PoolSection, description="Who is in the pool and how one is chosen.")
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="How the policy writes candidates.")
    teacher: TeacherSection = Field(default_factory=TeacherSection, description="The post-trained model that rewrites and judges.")
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection, description="The loss.")
    grpo: GrpoSection | None = Field(None, description="Train a judge or a rewriter instead of a policy: pool.rollouts answers to each prompt, and GRPO in the place of `objective`.")
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection, description="Saving and resuming.")
    log: LogSection = Field(default_factory=LogSection, description="Console, wandb, audit file.")
    health: HealthSection = Field(default_factory=HealthSection, description="Alarms about the judge and about rollouts that please it by meaning nothing.")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="Small evaluations of what the policy writes, while it trains.")
    debug: DebugSection = Field(default_factory=DebugSection, description="Record and replay.")

    @property
    def seq_length(self) -> int:
        """Tokens of one sequence: prefix plus suffix, or prompt plus answer."""
        if self.grpo is not None:
            return self.grpo.prompt_length + self.grpo.answer_length
        return self.data.prefix_length + self.data.suffix_length

    @property
    def has_reference(self) -> bool:
        """True if the loss compares the policy with a reference model."""
        weight = self.objective.dpo_weight if self.grpo is None else self.grpo.kl_weight
        return weight > 0 and self.objective.reference != "none"

    @property
    def asks_judge(self) -> bool:
        """True if some step of this run asks the judge."""
        if self.grpo is not None:
            return self.grpo.task == "rewrite"
        more_than_one = self.pool.original + self.pool.rewrite + self.pool.rollouts > 1
        return more_than_one and self.pool.selection == "judge" and not self.debug.replaying

    @property
    def asks_teacher(self) -> bool:
        """True if some step of this run needs the teacher, as judge or as rewriter."""
        return self.asks_judge or (self.pool.rewrite and not self.debug.replaying)

    @property
    def evaluates(self) -> bool:
        """True if some step of this run evaluates what the policy writes."""
        return self.evaluation.interval > 0 and not self.debug.generate_only

    @property
    def needs_engine(self) -> bool:
        """True if the policy writes: rollouts, or continuations of held-out prefixes."""
        return (self.pool.rollouts > 0 and not self.debug.replaying) or self.evaluates

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if problems := contradictions(self):
            raise ValueError("\n".join(problems))
        return self
