"""V and its bias from the frozen weight, and the gradients of what they are made of, in PyTorch.

    V = s * Ws @ w_up,  v_bias = bias + s * Ws @ b_up
    dw_up = s * G,  db_up = s * g,  ds = <G, w_up> + <g, b_up>,  G = Ws.T @ P,  g = Ws.T @ sum(dy)

s is a number times, where there is one, a tensor. All sizes are those of weights: no row of a batch
comes in but by P and sum(dy).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rule import acc_dtype, cast, cast_together, scaled, times


def merged(
    weight: Tensor,
    bias: Tensor | None,
    w_down: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    start: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """By the protocol of contract.py: w_down and V in weight's dtype, the bias in the wide one."""
    dtype = weight.dtype
    if scale_tensor is None:
        w_down, w_up, b_up = cast_together((w_down, w_up, b_up), dtype)
    else:
        w_up = scaled(w_up, scale, scale_tensor, dtype)
        b_up = None if b_up is None else scaled(b_up, scale, scale_tensor, dtype)
        scale = 1.0
    part = weight[:, start : start + w_up.shape[0]]
    if b_up is None:
        v_bias = bias
    elif bias is None:
        v_bias = product(part, b_up, scale)
    else:
        v_bias = torch.addmv(bias, part, b_up, alpha=scale)
    v = product(part, w_up, scale)
    return cast(w_down, dtype).contiguous(), v, cast(v_bias, acc_dtype(dtype))


def product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """scale * x @ y, y a matrix or a vector. The product takes the scale: no kernel of its own."""
    if scale == 1.0:
        return x @ y
    run = torch.addmm if y.dim() == 2 else torch.addmv
    return run(x.new_empty(1), x, y, beta=0, alpha=scale)


def up_grads(
    weight_slice: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    p: Tensor,
    dy_sum: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    need_scale: bool,
) -> dict[str, Tensor | None]:
    """dw_up, db_up and, asked for, that of the scale, in any dtype; weight_slice (N, C) is Ws."""
    dtype = weight_slice.dtype
    wide = acc_dtype(dtype)
    # in fp16 a sum over rows may leave the range: stay wide there
    narrow = wide if dtype == torch.float16 else dtype
    weight_t = cast(weight_slice.t(), narrow)
    # a scale in a tensor comes after, as its own gradient takes the products without it
    number = scale if scale_tensor is None else 1.0
    dw_up = product(weight_t, cast(p, narrow), number)
    # of a vector PyTorch rounds the scale to the product's dtype
    db_up = None if b_up is None else times(weight_t @ cast(dy_sum, narrow), number)
    if scale_tensor is None:
        return {"w_up": dw_up, "b_up": db_up}
    dw_up, db_up = cast(dw_up, wide), cast(db_up, wide)
    found: dict[str, Tensor | None] = {}
    if need_scale:
        dscale = (dw_up * cast(w_up, wide)).sum()
        if b_up is not None and db_up is not None:
            dscale = dscale + db_up @ cast(b_up, wide)
        found["scale_tensor"] = (dscale * scale).view(scale_tensor.shape)
    factor = cast(scale_tensor, wide) * scale
    return found | {"w_up": dw_up * factor, "b_up": None if db_up is None else db_up * factor}
