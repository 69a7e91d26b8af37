"""Lumina-Next: what the adapter reads is the sum of two attentions, head by head."""

from __future__ import annotations

import torch

import a3fta_kernels as a3fta

from ..models.lumina import MODELS
from .test_families import recorded_attention


def test_the_sum_of_self_and_gated_cross_attention(monkeypatch):
    small = MODELS["lumina_next"]
    model, read = small.build(), []
    report = a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    assert set(report.unadapted) == {"layers.0.attn1", "layers.1.attn1"}
    for layer in a3fta.projections(model).values():
        layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad(), recorded_attention(monkeypatch) as found:
        small.run(model)
        assert len(read) == 2 and len(found) == 4
        for i, h in enumerate(read):
            own, cross = found[2 * i : 2 * i + 2]
            gates = model.layers[i].gate.tanh().repeat_interleave(h.shape[-1] // 4)
            torch.testing.assert_close(h, own + gates * cross)
