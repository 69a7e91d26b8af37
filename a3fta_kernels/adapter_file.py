"""The adapter file: `adapter_model.safetensors` and its readable twin `adapter_config.json`.

The safetensors file stands alone. Its metadata holds the format version, the library version,
the adapter's config, the fingerprint of the base, and a SHA-256 over all of that and over every
tensor's name, dtype, shape and bytes; and what is only told (`about`), which older files and
readers of a file's weights do without. The twin repeats what a person wants to read, with a
checksum of its own and the SHA-256 of the weights file. Both are read as data: nothing is
unpickled.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = 1

_MAX_HEADER = 100_000_000  # safetensors' own limit
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_METADATA = ("format", "a3fta_format", "library_version", "config", "base", "samples", "sha256")
_CONFIG_KEYS = ("a3fta_format", "library_version", "config", "base", "weights", "sha256")
_OPTIONAL = {"about"}  # not in the first files of this version


class AdapterFileError(ValueError):
    """An adapter file that is damaged, foreign, or does not fit the model."""


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    tensors: named `<layer name>.<parameter>`; config: `AdapterConfig.to_dict()`; base: the class
    of the model and the shapes of the adapted layers, None for what is not known; samples: some of
    those layers' weights; about: where it comes from, for people.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    base: Mapping[str, Any]
    samples: Mapping[str, Any]
    library_version: str
    about: Mapping[str, Any] = field(default_factory=dict)


def refuse(path: Path, expected: str, found: str, cause: BaseException | None = None) -> NoReturn:
    raise AdapterFileError(f"{path}: expected {expected}, found {found}") from cause


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    base: Mapping[str, Any],
    samples: Mapping[str, Any],
    library_version: str,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Replaces the adapter in `folder`, which is made where it is missing.

    Weights first: whenever this is interrupted, an adapter that `read` accepts is in place.
    """
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    metadata = {
        "format": "pt",
        "a3fta_format": str(FORMAT_VERSION),
        "library_version": library_version,
        "config": _dump(config),
        "base": _dump(base),
        "samples": _dump(samples),
        "about": _dump(about or {}),
    }
    weights = serialize(tensors, {**metadata, "sha256": _digest(tensors, metadata)})
    twin = {
        "a3fta_format": FORMAT_VERSION,
        "library_version": library_version,
        "config": config,
        "base": base,
        "about": about or {},
        "weights": {"file": WEIGHTS_NAME, "sha256": hashlib.sha256(weights).hexdigest()},
    }
    twin["sha256"] = _twin_digest(twin)
    text = json.dumps(twin, indent=2).encode() + b"\n"
    folder.mkdir(parents=True, exist_ok=True)
    replace({folder / WEIGHTS_NAME: weights, folder / CONFIG_NAME: text})


def read(folder: Path) -> AdapterFile:
    """The checked contents of the adapter in `folder`.

    A twin that is itself sound but describes other weights (a save that was cut between the two
    renames) or is missing gets a warning, and the weights file counts; a damaged twin is refused.

    Raises AdapterFileError for everything else that is not a whole adapter of this format.
    """
    path = folder / WEIGHTS_NAME
    blob, header = _read_weights(path)
    file = _parse_weights(path, blob, header)
    twin_path = folder / CONFIG_NAME
    if not twin_path.exists():
        warnings.warn(
            f"{twin_path} is missing; the settings come from {path.name}, which holds them too",
            stacklevel=3,
        )
        return file
    twin = _read_twin(twin_path)
    if twin["weights"]["sha256"] != hashlib.sha256(blob).hexdigest():
        warnings.warn(
            f"{twin_path} describes other weights than {path.name} (an interrupted save?); "
            f"the settings come from {path.name}",
            stacklevel=3,
        )
    elif any(
        _dump(twin.get(key, {})) != _dump(getattr(file, key)) for key in ("config", "base", "about")
    ):
        refuse(twin_path, f"the settings that {path.name} holds", "other settings")
    return file


