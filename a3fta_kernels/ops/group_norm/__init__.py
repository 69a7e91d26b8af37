from .api import group_norm

__all__ = ["group_norm"]
