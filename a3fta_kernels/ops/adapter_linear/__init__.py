from .api import adapter_linear

__all__ = ["adapter_linear"]
