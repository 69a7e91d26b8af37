"""Bytes that a training forward of real models keeps: `python -m benchmarks.count_saved`.

The real architectures, batch 1 in bf16, by `a3fta.memory.ledger`: nothing is computed, every tensor
that autograd saves is counted once, and weights are not counted. Beside it the most bytes that live
at once in forward and backward, above the weights. Writes results/saved_bytes.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import a3fta_kernels as a3fta
from a3fta_kernels.memory import methods, models
from a3fta_kernels.memory.levels import LEVELS

from .measure import commit

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "SD1.5 512x512": "sd15",
    "SDXL 1024x1024": "sdxl",
    "SD3-medium 1024x1024": "sd3-medium",
    "Flux-dev 1024x1024": "flux-dev",
    "Z-Image 1024x1024": "z-image",
}
LORA = "PEFT LoRA r16 on q, k, v, out in bf16"
NATIVE = "A3FTA r64, backend native"
# method in the table -> method of a3fta_kernels.memory.methods
METHODS = {
    LORA: "lora",
    "PEFT LoRA r16 on q, k, v, out in fp32": "lora-fp32",
    "A3FTA r64, backend reference": "a3fta",
    NATIVE: "a3fta",
}


def cells(name: str) -> list[tuple[str, str]]:
    """(method, level) of a model: every level of ours; on Flux of LoRA."""
    if name == "flux-dev":
        return [(LORA, level) for level in LEVELS]
    plain = [(method, "stock") for method in METHODS if method != NATIVE]
    return [*plain, (LORA, "checkpointing"), *((NATIVE, level) for level in LEVELS)]


def kept_bytes(name: str, method: str, level: str) -> dict[str, int]:
    """Saved bytes, peak, trainable parameters and bytes of frozen weights of one model.

    `released_bytes` are inputs of checkpoints in which nothing trains: autograd saves them and lets
    go of them before the forward ends, so they are in neither of the other two.
    """
    model = models.build(name, torch.bfloat16)
    if METHODS[method] == "a3fta":
        a3fta.inject(model, a3fta.AdapterConfig(rank=64), backend=method.split()[-1])
    else:
        methods.adapt(model, METHODS[method], 16, torch.bfloat16)
    LEVELS[level].apply(model)
    inputs = models.inputs(model, models.resolution_of(name), 1, torch.bfloat16)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    ledger = a3fta.memory.ledger(model, **inputs)
    return {
        "saved_bytes": ledger.total,
        "released_bytes": ledger.released,
        "peak_bytes": a3fta.memory.step_peak(model, **inputs).bytes,
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
        for method, level in cells(model):
            if method == NATIVE and not native.available:
                print(f"{name:20s} {method}: not counted ({native.reason})")
                continue
            row = {"model": name, "method": method, "level": level}
            row |= kept_bytes(model, method, level)
            rows.append(row)
            saved, peak = row["saved_bytes"] / 2**20, row["peak_bytes"] / 2**20
            print(
                f"{name:20s} {method:38s} {level:14s} {saved:7,.0f} MiB saved, "
                f"{peak:7,.0f} MiB at the peak",
                flush=True,
            )
    import diffusers

    about = {"commit": commit(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    found = {"environment": about, "dtype": "bfloat16", "batch": 1, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
