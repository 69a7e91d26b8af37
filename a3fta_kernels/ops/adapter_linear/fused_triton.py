# mypy: allow-untyped-defs
"""The forward of path "fused": y and a of `adapter_linear` in one GEMM, which makes z on the way.

Two kernels of the same sums, by tensor descriptors where gemm_triton would use them, else by
pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import (
    AotKernel,
    Call,
    Config,
    Launcher,
    cdiv,
    config,
    descriptor,
    descriptors_fit,
    dot,
    grouped_tile,
    modulated,
    rank_block,
    rows_bucket,
    rows_per_sample,
    shared_limit,
)
from ..activations import activation_code
from ..rule import contiguous

FUSED_RANK_LIMIT = 64


@triton.jit
def plain_span(
    acc, h_ptrs, weight_ptrs, mask_m, mask_n, offs_k, first, last, K, BLOCK_K: tl.constexpr
):
    """acc + h[:, first:last] @ weight[:, first:last].T"""
    for k in range(first, last, BLOCK_K):
        mask_k = offs_k < K - k
        h = tl.load(h_ptrs + k, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(weight_ptrs + k, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = dot(h, w, acc)
    return acc


@triton.jit
def adapted_span(
    acc, acc_a, h_ptrs, weight_ptrs, w_down_ptrs, mask_m, mask_n, mask_r, offs_k, first, last, K,
    start, C, RAGGED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same, and acc_a + h @ w_down.T, whose columns are those of h from `start`.

    RAGGED: a step may reach beyond the slice, where a NaN of h would meet a zero.
    """
    for k in range(first, last, BLOCK_K):
        mask_k = offs_k < K - k
        mask_c = (offs_k >= start - k) & (offs_k < start + C - k)
        h = tl.load(h_ptrs + k, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(weight_ptrs + k, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        d = tl.load(w_down_ptrs + (k - start), mask=mask_c[:, None] & mask_r[None, :], other=0.0)
        acc = dot(h, w, acc)
        if RAGGED:
            h = tl.where(mask_c[None, :], h, 0.0)
        acc_a = dot(h, d, acc_a)
    return acc, acc_a


@triton.jit
def add_adapter(
    acc, acc_a, v_ptr, b_down_ptr, gamma_ptr, beta_ptr, a_ptr, pid_n,
    rows, offs_m, mask_m, offs_n, mask_n, offs_r, mask_r, rows_per_sample, R, ACT: tl.constexpr,
):  # fmt: skip
    """acc + z @ v.T for a = acc_a + b_down, which the first column of tiles stores."""
    if b_down_ptr is not None:
        acc_a += tl.load(b_down_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    if pid_n == 0:
        a_ptrs = a_ptr + rows * R + offs_r[None, :]
        tl.store(a_ptrs, acc_a.to(a_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
    z = modulated(
        acc_a, gamma_ptr, beta_ptr, offs_m, mask_m, offs_r, mask_r, rows_per_sample, R, ACT
    )
    # an infinite h times the zeros beyond the rank is NaN there
    z = tl.where(mask_r[None, :], z, 0.0)
    v_ptrs = v_ptr + offs_n.to(tl.int64)[None, :] * R + offs_r[:, None]
    v = tl.load(v_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
    return dot(z.to(v.dtype), v, acc)


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def linear_forward_kernel(
    h_ptr, weight_ptr, bias_ptr, w_down_ptr, v_ptr, b_down_ptr, gamma_ptr, beta_ptr, residual_ptr,
    y_ptr, a_ptr,
    M, N, K, C, R, start, rows_per_sample, stride_hm, stride_wn, stride_residual_m, stride_ym,
    WHOLE: tl.constexpr, RAGGED: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y (M, N) and a (M, R) for h (M, K), weight (N, K), w_down (R, C), v (N, R).

    WHOLE says that the adapter reads all columns of h, RAGGED that its slice begins or ends inside
    a step of K.
    """
    pid_m, pid_n = grouped_tile(M, N, BLOCK_M, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_r = offs_r < R
    rows = offs_m.to(tl.int64)[:, None]

    h_ptrs = h_ptr + rows * stride_hm + offs_k[None, :]
    weight_ptrs = weight_ptr + offs_n.to(tl.int64)[None, :] * stride_wn + offs_k[:, None]
    w_down_ptrs = w_down_ptr + offs_r[None, :] * C + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_a = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if WHOLE:
        acc, acc_a = adapted_span(
            acc, acc_a, h_ptrs, weight_ptrs, w_down_ptrs, mask_m, mask_n, mask_r, offs_k,
            0, K, K, 0, C, False, BLOCK_K,
        )  # fmt: skip
    else:
        first = start // BLOCK_K * BLOCK_K
        last = tl.cdiv(start + C, BLOCK_K) * BLOCK_K
        acc = plain_span(acc, h_ptrs, weight_ptrs, mask_m, mask_n, offs_k, 0, first, K, BLOCK_K)
        acc, acc_a = adapted_span(
            acc, acc_a, h_ptrs, weight_ptrs, w_down_ptrs, mask_m, mask_n, mask_r, offs_k,
            first, last, K, start, C, RAGGED, BLOCK_K,
        )  # fmt: skip
        acc = plain_span(acc, h_ptrs, weight_ptrs, mask_m, mask_n, offs_k, last, K, K, BLOCK_K)

    acc = add_adapter(
        acc, acc_a, v_ptr, b_down_ptr, gamma_ptr, beta_ptr, a_ptr, pid_n,
        rows, offs_m, mask_m, offs_n, mask_n, offs_r, mask_r, rows_per_sample, R, ACT,
    )  # fmt: skip

    mask = mask_m[:, None] & mask_n[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows * stride_residual_m + offs_n[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + rows * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def linear_forward_tma_kernel(
    h_desc, weight_desc, bias_ptr, w_down_desc, v_ptr, b_down_ptr, gamma_ptr, beta_ptr,
    residual_desc, y_desc, a_ptr,
    M, N, K, C, R, start, rows_per_sample,
    WHOLE: tl.constexpr, RAGGED: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The same by tensor descriptors, which read zeros beyond an edge and write nothing there."""
    pid_m, pid_n = grouped_tile(M, N, BLOCK_M, BLOCK_N)
    first_m = pid_m * BLOCK_M
    first_n = pid_n * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_r = offs_r < R
    rows = offs_m.to(tl.int64)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_a = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    first = 0 if WHOLE else start // BLOCK_K * BLOCK_K
    last = K if WHOLE else tl.cdiv(start + C, BLOCK_K) * BLOCK_K
    if not WHOLE:
        for k in range(0, first, BLOCK_K):
            w = weight_desc.load([first_n, k])
            acc = dot(h_desc.load([first_m, k]), tl.trans(w), acc)
    for k in range(first, last, BLOCK_K):
        h = h_desc.load([first_m, k])
        acc = dot(h, tl.trans(weight_desc.load([first_n, k])), acc)
        if RAGGED:
            columns = k - start + tl.arange(0, BLOCK_K)
            h = tl.where(((columns >= 0) & (columns < C))[None, :], h, 0.0)
        acc_a = dot(h, tl.trans(w_down_desc.load([0, k - start])), acc_a)
    if not WHOLE:
        for k in range(last, K, BLOCK_K):
            w = weight_desc.load([first_n, k])
            acc = dot(h_desc.load([first_m, k]), tl.trans(w), acc)

    acc = add_adapter(
        acc, acc_a, v_ptr, b_down_ptr, gamma_ptr, beta_ptr, a_ptr, pid_n,
        rows, offs_m, mask_m, offs_n, mask_n, offs_r, mask_r, rows_per_sample, R, ACT,
    )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if residual_desc is not None:
        acc += residual_desc.load([first_m, first_n]).to(tl.float32)
    y_desc.store([first_m, first_n], acc.to(y_desc.dtype))


# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages
_HALF = (
    (128, 128, 32, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (64, 64, 32, 4, 4),
    (64, 128, 32, 8, 3),
)
_HALF_ODD = (_HALF[0], _HALF[3])
_FP32 = ((64, 64, 16, 8, 2), (32, 32, 16, 4, 2))


def linear_forward_configs(itemsize: int, block_r: int, capability: int) -> list[Config]:
    found = []
    # where descriptors serve, pointers are left with the odd sizes
    tiles = _FP32 if itemsize == 4 else _HALF if capability < 90 else _HALF_ODD
    for block_m, block_n, block_k, num_warps, num_stages in tiles:
        shared = num_stages * itemsize * block_k * (block_m + block_n + block_r)
        accumulators = block_m * (block_n + block_r) // (32 * num_warps)
        # without wgmma (sm_80, 89, 120) a product's operands stand in registers too
        fits = capability in (90, 100, 103) or itemsize == 4 or accumulators * block_k <= 4096
        if shared <= shared_limit(capability) and fits:
            found.append(
                config(
                    num_warps, num_stages,
                    BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=block_r,
                )
            )  # fmt: skip
    return found


launch_linear_forward = Launcher(linear_forward_kernel, linear_forward_configs)

# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages
_TMA = (
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 2),
    (128, 256, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 4),
)


def linear_forward_tma_configs(itemsize: int, block_r: int, capability: int) -> list[Config]:
    found = []
    for block_m, block_n, block_k, num_warps, num_stages in _TMA:
        shared = num_stages * itemsize * block_k * (block_m + block_n + block_r)
        accumulators = block_m * (block_n + block_r) // (32 * num_warps)
        fits = accumulators <= (136 if capability == 90 else 96)
        if shared <= shared_limit(capability) and fits:
            found.append(
                config(
                    num_warps, num_stages,
                    BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=block_r,
                )
            )  # fmt: skip
    return found


launch_linear_forward_tma = Launcher(linear_forward_tma_kernel, linear_forward_tma_configs)

AOT_KERNELS = (
    AotKernel(
        launch_linear_forward,
        pointers={"bias_ptr": "fp32"},
        variants={
            "whole": {"ACT": 2, "WHOLE": True, "RAGGED": False, "start": 0},
            "slice": {"ACT": 2, "WHOLE": False, "RAGGED": False},
            "ragged slice": {"ACT": 2, "WHOLE": False, "RAGGED": True},
        },
        fixed_blocks=(16, 64),
    ),
    AotKernel(
        launch_linear_forward_tma,
        pointers={"bias_ptr": "fp32"},
        variants={
            name: {
                "ACT": 2, "WHOLE": name == "whole", "RAGGED": name == "ragged slice",
                "h_desc": ("BLOCK_M", "BLOCK_K"), "weight_desc": ("BLOCK_N", "BLOCK_K"),
                "w_down_desc": ("BLOCK_R", "BLOCK_K"), "residual_desc": ("BLOCK_M", "BLOCK_N"),
                "y_desc": ("BLOCK_M", "BLOCK_N"),
            }
            for name in ("whole", "slice", "ragged slice")
        },
        fixed_blocks=(16, 64),
        targets=(90, 100, 120),
        dtypes=("bf16", "fp16"),
    ),
)  # fmt: skip


def fused_forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_down: Tensor,
    v: Tensor,
    b_down: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    start: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    m, k = h.shape
    n = weight.shape[0]
    rank, length = w_down.shape
    y, a = h.new_empty(m, n), h.new_empty(m, rank)
    if m == 0:
        return y, a
    block_r = rank_block(rank, FUSED_RANK_LIMIT)
    whole = length == k
    by_descriptors = start % 8 == 0 and descriptors_fit(h.device, h, weight, w_down, residual, y)
    shared = dict(
        bias_ptr=contiguous(bias), v_ptr=v, b_down_ptr=contiguous(b_down),
        gamma_ptr=contiguous(gamma), beta_ptr=contiguous(beta), a_ptr=a,
        M=m, N=n, K=k, C=length, R=rank, start=start,
        rows_per_sample=rows_per_sample(m, gamma, beta), WHOLE=whole,
        ACT=activation_code(activation),
    )  # fmt: skip

    def plan(meta: dict[str, int]) -> Call:
        block_m, block_n, block_k = (meta[f"BLOCK_{axis}"] for axis in "MNK")
        grid = (cdiv(m, block_m) * cdiv(n, block_n),)
        ragged = not whole and (start % block_k != 0 or (start + length) % block_k != 0)
        if by_descriptors:
            return grid, shared | dict(
                RAGGED=ragged,
                h_desc=descriptor(h, block_m, block_k),
                weight_desc=descriptor(weight, block_n, block_k),
                w_down_desc=descriptor(w_down, block_r, block_k),
                residual_desc=descriptor(residual, block_m, block_n),
                y_desc=descriptor(y, block_m, block_n),
            )
        return grid, shared | dict(
            RAGGED=ragged, h_ptr=h, weight_ptr=weight, w_down_ptr=w_down, residual_ptr=residual,
            y_ptr=y, stride_hm=h.stride(0), stride_wn=weight.stride(0),
            stride_residual_m=0 if residual is None else residual.stride(0), stride_ym=n,
        )  # fmt: skip

    launch = launch_linear_forward_tma if by_descriptors else launch_linear_forward
    launch(plan, h, block_r, rows_bucket(m), n, k, whole, residual is None)
    return y, a
