from .api import dequantize, quantize

__all__ = ["dequantize", "quantize"]
