"""The specification of `frozen_conv`: PyTorch's convolution. Gradients come from PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def frozen_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """y = conv(x, weight) + bias."""
    return F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
