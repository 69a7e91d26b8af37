"""Adapters on the Hub: a repository's name in the place of a folder."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from .adapter_file import CONFIG_NAME, WEIGHTS_NAME, refuse


def is_repository(name: object) -> bool:
    """Whether this is no folder here, but may be a repository: `owner/name`."""
    named = isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
    return named and not Path(str(name)).exists()


def download(
    repository: str, revision: str | None, subfolder: str | None, token: str | bool | None
) -> Path:
    """The folder in the cache that holds the repository's adapter.

    Raises AdapterFileError where the repository, the revision or the adapter is not there, or
    cannot be asked for.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(name: str) -> Path:
        return Path(
            hf_hub_download(
                repository, name, revision=revision, subfolder=subfolder, token=token
            )
        )  # fmt: skip

    try:
        weights = fetch(WEIGHTS_NAME)
        # the weights hold the settings too; reading them warns
        with contextlib.suppress(EntryNotFoundError):
            fetch(CONFIG_NAME)
    except (OSError, ValueError) as error:  # the Hub's own errors are of these
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        refuse(
            Path(repository),
            "a folder, or a repository of the Hub with an adapter",
            f"neither ({first})",
            error,
        )
    return weights.parent
