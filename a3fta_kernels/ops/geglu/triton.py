# mypy: allow-untyped-defs
"""`geglu` in Triton: one element-wise kernel each way. The protocol is in contract.py."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import (
    AotKernel,
    Call,
    Config,
    Launcher,
    activate,
    activate_slope,
    cdiv,
    config,
    rows_bucket,
)
from ..activations import activation_code


@triton.jit
def tile(M, F, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's rows and columns, and which of them are inside: neighbours share rows."""
    tiles_n = tl.cdiv(F, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = (pid // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    return offs_m[:, None], offs_n[None, :], (offs_m < M)[:, None] & (offs_n < F)[None, :]


@triton.jit(do_not_specialize=["M"])
def geglu_forward_kernel(
    p_ptr, y_ptr, M, F, stride_pm,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (M, F) = hidden * act(gate) for p (M, 2F) = [hidden | gate]."""
    offs_m, offs_n, mask = tile(M, F, BLOCK_M, BLOCK_N)
    p_ptrs = p_ptr + offs_m * stride_pm + offs_n
    hidden = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(p_ptrs + F, mask=mask, other=0.0).to(tl.float32)
    y = hidden * activate(gate, ACT)
    tl.store(y_ptr + offs_m * F + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def geglu_backward_kernel(
    dy_ptr, p_ptr, dp_ptr, M, F, stride_dym, stride_pm,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dp (M, 2F) = [dy * act(gate) | dy * hidden * act'(gate)]."""
    offs_m, offs_n, mask = tile(M, F, BLOCK_M, BLOCK_N)
    p_ptrs = p_ptr + offs_m * stride_pm + offs_n
    hidden = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(p_ptrs + F, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offs_m * stride_dym + offs_n, mask=mask, other=0.0).to(tl.float32)
    dp_ptrs = dp_ptr + offs_m * 2 * F + offs_n
    dhidden = dy * activate(gate, ACT)
    tl.store(dp_ptrs, dhidden.to(dp_ptr.dtype.element_ty), mask=mask)
    dgate = dy * hidden * activate_slope(gate, ACT)
    tl.store(dp_ptrs + F, dgate.to(dp_ptr.dtype.element_ty), mask=mask)


def configs(itemsize: int, fixed_block: int, capability: int) -> list[Config]:
    """256 columns divide the widths of most models; 8 elements a thread, 16 bytes of a half."""
    return [
        config(warps, 1, BLOCK_M=block_m, BLOCK_N=block_n)
        for block_m, block_n, warps in ((4, 256, 4), (1, 1024, 4), (8, 256, 4))
    ]


launch_forward = Launcher(geglu_forward_kernel, configs)
launch_backward = Launcher(geglu_backward_kernel, configs)

AOT_KERNELS = tuple(
    AotKernel(
        launcher, pointers={}, variants={"gelu": {"ACT": 2}}, fixed_blocks=(0,), products=False
    )
    for launcher in (launch_forward, launch_backward)
)


def forward(p: Tensor, activation: str) -> Tensor:
    """y (M, F)."""
    m, f = p.shape[0], p.shape[1] // 2
    y = p.new_empty(m, f)
    if m > 0:
        _launch(launch_forward, m, f, activation, p_ptr=p, y_ptr=y, stride_pm=p.stride(0))
    return y


def backward(dy: Tensor, p: Tensor, activation: str) -> Tensor:
    """dp (M, 2F)."""
    m, f = dy.shape
    dp = p.new_empty(m, 2 * f)
    if m > 0:
        _launch(
            launch_backward, m, f, activation,
            dy_ptr=dy, p_ptr=p, dp_ptr=dp, stride_dym=dy.stride(0), stride_pm=p.stride(0),
        )  # fmt: skip
    return dp


def _launch(launcher: Launcher, m: int, f: int, activation: str, **arguments: Any) -> None:
    code = activation_code(activation)

    def plan(meta: dict[str, int]) -> Call:
        grid = (cdiv(m, meta["BLOCK_M"]) * cdiv(f, meta["BLOCK_N"]),)
        return grid, dict(arguments, M=m, F=f, ACT=code)

    launcher(plan, arguments["p_ptr"], 0, rows_bucket(m), f, code)
