# mypy: allow-untyped-defs
"""Normalisation of rows that one program holds: a layer norm's rows, small contiguous groups.

A row of N elements belongs to group `row % G` of a sample, and its element j to channel
`group * (N / S) + j // S`. A layer norm has G = S = 1. Each tensor is read once and written once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import (
    AotKernel,
    Call,
    Config,
    Launcher,
    activate,
    activate_slope,
    cdiv,
    config,
    power_of_2,
    rows_bucket,
)
from .activations import activation_code

ROW_BYTES = 32768  # of a row that one program holds


@triton.jit
def load_parameter(ptr, channels, mask, ABSENT: tl.constexpr):
    """weight or bias by channel in fp32; ABSENT where there is none."""
    if ptr is None:
        return tl.full(channels.shape, ABSENT, tl.float32)
    else:
        return tl.load(ptr + channels, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def channels_of(offs_m, offs_n, N, G, S, GROUPED: tl.constexpr):
    """The channels of the rows' elements: (BLOCK_M, BLOCK_N), or (1, BLOCK_N) where rows agree."""
    if GROUPED:
        return (offs_m % G)[:, None] * (N // S) + (offs_n // S)[None, :]
    else:
        return offs_n[None, :]


@triton.jit(do_not_specialize=["M", "eps"])
def norm_rows_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, M, N, G, S, stride_xm, eps,
    ACT: tl.constexpr, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x, y (M, N); mean, rstd (M,)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    x = tl.load(x_ptr + rows * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)

    mean = tl.sum(x, axis=1) / N
    apart = tl.where(mask, x - mean[:, None], 0.0)
    # what the sum's roundings left of the mean
    lack = tl.sum(apart, axis=1) / N
    mean += lack
    apart = tl.where(mask, apart - lack[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(apart * apart, axis=1) / N + eps)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)

    channels = channels_of(offs_m, offs_n, N, G, S, GROUPED)
    inside = (offs_n < N)[None, :]
    weight = load_parameter(weight_ptr, channels, inside, 1.0)
    bias = load_parameter(bias_ptr, channels, inside, 0.0)
    y = activate(apart * rstd[:, None] * weight + bias, ACT)
    tl.store(y_ptr + rows * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def norm_rows_backward_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, dx_ptr, M, N, G, S, stride_dym,
    stride_xm,
    ACT: tl.constexpr, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dy, x, dx (M, N); mean, rstd (M,)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    x = tl.load(x_ptr + rows * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + rows * stride_dym + offs_n[None, :], mask=mask, other=0.0)
    mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    channels = channels_of(offs_m, offs_n, N, G, S, GROUPED)
    inside = (offs_n < N)[None, :]
    weight = load_parameter(weight_ptr, channels, inside, 1.0)
    bias = load_parameter(bias_ptr, channels, inside, 0.0)

    xhat = (x - mean) * rstd
    g = dy.to(tl.float32) * activate_slope(xhat * weight + bias, ACT) * weight
    mean_g = tl.sum(g, axis=1) / N
    mean_gx = tl.sum(g * xhat, axis=1) / N
    dx = rstd * (g - mean_g[:, None] - xhat * mean_gx[:, None])
    tl.store(dx_ptr + rows * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def norm_rows_configs(itemsize: int, block_n: int, capability: int) -> list[Config]:
    """A program takes 2048 elements, or one row; a thread 16 of them, 32 of the widest."""
    if block_n * itemsize > ROW_BYTES:
        return []
    block_m = max(1, 2048 // block_n)
    warps = min(16, block_m * block_n // 512)
    return [config(warps, 1, BLOCK_M=block_m, BLOCK_N=block_n)]


launch_norm_rows_forward = Launcher(norm_rows_forward_kernel, norm_rows_configs)
launch_norm_rows_backward = Launcher(norm_rows_backward_kernel, norm_rows_configs)

_STATISTICS = {"mean_ptr": "fp32", "rstd_ptr": "fp32"}
_VARIANTS = {
    "groups, silu": {"ACT": 4, "GROUPED": True},
    "rows": {"ACT": 0, "GROUPED": False, "G": 1, "S": 1},
}
AOT_KERNELS = (
    AotKernel(
        launch_norm_rows_forward,
        pointers=_STATISTICS | {"eps": "fp32"},
        variants=_VARIANTS,
        fixed_blocks=(64, 512, 4096, 8192, 16384),
        products=False,
    ),
    AotKernel(
        launch_norm_rows_backward,
        pointers=_STATISTICS,
        variants=_VARIANTS,
        fixed_blocks=(64, 512, 4096, 8192, 16384),
        products=False,
    ),
)


def fits_a_row(n: int, x: Tensor) -> bool:
    """Whether a program holds n elements of x's dtype."""
    return power_of_2(n) * x.element_size() <= ROW_BYTES


def norm_rows_forward(
    x: Tensor,
    groups: int,
    positions: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (M, N), mean and rstd (M,) of the rows of x (M, N), of a width that `fits_a_row`."""
    m, n = x.shape
    y = x.new_empty(m, n)
    mean, rstd = (x.new_empty(m, dtype=torch.float32) for _ in range(2))
    if m > 0:
        _launch(
            launch_norm_rows_forward, x, groups, positions, activation,
            x_ptr=x, weight_ptr=weight, bias_ptr=bias, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd,
            stride_xm=x.stride(0), eps=eps,
        )  # fmt: skip
    return y, mean, rstd


def norm_rows_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    positions: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """dx (M, N)."""
    m, n = x.shape
    dx = x.new_empty(m, n)
    if m > 0:
        _launch(
            launch_norm_rows_backward, x, groups, positions, activation,
            dy_ptr=dy, x_ptr=x, mean_ptr=mean, rstd_ptr=rstd, weight_ptr=weight, bias_ptr=bias,
            dx_ptr=dx, stride_dym=dy.stride(0), stride_xm=x.stride(0),
        )  # fmt: skip
    return dx


def _launch(
    launcher: Launcher, x: Tensor, groups: int, positions: int, activation: str, **arguments: Any
) -> None:
    m, n = x.shape
    code = activation_code(activation)
    grouped = groups > 1 or positions > 1

    def plan(meta: dict[str, int]) -> Call:
        sizes = dict(M=m, N=n, G=groups, S=positions, ACT=code, GROUPED=grouped)
        return (cdiv(m, meta["BLOCK_M"]),), arguments | sizes

    launcher(plan, x, power_of_2(n), rows_bucket(m), n, code, grouped)
