"""What the tests of the normalisations share: cases, the oracle's rule for dx, saved bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from a3fta_kernels import ops
from a3fta_kernels.ops.group_norm.reference import group_norm as reference_group_norm
from a3fta_kernels.ops.layer_norm.reference import layer_norm as reference_layer_norm

from ..oracle import Outcome, compare, gradient, jitter, upcast

Run = tuple[str, str, torch.dtype]


@dataclass(frozen=True)
class NormCase:
    """One call: group_norm where `groups` is given, else layer_norm. x is N(mean, 1)."""

    shape: tuple[int, ...]
    groups: int = 0
    activation: str = "identity"
    weight: str = "same"  # dtype of the parameters: same, float32; or "no", "weight", "bias" alone
    layout: str = "plain"  # of x: plain, last, sliced, expanded
    mean: float = 0.3
    eps: float = 1e-5
    seed: int = 0

    def __str__(self) -> str:
        rest = [
            f"{k}={v}"
            for k, v in self.__dict__.items()
            if k not in ("shape", "groups") and v != NormCase.__dataclass_fields__[k].default
        ]
        name = "x".join(map(str, self.shape)) + (f"g{self.groups}" if self.groups else "")
        return ",".join([name, *rest])

    @property
    def channels(self) -> int:
        return self.shape[1 if self.groups else -1]

    @property
    def op(self) -> Callable[..., Tensor]:
        return ops.group_norm if self.groups else ops.layer_norm

    @property
    def reference(self) -> Callable[..., Tensor]:
        return reference_group_norm if self.groups else reference_layer_norm

    def inputs(self, dtype: torch.dtype, device: str) -> dict[str, Any]:
        """x, a leaf that requires grad, and frozen parameters."""
        g = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, to)

        wide = torch.float32 if self.weight == "float32" else dtype
        found: dict[str, Any] = {"x": (self._x(draw) + self.mean).detach().requires_grad_()}
        if self.layout != "plain":
            found["x"] = self._relaid(found["x"])
        if self.groups:
            found |= {"num_groups": self.groups, "activation": self.activation}
        if self.weight not in ("no", "bias"):
            found["weight"] = 1 + 0.5 * draw(self.channels, to=wide)
        if self.weight not in ("no", "weight"):
            found["bias"] = draw(self.channels, to=wide)
        return found | {"eps": self.eps}

    def _x(self, draw: Callable[..., Tensor]) -> Tensor:
        # rows and groups differ, so that one's statistics are wrong for another
        x = draw(*self.shape)
        return x * (1 + draw(*self.shape[:1], *(1 for _ in self.shape[1:])).abs())

    def _relaid(self, x: Tensor) -> Tensor:
        """The same values at other strides."""
        if self.layout == "last":
            x = x.detach().movedim(1, -1).contiguous().movedim(-1, 1)
        elif self.layout == "expanded":
            x = x.detach()[:1].expand(x.shape)
        else:
            wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
            wide[..., 1:-2] = x.detach()
            x = wide[..., 1:-2]
        return x.detach().requires_grad_()


def evaluate(op: Callable[..., Tensor], inputs: dict[str, Any], dy: Tensor) -> Outcome:
    y = op(**inputs)
    (dx,) = torch.autograd.grad(y, inputs["x"], dy.to(y.dtype))
    return Outcome(y.detach(), {"x": dx})


def layout(x: Tensor) -> list[int]:
    """The strides that are of account: where an axis has one element its stride is not."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def layout_for(x: Tensor) -> list[int]:
    """What y and dx are held to."""
    if x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        return layout(torch.empty(x.shape, device="meta"))
    return layout(x)


def check(case: NormCase, run: Run, dy_kind: str = "plain") -> None:
    """Forward and dx on one backend, by the rule of tests/oracle.py."""
    backend, device, dtype = run
    inputs = case.inputs(dtype, device)
    dy = gradient(torch.Size(case.shape), dtype, device, dy_kind, case.seed)
    if case.layout == "last" and dy_kind == "plain":
        dy = dy.movedim(1, -1).contiguous().movedim(-1, 1)
    ours = evaluate(lambda **kw: case.op(**kw, backend=backend), inputs, dy)
    assert ours.y.dtype == dtype and ours.y.shape == torch.Size(case.shape)
    dx = ours.grads["x"]
    assert dx.dtype == dtype and dx.shape == ours.y.shape
    if case.groups and ours.y.numel() > 0:
        assert layout(ours.y) == layout_for(inputs["x"])
        # the reference's gradients are PyTorch's
        assert backend == "reference" or layout(dx) == layout(ours.y)
    elif not case.groups:
        assert ours.y.is_contiguous() and (backend == "reference" or dx.is_contiguous())

    exact = evaluate(case.reference, upcast(inputs), dy.double())
    eager = evaluate(case.reference, inputs, dy)
    rounded = [
        evaluate(case.reference, jitter(upcast(inputs), dtype, s), jitter(dy.double(), dtype, s))
        for s in range(4)
    ]
    others = [eager, *rounded]
    compare("y", ours.y, [o.y for o in others], exact.y, dtype, 2.0)
    # a difference of terms of dy's size, which a group of few elements cancels
    unit = unit_of(case, inputs, dy)
    compare("dx", dx, [o.grads["x"] for o in others], exact.grads["x"], dtype, 2.0, unit)


def unit_of(case: NormCase, inputs: dict[str, Any], dy: Tensor) -> Tensor | float:
    """The size of rstd * dxhat: what dx is a difference of."""
    if dy.numel() == 0:
        return 0.0
    x = inputs["x"].detach().double()
    rows = x.reshape(x.shape[0] * case.groups, -1) if case.groups else x
    rstd = (rows.var(-1, correction=0) + case.eps).rsqrt().max()
    weight = inputs.get("weight")
    size = 1.0 if weight is None else weight.double().abs().max()
    return rstd * size * dy.double().abs().max()


def saved_tensors(call: Callable[[], Tensor]) -> list[Tensor]:
    """What autograd packs while `call` runs, one per storage."""
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = call()
    assert y.requires_grad
    return list(kept.values())
