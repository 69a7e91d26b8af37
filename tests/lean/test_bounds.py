"""What real models keep at every level, from the ledger: batch 1, bf16, against PEFT LoRA."""

from __future__ import annotations

import functools

import pytest
import torch

import a3fta_kernels as a3fta
from a3fta_kernels.memory import ledger, methods, models, step_peak

# model, resolution, level, norms -> the most of what LoRA r16 on q, k, v, out keeps
BOUNDS = {
    ("sd15", 512, "exact", "input"): 0.62,
    ("sd15", 512, "recompute", "input"): 0.27,
    ("sd15", 512, "block", "input"): 0.21,
    ("sd15", 512, "block", "int8"): 0.15,
    ("sd15", 512, "compressed", "input"): 0.45,
    ("sdxl", 1024, "exact", "input"): 0.70,
    ("sdxl", 1024, "recompute", "input"): 0.25,
    ("sdxl", 1024, "block", "input"): 0.18,
    ("sdxl", 1024, "block", "int8"): 0.14,
    ("sdxl", 1024, "compressed", "input"): 0.48,
}


def adapted(name: str, method: str):
    model = models.build(name)
    methods.adapt(model, method, None, torch.bfloat16)
    return model


@functools.cache
def kept(name: str, resolution: int, method: str, level: str, norms: str = "input") -> int:
    model = adapted(name, method)
    a3fta.lean(model, level, norms=norms)
    return ledger(model, **models.inputs(model, resolution)).total


@pytest.mark.parametrize("case", BOUNDS, ids=lambda case: "-".join(map(str, case)))
def test_the_bounds(case):
    name, resolution, level, norms = case
    ours = kept(name, resolution, "a3fta", level, norms)
    assert ours <= BOUNDS[case] * kept(name, resolution, "lora", "off")


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
