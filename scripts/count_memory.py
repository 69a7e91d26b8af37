"""What training holds in memory on the real architectures, counted on fake tensors: no weights, no
kernel is run, no GPU needed. Prints the table of the README.

    python scripts/count_memory.py [--rank 64] [--batch 1]

Saved for backward: bytes that autograd keeps between forward and backward, each storage once,
parameters aside. With checkpointing, what the segments keep; the segment that is being recomputed
comes on top of that.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import a3fta_kernels as a3fta

MIB = 2**20

SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
MODELS = {"SD1.5, 512²": SD15, "SDXL, 1024²": SDXL}


def inputs(model: UNet2DConditionModel, batch: int) -> dict[str, Any]:
    config = model.config
    size = config.sample_size
    found: dict[str, Any] = {
        "sample": torch.empty(batch, 4, size, size, dtype=torch.bfloat16),
        "timestep": torch.ones(batch, dtype=torch.long),
        "encoder_hidden_states": torch.empty(
            batch, 77, config.cross_attention_dim, dtype=torch.bfloat16
        ),
    }
    if config.addition_embed_type == "text_time":
        found["added_cond_kwargs"] = {
            "text_embeds": torch.empty(batch, 1280, dtype=torch.bfloat16),
            "time_ids": torch.empty(batch, 6, dtype=torch.bfloat16),
        }
    return found


def storage_bytes(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def saved_bytes(model: nn.Module, arguments: dict[str, Any]) -> int:
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in own:
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(**arguments).sample
    assert y.requires_grad
    return storage_bytes(kept)


def count(config: dict[str, Any], rank: int, batch: int) -> list[int]:
    """Bytes: weights; adapter, gradients and AdamW; saved; saved with checkpointing."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be cast in place
        model = UNet2DConditionModel(**config)
        torch.set_default_dtype(torch.float32)
        weights = storage_bytes(list(model.parameters()))
        a3fta.inject(model, a3fta.AdapterConfig(rank=rank))
        model.train()
        arguments = inputs(model, batch)
        # the parameter, its gradient, and the two moments
        state = 4 * storage_bytes(list(a3fta.trainable_parameters(model)))
        plain = saved_bytes(model, arguments)
        model.enable_gradient_checkpointing()
        return [weights, state, plain, saved_bytes(model, arguments)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    heads = (
        f"MiB, R = {arguments.rank}, batch {arguments.batch}", "frozen U-Net, bf16",
        "adapter, gradients, AdamW, fp32", "saved for backward", "the same, checkpointed",
    )  # fmt: skip
    print(f"| {' | '.join(heads)} |")
    print("|---|---:|---:|---:|---:|")
    for name, config in MODELS.items():
        found = count(config, arguments.rank, arguments.batch)
        print(f"| {name} | {' | '.join(f'{n / MIB:,.0f}' for n in found)} |")


if __name__ == "__main__":
    main()
