"""Who computes a bench's result: ours by backend and path, the rivals, the yardsticks.

| variant | computes |
|---|---|
| eager | the specification in PyTorch; torch.compile of it: compile |
| native, triton, native-skinny, ... | ours, by backend and path |
| auto | ours as a user gets it, where there is something to choose |
| sdpa+auto | PyTorch's attention, then our `adapter_linear` |
| loop, stacked | a bank without its op: bank.py |
| bank+frozen | the bank, then the frozen layer: what peft's layer computes |
| peft | LoRA of equal rank on the same layer through peft, in the trunk's dtype: its quickest way |
| frozen | the layer or block without any adapter |
| clone, read | a copy that moves as many bytes as `floors.copied` says |

The last four rows compute something else: they are timed, not checked. peft's other
way, weights in float32, makes it cast all of h.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a3fta_kernels import ops
from a3fta_kernels.backends import why_not
from a3fta_kernels.ops.adapter.reference import adapter as eager_adapter
from a3fta_kernels.ops.adapter_bank.reference import adapter_bank as eager_adapter_bank
from a3fta_kernels.ops.adapter_linear.contract import paths_for
from a3fta_kernels.ops.adapter_linear.reference import adapter_linear as eager_adapter_linear
from a3fta_kernels.ops.geglu.reference import geglu as eager_geglu
from a3fta_kernels.ops.group_norm.reference import group_norm as eager_group_norm
from a3fta_kernels.ops.layer_norm.reference import layer_norm as eager_layer_norm
from a3fta_kernels.ops.quantize import reference as eager_quantize
from tests.oracle import Case

from . import bank, blocks, floors
from .workloads import ELEMENTWISE, Workload

Op = Callable[..., Any]
# what no layer's parameters hold: these get fresh places in every buffer set
MOVED = ("h", "residual", "q", "k", "v", "x", "p")

COPIES = ("clone", "read")
# these compute something else than the op: its floor and its oracle say nothing about them
UNLIKE = ("bank+frozen", "peft", "frozen", *COPIES)


class CannotRun(Exception):
    """A variant that this machine lacks something for: skipped, with the reason."""


@dataclass
class Variant:
    """`run(**inputs)` gives y, with gradients for the inputs in `takes`; None: all that want one.

    `module`, where there is one, holds further parameters with gradients, and constants.
    """

    run: Op
    takes: tuple[str, ...] | None = None
    module: nn.Module | None = None
    checked: bool = True
    copied: int = 0  # a copy of so many bytes read and written, instead of `run`

    def leaves(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        found = {
            name: x
            for name, x in inputs.items()
            if isinstance(x, Tensor)
            and x.requires_grad
            and (self.takes is None or name in self.takes)
        }
        return found | blocks.trained(self.module)


@dataclass
class Subject:
    """One bench's op on one workload, with its inputs: what all variants share."""

    op: str
    workload: Workload
    dtype: torch.dtype
    device: torch.device
    inputs: dict[str, Any] = field(default_factory=dict)
    block: nn.Module | None = None

    @classmethod
    def make(cls, op: str, workload: Workload, dtype: torch.dtype, device: torch.device) -> Subject:
        subject = cls(op, workload, dtype, device)
        if op == "block":
            subject.block = blocks.frozen(workload, dtype, device)
            subject.inputs = blocks.inputs(workload, dtype, device)
        elif op == "cross_attention_adapter":
            subject.inputs = cross_inputs(workload, dtype, device)
        elif op == "adapter_bank":
            subject.inputs = bank.inputs(workload, dtype, device)
        elif op in ELEMENTWISE:
            subject.inputs = elementwise_inputs(op, workload, dtype, device)
        else:
            subject.inputs = case_of(op, workload).inputs(dtype, str(device))
        return subject

    @property
    def y_shape(self) -> torch.Size:
        if self.op == "group_norm":
            return torch.Size((self.workload.batch, self.workload.n, self.workload.tokens))
        return torch.Size((self.workload.batch, self.workload.tokens, self.workload.n))

    def laid_out(self, dy: Tensor) -> Tensor:
        """dy in y's memory format."""
        return dy.mT.contiguous().mT if self.workload.last else dy

    def exact(self) -> Variant:
        """The specification in float64; of `quantize`, there and back, what it is given."""
        if self.op == "quantize":
            return Variant(lambda x: x)
        if self.block is None:
            return Variant(EAGER[self.op])
        return block_variant(self, "reference", exact=True)


