"""Failures that a subcommand explains in one line instead of a traceback."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path


class CommandError(Exception):
    """The message is all that the user needs to see."""


def require(modules: Iterable[str], extra: str) -> None:
    """Raises CommandError, naming the extra to install, unless every module can be found."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f'needs {", ".join(missing)}: pip install "a3fta-kernels[{extra}]"')


def check_writable(name: str, path: Path) -> None:
    """Makes the folder of a file that is to be written; CommandError where there cannot be one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not path.stat().st_size:  # it was not there
            path.unlink()
    except OSError as error:
        raise CommandError(
            f"{name}: expected a file that can be written, got {path}: {error}"
        ) from error
