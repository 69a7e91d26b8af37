"""`adapter_bank` in the compiled library, on the CPU and on CUDA. Protocol: contract.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import load_native
from ..activations import activation_code

load_native()

# what fits a block's shared memory on every chip, in fp32 too
RANK_LIMIT = 256

_forward = torch.ops.a3fta_native.adapter_bank_forward.default


def forward(
    h: Tensor,
    residual: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    scale: Tensor,
    index: Tensor,
    activation: str,
) -> Tensor:
    """y (M, C)."""
    return _forward(
        h, residual, w_down, w_up, b_down, b_up, scale, index, activation_code(activation)
    )
