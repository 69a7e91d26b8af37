"""The failures that a person who trains can mend: a file, a setting, a full disk or GPU."""

from __future__ import annotations

# PyTorch's, and what libraries say that find no room to work in
_TOO_LITTLE = ("out of memory", "ALLOC_FAILED", "unable to find an engine")


class TrainingError(Exception):
    """The message says what was expected, what came, and what to do; no traceback is needed."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU had too little memory, of which CUDA's libraries have no class."""
    return any(words in str(error) for words in _TOO_LITTLE)
