"""The ops: `adapter` and `adapter_linear`. One op, one folder, one test, one bench."""

from .adapter import adapter
from .adapter_linear import adapter_linear

__all__ = ["adapter", "adapter_linear"]
