from .api import geglu

__all__ = ["geglu"]