def _read_weights(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The file's bytes and its header; a foreign file is refused before its data is read."""
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                refuse(path, "a safetensors file", f"{size} bytes with a header of {length}")
            text = stream.read(length)
            header = parse_json(path, text)
            _check_metadata(path, header.get("__metadata__"))
            return start + text + stream.read(), header
    except OSError as error:
        refuse(path, "a readable file", error.strerror or type(error).__name__, error)


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or "a3fta_format" not in metadata:
        refuse(path, "an adapter saved by a3fta_kernels", "a safetensors file without its metadata")
    _check_version(path, metadata["a3fta_format"], str(FORMAT_VERSION))
    _check_keys(path, "metadata", metadata, _METADATA)
    for key, value in metadata.items():
        if not isinstance(value, str):
            refuse(path, f"text in metadata {key!r}", type(value).__name__)


def _check_version(path: Path, found: Any, known: Any) -> None:
    if found != known:
        refuse(
            path,
            f"format version {known!r}, the one this library reads",
            f"format version {found!r}; a newer a3fta-kernels may read it",
        )


def _check_keys(path: Path, what: str, values: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    if set(values) - _OPTIONAL != set(keys):
        refuse(path, f"{what} with the keys {', '.join(keys)}", ", ".join(sorted(values)) or "none")


def _parse_weights(path: Path, blob: bytes, header: dict[str, Any]) -> AdapterFile:
    metadata = header["__metadata__"]
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = entry.get("dtype") if isinstance(entry, dict) else entry
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            refuse(path, f"a dtype of {', '.join(_DTYPES)} for {name!r}", repr(dtype)[:80])
    try:
        tensors = parse_tensors(blob)
    except (SafetensorError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        refuse(path, "whole tensors", f"a damaged file ({error})", error)
    signed = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = _digest(tensors, signed)
    if digest != metadata["sha256"]:
        refuse(path, f"contents of SHA-256 {metadata['sha256'][:64]}", digest)
    return AdapterFile(
        path=path,
        tensors=tensors,
        config=parse_json(path, metadata["config"]),
        base=parse_json(path, metadata["base"]),
        samples=parse_json(path, metadata["samples"]),
        library_version=metadata["library_version"],
        about=parse_json(path, metadata.get("about", "{}")),
    )


def _read_twin(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        refuse(path, "a readable file", error.strerror or type(error).__name__, error)
    twin = parse_json(path, text)
    if "a3fta_format" not in twin:
        refuse(path, "the config of an adapter saved by a3fta_kernels", "no key a3fta_format")
    _check_version(path, twin["a3fta_format"], FORMAT_VERSION)
    _check_keys(path, "an object", twin, _CONFIG_KEYS)
    digest = _twin_digest({key: value for key, value in twin.items() if key != "sha256"})
    if digest != twin["sha256"]:
        refuse(
            path, f"settings of SHA-256 {str(twin['sha256'])[:64]}", f"{digest} (was it edited?)"
        )
    weights = twin["weights"]
    if not isinstance(weights, dict) or set(weights) != {"file", "sha256"}:
        refuse(path, "weights with file and sha256", repr(weights)[:80])
    return twin


def parse_json(path: Path, text: bytes | str) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no key twice, finite numbers."""
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError) as error:
        refuse(path, "valid JSON", str(error), error)
    if not isinstance(value, dict):
        refuse(path, "a JSON object", type(value).__name__)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
    return values


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text}")
    return number


def _dump(value: Any) -> str:
    """Compact JSON in the order of the keys, which counts in rank_pattern."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(_dump(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(_dump([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_memory(tensor))
    return digest.hexdigest()


def _memory(tensor: Tensor) -> ctypes.Array[ctypes.c_char] | bytes:
    """The bytes of a contiguous CPU tensor, while it lives."""
    if tensor.nbytes == 0:
        return b""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; unlike the library's writer, the same bytes for the same contents."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    data = []
    end = 0
    # wide elements first, so that all are aligned
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        data.append(_memory(tensor))
    text = _dump(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def _twin_digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(values).encode()).hexdigest()


def replace(files: Mapping[Path, bytes]) -> None:
    """Each file as a whole, or as it was; durable when this returns.

    All are complete on disk under temporary names before the first rename, which go in this order.
    On an error the temporary files go and the error is raised.
    """
    with contextlib.ExitStack() as stack:
        made = {path: stack.enter_context(_temporary(path, data)) for path, data in files.items()}
        for path, new in made.items():
            os.replace(new, path)
    for folder in {path.parent for path in files}:
        sync(folder)


@contextlib.contextmanager
def _temporary(target: Path, data: bytes) -> Iterator[Path]:
    """`data` on disk beside `target`; what the body did not rename is removed."""
    path = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(path, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's renames, durable where the system lets that be asked."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
