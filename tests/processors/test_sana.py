"""Sana: what the adapter of self-attention reads is linear attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import a3fta_kernels as a3fta

from ..models.sana import MODELS


def test_linear_attention():
    """relu(q) (relu(k)^T v) / (relu(q) . sum of relu(k) + 1e-15), for each head of 8 channels."""
    small = MODELS["sana"]
    model, got = small.build(), {}
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    attention = model.transformer_blocks[0].attn1
    for name in ("to_q", "to_k", "to_v"):
        layer = attention.get_submodule(name)
        layer.register_forward_hook(lambda module, args, y, name=name: got.update({name: y}))
    attention.to_out[0].register_forward_pre_hook(lambda module, args: got.update(h=args[0]))
    with torch.no_grad():
        small.run(model)
    q, k, v = (got[name].unflatten(-1, (4, 8)).transpose(1, 2) for name in ("to_q", "to_k", "to_v"))
    q, k = F.relu(q), F.relu(k)
    total = q @ (k.transpose(-1, -2) @ v)
    expected = total / (q @ k.sum(dim=-2).unsqueeze(-1) + 1e-15)
    torch.testing.assert_close(got["h"], expected.transpose(1, 2).flatten(2))
