# mypy: allow-untyped-defs
"""Normalisation of large groups: tiles of channels and positions, in three launches each way.

A tile's sums by channel go to a workspace (2, B, P, C), P tiles along the S positions; one program
per group adds them in their order; tiles then apply what it found. x (B, C, S) of either layout:
element (c, s) of a sample lies at c * stride_c + s * stride_s.

A tile gives each channel's mean and its sum of squared differences from it, so that no variance is
a difference of large numbers.
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
)
from .activations import activation_code
from .norm_triton import load_parameter


@triton.jit
def tile_of(C, S, P, stride_c, stride_s, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """This program's sample, tile along the positions, channels, offsets, and what is inside."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    part = pid // tiles_c % P
    sample = (pid // tiles_c // P).to(tl.int64)
    offs_s = part * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = sample * C * S
    offsets = (
        inside + offs_c.to(tl.int64)[:, None] * stride_c + offs_s.to(tl.int64)[None, :] * stride_s
    )
    return sample, part, offs_c, offsets, (offs_c < C)[:, None] & (offs_s < S)[None, :]


@triton.jit
def store_parts(part_ptr, first, second, sample, part, offs_c, B, C, P):
    """Two values of each channel into the workspace (2, B, P, C)."""
    at = (sample * P + part) * C + offs_c
    tl.store(part_ptr + at, first, mask=offs_c < C)
    tl.store(part_ptr + at + B.to(tl.int64) * P * C, second, mask=offs_c < C)


@triton.jit
def load_of_group(ptr, sample, offs_c, C, G):
    """A value (B, G) for each channel of one sample: (BLOCK_C, 1)."""
    return tl.load(ptr + sample * G + offs_c // (C // G), mask=offs_c < C, other=0.0)[:, None]


@triton.jit(do_not_specialize=["B"])
def tile_moments_kernel(
    x_ptr, part_ptr, B, C, S, P, stride_c, stride_s,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Each channel's mean over the tile's positions, and the squared differences from it."""
    sample, part, offs_c, offsets, mask = tile_of(C, S, P, stride_c, stride_s, BLOCK_C, BLOCK_S)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(S - part * BLOCK_S, BLOCK_S)
    mean = tl.sum(x, axis=1) / count
    apart = tl.where(mask, x - mean[:, None], 0.0)
    store_parts(part_ptr, mean, tl.sum(apart * apart, axis=1), sample, part, offs_c, B, C, P)


@triton.jit
def entry_of(i, sample, group, C, P, D):
    """Where entry i of a group's P * D lies in the workspace, and its part."""
    part = i // D
    return (sample * P + part) * C + group * D + i % D, part


@triton.jit(do_not_specialize=["B", "eps"])
def group_moments_kernel(
    part_ptr, mean_ptr, rstd_ptr, B, C, S, P, G, LENGTH, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean and rstd of one group, from tiles of LENGTH positions."""
    pid = tl.program_id(0)
    sample = (pid // G).to(tl.int64)
    group = pid % G
    D = C // G
    squares_ptr = part_ptr + B.to(tl.int64) * P * C
    offs = tl.arange(0, BLOCK)
    # the first tile's mean: sums of differences from it stay small
    center = tl.load(part_ptr + sample * P * C + group * D)
    lacks = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, P * D, BLOCK):
        at, part = entry_of(i + offs, sample, group, C, P, D)
        mask = i + offs < P * D
        count = tl.minimum(S - part * LENGTH, LENGTH).to(tl.float32)
        lacks += tl.where(
            mask, count * (tl.load(part_ptr + at, mask=mask, other=0.0) - center), 0.0
        )
    N = 1.0 * D * S
    mean = center + tl.sum(lacks, axis=0) / N
    squares = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, P * D, BLOCK):
        at, part = entry_of(i + offs, sample, group, C, P, D)
        mask = i + offs < P * D
        count = tl.minimum(S - part * LENGTH, LENGTH).to(tl.float32)
        apart = tl.load(part_ptr + at, mask=mask, other=0.0) - mean
        of_tile = tl.load(squares_ptr + at, mask=mask, other=0.0)
        squares += tl.where(mask, of_tile + count * apart * apart, 0.0)
    tl.store(mean_ptr + pid, mean)
    tl.store(rstd_ptr + pid, 1.0 / tl.sqrt(tl.sum(squares, axis=0) / N + eps))


@triton.jit(do_not_specialize=["B"])
def tile_apply_kernel(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, y_ptr, B, C, S, P, G, stride_c, stride_s,
    ACT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y = act(weight * xhat + bias)."""
    sample, _, offs_c, offsets, mask = tile_of(C, S, P, stride_c, stride_s, BLOCK_C, BLOCK_S)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = load_of_group(mean_ptr, sample, offs_c, C, G)
    rstd = load_of_group(rstd_ptr, sample, offs_c, C, G)
    weight = load_parameter(weight_ptr, offs_c, offs_c < C, 1.0)[:, None]
    bias = load_parameter(bias_ptr, offs_c, offs_c < C, 0.0)[:, None]
    y = activate((x - mean) * rstd * weight + bias, ACT)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def slopes(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, offsets, mask, sample, offs_c, C, G,
    ACT: tl.constexpr,
):  # fmt: skip
    """xhat, g = dy * act'(weight * xhat + bias) * weight, and rstd, of a tile."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    rstd = load_of_group(rstd_ptr, sample, offs_c, C, G)
    weight = load_parameter(weight_ptr, offs_c, offs_c < C, 1.0)[:, None]
    bias = load_parameter(bias_ptr, offs_c, offs_c < C, 0.0)[:, None]
    xhat = (x - load_of_group(mean_ptr, sample, offs_c, C, G)) * rstd
    return xhat, dy * activate_slope(xhat * weight + bias, ACT) * weight, rstd


@triton.jit(do_not_specialize=["B"])
def tile_sums_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, part_ptr, B, C, S, P, G, stride_c,
    stride_s,
    ACT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Each channel's sums of g and of g * xhat over the tile's positions."""
    sample, part, offs_c, offsets, mask = tile_of(C, S, P, stride_c, stride_s, BLOCK_C, BLOCK_S)
    xhat, g, _ = slopes(
        dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, offsets, mask, sample, offs_c,
        C, G, ACT,
    )  # fmt: skip
    # outside g is 0, and xhat, of another group's mean, may be infinite
    gx = tl.where(mask, g * xhat, 0.0)
    store_parts(part_ptr, tl.sum(g, axis=1), tl.sum(gx, axis=1), sample, part, offs_c, B, C, P)


@triton.jit(do_not_specialize=["B"])
def group_sums_kernel(
    part_ptr, mean_g_ptr, mean_gx_ptr, B, C, S, P, G, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean(g) and mean(g * xhat) of one group."""
    pid = tl.program_id(0)
    sample = (pid // G).to(tl.int64)
    group = pid % G
    D = C // G
    second_ptr = part_ptr + B.to(tl.int64) * P * C
    offs = tl.arange(0, BLOCK)
    sum_g = tl.zeros((BLOCK,), tl.float32)
    sum_gx = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, P * D, BLOCK):
        at, _ = entry_of(i + offs, sample, group, C, P, D)
        mask = i + offs < P * D
        sum_g += tl.load(part_ptr + at, mask=mask, other=0.0)
        sum_gx += tl.load(second_ptr + at, mask=mask, other=0.0)
    N = 1.0 * D * S
    tl.store(mean_g_ptr + pid, tl.sum(sum_g, axis=0) / N)
    tl.store(mean_gx_ptr + pid, tl.sum(sum_gx, axis=0) / N)


@triton.jit(do_not_specialize=["B"])
def tile_dx_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, mean_g_ptr, mean_gx_ptr, dx_ptr,
    B, C, S, P, G, stride_c, stride_s,
    ACT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat))."""
    sample, _, offs_c, offsets, mask = tile_of(C, S, P, stride_c, stride_s, BLOCK_C, BLOCK_S)
    xhat, g, rstd = slopes(
        dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, offsets, mask, sample, offs_c,
        C, G, ACT,
    )  # fmt: skip
    mean_g = load_of_group(mean_g_ptr, sample, offs_c, C, G)
    mean_gx = load_of_group(mean_gx_ptr, sample, offs_c, C, G)
    dx = rstd * (g - mean_g - xhat * mean_gx)
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def tile_configs(itemsize: int, lanes: int, capability: int) -> list[Config]:
    """`lanes` channels in a tile: 64 where they are neighbours, else 8 with long runs."""
    return [config(4, 1, BLOCK_C=lanes, BLOCK_S=4096 // lanes)]


def group_configs(itemsize: int, lanes: int, capability: int) -> list[Config]:
    return [config(4, 1, BLOCK=512)]


launch_tile_moments = Launcher(tile_moments_kernel, tile_configs)
launch_group_moments = Launcher(group_moments_kernel, group_configs)
launch_tile_apply = Launcher(tile_apply_kernel, tile_configs)
launch_tile_sums = Launcher(tile_sums_kernel, tile_configs)
launch_group_sums = Launcher(group_sums_kernel, group_configs)
launch_tile_dx = Launcher(tile_dx_kernel, tile_configs)

_SUMS = {
    f"{name}_ptr": "fp32" for name in ("part", "mean", "rstd", "mean_g", "mean_gx")
} | {"eps": "fp32"}  # fmt: skip
_LAYOUTS = {"last": {"stride_c": 1}, "first": {"stride_s": 1}}
_SILU = {name: layout | {"ACT": 4} for name, layout in _LAYOUTS.items()}
_LANES = {"last": 64, "first": 8}


def _suits(variant: str, choice: Config) -> bool:
    return choice.meta.get("BLOCK_C", 0) == _LANES.get(variant, 0)


def _entry(launcher: Launcher, variants: dict[str, dict[str, Any]]) -> AotKernel:
    names = launcher.kernel.arg_names
    pointers = {name: kind for name, kind in _SUMS.items() if name in names}
    lanes = (64,) if "all" in variants else tuple(_LANES.values())
    return AotKernel(
        launcher, pointers, variants, fixed_blocks=lanes, products=False, suits=_suits,
    )  # fmt: skip


AOT_KERNELS = (
    _entry(launch_tile_moments, _LAYOUTS),
    _entry(launch_group_moments, {"all": {}}),
    _entry(launch_tile_apply, _SILU),
    _entry(launch_tile_sums, _SILU),
    _entry(launch_group_sums, {"all": {}}),
    _entry(launch_tile_dx, _SILU),
)


class Tiles:
    """x (B, C, S) of either layout, cut into tiles, and the launches over them."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.x, self.groups = x, groups
        self.last = x.stride(1) == 1 and x.shape[2] > 1
        self.lanes = _LANES["last" if self.last else "first"]
        (choice,) = tile_configs(x.element_size(), self.lanes, 80)
        self.length = choice.meta["BLOCK_S"]
        self.parts = cdiv(x.shape[2], self.length)

    def sums(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)

    def over_tiles(self, launcher: Launcher, **arguments: Any) -> None:
        b, c, s = self.x.shape
        sizes = dict(
            B=b, C=c, S=s, P=self.parts, stride_c=self.x.stride(1), stride_s=self.x.stride(2)
        )
        sizes |= {"G": self.groups} if "G" in launcher.kernel.arg_names else {}

        def plan(meta: dict[str, int]) -> Call:
            return (b * self.parts * cdiv(c, meta["BLOCK_C"]),), arguments | sizes

        launcher(plan, self.x, self.lanes)

    def over_groups(self, launcher: Launcher, **arguments: Any) -> None:
        b, c, s = self.x.shape
        sizes = dict(B=b, C=c, S=s, P=self.parts, G=self.groups)

        def plan(meta: dict[str, int]) -> Call:
            return (b * self.groups,), arguments | sizes

        launcher(plan, self.x, self.lanes)


def norm_tiles_forward(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, C, S) of x's layout, mean and rstd (B, G)."""
    tiles = Tiles(x, groups)
    y = torch.empty_like(x)
    parts = tiles.sums(2, x.shape[0], tiles.parts, x.shape[1])
    mean, rstd = (tiles.sums(x.shape[0], groups) for _ in range(2))
    tiles.over_tiles(launch_tile_moments, x_ptr=x, part_ptr=parts)
    tiles.over_groups(
        launch_group_moments, part_ptr=parts, mean_ptr=mean, rstd_ptr=rstd, LENGTH=tiles.length,
        eps=eps,
    )  # fmt: skip
    tiles.over_tiles(
        launch_tile_apply, x_ptr=x, mean_ptr=mean, rstd_ptr=rstd, weight_ptr=weight, bias_ptr=bias,
        y_ptr=y, ACT=activation_code(activation),
    )  # fmt: skip
    return y, mean, rstd


def norm_tiles_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """dx (B, C, S) of x's layout, which is dy's, too."""
    groups = mean.shape[1]
    tiles = Tiles(x, groups)
    dx = torch.empty_like(x)
    parts = tiles.sums(2, x.shape[0], tiles.parts, x.shape[1])
    mean_g, mean_gx = (tiles.sums(x.shape[0], groups) for _ in range(2))
    shared = dict(
        dy_ptr=dy, x_ptr=x, mean_ptr=mean, rstd_ptr=rstd, weight_ptr=weight, bias_ptr=bias,
        ACT=activation_code(activation),
    )  # fmt: skip
    tiles.over_tiles(launch_tile_sums, part_ptr=parts, **shared)
    tiles.over_groups(launch_group_sums, part_ptr=parts, mean_g_ptr=mean_g, mean_gx_ptr=mean_gx)
    tiles.over_tiles(
        launch_tile_dx, mean_g_ptr=mean_g, mean_gx_ptr=mean_gx, dx_ptr=dx, **shared
    )  # fmt: skip
    return dx
