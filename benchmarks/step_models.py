"""The U-Nets of `bench_step.py`, with random weights: `python -m benchmarks.step_models`.

On a GPU SD1.5 at 512x512 and SDXL at 1024x1024, in bf16. On the CPU smaller ones in float32 whose
step takes a few seconds, as wide as the upper levels with attention of both; depth and resolution
are such that convolutions, linear layers and attention have about the shares of the arithmetic that
they have in the real model. The command prints these shares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from a3fta_kernels.memory.models import ARCHITECTURES

TEXT_TOKENS = 77
SD15, SDXL = (ARCHITECTURES[name].config for name in ("sd15", "sdxl"))
SMALL_SD15 = {
    **SD15,
    "block_out_channels": (320, 640, 640),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "sample_size": 32,
}
SMALL_SDXL = {
    **SDXL,
    "block_out_channels": (160, 640),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 4),
    "layers_per_block": 1,
    "attention_head_dim": (5, 10),
    "sample_size": 24,
}
# for tests and a first look: every kind of layer, next to no work
TINY = {
    **SD15,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 48,
    "attention_head_dim": 4,
    "sample_size": 8,
}
KINDS = ("convolutions", "linear layers", "attention")


@dataclass(frozen=True)
class Model:
    """A U-Net, the batch it is trained with, and the real model that it stands for.

    brief: only the most telling cells are measured with it.
    """

    name: str
    config: dict[str, Any]
    batch: int
    like: str
    brief: bool = False

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}"

    def trunk(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Frozen, in training mode, always with the same weights."""
        from diffusers import UNet2DConditionModel
        from diffusers.utils import logging

        logging.set_verbosity_error()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            with device:
                unet = UNet2DConditionModel(**self.config)
        if dtype != torch.float32:  # fake tensors cannot be cast in place
            unet.to(dtype)
        return unet.requires_grad_(False).train()

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of a forward, and `target`, the noise to be predicted."""
        g = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(device, dtype)

        size, text = self.config["sample_size"], self.config["cross_attention_dim"]
        found: dict[str, Any] = {
            "sample": draw(self.batch, 4, size, size),
            "timestep": torch.full((self.batch,), 500, device=device),
            "encoder_hidden_states": draw(self.batch, TEXT_TOKENS, text),
            "target": draw(self.batch, 4, size, size),
        }
        if self.config.get("addition_embed_type") == "text_time":
            times = 6 * self.config["addition_time_embed_dim"]
            width = self.config["projection_class_embeddings_input_dim"] - times
            found["added_cond_kwargs"] = {
                "text_embeds": draw(self.batch, width),
                "time_ids": torch.zeros(self.batch, 6, device=device, dtype=dtype),
            }
        return found


# the most telling first: where time is short, the later ones are left out
GPU = (
    Model("SDXL 1024x1024", SDXL, 4, "SDXL"),
    Model("SD1.5 512x512", SD15, 4, "SD1.5"),
    Model("SDXL 1024x1024", SDXL, 1, "SDXL"),
)
CPU = (
    Model("SD1.5-like", SMALL_SD15, 1, "SD1.5"),
    Model("SDXL-like", SMALL_SDXL, 1, "SDXL", brief=True),
)
QUICK = (Model("tiny", TINY, 1, "SD1.5"),)


def models(device: str, quick: bool) -> tuple[Model, ...]:
    if quick:
        return QUICK
    return GPU if device == "cuda" else CPU


def arithmetic(model: Model) -> dict[str, int]:
    """FLOP of a forward by kind of layer, on fake tensors."""
    aten = torch.ops.aten
    on_cpu = aten._scaled_dot_product_flash_attention_for_cpu

    def attention(q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
        return sdpa_flop(q, k, v)

    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping={on_cpu: attention}) as c:
        device = torch.device("cpu")
        unet = model.trunk(device, torch.float32)
        inputs = model.inputs(device, torch.float32)
        inputs.pop("target")
        with torch.no_grad():
            unet(**inputs)
    counts = c.get_flop_counts()["Global"]
    kinds = {aten.convolution: KINDS[0], aten.addmm: KINDS[1], aten.mm: KINDS[1]}
    kinds |= {on_cpu: KINDS[2], aten.bmm: KINDS[2]}  # in one kernel, or as two products
    found = dict.fromkeys(KINDS, 0)
    for op, flop in counts.items():
        found[kinds[op]] += flop
    return found


def table() -> Iterator[str]:
    yield f"| model | GFLOP of a forward | {' | '.join(KINDS)} |"
    yield "|---|---|---|---|---|"
    for model in (*GPU[:2], *CPU):
        found = arithmetic(model)
        total = sum(found.values())
        shares = " | ".join(f"{100 * found[kind] / total:.0f} %" for kind in KINDS)
        yield f"| {model} | {total / 1e9:.0f} | {shares} |"


if __name__ == "__main__":
    print("\n".join(table()))
    sys.exit()
