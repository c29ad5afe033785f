"""A verdict as probabilities, from the log-probabilities of an answer's first token. Nothing is sampled, so one question says it all.

In: a question with its choices and a server that returns log-probabilities of what it generates (vLLM; others under ``logprobs``).
Out: choice -> probability, renormalised over the choices; ``None`` for no answer.

A token counts for the one choice that begins with it; one that begins several, or none, counts for nothing. vLLM masks what is
no choice before it takes log-probabilities, so there the choices have all the mass. A server that does not may say something
else; below ``_LEAST_MASS`` on the choices its answer is no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_sip.config import JudgeSection
from megatron_sip.teacher.fleet import Fleet, Replica, Unreadable
from megatron_sip.teacher.questions import Question

TOP_LOGPROBS = 20  # what servers give at most; three words have no more beginnings than that
_LEAST_MASS = 0.5
PROBE = Question("Which letter is the first of the alphabet? A or B", ("A", "B"))


def logprob_request(model: str, question: Question, dialect: str) -> dict[str, Any]:
    """Body of a chat completion of one token with its alternatives.

    Temperature 1 and no nucleus: servers differ in whether log-probabilities come before or after these, and so it makes no difference.
    """
    prompt, more = question.prompt, {}
    if dialect == "choice":
        more["structured_outputs"] = {"choice": list(question.choices)}
    else:
        prompt += f"\n\nAnswer with one word: {' or '.join(question.choices)}."
    return {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 1.0, "top_p": 1.0, "max_tokens": 1,
            "logprobs": True, "top_logprobs": TOP_LOGPROBS, **more}


def read_logprobs(data: Any, choices: Sequence[str]) -> dict[str, float]:
    """Choice -> probability, in the decoded answer of a chat completion; the sum is 1.

    Raises:
        Unreadable: no log-probabilities, or less than half of the probability on the choices.
    """
    try:
        alternatives = data["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        tokens = [(one["token"].strip(), float(one["logprob"])) for one in alternatives]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise Unreadable("no log-probabilities of the answer") from None
    mass = dict.fromkeys(choices, 0.0)
    for token, logprob in tokens:
        meant = [choice for choice in choices if token and choice.startswith(token)]
        if len(meant) == 1 and logprob <= 1e-6:  # a NaN compares false and counts for nothing
            mass[meant[0]] += math.exp(logprob)
    total = math.fsum(mass.values())
    if total < _LEAST_MASS:
        raise Unreadable(f"only {total:.2f} of the probability is on {' or '.join(choices)}")
    return {choice: value / total for choice, value in mass.items()}


async def lacks_logprobs(fleet: Fleet, replica: Replica, model: str, judges: Sequence[JudgeSection]) -> str | None:
    """What keeps ``replica`` from judging by log-probabilities, if any judge of the run does; ``None`` if nothing.

    Raises:
        ValueError: a fault that may pass.
    """
    if not any(section.use_logprobs for section in judges):
        return None
    remedy = "teacher.judges[].use_logprobs=true needs them: serve the model by vLLM, or set it to false"
    status, data = await fleet.send(replica, "POST", "/chat/completions", logprob_request(model, PROBE, replica.dialect))
    if status in (400, 422):
        return f"teacher server {replica.url} refuses a question for log-probabilities (HTTP {status}: {data!s:.200}); {remedy}"
    if status != 200:
        raise ValueError(f"HTTP {status}: {data!s:.200}")
    try:
        read_logprobs(data, PROBE.choices)
    except Unreadable as error:
        return f"teacher server {replica.url} gives no usable log-probabilities of its answers ({error}); {remedy}"
    return None
