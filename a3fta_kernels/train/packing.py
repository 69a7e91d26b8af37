"""A frozen model whose linear layers hold 4 bits per weight, by bitsandbytes.

NF4 with double quantization, as in QLoRA (Dettmers et al., 2023): blocks of 64 weights, each weight
one of 16 values that are even quantiles of a normal distribution. A layer multiplies in the
precision it had, by its weight unpacked for that moment, and keeps no input for a backward.
"""

from __future__ import annotations

import torch
from torch import nn

from .errors import TrainingError


def check(kind: str) -> None:
    """TrainingError where the package that packs is missing."""
    if kind == "no":
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise TrainingError(
            f"quantize: {kind} needs bitsandbytes: pip install bitsandbytes ({error})"
        ) from error


def pack(model: nn.Module, kind: str, device: torch.device) -> None:
    """Replaces every plain linear layer of `model`, on the CPU, by a packed one, on the CPU too.

    They are packed on `device`, one at a time, so that it never holds the model. After `check`.
    """
    if kind == "no":
        return
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _packed(layer, kind, device))


def _packed(linear: nn.Linear, kind: str, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None,
        compute_dtype=linear.weight.dtype, quant_type=kind, device="meta",
    )  # fmt: skip
    layer.weight = Params4bit(linear.weight.data, False, quant_type=kind, module=layer)
    layer.bias = linear.bias
    # where a CPU has bf16 products it packs a layer anew at its first call without gradients, and
    # such a layer has no backward
    layer.support_avx512bf16_for_cpu = False
    # the first move packs
    return layer.to(device).to("cpu").train(linear.training).requires_grad_(False)
