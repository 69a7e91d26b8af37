"""Bytes that a training forward of SD1.5 and SDXL keeps: `python -m benchmarks.count_saved`.

The real architectures, batch 1 in bf16, on fake tensors: nothing is computed, every tensor that
autograd saves is counted once, and weights are not counted. Writes results/saved_bytes.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import a3fta_kernels as a3fta

from .measure import commit

RESULTS = Path(__file__).parent / "results"
SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
MODELS = {"SD1.5 512x512": SD15, "SDXL 1024x1024": SDXL}


def kept_bytes(model_config: dict[str, Any], method: str) -> dict[str, int]:
    """Saved bytes, trainable parameters and bytes of weights of one model with one way to adapt it.

    A checkpointed forward keeps what its segments start from; the segment that is being recomputed
    comes on top.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging
    from peft import LoraConfig

    logging.set_verbosity_error()
    kept: dict[int, torch.UntypedStorage] = {}  # the storage is held, so that its id stays its own

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x

    with torch.device("meta"):
        unet = UNet2DConditionModel(**model_config).to(torch.bfloat16).train()
        if method.startswith("PEFT"):
            unet.requires_grad_(False)
            unet.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
            if method.endswith("bf16"):
                unet.to(torch.bfloat16)  # add_adapter leaves LoRA's own weights in float32
    with FakeTensorMode():
        for module in unet.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = torch.nn.Parameter(empty, parameter.requires_grad)
        if method.startswith("A3FTA"):
            a3fta.inject(unet, a3fta.AdapterConfig(rank=64), backend=method.split()[-1])
        if "checkpointed" in method:
            unet.enable_gradient_checkpointing()
        inputs = example(model_config)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = unet(**inputs).sample
        weights = {t.untyped_storage()._cdata for t in (*unet.parameters(), *unet.buffers())}
        bytes_kept = sum(s.nbytes() for key, s in kept.items() if key not in weights)
        trainable = sum(p.numel() for p in unet.parameters() if p.requires_grad)
        frozen = sum(p.nbytes for p in unet.parameters() if not p.requires_grad)
        assert y.requires_grad
    return {
        "saved_bytes": bytes_kept, "trainable_parameters": trainable, "frozen_bytes": frozen
    }  # fmt: skip


def example(model_config: dict[str, Any]) -> dict[str, Any]:
    size, width = model_config["sample_size"], model_config["cross_attention_dim"]
    inputs: dict[str, Any] = {
        "sample": torch.randn(1, 4, size, size, dtype=torch.bfloat16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 77, width, dtype=torch.bfloat16),
    }
    if model_config.get("addition_embed_type") == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(1, 1280, dtype=torch.bfloat16),
            "time_ids": torch.zeros(1, 6, dtype=torch.bfloat16),
        }
    return inputs


def main() -> int:
    parser = argparse.ArgumentParser(description="bytes saved for backward, counted")
    parser.add_argument("--out", type=Path, default=RESULTS / "saved_bytes.json")
    arguments = parser.parse_args()
    lora = "PEFT LoRA r16 on q, k, v, out"
    methods = [f"{lora} in bf16", f"{lora} in fp32", "A3FTA r64, backend reference"]
    native = a3fta.backends()["native"]
    if native.available:
        methods.append("A3FTA r64, backend native")
        methods.append("A3FTA r64, checkpointed, backend native")
    else:
        print(f"A3FTA r64, backend native: not counted ({native.reason})")
    rows = []
    for name, config in MODELS.items():
        for method in methods:
            row = {"model": name, "method": method, **kept_bytes(config, method)}
            rows.append(row)
            print(
                f"{name:15s} {method:38s} {row['saved_bytes'] / 2**20:7.0f} MiB saved, "
                f"{row['trainable_parameters'] / 1e6:.1f} M trainable"
            )
    import diffusers

    about = {"commit": commit(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    found = {"environment": about, "dtype": "bfloat16", "batch": 1, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
