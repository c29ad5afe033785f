"""Documents -> tokens -> pairs on disk -> pairs in a batch."""

from __future__ import annotations


class DataError(RuntimeError):
    """Input or dataset that cannot be used; the message names file, line or key and the remedy."""


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for halves of a character: JSON may hold such ("\\ud83d"), UTF-8 and tokenizers cannot."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
