"""Runs without training: curves as they are told."""

from __future__ import annotations

from typing import Any

from a3fta_kernels.study.views import Run

STEPS = (25, 50, 100)


def run(method: str = "full", k: int = 20, seed: int = 0, early: int = 50, **curves: Any) -> Run:
    """Curves that are not told are flat; a number stands for a flat one."""
    steps = (0,) if method == "base" else STEPS
    names = ("kid", "precision", "recall", "density", "coverage", "copies", "vendi")
    plain: dict[str, Any] = {
        "train": 0.5, "heldout": 0.5, "source": 0.5,
        **{f"{part}_bin{i}": 0.5 for part in ("train", "heldout") for i in range(1, 6)},
        **{f"{name}{suffix}": 0.5 for name in names for suffix in ("", "_2")},
    }  # fmt: skip
    told = {
        name: list(v) if isinstance(v, list) else [float(v)] * len(steps)
        for name, v in (plain | curves).items()
    }
    early = 0 if method == "base" else early
    return Run(method, k, seed, early, 10, 2048, 1024, 1e-3, 5.0, steps, told, 1.5)
