"""The rule for "correct", in one place.

The oracle is the reference in float64. A result is right when its error against the oracle is at
most twice that of eager PyTorch in the result's own dtype (three times for gradients of weights),
plus four roundings of the result's own size. Eager's error is the larger of two: what eager PyTorch
makes on these inputs, and what moving the inputs by one unit in the last place does to the exact
result; the second keeps a lucky eager result of a few elements from setting the bar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from a3fta_kernels import ops
from a3fta_kernels.backends import triton_interpreted, why_not
from a3fta_kernels.ops.adapter.reference import adapter as reference_adapter
from a3fta_kernels.ops.adapter_bank.reference import adapter_bank as reference_adapter_bank
from a3fta_kernels.ops.adapter_linear.reference import adapter_linear as reference_adapter_linear
from a3fta_kernels.ops.cross_attention_adapter.reference import (
    cross_attention_adapter as reference_cross_attention_adapter,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WEIGHT_GRADS = ("w_down", "w_up", "b_down", "b_up", "gamma", "beta", "scale")


def runs() -> list[tuple[str, str, torch.dtype]]:
    """Every (backend, device type, dtype) that runs here, the reference aside."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [
        (backend, device, dtype)
        for backend in ("native", "triton")
        for device in devices
        for dtype in DTYPES
        if why_not(backend, torch.device(device), dtype) is None
    ]


def triton_runs() -> list[tuple[str, str, torch.dtype]]:
    """Those of Triton, for tests of masks, tiles and sums. In the interpreter without fp16, whose
    kernels are bf16's with another type; what is its own is in the tests of each op."""
    here = {torch.float16} if triton_interpreted() else set()
    return [run for run in runs() if run[0] == "triton" and run[2] not in here]


IN_ORDER = pytest.mark.skipif(
    triton_interpreted(), reason="the interpreter runs programs in one order: the same bits always"
)


def run_id(run: tuple[str, str, torch.dtype]) -> str:
    return f"{run[0]}-{run[1]}-{str(run[2]).removeprefix('torch.')}"


