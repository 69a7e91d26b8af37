from .api import layer_norm

__all__ = ["layer_norm"]
