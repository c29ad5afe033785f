"""What a run will cost, before it runs: configuration and hardware in, questions, FLOPs, GPUs, time, energy and memory out.

    hardware     named GPUs (vendor data sheets), efficiencies (assumptions)
    shapes       size and shape of policy and judge
    asking       one judge's questions about a pool: rounds, by the strategies' own code, and requests
    workload     configuration -> questions and tokens of a step, and what a prefix cache spares
    costs        FLOPs, bytes moved and seconds of trainer, rollouts and judge
    memory       bytes a GPU
    pipeline     seconds of a step from the seconds of its parts, at staleness 0 and 1 (closed form)
    simulate     the same by discrete events, question by question
    measured     rates of the user's machine from metrics.jsonl or a file
    given        configuration and options -> layout, models, work of the steps
    sizing       how many servers, and what a step takes with them
    plan         puts these together: how long, how much energy
    backtest     how well measured rates predict
    report       a plan as text

Pure Python; imports no torch, no Megatron and no network. docs/planning.md has the formulas.
"""

from __future__ import annotations


class PlanError(ValueError):
    """A plan that cannot be made; the message names what is impossible and the remedy."""
