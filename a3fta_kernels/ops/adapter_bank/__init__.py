from .api import adapter_bank

__all__ = ["adapter_bank"]
