"""Measurements of this project beside named peers, in alternation, in one run. tools/bench.py is their command line.

    common        the machine, timed commands, medians
    preprocess    text to tokens: rates beside Megatron-LM's tool, memory, one long document
    pairs         a dataset of many pairs: time and memory to open it
    checkpoint    what a save costs the training
    stub_server   a teacher whose answers cost nothing but their latency
    fleet         questions a second of the teacher's client beside bare httpx
    overlap       judging beside training against a client that waits for the whole step

A measurement takes the parsed command line and a scratch folder, prints its table and returns its numbers.
"""
