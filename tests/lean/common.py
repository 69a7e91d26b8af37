"""Small models with adapters or LoRA, and what one step of them gives and keeps."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor, nn

import a3fta_kernels as a3fta

from .. import models
from ..models import small

LORA = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj"]


def sd35() -> nn.Module:
    """Like SD3.5: norms of q and k, and a second attention in the first blocks."""
    return diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=16, out_channels=4, qk_norm="rms_norm",
        dual_attention_layers=(0, 1),
    )  # fmt: skip


def z_image() -> nn.Module:
    return small.filled(
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            cap_feat_dim=16, axes_dims=[4, 4, 8], axes_lens=[128, 8, 8],
        )
    )  # fmt: skip


def z_image_inputs(*lengths: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": [draw(4, 1, 8, 8) for _ in lengths], "t": draw(len(lengths)).sigmoid(),
        "cap_feats": [draw(length, 16) for length in lengths],
    }  # fmt: skip


MODELS = {
    **{n: (partial(models.build, n), partial(models.inputs, n)) for n in models.MODELS},
    "sd3": (models.sd3, models.sd3_inputs),
    "sd35": (sd35, models.sd3_inputs),
    "z_image": (z_image, lambda: z_image_inputs(7, 7)),
    # texts of two lengths, so that attention has a mask
    "z_image_masked": (z_image, lambda: z_image_inputs(7, 40)),
}


def trained(
    name: str, method: str = "a3fta", dtype: torch.dtype = torch.float64, **options: Any
) -> nn.Module:
    """A model in training mode whose adapters are as if training had changed them."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    if dtype != torch.float32:  # diffusers comments on every cast
        nn.Module.to(model, dtype)
    if method in ("a3fta", "parallel"):
        placement = {"placement": "parallel"} if method == "parallel" else {}
        a3fta.inject(model, a3fta.AdapterConfig(rank=4, **placement, **options))
    else:
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=4, target_modules=LORA))
        nn.Module.to(model, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def batch_for(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    def cast(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: cast(v) for k, v in x.items()}
        if isinstance(x, list):
            return [cast(v) for v in x]
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return cast(MODELS[name][1]())


class Step(NamedTuple):
    output: Tensor
    grads: dict[str, Tensor]
    kept: int  # bytes saved for the backward, without weights


def step(model: nn.Module, batch: dict[str, Any]) -> Step:
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = small.output(model(**batch).sample)
    weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    bytes_kept = sum(s.nbytes() for key, s in kept.items() if key not in weights)
    kept.clear()
    output.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Step(output.detach(), grads, bytes_kept)


def assert_same_step(found: Step, expected: Step, tolerance: float) -> None:
    """Outputs and gradients as far apart as `tolerance` of their norm."""
    assert found.grads.keys() == expected.grads.keys() and expected.grads
    pairs = {"output": (found.output, expected.output)}
    pairs |= {n: (found.grads[n], g) for n, g in expected.grads.items()}
    for name, (a, b) in pairs.items():
        assert (a - b).norm() <= tolerance * b.norm() + 1e-30, name
