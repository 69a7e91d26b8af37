"""Made-up results of `bench_step.py`."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.step_methods import (
    ANCHOR,
    BESIDE,
    CHECKPOINTING,
    COMPILE,
    EAGER,
    EXACT_COMPILE,
    FLOOR,
    FULL,
    FUSED,
    GRAPH,
    LORA,
    STOCK,
    XFORMERS,
    Cell,
    batches,
)  # fmt: skip

# over the stock trunk: time, memory
VARIANTS = {
    STOCK: (1.0, 1.0), "exact": (0.88, 0.66), "recompute": (1.1, 0.26),
    "recompute-int8": (1.13, 0.21), "block": (1.16, 0.2), "block-int8": (1.19, 0.15),
    "compressed": (1.02, 0.45), CHECKPOINTING: (1.3, 0.21), COMPILE: (0.85, 0.8),
    EXACT_COMPILE: (0.84, 0.7), XFORMERS: (1.01, 1.0), GRAPH: (0.7, 1.0),
    f"exact, {GRAPH}": (0.6, 0.66), f"block-int8, {GRAPH}": (0.8, 0.15),
}  # fmt: skip
METHODS = {
    FLOOR: (0.6, 1.0),
    FUSED: (0.8, 0.95),
    BESIDE: (0.82, 0.97),
    EAGER: (0.9, 1.0),
    FULL: (1.4, 3.0),
}
ABOUT = {
    "device": "Made Up", "date": "today", "commit": "abc", "torch": "2", "threads": 2,
    "diffusers": "0", "peft": "0", "quick": False,
}  # fmt: skip
ON_GPU = {"capability": "sm_90", "driver": "1", "cuda": "13.0", "triton": "3"}
MIB = 2**20


def rows(model: str, batch: int, device: str, seed: int = 0) -> list[dict[str, Any]]:
    """Every cell of the table; with a seed, off by up to a tenth."""
    draw = random.Random(seed)
    found: list[dict[str, Any]] = []
    for part in batches(device):
        times = {cell: 1e6 * _of(cell, 0) for cell in part.cells}
        if seed:
            times = {cell: t * draw.uniform(0.9, 1.1) for cell, t in times.items()}
        beside = {str(cell): t for cell, t in times.items()}
        for cell, t in times.items():
            if found and any((r["method"], r["variant"]) == cell for r in found):
                continue
            uncounted = cell.method == FLOOR or cell.variant.endswith(GRAPH)
            peak = None if uncounted else 5000 * MIB * _of(cell, 1)
            found.append({
                "model": model, "batch_size": batch, "like": model,
                "dtype": "bfloat16" if device == "cuda" else "float32", "method": cell.method,
                "variant": cell.variant, "trainable_parameters": 3_000_000,
                "weights_bytes": 5000 * MIB, "resident_bytes": 100 * MIB, "peak_bytes": peak,
                "peak_by": "made up",
                "predicted_bytes": 1.04 * peak if peak and device == "cuda" else None,
                "saved_bytes": 4000 * MIB * _of(cell, 1),
                "counts": {"kernels" if device == "cuda" else "operators": 1000}, "rounds": 9,
                "q20_us": 0.97 * t, "q50_us": t, "q80_us": 1.05 * t, "batch": part.name,
                "beside": dict(beside),
            })  # fmt: skip
    return found


def _of(cell: Cell, which: int) -> float:
    return METHODS.get(cell.method, (1.0, 1.0))[which] * VARIANTS[cell.variant][which]


def results(device: str, seed: int = 0) -> dict[str, Any]:
    if device == "cuda":
        models = (("SDXL 1024x1024", 4), ("SD1.5 512x512", 4), ("SDXL 1024x1024", 1))
    else:
        models = (("SD1.5-like", 1), ("SDXL-like", 1))
    found = [row for name, batch in models for row in rows(name, batch, device, seed)]
    absent = []
    if device == "cpu":
        for row in [r for r in found if COMPILE in r["variant"]]:
            found.remove(row)
            absent.append({k: row[k] for k in ("model", "batch_size", "dtype", "method", "variant",
                                               "batch")} | {"reason": "made up"})  # fmt: skip
    about = ABOUT | (ON_GPU if device == "cuda" else {})
    return {"environment": about, "absent": absent, "rows": found}


__all__ = ["ABOUT", "ANCHOR", "FUSED", "LORA", "MIB", "ON_GPU", "results", "rows"]
