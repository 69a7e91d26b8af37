"""What real models keep at every level, from the ledger: batch 1, bf16, against PEFT LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import a3fta_kernels as a3fta
from a3fta_kernels.memory import ledger, methods, models, step_peak
from a3fta_kernels.memory.levels import LEVELS

ROWS = json.loads((Path(__file__).parents[2] / "benchmarks/results/saved_bytes.json").read_text())
NATIVE = "A3FTA r64, backend native"
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


def counted(model: str, what: str = "saved_bytes") -> dict[tuple[str, str], int]:
    """(method, level) -> bytes, of benchmarks/results."""
    return {(r["method"], r["level"]): r[what] for r in ROWS["rows"] if r["model"] == model}


@pytest.mark.parametrize("model", BOUNDS)
def test_the_bounds_in_what_was_counted(model):
    kept = counted(model)
    ours = next(method for method, level in kept if level == "block")
    for level, bound in BOUNDS[model].items():
        assert kept[ours, level] <= bound * kept[LORA, "stock"], level


def adapted(name: str):
    model = models.build(name)
    methods.adapt(model, "a3fta", None, torch.bfloat16)
    return model


@pytest.mark.parametrize(
    ("name", "resolution", "title", "level"),
    [("sd15", 512, "SD1.5 512x512", level) for level in BOUNDS["SD1.5 512x512"]]
    + [("sdxl", 1024, "SDXL 1024x1024", "block-int8")],
)
def test_the_bounds_counted_now(name, resolution, title, level):
    model = adapted(name)
    LEVELS[level].apply(model)
    ours = ledger(model, **models.inputs(model, resolution)).total
    assert ours <= BOUNDS[title][level] * counted(title)[LORA, "stock"]


@pytest.mark.parametrize(("norms", "share"), [("input", 1.0), ("int8", 0.8)])
def test_the_peak_of_a_step_falls_with_what_is_kept(norms, share):
    """SD1.5: level block needs no more at its peak than gradient checkpointing does."""
    peaks = counted("SD1.5 512x512", "peak_bytes")
    assert peaks[NATIVE, "exact"] <= 0.7 * peaks[NATIVE, "stock"]
    model = adapted("sd15")
    a3fta.lean(model, "block", norms=norms)
    found = step_peak(model, **models.inputs(model, 512)).bytes
    assert found <= share * peaks[NATIVE, "checkpointing"]
    assert found <= 0.3 * peaks[NATIVE, "stock"]
