"""The recipe: fine-tuning a diffusers pipeline on a small folder of photos.

    from a3fta_kernels.train import Settings, finetune
    finetune(Settings(model="./sd15", data="./photos", trigger="a photo of sks dog"))

`a3fta finetune` is the same on the command line. Needs the extra `train`, which is imported at
the first use of a name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import TrainingError
    from .listener import Listener
    from .recipe import finetune
    from .sampling import sample
    from .settings import Settings

__all__ = ["Listener", "Settings", "TrainingError", "finetune", "sample"]

_HOMES = {
    "Listener": "listener",
    "Settings": "settings",
    "TrainingError": "errors",
    "finetune": "recipe",
    "sample": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
