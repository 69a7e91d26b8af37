"""The specification of `group_norm` in eager PyTorch. Gradients come from PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import activate
from ..norm import common_dtype
from ..rule import cast


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "identity",
) -> Tensor:
    """act(weight * xhat + bias), xhat of mean 0 and variance 1 over each sample's group.

    x (B, C, *spatial); weight and bias (C,). Computed in the widest of their dtypes, and of x's.
    """
    dtype = common_dtype(x, weight, bias)
    y = torch.group_norm(x.to(dtype), num_groups, cast(weight, dtype), cast(bias, dtype), eps)
    return activate(y, activation).to(x.dtype)
