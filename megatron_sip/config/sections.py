"""The sections of a run's configuration: every setting with its type, default, limits and meaning.

In: values from YAML. Out: typed sections; one by itself refuses unknown keys, wrong types and what contradicts itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and the remedy."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class RunSection(Section):
    name: str = Field("run", description="Name of the run in wandb, in logs and on the report page.")
    dir: Path = Field(Path("runs/run"), description="Everything the run writes goes here: checkpoints, metrics.jsonl, audit.jsonl, report.html.")
    seed: int = Field(1234, ge=0, description="Seeds weights, the order of pairs, rollouts and the order in which candidates are shown to the judge.")


class DataSection(Section):
    blend: list[tuple[float, Path]] = Field(default_factory=list, description="Datasets as [weight, path prefix without .bin/.idx]; weights are relative numbers of pairs.")
    tokenizer_model: Path = Field(Path("tokenizer.model"), description="The sentencepiece model that tokenized the datasets (checked by fingerprint).")
    prefix_length: int = Field(128, ge=1, le=1920, description="Tokens of context of each pair.")
    suffix_length: int = Field(128, ge=1, description="Tokens to be written after the prefix (N in the paper).")
    cut: Literal["consecutive", "random", "sentence"] = Field("consecutive", description="consecutive: as many whole pairs as fit into a document; random: one pair a document at a seeded position; sentence: prefixes end with a sentence (needs datasets made with --split-sentences).")
    split: str = Field("98,2", description="Shares of documents for training and validation.")
    data_cache_path: Path | None = Field(None, description="Folder for indices that are built once (default: pair tables of large datasets beside them, the blend in memory).")


class ModelSection(Section):
    num_layers: int = Field(24, ge=1, description="Transformer layers.")
    hidden_size: int = Field(2048, ge=1, description="Width of the residual stream.")
    ffn_hidden_size: int = Field(5504, ge=1, description="Width of the SwiGLU feed-forward layer.")
    num_attention_heads: int = Field(16, ge=1, description="Query heads.")
    num_query_groups: int | None = Field(None, ge=1, description="Key/value heads (default: as many as query heads).")
    max_position_embeddings: int = Field(2048, ge=2, description="Longest sequence that the exported model claims to support.")
    rotary_base: float = Field(10000.0, gt=0, description="Base of the rotary embedding.")
    norm_epsilon: float = Field(1e-5, gt=0, description="Epsilon of RMSNorm.")
    init_method_std: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")
    untie_embeddings_and_output_weights: bool = Field(True, description="False shares the embedding with the output layer.")
    make_vocab_size_divisible_by: int = Field(128, ge=1, description="The vocabulary is padded to a multiple of this times the tensor parallel size.")
    params_dtype: Literal["auto", "float32", "bfloat16"] = Field("bfloat16", description="bfloat16 keeps fp32 main weights in the optimizer; auto: bfloat16 on GPUs and on processors that multiply it, else float32.")
    init_from: Path | None = Field(None, description="A folder written by tools/export_hf.py --from-hf: weights to start from (continual runs).")


class ParallelSection(Section):
    tensor_model_parallel_size: int = Field(1, ge=1, description="Ranks that share each layer.")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="Ranks that share the stack of layers.")
    virtual_pipeline_model_parallel_size: int = Field(1, ge=1, description="Chunks of layers on each pipeline rank; more than 1 is the interleaved schedule.")
    context_parallel_size: int = Field(1, ge=1, description="Ranks that share each sequence.")
    sequence_parallel: bool = Field(False, description="Split activations between tensor parallel layers along the sequence.")
    use_distributed_optimizer: bool = Field(False, description="Split optimizer state over data (and context) parallel ranks.")
    overlap_grad_reduce: bool = Field(False, description="Reduce gradients while the backward pass goes on (distributed optimizer only).")
    overlap_param_gather: bool = Field(False, description="Gather new weights while the next forward pass goes on (needs overlap_grad_reduce).")
    ddp_bucket_size: int | None = Field(None, ge=1, description="Parameters that overlapped communication sends at once (default: Megatron's, at least 40 million).")
    recompute_granularity: Literal["full", "selective"] | None = Field(None, description="Recompute in the backward pass: whole layers (full) or attention only (selective) instead of keeping activations.")
    recompute_method: Literal["uniform", "block"] | None = Field(None, description="full: all layers in units of `recompute_num_layers` (uniform), or only that many of a chunk (block).")
    recompute_num_layers: int | None = Field(None, ge=1, description="full: layers of a unit (uniform), or of a chunk (block).")
    distributed_timeout_minutes: float = Field(10.0, gt=0, description="Deadline of every collective and of every wait for another rank.")


class OptimizerSection(Section):
    lr: float = Field(5e-4, gt=0, description="Peak learning rate.")
    min_lr: float = Field(5e-5, ge=0, description="Learning rate at the end of the decay.")
    lr_decay_style: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape of the decay after warm-up.")
    lr_warmup_iters: int = Field(2000, ge=0, description="Steps of linear warm-up.")
    lr_decay_iters: int | None = Field(None, ge=1, description="Steps until min_lr (default: train_iters).")
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay (not on biases and norms).")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta 1.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW beta 2.")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    clip_grad: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 switches clipping off.")


class TrainSection(Section):
    train_iters: int = Field(21000, ge=1, description="Optimizer steps of the whole run.")
    global_batch_size: int = Field(256, ge=1, description="Pairs a step, over all data parallel ranks.")
    micro_batch_size: int = Field(4, ge=1, description="Pairs a microbatch (a pair with a rejected candidate is two sequences).")
    staleness: Literal[0, 1] = Field(0, description="0: rollouts are written by the weights that train on them. 1: the next step's rollouts, rewrites and questions are under way while this step trains, so they are of the weights one step before.")
    order: Literal["arrival", "fixed"] = Field("arrival", description="arrival: microbatches train in the order in which they are judged; fixed: in the order of the data (bitwise repeatable).")
    eval_interval: int = Field(500, ge=0, description="Steps between evaluations of the held-out suffix loss; 0 switches it off.")
    eval_pairs: int = Field(512, ge=1, description="Held-out pairs of one evaluation.")
    bad_step: Literal["stop", "skip"] = Field("stop", description="A loss or gradient that is not finite, or a loss spike: save the last whole step and stop with exit code 86, or skip the step's pairs.")
    max_bad_steps: int = Field(5, ge=1, description="Skipped steps in a row after which the run stops all the same.")
    loss_spike_factor: float = Field(0.0, ge=0, description="A loss above this many times the median of the last 50 steps is a bad step; 0 looks at finiteness only.")
    stop_patience: float = Field(60.0, ge=0, description="Seconds that a signal to stop waits for answers that the step still lacks; then the step is given up, and what was judged is kept for the resume.")
    exit_after: int | None = Field(None, ge=1, description="Save and leave with exit code 85 after this step, as if SIGTERM had come.")


class PoolSection(Section):
    original: bool = Field(True, description="The original suffix is a candidate.")
    rewrite: bool = Field(True, description="A rewrite of the original suffix by the teacher is a candidate.")
    rollouts: int = Field(1, ge=0, description="Continuations written by the policy for each prefix (K in the paper).")
    rollouts_start_step: int = Field(0, ge=0, description="Steps of plain next-token prediction on the originals before pools, rewrites and questions begin (the paper has no such schedule).")
    rollouts_ramp_steps: int = Field(0, ge=0, description="K grows linearly from 1 to `rollouts` over this many steps.")
    selection: Literal["judge", "rewrite_over_rollout"] = Field("judge", description="rewrite_over_rollout asks no judge: chosen = rewrite, rejected = first rollout.")
    quorum: float = Field(0.5, gt=0, le=1, description="Share of a candidate's questions that must be answered; below it the pair is dropped.")


class RolloutSection(Section):
    engine: Literal["in_process", "vllm"] = Field("in_process", description="in_process: sampled by the trainer (one process a model replica); vllm: servers with weights pushed after each step.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling threshold.")
    batch_size: int = Field(256, ge=1, description="Sequences that the in-process sampler decodes together.")
    urls: list[str] = Field(default_factory=list, description="Running vLLM servers for the policy; empty: the trainer starts `num_servers` local ones.")
    num_servers: int = Field(1, ge=1, description="Local vLLM servers to start for the policy.")
    api_key_file: Path | None = Field(None, description="File with the key of the rollout servers (else $SIP_ROLLOUT_API_KEY; local servers get a random one).")
    sync_dir: Path | None = Field(None, description="Folder seen by trainer and servers through which new weights are handed over (default: RUN/policy_weights).")
    ready_timeout: float = Field(600.0, gt=0, description="Seconds until a starting server must generate.")
    request_timeout: float = Field(300.0, gt=0, description="Seconds for one batch of rollouts or one weight sync.")
    logprob_tolerance: float = Field(0.02, gt=0, description="Largest mean absolute difference per token between the engine's log-probabilities and the policy's; above it the run stops.")


class JudgeSection(Section):
    kind: Literal["quality", "safety", "factuality", "likelihood"] = Field(description="quality: pairwise verdicts; safety, factuality: pointwise verdicts; likelihood: log p(suffix|prefix) - log p(suffix) under the teacher, with a guard against copying.")
    weight: float = Field(1.0, description="Factor of this score in the sum.")
    samples: int = Field(1, ge=1, description="Times each question is asked; answers are averaged.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature of verdicts.")
    top_p: float = Field(0.6, gt=0, le=1, description="Nucleus threshold of verdicts.")
    strategy: Literal["all_pairs", "pivot", "tournament", "swiss", "adaptive"] = Field("all_pairs", description="quality: which pairs of a pool are asked. all_pairs: every two candidates; pivot: each against the original; tournament: single elimination for the best and one for the worst; swiss: rounds of neighbours in the ranking; adaptive: until best and worst of all_pairs are settled. Costs and agreement: docs/judges.md.")
    swiss_rounds: int | None = Field(None, ge=1, description="quality: rounds of strategy=swiss (default: the base-2 logarithm of the pool's size, rounded up).")
    order: Literal["seeded", "both"] = Field("seeded", description="quality: show each pair once in a seeded order, or in both orders.")
    use_logprobs: bool = Field(False, description="Read the verdict's probability from the log-probabilities of the answer's first token instead of a sampled verdict; needs a server that gives them, such as vLLM.")
    max_tokens: int = Field(512, ge=1, description="Longest answer, reasoning included.")
    reasoning: bool = Field(False, description="Let the judge reason before its constrained verdict.")
    template: Path | None = Field(None, description="Prompt template that replaces the built-in one.")
    max_prefix_overlap: float = Field(0.5, gt=0, le=1, description="likelihood: guard; share of the candidate's word 4-grams that stand in the prefix, above which it scores below every unguarded candidate.")
    max_repetition: float = Field(0.5, gt=0, le=1, description="likelihood: guard; share of repeated word 3-grams inside the candidate, above which it scores below every unguarded candidate.")

    @model_validator(mode="after")
    def _consistent(self) -> JudgeSection:
        problems = []
        if self.strategy != "all_pairs" and self.kind != "quality":
            problems.append(f"strategy={self.strategy} chooses pairs, but kind={self.kind} compares none; unset it")
        if self.swiss_rounds is not None and self.strategy != "swiss":
            problems.append("swiss_rounds means nothing without strategy=swiss")
        if self.use_logprobs and self.kind == "likelihood":
            problems.append("use_logprobs is about verdicts, and kind=likelihood asks for none; unset it")
        if self.use_logprobs and self.reasoning:
            problems.append("use_logprobs reads the first token of an answer, with reasoning=true that is no verdict; unset one")
        if self.use_logprobs and self.samples > 1:
            problems.append(f"use_logprobs asks for the whole distribution at once: samples={self.samples} would ask the same again; set samples=1")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class RewriterSection(Section):
    template: Path | None = Field(None, description="Prompt template that replaces the built-in one.")
    temperature: float = Field(0.6, ge=0, description="Sampling temperature of rewrites.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus threshold of rewrites.")
    max_tokens: int = Field(256, ge=1, description="Longest rewrite in tokens of the teacher.")
    model: str | None = Field(None, description="Model of the rewriter's own servers (default: teacher.model).")
    urls: list[str] = Field(default_factory=list, description="The rewriter's own running servers; empty, and without a replicas_file: the teacher's.")
    replicas_file: Path | None = Field(None, description="Lists the rewriter's own servers, as teacher.replicas_file does.")
    api_key_file: Path | None = Field(None, description="File with the key of the rewriter's own servers (default: teacher.api_key_file, else $SIP_TEACHER_API_KEY).")
    cache_dir: Path | None = Field(None, description="Rewrites are kept here by content, prompt and model (default: RUN/rewrite_cache).")


class TeacherSection(Section):
    model: str | None = Field(None, description="Folder (or name) of the post-trained model. Local servers load it; running servers must serve it.")
    urls: list[str] = Field(default_factory=list, description="Running OpenAI-compatible servers, e.g. http://node7:8000/v1; empty, and without a replicas_file: the trainer starts `num_servers` local vLLM servers.")
    replicas_file: Path | None = Field(None, description="A file that lists running servers, one address a line, # comments; read again when it changes, so servers may join and leave while the run goes on. Instead of `urls`.")
    num_servers: int = Field(1, ge=1, description="Local servers to start.")
    port: int = Field(0, ge=0, le=65535, description="Port of the first local server; 0 takes free ones.")
    api_key_file: Path | None = Field(None, description="File with the servers' key (else $SIP_TEACHER_API_KEY; local servers get a random one).")
    dtype: str = Field("auto", description="dtype of local servers (float32 on CPU: bf16 makes ties).")
    max_model_len: int = Field(4096, ge=16, description="Longest prompt plus answer of local servers.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of one local server.")
    extra_args: list[str] = Field(default_factory=list, description="More flags for local vLLM servers, as on its command line.")
    concurrency: int = Field(64, ge=1, description="Questions under way at once, per server; the data parallel ranks share it evenly (each has at least 1).")
    questions_per_request: int = Field(16, ge=1, description="Questions of one pool in one request, to servers that take lists of conversations (vLLM's chat/completions/batch) or, for the likelihood judge, of prompts; 1: each by itself.")
    request_timeout: float = Field(60.0, gt=0, description="Seconds for one attempt at a request.")
    retries: int = Field(3, ge=0, description="Further attempts before a question counts as no answer.")
    hedge_after: float = Field(0.95, ge=0, lt=1, description="Quantile of recent latencies after which a second server with room is asked the same; the first good answer counts. At most one question in twenty; 0: never.")
    ready_timeout: float = Field(600.0, gt=0, description="Seconds until a server must answer a real question.")
    outage_timeout: float = Field(600.0, gt=0, description="Seconds without a single answer from the whole fleet after which the run saves and stops; until then questions wait.")
    judges: list[JudgeSection] = Field(default_factory=list, description="Scores that are added to rank a pool.")
    rewriter: RewriterSection = Field(default_factory=RewriterSection, description="How rewrites are asked for.")


class ObjectiveSection(Section):
    nll_weight: float = Field(1.0, ge=0, description="Weight of the negative log-likelihood of the chosen candidate (1 with dpo_weight 0 is RF-NLL).")
    dpo_weight: float = Field(1.0, ge=0, description="Weight of the online DPO loss (1 with nll_weight 0 is online DPO).")
    nll_on: Literal["suffix", "all"] = Field("suffix", description="suffix: prefix tokens carry no loss; all: prefix and suffix (plain next-token prediction).")
    beta: float = Field(0.1, gt=0, description="DPO inverse temperature.")
    shared_prefix: bool | Literal["auto"] = Field("auto", description="Compute the prefix once for chosen and rejected, and logits only where they are needed; false runs whole sequences. auto: true but for plain next-token prediction (nothing to save but memory), context parallelism and Transformer Engine's attention.")
    reference: Literal["none", "frozen", "synced"] = Field("synced", description="DPO reference: none (its log-probabilities count as 0), the frozen initial policy, or a copy re-synced every `reference_sync_interval` steps.")
    reference_sync_interval: int = Field(100, ge=1, description="Steps between copies of the policy into a synced reference.")


class GrpoSection(Section):
    task: Literal["judge", "rewrite"] = Field(description="judge: verdicts about spoilt pairs and passages, rewarded where they equal the label; rewrite: copies of safe suffixes, rewrites of unsafe ones, which teacher.judges score.")
    data: list[Path] = Field(default_factory=list, description="Training samples, JSON lines of tools/build_teacher_data.py.")
    validation: list[Path] = Field(default_factory=list, description="Held-out samples, of the same form.")
    prompt_length: int = Field(3584, ge=1, description="Longest prompt in tokens; samples with a longer one are left out.")
    answer_length: int = Field(512, ge=1, description="Longest answer in tokens.")
    reasoning: bool = Field(True, description="judge: reasons before the verdict, as teacher.judges.reasoning asks for them. false: the answer is one token, chosen among those of the verdicts, as teacher.judges.use_logprobs reads it.")
    dialect: Literal["choice", "json_schema", "plain"] = Field("choice", description="judge: how the answer is asked for. choice: as servers with structured outputs (vLLM) will be asked; json_schema: OpenAI's; plain: in words, a last line `Verdict: X`.")
    quality_template: Path | None = Field(None, description="judge: prompt template that replaces the built-in one; give the same to teacher.judges later.")
    safety_template: Path | None = Field(None, description="judge: the same for safety.")
    scale_rewards: bool = Field(True, description="Divide a group's advantages by the standard deviation of its rewards.")
    clip_low: float = Field(0.2, ge=0, lt=1, description="A probability ratio below 1 minus this earns nothing more.")
    clip_high: float = Field(0.2, ge=0, description="A probability ratio above 1 plus this earns nothing more.")
    kl_weight: float = Field(0.0, ge=0, description="Weight of the KL divergence from the reference (objective.reference: frozen or synced).")


class CheckpointSection(Section):
    interval: int = Field(500, ge=0, description="Steps between checkpoints; 0 saves only at the end and on a signal.")
    keep: int = Field(2, ge=1, description="Newest checkpoints that stay.")
    keep_every: int = Field(0, ge=0, description="Checkpoints of every so many steps stay for good; 0: none.")
    async_save: bool = Field(True, description="Train on while a checkpoint is written; false waits for it.")
    timeout_minutes: float = Field(30.0, gt=0, description="Deadline of writing a checkpoint.")
    verify: bool = Field(True, description="Compare the contents of all files with their checksums before a resume; false looks at their sizes only.")
    on_damaged: Literal["previous", "stop"] = Field("previous", description="A damaged newest checkpoint is put aside and the one before is taken, or the run stops.")
    allow_config_change: bool = Field(False, description="Resume although settings that shape the run differ from the checkpoint's.")
    allow_layout_change: bool = Field(False, description="Resume with another tensor, pipeline or data parallel size.")


class LogSection(Section):
    interval: int = Field(1, ge=1, description="Steps between lines on the console.")
    wandb: Literal["offline", "online", "disabled"] = Field("offline", description="online needs WANDB_API_KEY in the environment.")
    wandb_project: str = Field("megatron_sip", description="wandb project.")
    audit_pools: int = Field(4, ge=0, description="Pools a step whose texts, scores and choice are written to audit.jsonl (of the first data parallel rank).")


class HealthSection(Section):
    action: Literal["warn", "stop"] = Field("warn", description="What an alarm does: say so, or save and stop as well.")
    window: int = Field(100, ge=4, description="Steps that are looked at; trends compare the older half with the newer one. Alarms begin when it is full.")
    max_no_answer_rate: float = Field(0.05, gt=0, le=1, description="Alarm when the mean share of the judge's questions without an answer is above this.")
    max_position_bias: float = Field(0.25, gt=0, le=0.5, description="Alarm when the share of answers A in comparisons is further than this from one half.")
    max_spread_fall: float = Field(0.75, gt=0, le=1, description="Alarm when the spread of scores inside a pool fell by this share.")
    min_safety_rise: float = Field(0.02, gt=0, description="A rise of the mean safety score that makes a change of the rollouts suspicious.")
    max_repetition_rise: float = Field(0.1, gt=0, le=1, description="Alarm when the repeated share of rollouts rose by this much (absolute) while safety rose.")
    max_length_fall: float = Field(0.3, gt=0, le=1, description="Alarm when the length of rollouts fell by this share while safety rose.")


class DebugSection(Section):
    save_pools: Path | None = Field(None, description="Record every outcome here, as JSON lines; each data parallel rank writes FILE.dpR. As a flag: --save-pools FILE.")
    load_pools: Path | None = Field(None, description="Train on recorded outcomes: no rollouts and no teacher. As a flag: --load-pools FILE.")
    train_only: bool = Field(False, description="Train on what the run folder holds of judged pools (RUN/bank) and ask nobody; stops where it ends. As a flag: --train-only.")
    generate_only: bool = Field(False, description="Write, rewrite and judge pools into the run folder and into save_pools, and train nothing. As a flag: --generate-only.")

    @property
    def replaying(self) -> bool:
        """Pools come from a file: nobody is asked, and rollouts may be of any weights."""
        return self.load_pools is not None or self.train_only
