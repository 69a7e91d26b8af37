"""Failures that a subcommand explains in one line instead of a traceback."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable


class CommandError(Exception):
    """The message is all that the user needs to see."""


def require(modules: Iterable[str], extra: str) -> None:
    """Raises CommandError, naming the extra to install, unless every module can be found."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f'needs {", ".join(missing)}: pip install "a3fta-kernels[{extra}]"')
