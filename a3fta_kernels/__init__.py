"""A3FTA: adapters between the attention and the projection that consumes its output.

Public names only, each loaded at its first use: the import needs torch, and neither diffusers
nor Triton nor the compiled library.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import memory, ops, processors
    from .adapters import AdapterConfig
    from .attention import fuse_qkv, set_attention, unfuse_qkv
    from .backends import BackendStatus, BackendUnavailableError, backends
    from .captured import Captured
    from .export import export_lora
    from .inject import (
        InjectionReport,
        attn_processors,
        disable_adapters,
        disabled,
        eject,
        enable_adapters,
        freeze_for_inference,
        inject,
        merge,
        projections,
        set_adapters,
        set_trainable,
        trainable_parameters,
        unfreeze,
        unmerge,
    )
    from .lean import LeanReport, lean
    from .per_sample import adapters_per_sample
    from .projection import AdaptedProjection
    from .storage import AdapterFileError, load_adapter, save_adapter

__version__ = "0.1.0"

__all__ = [
    "AdaptedProjection",
    "AdapterConfig",
    "AdapterFileError",
    "BackendStatus",
    "BackendUnavailableError",
    "Captured",
    "InjectionReport",
    "LeanReport",
    "adapters_per_sample",
    "attn_processors",
    "backends",
    "disable_adapters",
    "disabled",
    "eject",
    "enable_adapters",
    "export_lora",
    "freeze_for_inference",
    "fuse_qkv",
    "inject",
    "lean",
    "load_adapter",
    "memory",
    "merge",
    "ops",
    "processors",
    "projections",
    "save_adapter",
    "set_adapters",
    "set_attention",
    "set_trainable",
    "trainable_parameters",
    "unfreeze",
    "unfuse_qkv",
    "unmerge",
]

_HOMES = {
    "adapters": ("AdapterConfig",),
    "attention": ("fuse_qkv", "set_attention", "unfuse_qkv"),
    "backends": ("BackendStatus", "BackendUnavailableError", "backends"),
    "captured": ("Captured",),
    "export": ("export_lora",),
    "inject": (
        "InjectionReport",
        "attn_processors",
        "disable_adapters",
        "disabled",
        "eject",
        "enable_adapters",
        "freeze_for_inference",
        "inject",
        "merge",
        "projections",
        "set_adapters",
        "set_trainable",
        "trainable_parameters",
        "unfreeze",
        "unmerge",
    ),
    "lean": ("LeanReport", "lean"),
    "per_sample": ("adapters_per_sample",),
    "projection": ("AdaptedProjection",),
    "storage": ("AdapterFileError", "load_adapter", "save_adapter"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """The import system binds each submodule on its package; `a3fta_kernels.inject` and
    `a3fta_kernels.backends` stay the functions of that name, whoever imports the file first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if _HOME.get(name) == name and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in ("memory", "peft", "processors"):
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
import_module(".ops", __name__)  # registers torch.ops.a3fta