@dataclass(frozen=True)
class Case:
    """One call of an op. `n` is None for `adapter`, the projection's width for the others; with
    `heads` it is `cross_attention_adapter`, and h becomes q. With `bank` it is `adapter_bank` of so
    many adapters, which the samples, and none, take in turns.
    """

    lead: tuple[int, ...] = (2, 5)
    c: int = 16
    r: int = 4
    n: int | None = None
    activation: str = "gelu"
    biases: bool = True
    modulation: str = ""  # "gamma", "beta", both or neither
    scale: float | str = 1.0  # a number, or "tensor"
    residual: bool = False
    columns: tuple[int, int] | None = None  # (start, width of h)
    layout: str = "plain"  # of h: plain, sliced, strided, transposed
    adapter_dtype: torch.dtype | None = None
    path: str = "auto"
    seed: int = 0
    heads: int = 0
    keys: int = 0
    mask: str = ""  # "bool" or "add", then the axes it has of b, h, m, n: "bool b n"
    text: bool = True  # whether k and v require gradients
    bank: int = 0
    base: int = 0  # channels of the base of `adapter`, if it is not h

    def __str__(self) -> str:
        plain = Case()
        shape = "x".join(map(str, self.lead)) + f"x{self.c}r{self.r}"
        rest = [
            f"{k}={v}"
            for k, v in self.__dict__.items()
            if k not in ("lead", "c", "r") and v != getattr(plain, k)
        ]
        return ",".join([shape, *rest])

    def inputs(self, dtype: torch.dtype, device: str) -> dict[str, Any]:
        """Fresh random arguments; tensors are leaves that require gradients."""
        g = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
            x = torch.randn(*shape, generator=g, dtype=torch.float64) * scale
            return x.to(device, to).requires_grad_()

        small = self.adapter_dtype or dtype
        if self.activation == "relu":
            # relu's derivative jumps at 0: values on a grid make h @ w_down.T + b_down exact in
            # every dtype, so that no rounding decides on which side of the jump an element lies
            draw = on_grid(draw)
        width = self.c if self.columns is None else self.columns[1]
        bank = (self.bank,) if self.bank else ()
        found: dict[str, Any] = {
            "h": self._h(draw, width),
            "w_down": draw(*bank, self.r, self.c, scale=self.c**-0.5, to=small),
            "w_up": draw(*bank, self.base or self.c, self.r, scale=self.r**-0.5, to=small),
        }
        if self.base:
            found["base"] = draw(*self.lead, self.base)
        if self.n is not None:
            found["weight"] = draw(self.n, width, scale=width**-0.5).detach()
            found["bias"] = draw(self.n).detach() if self.biases else None
            if self.residual:
                found["residual"] = draw(*self.lead, self.n)
            if self.columns is not None:
                found["columns"] = (self.columns[0], self.c)
        if self.biases:
            found["b_down"] = draw(*bank, self.r, to=small)
            found["b_up"] = draw(*bank, self.base or self.c, to=small)
        for name in ("gamma", "beta"):
            if name in self.modulation:
                found[name] = draw(self.lead[0], self.r, to=small)
        found["scale"] = (
            torch.tensor(0.7, device=device, dtype=small).requires_grad_()
            if self.scale == "tensor"
            else self.scale
        )
        found["activation"] = self.activation
        if self.bank:
            turns = torch.arange(self.lead[0], device=device)
            found["index"] = turns % (self.bank + 1) - 1
            found["scale"] = draw(self.bank, to=small) if self.scale == "tensor" else None
        if self.heads:
            found["q"] = found.pop("h")
            for name in ("k", "v"):
                x = draw(self.lead[0], self.keys, self.c)
                found[name] = x.requires_grad_(self.text)
            found |= {"heads": self.heads, "mask": self._mask(draw)}
        return found

    def _mask(self, draw: Callable[..., Tensor]) -> Tensor | None:
        if not self.mask:
            return None
        kind, *axes = self.mask.split()
        sizes = dict(b=self.lead[0], h=self.heads, m=self.lead[1], n=self.keys)
        x = draw(*(size if name in axes else 1 for name, size in sizes.items())).detach()
        # half a query's keys, and in a mask by query all keys of the first
        hidden = x < 0
        if "m" in axes:
            hidden[:, :, :1] = True
        return ~hidden if kind == "bool" else x.masked_fill(hidden, -torch.inf)

    def _h(self, draw: Callable[..., Tensor], width: int) -> Tensor:
        if self.layout == "sliced":
            base = draw(*self.lead, width + 3)[..., 1 : width + 1]
        elif self.layout == "strided":
            base = draw(*self.lead, 2 * width)[..., ::2]
        elif self.layout == "transposed":
            base = draw(*self.lead[:-1], width, self.lead[-1]).transpose(-1, -2)
        else:
            return draw(*self.lead, width)
        return base.detach().requires_grad_()


def on_grid(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Draws -1, 0 or 1 in place of normal values."""

    def draw_grid(*shape: int, scale: float = 1.0, **options: Any) -> Tensor:
        x = draw(*shape, **options)
        x.data.clamp_(-1, 1).round_()
        return x

    return draw_grid


def upcast(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The same values as fresh leaves in another dtype."""
    return {
        k: v.detach().to(dtype).requires_grad_(v.requires_grad) if is_float(v) else v
        for k, v in inputs.items()
    }


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@dataclass
class Outcome:
    """What one implementation computed: y and the gradients by argument name."""

    y: Tensor
    grads: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: str) -> Outcome:
        return Outcome(self.y.to(device), {k: g.to(device) for k, g in self.grads.items()})


def evaluate(op: Callable[..., Tensor], inputs: dict[str, Any], dy: Tensor) -> Outcome:
    leaves = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    y = op(**inputs)
    found = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return Outcome(y.detach(), dict(zip(leaves, found, strict=True)))


def gradient(y_shape: torch.Size, dtype: torch.dtype, device: str, kind: str, seed: int) -> Tensor:
    """A gradient of the given kind: plain, expanded (stride 0), or transposed in memory."""
    g = torch.Generator().manual_seed(seed + 1)
    if kind == "expanded":
        return torch.randn((), generator=g).to(device, dtype).expand(y_shape)
    dy = torch.randn(y_shape, generator=g, dtype=torch.float64).to(device, dtype)
    if kind == "transposed" and len(y_shape) >= 2:
        return dy.transpose(-1, -2).contiguous().transpose(-1, -2)
    return dy


