"""Small models of every family, by name: the MODELS of all files beside this one."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from .small import Small

ZOO: dict[str, Small] = {}
for found in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if found.name not in ("small", "zoo"):
        models: dict[str, Small] = importlib.import_module(f"{__package__}.{found.name}").MODELS
        assert not ZOO.keys() & models.keys(), f"{found.name} takes a name that is taken"
        ZOO |= models
