"""The post-trained model, reached over HTTP: rewrites and verdicts. Text in, verdicts out; imports no torch.

    client.Teacher   what a trainer holds: judge(pool), rewrite(pair, ...), metrics(), close()
    judge            scores of a pool: verdicts of quality, safety, factuality
    strategies       which pairs are asked, and what the answers make of each candidate
    logprobs         verdicts as probabilities
    likelihood       scores of a pool: log-probabilities under the teacher, with a guard against copying
    rewriter         rewrites of suffixes, kept on disk
    questions        prompt templates -> the exact text of a question; corpus text is fenced in
    verdict          answer -> verdict, or None
    fleet            servers of one model: who is free, deadlines, retries, hedges
    resting          which servers rest, how long nobody has answered
    readiness        does a server do what the run will ask of it?
    replicas_file    servers that join and leave while the run goes on
    server_load      what vLLM's /metrics say
    transport        HTTP
    probes           text spoilt by rule, to measure a judge
    serve            local vLLM servers of the teacher
    prompts/         the templates
"""

from __future__ import annotations


class TeacherError(RuntimeError):
    """The teacher cannot be used; the message names server, file or setting and the remedy."""
