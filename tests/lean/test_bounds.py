"""What real models keep at every level, from the ledger: batch 1, bf16, against PEFT LoRA."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

import a3fta_kernels as a3fta
from a3fta_kernels.memory import ledger, methods, models, step_peak
from a3fta_kernels.memory.levels import LEVELS

ROWS = json.loads((Path(__file__).parents[2] / "benchmarks/results/saved_bytes.json").read_text())
LORA = "PEFT LoRA r16 on q, k, v, out in bf16"
# the most of what LoRA keeps on the stock trunk; on Flux it is LoRA's own that was counted
BOUNDS = {
    "SD1.5 512x512": {
        "exact": 0.62, "recompute": 0.27, "block": 0.21, "block-int8": 0.15, "compressed": 0.45
    },
    "SDXL 1024x1024": {
        "exact": 0.70, "recompute": 0.25, "block": 0.18, "block-int8": 0.14, "compressed": 0.48
    },
    "SD3-medium 1024x1024": {
        "recompute": 0.26, "block": 0.18, "block-int8": 0.14, "compressed": 0.67
    },
    "Flux-dev 1024x1024": {
        "recompute": 0.17, "block": 0.15, "block-int8": 0.11, "compressed": 0.92
    },
}  # fmt: skip


@pytest.mark.parametrize("model", BOUNDS)
def test_the_bounds_in_what_was_counted(model):
    kept = {
        (r["method"], r["level"]): r["saved_bytes"] for r in ROWS["rows"] if r["model"] == model
    }
    ours = next(method for method, level in kept if level == "block")
    for level, bound in BOUNDS[model].items():
        assert kept[ours, level] <= bound * kept[LORA, "stock"], level


def adapted(name: str, method: str):
    model = models.build(name)
    methods.adapt(model, method, None, torch.bfloat16)
    return model


@functools.cache
def kept(name: str, resolution: int, method: str, level: str) -> int:
    model = adapted(name, method)
    LEVELS[level].apply(model)
    return ledger(model, **models.inputs(model, resolution)).total


@pytest.mark.parametrize(
    ("name", "resolution", "title", "level"),
    [("sd15", 512, "SD1.5 512x512", level) for level in BOUNDS["SD1.5 512x512"]]
    + [("sdxl", 1024, "SDXL 1024x1024", level) for level in ("exact", "block-int8")],
)
def test_the_bounds_counted_now(name, resolution, title, level):
    ours = kept(name, resolution, "a3fta", level)
    assert ours <= BOUNDS[title][level] * kept(name, resolution, "lora", "stock")


def test_the_peak_of_a_step_falls_with_what_is_kept():
    """SD1.5: level block needs no more at its peak than gradient checkpointing does."""
    peaks = {}
    for level, norms in (
        ("off", "input"),
        ("exact", "input"),
        ("block", "input"),
        ("block", "int8"),
    ):
        model = adapted("sd15", "a3fta")
        a3fta.lean(model, level, norms=norms)
        peaks[level, norms] = step_peak(model, **models.inputs(model, 512)).bytes
    rival = adapted("sd15", "a3fta")
    rival.enable_gradient_checkpointing()
    checkpointed = step_peak(rival, **models.inputs(rival, 512)).bytes
    assert peaks["block", "input"] <= checkpointed
    assert peaks["block", "int8"] <= 0.8 * checkpointed
    assert peaks["exact", "input"] <= 0.7 * peaks["off", "input"]
    assert peaks["block", "input"] <= 0.3 * peaks["off", "input"]
