"""The specification of `cross_attention_adapter` in eager PyTorch. Gradients come from PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..adapter_linear.reference import adapter_linear
from .attention import attention


def cross_attention_adapter(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    heads: int,
    mask: Tensor | None = None,
    attention_scale: float | None = None,
    residual: Tensor | None = None,
    scale: float | Tensor = 1.0,
    activation: str = "gelu",
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """adapter_linear(attention(q, k, v), ...)."""
    # of PyTorch's kernels the one that keeps every NaN and has all derivatives
    with sdpa_kernel(SDPBackend.MATH):
        h = attention(q, k, v, heads=heads, mask=mask, attention_scale=attention_scale)
    return adapter_linear(
        h, w_down, w_up, weight, bias, b_down, b_up, residual=residual, scale=scale,
        activation=activation, gamma=gamma, beta=beta,
    )  # fmt: skip
