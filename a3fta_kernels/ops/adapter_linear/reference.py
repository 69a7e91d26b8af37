"""The specification of `adapter_linear` in eager PyTorch. Gradients come from PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapter.reference import adapter


def adapter_linear(
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    columns: tuple[int, int] | None = None,
    scale: float | Tensor = 1.0,
    activation: str = "gelu",
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """adapter(h) @ weight.T + bias [+ residual].

    With `columns = (start, length)` the adapter reads and writes only that slice of h's columns.
    """

    def with_adapter(x: Tensor) -> Tensor:
        return adapter(
            x, w_down, w_up, b_down, b_up,
            scale=scale, activation=activation, gamma=gamma, beta=beta,
        )  # fmt: skip

    if columns is None:
        adapted = with_adapter(h)
    else:
        start, length = columns
        before, inside, after = h.split((start, length, h.shape[-1] - start - length), dim=-1)
        adapted = torch.cat((before, with_adapter(inside), after), dim=-1)
    y = F.linear(adapted, weight, bias)
    return y if residual is None else y + residual
