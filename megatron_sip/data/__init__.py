"""Documents -> tokens -> pairs on disk -> pairs in a batch."""

from __future__ import annotations


class DataError(RuntimeError):
    """Input or dataset that cannot be used; the message names file, line or key and the remedy."""
