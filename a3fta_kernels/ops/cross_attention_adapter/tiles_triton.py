# mypy: allow-untyped-defs
"""Tiles of short-key attention: what the kernels of its backward share.

Tensor cores take powers of two, but a head has 40 dimensions and a text 77 tokens. So an axis is
cut into blocks of one size and a smaller tail, 32 + 16 and 64 + 16, where these pad it less than
one block would; a matrix is then a tuple of tiles, one for each block of the head's dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import dot, power_of_2

# larger axes are several blocks of this size: larger tiles take registers until some spill
KEY_BLOCK = 128
HEAD_BLOCK = 64

# head_dim, keys: what is compiled ahead of time
SHAPES = (
    (64, 77), (40, 77), (80, 77), (128, 77), (160, 77),
    (64, 512), (80, 256), (128, 256), (160, 192),
)  # fmt: skip


class Blocks(NamedTuple):
    """`full` blocks and a tail, 0 where there is none, cover an axis."""

    block: int
    full: int
    tail: int


def blocks(length: int, largest: int, ratio: int) -> Blocks:
    """Blocks of at most `largest`, and a tail of at least 1 / ratio of one."""
    if length > largest:
        full, rest = divmod(length, largest)
        tail = max(_power_of_two(rest), largest // ratio) if rest else 0
        return Blocks(largest, full, tail) if tail < largest else Blocks(largest, full + 1, 0)
    whole = _power_of_two(length)
    half = whole // 2
    tail = max(_power_of_two(length - half), half // ratio)
    return Blocks(half, 1, tail) if tail < half else Blocks(whole, 1, 0)


def _power_of_two(length: int) -> int:
    return max(16, power_of_2(length))


def head_meta(head_dim: int) -> dict[str, int]:
    """Block sizes for the dimensions of a head."""
    # 16 columns beside 64 take more registers than 32 do
    cut = blocks(head_dim, HEAD_BLOCK, ratio=2)
    return dict(BLOCK_D=cut.block, COUNT_D=cut.full, TAIL_D=cut.tail)


def tall_blocks(head_dim: int, capability: int) -> bool:
    """Whether kernels may take blocks of 64 rows.

    On sm_90, where these are products by wgmma, Triton 3.6 made code of them that was now right,
    now wrong, where a head has a tail of columns. Blocks of 32 and 16 rows were right.
    """
    return not (capability == 90 and head_meta(head_dim)["TAIL_D"])


def tall_warps(capability: int) -> int:
    """Warps for a block of 64 rows.

    wgmma takes 64 rows by four warps. In a chain of products Triton gives eight 128 rows, of which
    half are not there: some of the wrong values above were of such code.
    """
    return 4 if capability == 90 else 8


def key_meta(keys: int) -> dict[str, int]:
    """Block sizes for the keys."""
    cut = blocks(keys, KEY_BLOCK, ratio=8)
    return dict(BLOCK_N=cut.block, COUNT_N=cut.full, TAIL_N=cut.tail)


def head_constants(head_dim: int, mask: str = "") -> dict[str, Any]:
    """What builds for such heads are given ahead of time; `mask` is "key", "query" or none."""
    given = dict(D=head_dim, SCALE=head_dim**-0.5, PER_QUERY=mask == "query", stride_mask_n=1)
    return given | head_meta(head_dim) | ({} if mask else {"mask_ptr": None})


def variants() -> dict[str, tuple[int, int, str]]:
    """head_dim, keys and mask of what is built ahead of time."""
    plain = {f"D{d} N{n}": (d, n, "") for d, n in SHAPES}
    return plain | {f"D64 N77 mask by {kind}": (64, 77, kind) for kind in ("key", "query")}


def text_arguments(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """q (B, M, C), k and v (B, N, C) and their strides; those of k and v are the same."""
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    return dict(
        q_ptr=q, k_ptr=k, v_ptr=v, N=k.shape[1], stride_qb=q.stride(0), stride_qm=q.stride(1),
        stride_kb=k.stride(0), stride_kn=k.stride(1),
    )  # fmt: skip


def mask_arguments(mask: Tensor | None) -> dict[str, Any]:
    """For a mask seen as (B, H, M, N); along keys it is dense."""
    if mask is not None and mask.stride(3) != 1:
        mask = mask.contiguous()
    sizes = (0, 0, 0, 1) if mask is None else mask.stride()
    found = dict(zip((f"stride_mask_{x}" for x in "bhmn"), sizes, strict=True))
    return dict(mask_ptr=mask, PER_QUERY=sizes[2] != 0, **found)


@triton.jit
def append(x, y):
    """The tuple x with y at its end; Triton has no starred expressions."""
    return x + (y,)  # noqa: RUF005


@triton.jit
def load_block(ptr, offs, mask, stride, START: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Columns from START of the rows `offs`, of all where mask is None, zeros past D."""
    offs_d = tl.arange(0, BLOCK)
    # START in the scalar: offsets are then the same for all blocks, which saves registers
    ptrs = ptr + START + offs[:, None] * stride + offs_d[None, :]
    if START + BLOCK > D:
        inside = (offs_d < D - START)[None, :]
        if mask is not None:
            inside &= mask[:, None]
        return tl.load(ptrs, mask=inside, other=0.0)
    elif mask is not None:
        return tl.load(ptrs, mask=mask[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_rows(
    ptr,
    offs,
    mask,
    stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COUNT_D: tl.constexpr,
    TAIL_D: tl.constexpr,
):
    """The rows `offs` of one head, which starts at ptr: tiles (rows, BLOCK_D), (rows, TAIL_D)."""
    x = ()
    for i in tl.static_range(COUNT_D):
        x = append(x, load_block(ptr, offs, mask, stride, i * BLOCK_D, D, BLOCK_D))
    if TAIL_D > 0:
        x = append(x, load_block(ptr, offs, mask, stride, COUNT_D * BLOCK_D, D, TAIL_D))
    return x


@triton.jit
def store_rows(ptr, x, offs, mask, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    for i in tl.static_range(len(x)):
        offs_d = tl.arange(0, x[i].shape[1])
        ptrs = ptr + i * BLOCK_D + offs[:, None] * stride + offs_d[None, :]
        tl.store(ptrs, x[i], mask=mask[:, None] & (offs_d < D - i * BLOCK_D)[None, :])


@triton.jit
def load_keys(
    ptr, N, stride, INDEX: tl.constexpr, BLOCK_N: tl.constexpr, COUNT_N: tl.constexpr,
    TAIL_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, COUNT_D: tl.constexpr,
    TAIL_D: tl.constexpr,
):  # fmt: skip
    """The keys, or values, of block INDEX of one head, which starts at ptr: tiles (keys, dims)."""
    ptr += INDEX * BLOCK_N * stride
    offs = tl.arange(0, BLOCK_N if INDEX < COUNT_N else TAIL_N)
    if (TAIL_N > 0 and INDEX < COUNT_N) or INDEX < COUNT_N - 1:  # a full block
        return load_rows(ptr, offs, None, stride, D, BLOCK_D, COUNT_D, TAIL_D)
    else:
        return load_rows(ptr, offs, offs < N - INDEX * BLOCK_N, stride, D, BLOCK_D, COUNT_D, TAIL_D)


@triton.jit
def zero_tiles(
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, COUNT_D: tl.constexpr, TAIL_D: tl.constexpr
):
    """Accumulators (BLOCK, BLOCK_D), (BLOCK, TAIL_D)."""
    x = ()
    for _ in tl.static_range(COUNT_D):
        x = append(x, tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32))
    if TAIL_D > 0:
        x = append(x, tl.zeros((BLOCK, TAIL_D), dtype=tl.float32))
    return x


@triton.jit
def tiles_to(x, dtype: tl.constexpr, factor=1.0):
    """Each tile times factor, in dtype."""
    y = ()
    for i in tl.static_range(len(x)):
        y = append(y, (x[i].to(tl.float32) * factor).to(dtype))
    return y


@triton.jit
def dot_nt(x, y, acc):
    """acc + x @ y.T for x (rows, D), y (columns, D), acc (rows, columns)."""
    for i in tl.static_range(len(x)):
        acc = dot(x[i], tl.trans(y[i]), acc)
    return acc


@triton.jit
def dot_nn(p, x, acc):
    """acc + p @ x for one tile p (rows, columns), x (columns, D), acc (rows, D)."""
    y = ()
    for i in tl.static_range(len(x)):
        y = append(y, dot(p, x[i], acc[i]))
    return y


@triton.jit
def masked_scores(
    q, k, mask_ptr, offs_m, mask_m, offs_n, N, stride_mask_m, stride_mask_n,
    SCALE: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """q @ k.T * SCALE + mask, -inf past the last key. mask_ptr, at the head, may be None."""
    s = dot_nt(q, k, tl.zeros((q[0].shape[0], k[0].shape[0]), dtype=tl.float32)) * SCALE
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
def softmax(s):
    """p = exp(s - top) for the scores s by blocks of keys; top, and 1 / sum(p), by row.

    A row of nothing but -inf has p = 0: it attends to no key.
    """
    top = tl.max(s[0], axis=1)
    for i in tl.static_range(1, len(s)):
        top = tl.maximum(top, tl.max(s[i], axis=1))
    top = tl.where(top == float("-inf"), 0.0, top)
    p = ()
    total = tl.zeros_like(top)
    for i in tl.static_range(len(s)):
        p = append(p, tl.exp(s[i] - top[:, None]))
        total += tl.sum(p[i], axis=1)
    return p, top, 1.0 / tl.where(total == 0.0, 1.0, total)
