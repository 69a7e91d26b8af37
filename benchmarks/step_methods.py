"""Ways to train a U-Net, and the table of those that `bench_step.py` measures.

A cell is a method, what trains, and a variant, how the frozen trunk is computed. Cells that are
timed in one loop are a batch; each has PEFT LoRA on the stock trunk, to which all is compared.

The frozen floor is the trunk's own cost: a forward, and a backward to the output of the first
attention layer, which is as far as the gradient of every adapter method has to go. Nothing trains
and there is no optimizer, so no adapter method can be faster on the same trunk.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.memory import levels

from .variants import CannotRun

RANK = 64  # of A3FTA
FLOOR, FULL = "frozen floor", "full fine-tuning"
LORA, EQUAL = "PEFT LoRA r16", "PEFT LoRA, as many parameters as A3FTA"
EAGER, FUSED = "A3FTA r64, eager", "A3FTA r64"
BESIDE = "A3FTA r64, beside attention"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

STOCK, COMPILE, XFORMERS = "stock", "compile", "xformers"
CHECKPOINTING = "checkpointing"
# what `a3fta.lean` is called with
LEVELS: dict[str, dict[str, str]] = {
    **{name: level.lean for name, level in levels.LEVELS.items() if level.lean is not None},
    "recompute-int8": {"level": "recompute", "norms": "int8"},
}
EIGHT_BITS = ("recompute-int8", "block-int8", "compressed")
EXACT_COMPILE = "exact, compile"
GRAPH = "graph"  # alone or behind a level: loss and backward by `a3fta.Captured`


class Cell(NamedTuple):
    method: str
    variant: str

    def __str__(self) -> str:
        return f"{self.method} | {self.variant}"

    @property
    def same(self) -> str:
        """Cells of equal `same` have equal losses and gradients, up to rounding."""
        return FUSED if self.method == EAGER else self.method


ANCHOR = Cell(LORA, STOCK)


class Batch(NamedTuple):
    """Cells that share a trunk in memory and take turns in one loop."""

    name: str
    cells: tuple[Cell, ...]


def batches(device: str, brief: bool = False) -> tuple[Batch, ...]:
    """The most telling first; `brief`: these alone."""
    adapters = [
        ANCHOR, Cell(EQUAL, STOCK), Cell(FUSED, STOCK), Cell(FUSED, "exact"),
        Cell(FUSED, "recompute"), Cell(FUSED, "block-int8"), Cell(FUSED, "block"),
        Cell(FUSED, CHECKPOINTING), Cell(LORA, CHECKPOINTING),
        Cell(FUSED, "recompute-int8"), Cell(FUSED, "compressed"), Cell(FLOOR, STOCK),
        Cell(FLOOR, "exact"), Cell(EAGER, STOCK), Cell(LORA, "exact"), Cell(LORA, "recompute"),
        Cell(LORA, "block-int8"), Cell(BESIDE, STOCK), Cell(BESIDE, "exact"),
        Cell(BESIDE, "recompute"),
    ]  # fmt: skip
    if brief:
        return (Batch("adapters", tuple(adapters[:12])),)
    if device == "cuda":  # xformers has no operators for the CPU
        adapters += [Cell(LORA, XFORMERS), Cell(FUSED, XFORMERS)]
    compiled = (
        ANCHOR, Cell(FUSED, STOCK), Cell(FUSED, "exact"), Cell(LORA, COMPILE),
        Cell(EQUAL, COMPILE), Cell(FUSED, EXACT_COMPILE), Cell(FUSED, COMPILE),
    )  # fmt: skip
    full = (ANCHOR, Cell(FULL, STOCK), Cell(FULL, CHECKPOINTING))
    found = Batch("adapters", tuple(adapters)), Batch("compiled", compiled), Batch("full", full)
    if device != "cuda":
        return found
    # each graph has memory of its own
    captured = (
        ANCHOR, Cell(FUSED, "exact"), Cell(LORA, GRAPH), Cell(FUSED, f"exact, {GRAPH}"),
        Cell(FUSED, f"block-int8, {GRAPH}"), Cell(BESIDE, f"exact, {GRAPH}"),
    )  # fmt: skip
    return *found, Batch("captured", captured)


@dataclass
class Step:
    """One training step over a model of its own; `trunk` holds the shared frozen tensors."""

    model: nn.Module
    inputs: dict[str, Any]
    trained: dict[str, Tensor]
    own: list[Tensor]  # parameters that are not the trunk's
    optimizer: torch.optim.Optimizer | None
    call: Callable[..., Any]
    leaf: list[Tensor] = field(default_factory=list)  # of the floor, filled by its forward

    def loss(self, given: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
        """Of the inputs, or of those that are given in their place."""
        inputs = {**self.inputs, **given}
        target = inputs.pop("target")
        self.leaf.clear()
        y = self.call(**inputs, return_dict=False)[0]
        return torch.nn.functional.mse_loss(y.float(), target.float())

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its gradients, which are given back and not kept."""
        loss = self.loss()
        named = self.trained or {"first attention": self.leaf[0]}
        found = torch.autograd.grad(loss, list(named.values()))
        return loss.detach(), dict(zip(named, found, strict=True))

    def run(self, _: int = 0) -> None:
        if self.optimizer is None:
            loss = self.loss()
            torch.autograd.grad(loss, self.leaf)
            self.leaf.clear()
            return
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def resident_bytes(self) -> int:
        """What the method holds between steps beside one copy of the trunk's weights."""
        states = self.optimizer.state.values() if self.optimizer else ()
        held = [x for state in states for x in state.values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in (*self.own, *held))


