"""Ways to compute softmax(Q K^T) V on the heads of diffusers' `Attention`.

Each takes query, key, value (B, L, C), heads side by side, and the mask as
`Attention.prepare_attention_mask` makes it, (B * H, 1 or Lq, Lk) or None, and returns (B, Lq, C).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import BackendUnavailableError, xformers_status


def sdpa(attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`F.scaled_dot_product_attention`, scaled by 1 / sqrt(head_dim)."""
    batch = key.shape[0]
    query, key, value = (_split(x, attn.heads).transpose(1, 2) for x in (query, key, value))
    if getattr(attn, "norm_q", None) is not None:
        query = attn.norm_q(query)
    if getattr(attn, "norm_k", None) is not None:
        key = attn.norm_k(key)
    if mask is not None:
        mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
    h = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return h.transpose(1, 2).flatten(2).to(query.dtype)


def math(attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The scores in full, by `Attention.get_attention_scores`: honours its upcast flags."""
    query, key, value = (attn.head_to_batch_dim(x) for x in (query, key, value))
    scores = attn.get_attention_scores(query, key, mask)
    return attn.batch_to_head_dim(torch.bmm(scores, value))


def sliced(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, size: int
) -> Tensor:
    """As `math`, for `size` heads at a time."""
    query, key, value = (attn.head_to_batch_dim(x) for x in (query, key, value))
    parts = []
    for start in range(0, query.shape[0], size):
        part = slice(start, start + size)
        scores = attn.get_attention_scores(
            query[part], key[part], None if mask is None else mask[part]
        )
        parts.append(torch.bmm(scores, value[part]))
    return attn.batch_to_head_dim(torch.cat(parts))


def xformers(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, op: Any
) -> Tensor:
    """`memory_efficient_attention` on (B, L, H, D), without a copy of the heads."""
    memory_efficient_attention = xformers_attention()
    batch, tokens, _ = query.shape
    query, key, value = (_split(x, attn.heads) for x in (query, key, value))
    if mask is not None:
        mask = _xformers_bias(mask, batch, attn.heads, tokens, query.dtype)
    try:
        h = memory_efficient_attention(query, key, value, attn_bias=mask, op=op, scale=attn.scale)
    except NotImplementedError as error:
        first = str(error).strip().splitlines()[0]
        raise BackendUnavailableError(f"attention 'xformers': {first}") from error
    return h.to(query.dtype).flatten(2)


def xformers_attention() -> Any:
    """xformers' operator, or BackendUnavailableError with the reason it cannot be had."""
    try:
        from xformers.ops import memory_efficient_attention
    except Exception as error:  # a broken build raises whatever its extension raises
        reason = xformers_status().reason
        raise BackendUnavailableError(f"attention 'xformers': {reason}") from error
    return memory_efficient_attention


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, L, H * D) -> (B, L, H, D)"""
    return x.unflatten(-1, (heads, -1))


def _xformers_bias(mask: Tensor, batch: int, heads: int, tokens: int, dtype: torch.dtype) -> Tensor:
    """(B, H, Lq, Lk), expanded over queries, with rows that start at multiples of 8 elements."""
    keys = mask.shape[-1]
    mask = mask.to(dtype).view(batch, heads, -1, keys)
    aligned = F.pad(mask, (0, -keys % 8))[..., :keys]
    return aligned.expand(-1, -1, tokens, -1)
