from .api import cross_attention_adapter

__all__ = ["cross_attention_adapter"]
