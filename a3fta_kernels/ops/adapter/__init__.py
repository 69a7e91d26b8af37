from .api import adapter

__all__ = ["adapter"]
