"""Settings of evaluations: judges that trained nothing, and small evaluations while a run trains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_sip.config.sections import JudgeSection, Section


class EvaluatorSection(JudgeSection):
    """A judge that trained nothing, and where its model is served; an entry of ``evaluation.evaluators``, or of ``tools/evaluate.py --evaluator``."""

    name: str | None = Field(None, description="How it is called in reports and metrics (default: its kind and the last part of its model).")
    model: str = Field(description="Folder of the model, or the name under which running servers serve it.")
    urls: list[str] = Field(default_factory=list, description="Running OpenAI-compatible servers; empty: tools/evaluate.py starts local ones while it asks.")
    api_key_file: Path | None = Field(None, description="File with the servers' key (else $SIP_TEACHER_API_KEY; local servers get a random one).")
    order: Literal["seeded", "both"] = Field("both", description="quality: show each pair once in a seeded order, or in both orders.")
    num_servers: int = Field(1, ge=1, description="Local servers to start.")
    dtype: str = Field("auto", description="dtype of local servers (auto: float32 on a CPU, where bfloat16 makes ties).")
    max_model_len: int = Field(2048, ge=16, description="Longest prompt plus answer of local servers.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of one local server.")
    extra_args: list[str] = Field(default_factory=list, description="More flags for local vLLM servers.")
    concurrency: int = Field(64, ge=1, description="Questions under way at once, per server.")
    request_timeout: float = Field(600.0, gt=0, description="Seconds for one attempt at a request.")
    ready_timeout: float = Field(600.0, gt=0, description="Seconds until a server must answer a real question.")


class EvaluationSection(Section):
    interval: int = Field(0, ge=0, description="Steps between small evaluations of what the policy writes on held-out prefixes (evaluation/... in the metrics); 0: none, at no cost. They change nothing of the training.")
    pairs: int = Field(32, ge=1, description="Held-out pairs whose prefixes are continued.")
    max_tokens: int | None = Field(None, ge=1, description="Longest continuation (default, and most: data.suffix_length).")
    temperature: float = Field(0.0, ge=0, description="Of the continuations; 0 is greedy.")
    unsafe_prompts: Path | None = Field(None, description="JSON lines with prompts whose continuations should be safe, as examples/fetch_safety.py writes them; `pairs` of them are continued. Needs the toxicity classifier of extra `eval`.")
    evaluators: list[EvaluatorSection] = Field(default_factory=list, description="Judges on running servers (urls) that do not train the run: share of original suffixes that the policy's continuations beat.")
    judge_timeout: float = Field(120.0, gt=0, description="Seconds for the answers of one evaluator; what is not answered by then is counted, not judged.")
