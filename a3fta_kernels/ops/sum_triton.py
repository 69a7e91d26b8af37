# mypy: allow-untyped-defs
"""Sums over rows in parts: how rows are split, and the Triton kernel that adds the parts, of
several tensors in one launch and a fixed order."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import AotKernel, Call, Config, Launcher, cdiv, chip, config

AT_ONCE = 4  # tensors of one launch


@triton.jit
def sum_parts(
    pid, x_ptr, y_ptr, samples, parts, size, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr
):
    """y (samples, size) = x (samples, parts, size) summed over parts, if this block is of x.

    Returns pid as counted from the blocks after x's.
    """
    blocks = 0
    if x_ptr is not None:
        tiles = tl.cdiv(size, BLOCK_S)
        blocks = samples * tiles
        if (pid >= 0) & (pid < blocks):
            sample = (pid // tiles).to(tl.int64)
            offs_s = (pid % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
            mask_s = offs_s < size
            x_ptrs = x_ptr + sample * parts * size + offs_s[None, :]
            acc = tl.zeros((BLOCK_P, BLOCK_S), dtype=tl.float32)
            for p in range(0, parts, BLOCK_P):
                offs_p = p + tl.arange(0, BLOCK_P)
                mask = (offs_p < parts)[:, None] & mask_s[None, :]
                acc += tl.load(x_ptrs + offs_p.to(tl.int64)[:, None] * size, mask=mask, other=0.0)
            tl.store(y_ptr + sample * size + offs_s, tl.sum(acc, axis=0), mask=mask_s)
    return pid - blocks


@triton.jit
def sum_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr,
    samples0, samples1, samples2, samples3, parts0, parts1, parts2, parts3,
    size0, size1, size2, size3,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Each program adds BLOCK_S columns of one sample of one tensor; tensors may be None."""
    pid = tl.program_id(0)
    pid = sum_parts(pid, x0_ptr, y0_ptr, samples0, parts0, size0, BLOCK_P, BLOCK_S)
    pid = sum_parts(pid, x1_ptr, y1_ptr, samples1, parts1, size1, BLOCK_P, BLOCK_S)
    pid = sum_parts(pid, x2_ptr, y2_ptr, samples2, parts2, size2, BLOCK_P, BLOCK_S)
    sum_parts(pid, x3_ptr, y3_ptr, samples3, parts3, size3, BLOCK_P, BLOCK_S)


def sum_configs(itemsize: int, fixed_block: int, capability: int) -> list[Config]:
    return [config(4, 3, BLOCK_P=64, BLOCK_S=32)]


launch_sum = Launcher(sum_kernel, sum_configs)

AOT_KERNELS = (
    AotKernel(
        launch_sum,
        pointers={f"{x}{i}_ptr": "fp32" for x in "xy" for i in range(AT_ONCE)},
        variants={
            "four": {},
            "two": {
                name: None
                for i in (2, 3)
                for name in (f"x{i}_ptr", f"y{i}_ptr", f"samples{i}", f"parts{i}", f"size{i}")
            },
        },
        dtypes=("fp32",),
        fixed_blocks=(0,),
        products=False,
    ),
)


def totals(*partial: Tensor | None, axis: int) -> list[Tensor | None]:
    """Of each, in fp32, the sum over its parts; None stays.

    axis 0: all is of one sample, (parts, ...). axis 1: (samples, parts, ...).
    """
    found = list(partial)
    several = []
    for i, x in enumerate(partial):
        if x is None:
            continue
        if x.shape[axis] > 1 and x.numel() > 0:
            several.append(i)
        else:  # nothing to add: the only part, or zeros
            found[i] = x.select(axis, 0) if x.shape[axis] == 1 else x.sum(axis)
    for first in range(0, len(several), AT_ONCE):
        chosen = several[first : first + AT_ONCE]
        for i, y in zip(chosen, _launch([partial[i] for i in chosen], axis), strict=True):
            found[i] = y
    return found


def split_rows(m: int, block_m: int, programs: int, device: torch.device) -> int:
    """How many of m rows a program adds up, where `programs` share each split of them.

    Two programs a processor, each with at least four steps of its loop over block_m rows.
    """
    wanted = max(1, 2 * chip(device).processors // programs)
    return max(cdiv(cdiv(m, wanted), block_m), 4) * block_m


# of sum_kernel's arguments, in its order
_ARGUMENTS = tuple(
    name.format(i)
    for name in ("x{}_ptr", "y{}_ptr", "samples{}", "parts{}", "size{}")
    for i in range(AT_ONCE)
)


def _launch(partial: list[Any], axis: int) -> list[Tensor]:
    shapes = [tuple(x.shape) for x in partial]  # a torch.Size is slow to slice
    samples, parts = [s[0] if axis else 1 for s in shapes], [s[axis] for s in shapes]
    rest = [s[axis + 1 :] for s in shapes]
    sizes = [math.prod(shape) for shape in rest]
    made = [
        x.new_empty(s[:axis] + shape) for x, s, shape in zip(partial, shapes, rest, strict=True)
    ]
    unused = [None] * (AT_ONCE - len(partial))
    values = [x for group in (partial, made, samples, parts, sizes) for x in (*group, *unused)]
    arguments = dict(zip(_ARGUMENTS, values, strict=True))

    def plan(meta: dict[str, int]) -> Call:
        block = meta["BLOCK_S"]
        blocks = sum(b * cdiv(size, block) for b, size in zip(samples, sizes, strict=True))
        return (blocks,), arguments

    launch_sum(plan, partial[0], 0)
    return made
