"""The failure that a person who trains can mend: a file, a setting, a full disk."""

from __future__ import annotations


class TrainingError(Exception):
    """The message says what was expected, what came, and what to do; no traceback is needed."""
