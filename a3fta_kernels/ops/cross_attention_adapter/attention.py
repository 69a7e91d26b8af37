"""PyTorch's attention on tensors whose heads lie side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int,
    mask: Tensor | None = None,
    attention_scale: float | None = None,
) -> Tensor:
    """softmax(q k^T * attention_scale + mask) v, heads side by side: (B, Lq, C).

    A row whose keys are all masked by -inf or False attends to nothing: its result is zero, as
    PyTorch defines it.
    """
    if mask is not None:
        mask = _compact(mask.reshape(*[1] * (4 - mask.dim()), *mask.shape))
    careful = without_suspect_cudnn(k)
    q, k, v = (_aligned(x.unflatten(-1, (heads, -1)).transpose(1, 2)) for x in (q, k, v))
    # PyTorch's other CUDA kernels return nothing for an empty batch
    with sdpa_kernel(SDPBackend.MATH) if q.numel() == 0 else careful:
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention_scale)
    if mask is not None and h.device.type == "cuda":
        # where they spread a row without keys over all of them
        hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        h = h.masked_fill(hidden.all(-1, keepdim=True), 0)
    return h.transpose(1, 2).flatten(2)


def without_suspect_cudnn(keys: Tensor) -> contextlib.AbstractContextManager:
    """Around PyTorch's attention to these keys (B, Lk, C): without cuDNN's where that is suspect.

    Of keys whose number is no multiple of 128 cuDNN before 9.15.1 read past the end
    (pytorch/pytorch#169849), and an illegal access was met where 77 keys were slices of one product
    of k and v (benchmarks/NOTES.md, "A whole step"). Who allows cuDNN alone gets it. Like PyTorch's
    `sdpa_kernel` this is for the whole process, all threads of it.
    """
    slices = keys.stride(1) != keys.shape[2] and keys.shape[1] % 128 != 0
    if not slices or torch.compiler.is_compiling() or not _others_enabled():
        return contextlib.nullcontext()
    return _without_cudnn()


def _others_enabled() -> bool:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.math_sdp_enabled()


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _compact(mask: Tensor) -> Tensor:
    """A mask (b, h, m, n) without repetitions: what is made of it is as small as it was."""
    for dim, stride in enumerate(mask.stride()):
        if stride == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _aligned(x: Tensor) -> Tensor:
    """x, copied where PyTorch's CUDA kernels refuse its strides: they read 16 bytes at a time."""
    if x.device.type != "cuda" or all(s * x.itemsize % 16 == 0 for s in x.stride()[:-1]):
        return x
    return x.contiguous()
