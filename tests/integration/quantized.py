"""Quantized linear layers of the libraries that diffusers knows, made by hand on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import models


def bitsandbytes_4bit(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    options = dict(quant_type="nf4", compute_dtype=linear.weight.dtype)
    layer = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **options)
    layer.weight = Params4bit(linear.weight.data, False, quant_type="nf4", module=layer)
    layer.bias = linear.bias
    # on a CPU with bf16 products it would pack them anew, which layers as small as these it cannot
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu")  # the move packs the weight


def bitsandbytes_8bit(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer = Linear8bitLt(*sizes, has_fp16_weights=False)
    layer.weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.to("cpu")


def torchao_int8(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def gguf_q8(linear: nn.Linear) -> nn.Module:
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quantize

    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer = GGUFLinear(*sizes, compute_dtype=linear.weight.dtype)
    blocks = torch.from_numpy(quantize(linear.weight.data.numpy(), GGMLQuantizationType.Q8_0))
    layer.weight = GGUFParameter(blocks, quant_type=GGMLQuantizationType.Q8_0)
    layer.bias = linear.bias
    return layer


def quanto_int8(linear: nn.Linear) -> nn.Module:
    from optimum.quanto import QLinear, qint8

    layer = QLinear.from_module(linear, weights=qint8)
    layer.freeze()
    return layer


def quantized(make: Callable[[nn.Linear], nn.Module], name: str = "sd15") -> nn.Module:
    """A small model with every linear layer quantized, in evaluation mode."""
    model = models.build(name).requires_grad_(False)
    for path, linear in list(model.named_modules()):
        if type(linear) is nn.Linear:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, make(linear))
    return model.eval()


def dequantized(model: nn.Module, name: str = "sd15") -> nn.Module:
    """The same model in float64, with plain layers of the weights that the quantized ones hold."""
    plain = models.build(name)
    with torch.no_grad():
        for path, linear in plain.named_modules():
            if type(linear) is nn.Linear:
                linear.weight.copy_(held(model.get_submodule(path)))
    return nn.Module.to(plain, torch.float64)


def held(layer: nn.Module) -> Tensor:
    """The weight, read from what the layer does: y - bias of the unit vectors."""
    y = layer(torch.eye(layer.in_features))
    return (y if layer.bias is None else y - layer.bias).T
