"""Encoded photos and texts on disk, so that a second run does not encode them again.

One safetensors file per entry, named by what it was made from. An entry is never trusted: it
carries its key and a checksum, and one that is damaged, cut off or foreign is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..adapter_file import replace
from .records import explained

logger = logging.getLogger("a3fta_kernels")


class Cache:
    """Tensors by what they were made from, in `folder`; with None nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            with explained(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def get(
        self, key_parts: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors that `make` gave for this key, on the CPU; it is called if there are none.

        Args:
            key_parts: everything that the tensors depend on, as JSON has it.
        """
        key = json.dumps(key_parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        if self.folder is None:
            return _on_cpu(make())
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        kept = _read(path, key)
        if kept is not None:
            return kept
        tensors = _on_cpu(make())
        blob = save(tensors, {"entry": json.dumps({"key": key, "sha256": _checksum(tensors)})})
        with explained(self.folder):
            replace({path: blob})
        return tensors


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies with memory of their own, as a file would give them."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes: a safetensors file without metadata is just these."""
    return hashlib.sha256(save(tensors)).hexdigest()


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The entry's tensors; None, with a line in the log, if it is not whole."""
    try:
        blob = path.read_bytes()
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        entry = json.loads(header["__metadata__"]["entry"])
        tensors = load(blob)
        if entry["key"] != key:
            raise ValueError("an entry of another key")
        if entry["sha256"] != _checksum(tensors):
            raise ValueError("the checksum differs")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning("%s is not a whole entry of the cache (%s): made again", path, reason)
        return None
    return tensors