def case_of(op: str, w: Workload) -> Case:
    """A bf16 or fp16 trunk carries fp32 adapters, as inject makes them."""
    linear = op != "adapter"
    return Case(
        lead=(w.batch, w.tokens),
        c=w.c,
        r=w.r,
        n=w.n if linear else None,
        columns=(0, w.k) if linear and w.k else None,
        residual=linear and w.residual,
        adapter_dtype=torch.float32,
    )


def cross_inputs(w: Workload, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """q wants a gradient; k and v, of frozen layers and constant text, do not."""
    inputs = case_of("cross_attention_adapter", w).inputs(dtype, str(device))
    g = torch.Generator().manual_seed(7)
    inputs["q"] = inputs.pop("h")
    for name in ("k", "v"):
        inputs[name] = torch.randn(w.batch, w.keys, w.c, generator=g).to(device, dtype)
    return inputs | {"heads": w.heads}


def elementwise_inputs(
    op: str, w: Workload, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(7)
    if op in ("group_norm", "layer_norm"):
        return norm_inputs(op, w, g, dtype, device)
    columns = 2 * w.c if op == "geglu" else w.c
    x = torch.randn(w.batch, w.tokens, columns, generator=g).to(device, dtype)
    return {"p": x.requires_grad_()} if op == "geglu" else {"x": x}


def norm_inputs(
    op: str, w: Workload, g: torch.Generator, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """As the U-Nets have them: 32 groups, then silu; frozen parameters in the trunk's dtype."""
    x = torch.randn(w.batch, w.tokens, w.c, generator=g).to(device, dtype)
    if op == "group_norm":
        x = x.mT if w.last else x.mT.contiguous()
    weight, bias = (torch.randn(w.c, generator=g).to(device, dtype) for _ in range(2))
    found = {"x": x.requires_grad_(), "weight": weight, "bias": bias}
    return found | ({"num_groups": 32, "activation": "silu"} if op == "group_norm" else {})


def eager_there_and_back(x: Tensor) -> Tensor:
    """Of a contiguous x, without the registered op: torch.compile looks inside."""
    codes, ranges = eager_quantize.quantize(x.view(-1))
    return eager_quantize.dequantize(codes, ranges, x.dtype).view(x.shape)


def there_and_back(x: Tensor, backend: str) -> Tensor:
    codes, ranges = ops.quantize(x, backend=backend)
    return ops.dequantize(codes, ranges, x.dtype, backend=backend)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """PyTorch's own; (B, L, C) in and out, heads merged."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def after_attention(op: Op) -> Op:
    """`op` of h, as a function of q, k, v."""

    def composed(q: Tensor, k: Tensor, v: Tensor, heads: int, **rest: Any) -> Tensor:
        return op(h=attention(q, k, v, heads), **rest)

    return composed


def frozen_linear(
    h: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, **_: Any
) -> Tensor:
    y = F.linear(h, weight, bias)
    return y if residual is None else y + residual


EAGER: dict[str, Op] = {
    "adapter": eager_adapter,
    "adapter_bank": eager_adapter_bank,
    "adapter_linear": eager_adapter_linear,
    "cross_attention_adapter": after_attention(eager_adapter_linear),
    "geglu": eager_geglu,
    "quantize": eager_there_and_back,
    "group_norm": eager_group_norm,
    "layer_norm": eager_layer_norm,
}


def names(op: str, w: Workload, dtype: torch.dtype, direction: str, device: str) -> list[str]:
    """The variants of a group, without building anything."""
    here = torch.device(device)
    ours = [b for b in ("native", "triton") if why_not(b, here, dtype) is None]
    if op == "adapter_linear":
        ours = [f"{b}-{path}" for b in ours for path in paths_for(b, device, w.r)]
    if op == "cross_attention_adapter" and not hasattr(ops, op):
        ours = []
    found = ["eager", *ours, *(["auto"] if len(ours) > 1 else [])]
    if op == "adapter_bank":
        found += list(bank.RIVALS)
    # inductor takes long: where a target asks for it, and on the CPU once per shape
    if op in ELEMENTWISE or (op in ("adapter", "adapter_bank") and (device == "cuda" or w.r == 64)):
        found.append("compile")
    if op == "cross_attention_adapter":
        found.append("sdpa+auto")
    if op not in ("adapter", "adapter_bank", *ELEMENTWISE):
        found += ["peft", "frozen"]
    return found + list(floors.copied(op, w, direction, dtype))


def build(name: str, subject: Subject, direction: str) -> Variant:
    """Raises CannotRun."""
    op, w = subject.op, subject.workload
    if name in COPIES:
        size = floors.copied(op, w, direction, subject.dtype)[name]
        return Variant(_no_run, checked=False, copied=size)
    if op == "block":
        return block_variant(subject, "reference" if name == "eager" else name)
    if op == "adapter_bank" and name in bank.RIVALS:
        return bank.variant(name, subject)
    if name == "eager":
        return Variant(EAGER[op])
    if name == "compile":
        return Variant(torch.compile(EAGER[op], fullgraph=True, dynamic=False))
    if name in ("peft", "frozen"):
        layer = peft_layer(subject) if name == "peft" else None
        run = frozen_linear if layer is None else _with_residual(layer)
        if op == "cross_attention_adapter":
            return Variant(after_attention(run), ("q",), layer, checked=False)
        return Variant(run, ("h", "residual"), layer, checked=False)
    if op == "quantize":
        return Variant(lambda x: there_and_back(x, name))
    if name == "sdpa+auto":
        return Variant(after_attention(ops.adapter_linear))
    backend, _, path = name.partition("-")
    options = {"backend": backend} | ({"path": path} if path else {})
    return Variant(lambda **inputs: getattr(ops, op)(**inputs, **options))


def _no_run(**_: Any) -> None:
    raise AssertionError("a copy has no run of its own")


def _with_residual(layer: nn.Module) -> Op:
    def run(h: Tensor, residual: Tensor | None = None, **_: Any) -> Tensor:
        y = layer(h)
        return y if residual is None else y + residual

    return run


def peft_layer(subject: Subject) -> nn.Module:
    """The frozen layer of the inputs, wrapped by peft; both of its matrices are random."""
    config = lora(subject.workload.r, ["linear"])
    holder = nn.Module()
    weight, bias = subject.inputs["weight"], subject.inputs["bias"]
    with torch.device("meta"):
        holder.linear = nn.Linear(weight.shape[1], weight.shape[0])
    holder.linear.weight = nn.Parameter(weight, requires_grad=False)
    holder.linear.bias = nn.Parameter(bias, requires_grad=False)
    return wrap(config, holder).linear


def lora(rank: int, targets: list[str]) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise CannotRun("peft is not installed")
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)


def wrap(config: Any, module: nn.Module, name: str = "default") -> Any:
    from peft import inject_adapter_in_model

    return inject_adapter_in_model(config, module, name)


def block_variant(subject: Subject, name: str, exact: bool = False) -> Variant:
    block = subject.block
    assert block is not None
    if name == "peft":
        config = lora(subject.workload.r, ["to_out.0"])
        module = wrap(config, blocks.copy_of(block))
    elif name == "frozen":
        module = block
    else:
        module = blocks.adapted(block, subject.workload.r, name)
    if exact:
        module = copy.deepcopy(module).double()
    return Variant(blocks.runner(module), ("x",), module, checked=name not in UNLIKE)
