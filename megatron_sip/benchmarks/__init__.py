"""Measurements of this project beside named peers, in alternation, in one run. tools/bench.py is their command line.

    common        the machine, timed commands, medians
    preprocess    text to tokens: rates beside Megatron-LM's tool, memory, one long document
    pairs         a dataset of many pairs: time and memory to open it
    checkpoint    what a save costs the training
    stub_server   a teacher whose answers cost nothing but their latency
    fleet         questions a second of the teacher's client beside bare httpx
    models        policies of 5 to 124 million parameters, the processor's own limits, peaks of memory
    train         forward and backward beside transformers' Llama
    preference    the preference step: packed pairs against whole sequences
    step          whole steps of online DPO beside TRL's trainer
    rollout       the in-process sampler beside transformers' generate and vLLM
    scaling       the preference step in several layouts
    sync          new weights for rollout servers
    start         from the command to the end of the first step
    overlap       judging beside training against a client that waits for the whole step

A measurement takes the parsed command line and a scratch folder, prints its table and returns its numbers.
"""
