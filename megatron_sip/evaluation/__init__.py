"""Two trained models side by side, on prefixes that neither has seen.

In: two Hugging Face folders and held-out pairs. Out: a :class:`Report` as table, JSON and texts to read.

- ``models``      a Hugging Face folder: greedy continuations, loss of the original suffixes
- ``statistics``  plain numbers about a continuation; win rates and differences with bootstrap intervals
- ``embedding``   similarity of two texts under a small sentence-embedding model
- ``compare``     asks all of the above, and the teacher's judges, about every prefix
- ``report``      the table, the JSON file, continuations side by side
"""


class EvaluationError(RuntimeError):
    """An evaluation that cannot be made; the message names the file or setting and the remedy."""
