"""How much one attention layer starts: operators that move data on the CPU, in bf16 with adapters
in float32, as models are trained. A new one has to be a decision."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import a3fta_kernels as a3fta
from benchmarks import count_launches, measure

CPU = torch.device("cpu")
# what frozen attention is made of: q, k, v, the attention, the projection, and their gradients
SELF, CROSS = count_launches.LAYERS[:2]

# layer -> variant -> at most this many in forward, and in forward with backward. Of the adapter:
# 4 casts, V, the bias and its cast; z; r; and in the backward a cast of w_down, dz and P, the
# addition to dh, dw_down, and two casts and a product each for w_up and b_up
LIMITS = {
    SELF: {"native": (14, 31), "native, fuse_qkv": (13, 30)},
    CROSS: {"native": (14, 29), "native, fuse_qkv": (14, 29)},
}


@cache
def counts(layer: count_launches.Layer) -> dict[str, tuple[int, int]]:
    found: dict[str, list[int]] = {}
    small = count_launches.small(layer)
    for name, _, call in count_launches.every_call(small, CPU, torch.bfloat16):
        found.setdefault(name, []).append(measure.count(call, CPU)["operators"])
    return {name: (both[0], both[1]) for name, both in found.items()}


@pytest.mark.parametrize("layer", LIMITS, ids=lambda layer: layer.name)
def test_at_most(layer: count_launches.Layer):
    if not a3fta.backends()["native"].available:
        pytest.skip(a3fta.backends()["native"].reason)
    found = counts(layer)
    for name, limits in LIMITS[layer].items():
        assert all(n <= most for n, most in zip(found[name], limits, strict=True)), (name, found)


@pytest.mark.parametrize("layer", LIMITS, ids=lambda layer: layer.name)
def test_fewer_than_lora_and_than_eager(layer: count_launches.Layer):
    if not a3fta.backends()["native"].available:
        pytest.skip(a3fta.backends()["native"].reason)
    found = counts(layer)
    assert found["frozen"][0] < found["native"][0]
    for rival in ("PEFT LoRA", "reference"):
        assert found["native"][1] < found[rival][1], found
