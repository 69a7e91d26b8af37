"""Bytes that a training forward of SD1.5 and SDXL keeps: `python -m benchmarks.count_saved`.

The real architectures, batch 1 in bf16, by `a3fta.memory.ledger`: nothing is computed, every tensor
that autograd saves is counted once, and weights are not counted. Writes results/saved_bytes.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import a3fta_kernels as a3fta
from a3fta_kernels.memory import methods, models

from .measure import commit

RESULTS = Path(__file__).parent / "results"
MODELS = {"SD1.5 512x512": "sd15", "SDXL 1024x1024": "sdxl"}
LORA = "PEFT LoRA r16 on q, k, v, out"
METHODS = {
    f"{LORA} in bf16": "lora",
    f"{LORA} in fp32": "lora-fp32",
    "A3FTA r64, backend reference": "a3fta",
    "A3FTA r64, backend native": "a3fta",
    "A3FTA r64, checkpointed, backend native": "a3fta",
}


def kept_bytes(name: str, method: str) -> dict[str, int]:
    """Saved bytes, trainable parameters and bytes of weights of one model with one way to adapt it.

    A checkpointed forward saves what its segments start from, `released_bytes` of it for segments
    in which nothing trains, which lets go of it; the segment that is being recomputed comes on top.
    """
    unet = models.build(name, torch.bfloat16)
    if METHODS[method] == "a3fta":
        a3fta.inject(unet, a3fta.AdapterConfig(rank=64), backend=method.split()[-1])
    else:
        methods.adapt(unet, METHODS[method], 16, torch.bfloat16)
    if "checkpointed" in method:
        unet.enable_gradient_checkpointing()
    inputs = models.inputs(unet, models.resolution_of(name), 1, torch.bfloat16)
    trainable = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in unet.parameters() if not p.requires_grad)
    ledger = a3fta.memory.ledger(unet, **inputs)
    return {
        "saved_bytes": ledger.total + ledger.released,
        "released_bytes": ledger.released,
        "trainable_parameters": trainable,
        "frozen_bytes": frozen,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="bytes saved for backward, counted")
    parser.add_argument("--out", type=Path, default=RESULTS / "saved_bytes.json")
    arguments = parser.parse_args()
    native = a3fta.backends()["native"]
    rows = []
    for name, model in MODELS.items():
        for method in METHODS:
            if method.endswith("native") and not native.available:
                print(f"{name:15s} {method}: not counted ({native.reason})")
                continue
            row = {"model": name, "method": method, **kept_bytes(model, method)}
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
