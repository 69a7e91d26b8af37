"""The ops. One op, one folder, one test, one bench."""

from .adapter import adapter
from .adapter_bank import adapter_bank
from .adapter_linear import adapter_linear
from .cross_attention_adapter import cross_attention_adapter
from .frozen_conv import frozen_conv
from .geglu import geglu
from .group_norm import group_norm
from .layer_norm import layer_norm
from .quantize import dequantize, quantize

__all__ = [
    "adapter",
    "adapter_bank",
    "adapter_linear",
    "cross_attention_adapter",
    "dequantize",
    "frozen_conv",
    "geglu",
    "group_norm",
    "layer_norm",
    "quantize",
]
