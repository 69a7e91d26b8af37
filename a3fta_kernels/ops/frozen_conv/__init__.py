from .api import frozen_conv

__all__ = ["frozen_conv"]
