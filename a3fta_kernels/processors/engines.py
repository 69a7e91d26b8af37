"""Ways to compute softmax(Q K^T) V on the heads of diffusers' `Attention`.

Each takes query, key, value (B, L, C), heads side by side, row strides free, and the mask as
`Attention.prepare_attention_mask` makes it, (B * H, 1 or Lq, Lk) or None, and returns (B, Lq, C).
All but `math` and `sliced`, which move the heads into the batch, copy nothing: the heads are
views, and so is what they return, forward and backward.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..backends import BackendUnavailableError, device_class, flash3_status, xformers_status
from ..ops.cross_attention_adapter.attention import without_suspect_cudnn
from ..ops.rule import cast

# what set_attention and A3FTAAttnProcessor take; sdpa is PyTorch's own choice of kernel
ENGINES = ("auto", "sdpa", "flash", "cudnn", "efficient", "flash3", "xformers", "math", "sliced")

# (device class, head_dim) -> the SDPA kernel that "auto" asks first: flash, cudnn or efficient.
# Elsewhere "auto" is sdpa. An entry is a measurement of all of them in benchmarks/results/<device>.
MEASURED: dict[tuple[str, int], str] = {}

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_CAN_USE: dict[str, Callable[..., bool]] = {
    "flash": torch.backends.cuda.can_use_flash_attention,
    "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "efficient": torch.backends.cuda.can_use_efficient_attention,
}
_ENABLED: dict[SDPBackend, Callable[[], bool]] = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}


def auto(attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`sdpa`; where a kernel was measured to be the fastest, it is asked before the others."""
    order = _order(query.device, query.shape[-1] // attn.heads) if MEASURED else None
    if not order:
        return sdpa(attn, query, key, value, mask)
    with sdpa_kernel(order, set_priority=True):
        return sdpa(attn, query, key, value, mask)


def _order(device: torch.device, head_dim: int) -> list[SDPBackend]:
    """The kernels that are on, the measured one first; empty where none was measured."""
    name = MEASURED.get((device_class(device), head_dim))
    if name is None:
        return []
    order = dict.fromkeys((_KERNELS[name], *_ENABLED))
    return [kernel for kernel in order if _ENABLED[kernel]()]


# a constant for the compiler, as `backends.resolve` is
_order._dynamo_marked_constant = True  # type: ignore[attr-defined]


def sdpa(attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`F.scaled_dot_product_attention`, scaled by 1 / sqrt(head_dim)."""
    careful = without_suspect_cudnn(key)
    query, key, value, mask = _heads_first(attn, query, key, value, mask)
    with careful:
        h = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return cast(h.transpose(1, 2).flatten(2), query.dtype)


def sdpa_by(
    name: str, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """`sdpa` by one kernel of PyTorch: flash, cudnn or efficient."""
    try:
        with sdpa_kernel(_KERNELS[name]):
            return sdpa(attn, query, key, value, mask)
    except RuntimeError as error:
        # "No available kernel", "No viable backend": all else is an error of its own
        if not str(error).startswith("No "):
            raise
        heads = _heads_first(attn, query, key, value, mask)
        raise BackendUnavailableError(f"attention {name!r}: {_why_not(name, *heads)}") from error


def _why_not(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str:
    """PyTorch's own words for why the kernel cannot run such a call."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        # a build for CUDA asks a driver that may not be there
        with contextlib.suppress(RuntimeError):
            _CAN_USE[name](SDPAParams(query, key, value, mask, 0.0, False, False), True)
    words = [str(warning.message).split(" (Triggered internally")[0] for warning in said]
    shown = f"query {tuple(query.shape)} in {query.dtype} on {query.device.type}"
    masked = "with a mask" if mask is not None else "without a mask"
    return "; ".join([*words, f"PyTorch has no such kernel for {shown}, {masked}"])


def flash3(attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """FlashAttention 3's `flash_attn_func` on (B, L, H, D), scaled by 1 / sqrt(head_dim)."""
    flash_attn_func = flash3_attention()
    if mask is not None:
        raise BackendUnavailableError("attention 'flash3': it takes no mask")
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise BackendUnavailableError(
            f"attention 'flash3': it computes in fp16 and bf16, got {query.dtype}"
        )
    query, key, value = (_split(x, attn.heads) for x in (query, key, value))
    query, key = _normed(attn, query, key)
    h = flash_attn_func(query, key, value)
    # older releases return the log-sum-exp beside it
    return (h[0] if isinstance(h, tuple) else h).flatten(2)


def flash3_attention() -> Any:
    """FlashAttention 3's function, or BackendUnavailableError with the reason it cannot be had."""
    try:
        from flash_attn_interface import flash_attn_func
    except Exception as error:  # a broken build raises whatever its extension raises
        reason = flash3_status().reason
        raise BackendUnavailableError(f"attention 'flash3': {reason}") from error
    return flash_attn_func


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


PLAIN: dict[str, Callable[[Any, Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "auto": auto,
    "sdpa": sdpa,
    "flash": functools.partial(sdpa_by, "flash"),
    "cudnn": functools.partial(sdpa_by, "cudnn"),
    "efficient": functools.partial(sdpa_by, "efficient"),
    "flash3": flash3,
    "math": math,
}


def check_installed(name: str) -> None:
    """Raises BackendUnavailableError where the engine is a package that cannot be imported."""
    if name == "flash3":
        flash3_attention()
    elif name == "xformers":
        xformers_attention()


def _heads_first(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Views (B, H, L, D), and the mask (B, H, 1 or Lq, Lk)."""
    if mask is not None:
        mask = mask.view(key.shape[0], attn.heads, -1, mask.shape[-1])
    query, key, value = (_split(x, attn.heads).transpose(1, 2) for x in (query, key, value))
    query, key = _normed(attn, query, key)
    return query, key, value, mask


def _normed(attn: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The norms over head_dim that some layers have."""
    if getattr(attn, "norm_q", None) is not None:
        query = attn.norm_q(query)
    if getattr(attn, "norm_k", None) is not None:
        key = attn.norm_k(key)
    return query, key


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, L, H * D) -> (B, L, H, D)"""
    return x.view(x.shape[0], x.shape[1], heads, -1)


def _xformers_bias(mask: Tensor, batch: int, heads: int, tokens: int, dtype: torch.dtype) -> Tensor:
    """(B, H, Lq, Lk), expanded over queries, with rows that start at multiples of 8 elements."""
    keys = mask.shape[-1]
    mask = mask.to(dtype).view(batch, heads, -1, keys)
    aligned = F.pad(mask, (0, -keys % 8))[..., :keys]
    return aligned.expand(-1, -1, tokens, -1)
