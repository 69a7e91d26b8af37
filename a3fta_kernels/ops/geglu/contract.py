"""The autograd rule of `geglu`, its torch.library registration, and the backend protocol.

    y  = hidden * act(gate)                    p (M, 2F) = [hidden | gate]: the one tensor saved
    dp = [dy * act(gate) | dy * hidden * act'(gate)]

With keep="int8" the codes and ranges of `quantize` are saved in p's place, and the backward is that
of the p they stand for.

A backend is a module with two functions, without autograd. Their tensors are 2-D with unit column
stride (`rule.rows`); row strides are free, results are contiguous. M may be 0.

    forward(p, activation) -> y
    backward(dy, p, activation) -> dp

p, dp (M, 2F); y, dy (M, F).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantize import contract as quantize
from ..rule import is_plain, loader, record, refuse_second_derivative, rows

backend_module = loader(__package__)


def forward(p: Tensor, activation: str, keep: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """y (M, F), then p's codes and ranges: empty tensors where p itself is kept."""
    y = backend_module(backend).forward(rows(p), activation)
    if keep == "int8":
        return y, *quantize.quantize(p, backend)
    return y, p.new_empty(0, dtype=torch.int8), p.new_empty(0, 2, dtype=torch.bfloat16)


def backward(dy: Tensor, p: Tensor, activation: str, backend: str) -> Tensor:
    """dp (M, 2F), contiguous."""
    return backend_module(backend).backward(rows(dy), rows(p), activation)


def save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    p, activation, keep, backend = inputs
    ctx.save_for_backward(*(output[1:] if keep == "int8" else (p,)))
    ctx.saved_names = ("codes", "ranges") if keep == "int8" else ("p",)
    ctx.options = (activation, backend)
    ctx.dtype = p.dtype


def rule(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
    """Codes and ranges are saved outputs that no caller sees: their gradients never come."""
    activation, backend = ctx.options
    saved = ctx.saved_tensors  # once: checkpointing refuses to be asked again
    p = saved[0]
    if len(saved) > 1:
        p = quantize.widen(p, saved[1], ctx.dtype, backend)
    run = backward if is_plain(dy) else torch.ops.a3fta.geglu_backward
    return run(dy, p, activation, backend), None, None, None


class GegluFunction(torch.autograd.Function):
    """The cheap eager entry to the rule; compiled code takes torch.ops.a3fta.geglu."""

    operator = "geglu"

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        p, activation, keep, backend = inputs
        output: tuple[Tensor, ...]
        if keep == "int8":
            output = forward(p, activation, keep, backend)
        else:
            output = (backend_module(backend).forward(rows(p), activation),)
        save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple:
        refuse_second_derivative()
        return rule(ctx, *grad_outputs)


def apply(p: Tensor, activation: str, keep: str, backend: str) -> Tensor:
    """y (M, F) for p (M, 2F), differentiable."""
    wants_gradient = torch.is_grad_enabled() and p.requires_grad
    if not is_plain(p):
        kept = keep if wants_gradient else "input"
        return torch.ops.a3fta.geglu(p, activation, kept, backend)[0]
    if wants_gradient:
        return record(GegluFunction, p, activation, keep, backend)
    return backend_module(backend).forward(rows(p), activation)


_library = torch.library.Library("a3fta", "FRAGMENT")
_library.define(
    "geglu(Tensor p, str activation, str keep, str backend) "
    "-> (Tensor y, Tensor codes, Tensor ranges)"
)
_library.define("geglu_backward(Tensor dy, Tensor p, str activation, str backend) -> Tensor dp")
_library.impl("geglu", forward, "CompositeExplicitAutograd")
_library.impl("geglu_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("a3fta::geglu", lib=_library)
def _(p: Tensor, activation: str, keep: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    m, width = p.shape
    y = p.new_empty(m, width // 2)
    if keep == "int8":
        return y, *torch.ops.a3fta.quantize(p, backend)
    return y, p.new_empty(0, dtype=torch.int8), p.new_empty(0, 2, dtype=torch.bfloat16)


@torch.library.register_fake("a3fta::geglu_backward", lib=_library)
def _(dy: Tensor, p: Tensor, activation: str, backend: str) -> Tensor:
    return torch.empty_like(p, memory_format=torch.contiguous_format)


torch.library.register_autograd("a3fta::geglu", rule, setup_context=save, lib=_library)
