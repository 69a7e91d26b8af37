"""The ops. One op, one folder, one test, one bench."""

from .adapter import adapter
from .adapter_linear import adapter_linear
from .cross_attention_adapter import cross_attention_adapter
from .geglu import geglu
from .quantize import dequantize, quantize

__all__ = [
    "adapter",
    "adapter_linear",
    "cross_attention_adapter",
    "dequantize",
    "geglu",
    "quantize",
]