def check(
    case: Case,
    run: tuple[str, str, torch.dtype],
    dy_kind: str = "plain",
    truth_device: str | None = None,
) -> None:
    """Runs `case` on one backend and holds forward and gradients to the rule.

    The truth comes from the same device, unless another is named.
    """
    backend, device, dtype = run
    op, reference = op_of(case)
    options: dict[str, Any] = {"backend": backend}
    if op is ops.adapter_linear:
        options["path"] = case.path
    inputs = case.inputs(dtype, device)
    shape = torch.Size((*case.lead, case.base or case.c if case.n is None else case.n))
    dy = gradient(shape, dtype, device, dy_kind, case.seed)

    ours = evaluate(lambda **kw: op(**kw, **options), inputs, dy)
    assert ours.y.dtype == dtype and ours.y.shape == shape and ours.y.is_contiguous()
    if truth_device is not None:
        inputs = case.inputs(dtype, truth_device)
        ours, dy = ours.to(truth_device), dy.to(truth_device)
    exact = evaluate(reference, upcast(inputs), dy.double())
    eager = evaluate(reference, inputs, dy)
    # see `inputs` on relu: nothing may move across the jump
    fixed = ("h", "w_down", "b_down") if case.activation == "relu" else ()
    rounded = [
        evaluate(
            reference, jitter(upcast(inputs), dtype, seed, fixed), jitter(dy.double(), dtype, seed)
        )
        for seed in range(8)
    ]

    others = [eager.y, *(o.y for o in rounded)]
    compare("y", ours.y, others, exact.y, dtype, 2.0)
    assert ours.grads.keys() == exact.grads.keys()
    for name, grad in ours.grads.items():
        assert grad.dtype == inputs[name].dtype and grad.shape == inputs[name].shape, name
        factor = 3.0 if name in WEIGHT_GRADS else 2.0
        others = [eager.grads[name], *(o.grads[name] for o in rounded)]
        # the one sum over everything: it may cancel, its terms are of the size of dy
        unit = dy.double().norm() if name == "scale" else 0.0
        if case.heads and name in ("q", "k"):
            # dp - delta, which is 0 for a single key
            unit = torch.linalg.vector_norm(dy.double(), float("inf")) if dy.numel() else 0.0
        compare(f"d{name}", grad, others, exact.grads[name], dtype, factor, unit)


def op_of(case: Case) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The op of a case, and its specification."""
    if case.bank:
        return ops.adapter_bank, reference_adapter_bank
    if case.heads:
        return ops.cross_attention_adapter, reference_cross_attention_adapter
    if case.n is not None:
        return ops.adapter_linear, reference_adapter_linear
    return ops.adapter, reference_adapter


def jitter(x: Any, dtype: torch.dtype, seed: int, fixed: tuple[str, ...] = ()) -> Any:
    """Tensors with each value moved by up to one unit in the last place, as fresh leaves."""
    if isinstance(x, dict):
        return {
            k: v if k in fixed else jitter(v, dtype, seed + i) for i, (k, v) in enumerate(x.items())
        }
    if not is_float(x):
        return x
    g = torch.Generator().manual_seed(seed)
    noise = 2 * torch.rand(x.shape, generator=g, dtype=torch.float64).to(x.device) - 1
    moved = x.detach() * (1 + torch.finfo(dtype).eps * noise)
    return moved.requires_grad_(x.requires_grad)


def compare(
    name: str,
    ours: Tensor,
    eager: list[Tensor],
    exact: Tensor,
    dtype: torch.dtype,
    factor: float,
    unit: float | Tensor = 0.0,
) -> None:
    """|ours - exact| <= factor * |eager - exact| + tiny, by the largest element and by the norm."""
    if exact.numel() == 0:
        assert ours.numel() == 0
        return
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    # the oracle itself is no better than float64
    roundings = 64 if dtype == torch.float64 else 4
    tiny = roundings * torch.finfo(dtype).eps * (exact.abs().max() + unit) + 1e-12
    for measure in (lambda x: x.abs().max(), lambda x: x.norm() / x.numel() ** 0.5):
        got = measure(ours.double() - exact)
        bar = max(measure(e.double() - exact) for e in eager)
        assert got <= factor * bar + tiny, (
            f"{name}: error {got:.3e}, allowed {factor * bar + tiny:.3e} "
            f"(eager {bar:.3e}, size {exact.abs().max():.3e})"
        )


def with_paths(case: Case, run: tuple[str, str, torch.dtype]) -> list[Case]:
    """`case` by every path its backend has for it on the device; [case] without paths."""
    if case.n is None or case.heads:
        return [case]
    from a3fta_kernels.ops.adapter_linear.contract import paths_for

    return [replace(case, path=p) for p in paths_for(run[0], run[1], case.r)]