@dataclass
class Captured(Step):
    """The same with loss and backward recorded; the optimizer is started by Python."""

    recorded: a3fta.Captured | None = None

    def run(self, _: int = 0) -> None:
        assert self.optimizer is not None
        self._replay()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._replay()
        found = {n: p.grad.clone() for n, p in self.trained.items() if p.grad is not None}
        for parameter in self.trained.values():
            parameter.grad = None
        return loss, found

    def _replay(self) -> Tensor:
        if self.recorded is None:
            self.recorded = a3fta.Captured(self.loss, self.trained.values())
        return self.recorded({n: x for n, x in self.inputs.items() if isinstance(x, Tensor)})


def build(cell: Cell, trunk: nn.Module, inputs: dict[str, Any]) -> Step:
    """Raises CannotRun where something that the cell needs is not here."""
    if cell.variant == XFORMERS and importlib.util.find_spec("xformers") is None:
        raise CannotRun("xformers is not installed")
    if cell.method in (LORA, EQUAL) and importlib.util.find_spec("peft") is None:
        raise CannotRun("peft is not installed")
    # all but a full fine-tuning computes with the same frozen tensors
    frozen = () if cell.method == FULL else (*trunk.parameters(), *trunk.buffers())
    model = copy.deepcopy(trunk, {id(x): x for x in frozen})
    leaf: list[Tensor] = []
    _adapt(model, cell.method, leaf)
    call = _vary(model, cell)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    own = [p for p in trained.values() if cell.method != FULL]
    optimizer = None
    if trained:
        on_gpu = next(iter(trained.values())).device.type == "cuda"
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, fused=on_gpu)
    kind = Captured if cell.variant.endswith(GRAPH) else Step
    return kind(model, inputs, trained, own, optimizer, call, leaf)


def _adapt(model: nn.Module, method: str, leaf: list[Tensor]) -> None:
    if method == FLOOR:
        first = next(m for name, m in model.named_modules() if name.endswith("attn1"))

        def start(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaf.append(output.detach().requires_grad_())
            return leaf[-1]

        first.register_forward_hook(start)
    elif method == FULL:
        model.requires_grad_(True)
    elif method in (EAGER, FUSED, BESIDE):
        backend = "reference" if method == EAGER else "auto"
        placement = "parallel" if method == BESIDE else "pre"
        config = a3fta.AdapterConfig(rank=RANK, placement=placement)
        a3fta.inject(model, config, backend=backend)
    else:
        lora(model, 16 if method == LORA else equal_rank(model))
    if method != FULL:
        fill(model)


def lora(model: nn.Module, rank: int) -> None:
    """In the trunk's dtype: PEFT's way in float32 casts its inputs, which is slower and larger."""
    from peft import LoraConfig

    dtype = next(model.parameters()).dtype
    model.add_adapter(LoraConfig(r=rank, target_modules=list(TARGETS)))  # type: ignore[operator]
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)


def equal_rank(model: nn.Module) -> int:
    """LoRA's rank with which it has about as many parameters as A3FTA."""
    per_rank = ours = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(TARGETS):
            per_rank += layer.in_features + layer.out_features
            if name.endswith(TARGETS[-1]):
                c = layer.in_features
                ours += RANK * 2 * c + RANK + c
    return max(1, round(ours / per_rank))


def fill(model: nn.Module) -> None:
    """Adapters start at zero; here none is, so that every gradient is put to the test."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.5 * p.shape[-1] ** -0.5)


def _vary(model: Any, cell: Cell) -> Callable[..., Any]:
    variant = cell.variant
    if variant == CHECKPOINTING:
        model.enable_gradient_checkpointing()
    elif variant == XFORMERS and cell.method == FUSED:
        a3fta.set_attention(model, "xformers")
    elif variant == XFORMERS:
        model.enable_xformers_memory_efficient_attention()
    level = variant.partition(", ")[0]
    if level in LEVELS:
        a3fta.lean(model, **LEVELS[level])
    return torch.compile(model, dynamic=False) if COMPILE in variant else model


@contextlib.contextmanager
def strict_compiler() -> Iterator[None]:
    """Many models, one forward: none may fall back to eager because others were compiled before."""
    import torch._dynamo.config as config

    torch.compiler.reset()
    with config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()
