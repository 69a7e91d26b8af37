"""The specification of `layer_norm` in eager PyTorch. Gradients come from PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..norm import common_dtype
from ..rule import cast


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """weight * xhat + bias, xhat of mean 0 and variance 1 over the last dimension.

    x (..., C); weight and bias (C,). Computed in the widest of their dtypes, and of x's.
    """
    dtype = common_dtype(x, weight, bias)
    y = F.layer_norm(x.to(dtype), x.shape[-1:], cast(weight, dtype), cast(bias, dtype), eps)
    return y.to(x.dtype)
