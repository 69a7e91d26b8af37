# mypy: allow-untyped-defs
"""Tiles of short-key attention: what its forward and backward kernels share.

Tensor cores take powers of two, but a head has 40 dimensions and a text 77 tokens: an axis is split
into two blocks, 32 + 16 and 64 + 16, where these pad it less than one block would. A matrix is then
a tuple of tiles, of one or two, by the blocks of the head's dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import dot


class Blocks(NamedTuple):
    """Two blocks that cover an axis; `second` is 0 where one does."""

    first: int
    second: int

    @property
    def total(self) -> int:
        return self.first + self.second


def blocks(length: int) -> Blocks:
    whole = max(16, triton.next_power_of_2(length))
    first = whole // 2
    if first < 16:
        return Blocks(whole, 0)
    second = max(16, triton.next_power_of_2(length - first))
    return Blocks(first, second) if first + second < whole else Blocks(whole, 0)


def mask_strides(mask: Tensor | None) -> dict[str, int]:
    """Of a mask seen as (B, H, M, N)."""
    strides = (0, 0, 0, 0) if mask is None else mask.stride()
    return dict(zip((f"stride_mask_{x}" for x in "bhmn"), strides, strict=True))


@triton.jit
def load_block(ptr, offs, mask, stride, START: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    offs_d = START + tl.arange(0, BLOCK)
    inside = mask[:, None] & (offs_d < D)[None, :]
    return tl.load(ptr + offs[:, None] * stride + offs_d[None, :], mask=inside, other=0.0)


@triton.jit
def load_rows(
    ptr, offs, mask, stride, D: tl.constexpr, BLOCK_D_1: tl.constexpr, BLOCK_D_2: tl.constexpr
):
    """The rows `offs` of one head, which starts at ptr, zeros past D: tiles (rows, BLOCK_D)."""
    x = (load_block(ptr, offs, mask, stride, 0, D, BLOCK_D_1),)
    if BLOCK_D_2 > 0:
        x = (x[0], load_block(ptr, offs, mask, stride, BLOCK_D_1, D, BLOCK_D_2))
    return x


@triton.jit
def load_keys(
    ptr, N, stride, D: tl.constexpr, BLOCK_N_1: tl.constexpr, BLOCK_N_2: tl.constexpr,
    BLOCK_D_1: tl.constexpr, BLOCK_D_2: tl.constexpr,
):  # fmt: skip
    """All keys, or values, of one head: for each block of them the tiles (BLOCK_N, BLOCK_D)."""
    offs = tl.arange(0, BLOCK_N_1)
    x = (load_rows(ptr, offs, offs < N, stride, D, BLOCK_D_1, BLOCK_D_2),)
    if BLOCK_N_2 > 0:
        offs = BLOCK_N_1 + tl.arange(0, BLOCK_N_2)
        x = (x[0], load_rows(ptr, offs, offs < N, stride, D, BLOCK_D_1, BLOCK_D_2))
    return x


@triton.jit
def store_block(
    ptr, x, offs, mask, stride, START: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    offs_d = START + tl.arange(0, BLOCK)
    inside = mask[:, None] & (offs_d < D)[None, :]
    tl.store(ptr + offs[:, None] * stride + offs_d[None, :], x, mask=inside)


@triton.jit
def store_rows(
    ptr, x, offs, mask, stride, D: tl.constexpr, BLOCK_D_1: tl.constexpr, BLOCK_D_2: tl.constexpr
):
    store_block(ptr, x[0], offs, mask, stride, 0, D, BLOCK_D_1)
    if BLOCK_D_2 > 0:
        store_block(ptr, x[1], offs, mask, stride, BLOCK_D_1, D, BLOCK_D_2)


@triton.jit
def zeros(BLOCK: tl.constexpr, BLOCK_D_1: tl.constexpr, BLOCK_D_2: tl.constexpr):
    """Accumulators (BLOCK, BLOCK_D)."""
    x = (tl.zeros((BLOCK, BLOCK_D_1), dtype=tl.float32),)
    if BLOCK_D_2 > 0:
        x = (x[0], tl.zeros((BLOCK, BLOCK_D_2), dtype=tl.float32))
    return x


@triton.jit
def cast(x, dtype: tl.constexpr, factor=1.0):
    """x * factor in dtype."""
    y = ((x[0] * factor).to(dtype),)
    if len(x) > 1:
        y = (y[0], (x[1] * factor).to(dtype))
    return y


@triton.jit
def outer(x, y, acc):
    """acc + x @ y.T for x (rows, D) and y (columns, D)."""
    acc = dot(x[0], tl.trans(y[0]), acc)
    if len(x) > 1:
        acc = dot(x[1], tl.trans(y[1]), acc)
    return acc


@triton.jit
def times(p, x, acc):
    """acc + p @ x for one tile p (rows, columns), x (columns, D) and acc (rows, D)."""
    y = (dot(p, x[0], acc[0]),)
    if len(x) > 1:
        y = (y[0], dot(p, x[1], acc[1]))
    return y


@triton.jit
def masked_scores(
    q, k, mask_ptr, offs_m, mask_m, offs_n, N, stride_mask_m, stride_mask_n,
    SCALE: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """q @ k.T * SCALE + mask, -inf past the last key. mask_ptr, at the head, may be None."""
    s = tl.zeros((offs_m.shape[0], offs_n.shape[0]), dtype=tl.float32)
    s = outer(q, k, s) * SCALE
    mask_n = offs_n < N
    if mask_ptr is not None:
        if PER_QUERY:
            ptrs = mask_ptr + offs_m[:, None] * stride_mask_m + offs_n[None, :] * stride_mask_n
            mask = tl.load(ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0)
        else:
            mask = tl.load(mask_ptr + offs_n * stride_mask_n, mask=mask_n, other=0)[None, :]
        if mask_ptr.dtype.element_ty == tl.int1:
            s += tl.where(mask, 0.0, float("-inf"))
        else:
            s += mask.to(tl.float32)
    return tl.where(mask_n[None, :], s, float("-inf"))


@triton.jit
def probabilities(
    q, k, mask_ptr, offs_m, mask_m, N, stride_mask_m, stride_mask_n,
    SCALE: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """p = exp(s - top) for each block of keys; top, and 1 / sum(p), by row.

    A row of nothing but -inf has p = 0: it attends to no key.
    """
    offs_n = tl.arange(0, k[0][0].shape[0])
    s = (
        masked_scores(
            q, k[0], mask_ptr, offs_m, mask_m, offs_n, N, stride_mask_m, stride_mask_n, SCALE,
            PER_QUERY,
        ),
    )  # fmt: skip
    top = tl.max(s[0], axis=1)
    if len(k) > 1:
        offs_n_2 = k[0][0].shape[0] + tl.arange(0, k[1][0].shape[0])
        s_2 = masked_scores(
            q, k[1], mask_ptr, offs_m, mask_m, offs_n_2, N, stride_mask_m, stride_mask_n, SCALE,
            PER_QUERY,
        )  # fmt: skip
        s = (s[0], s_2)
        top = tl.maximum(top, tl.max(s_2, axis=1))
    top = tl.where(top == float("-inf"), 0.0, top)
    p = (tl.exp(s[0] - top[:, None]),)
    total = tl.sum(p[0], axis=1)
    if len(k) > 1:
        p = (p[0], tl.exp(s[1] - top[:, None]))
        total += tl.sum(p[1], axis=1)
    return p, top, 1.0 / tl.where(total == 0.0, 1.0, total)
