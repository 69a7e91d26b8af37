"""A chain of stages as one autograd node that keeps little and computes the rest again.

A stage is the residual step of a transformer block, in three parts:

    parts = head(state, given)          norms and frozen projections: cheap, computed again
    outs  = core(*parts, given)         attention or the activation: never computed again
    state = tail(outs, state, given)    the projection with its adapter, and the residual add

and, where an adapter sits beside attention, a fourth, aside(state, given), which is computed again
as the head is, and whose tensors the tail finds behind those of the core.

Of a chain the state it starts from is kept, what the cores keep beside their parts, and the
outputs of every core but the last. The states between are rebuilt by the tails, the parts by the
heads, at the time of the backward and one stage at a time:

    one stage     (level recompute)   nothing is rebuilt but the parts
    whole block   (level block)       nor is the residual stream between its stages kept

The last stage has no tail here: the chain ends in its state, its outs and what is aside, and
ordinary autograd goes on. Parameters that train get their gradients as inputs of the node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..adapters import BottleneckAdapter, reruns, timestep
from ..ops.rule import record, refuse_second_derivative
from ..projection import AdaptedProjectionMixin
from .forgetful import remember
from .swapping import Settings, dropout, every

Tensors = tuple[Tensor, ...]
Reader = Callable[[Tensors, Tensors], Tensor]  # a tensor of the state and what is given


@dataclass(frozen=True)
class Stage:
    """One residual step. `given` are tensors that all stages read: the text, a mask.

    head_modules, tail_modules and aside_modules are those whose parameters the parts use.
    """

    head: Callable[[Tensors, Tensors], Tensors]
    core: Callable[[Tensors, Tensors], Tensors]
    tail: Callable[[Tensors, Tensors, Tensors], Tensors]
    head_modules: Sequence[nn.Module] = ()
    tail_modules: Sequence[nn.Module] = ()
    aside: Callable[[Tensors, Tensors], Tensors] = lambda state, given: ()
    aside_modules: Sequence[nn.Module] = ()


def run(stages: Sequence[Stage], state: Tensors, given: Tensors, settings: Settings) -> Tensors:
    """The state after all stages: at level block in one chain, else each stage in its own."""
    if torch.compiler.is_compiling():  # as what surrounds this is to be computed again
        return _straight(stages, state, given)
    chains = [stages] if settings.level == "block" else [[stage] for stage in stages]
    for chain in chains:
        state = _run(chain, state, given, settings.norms)
    return state


def _run(stages: Sequence[Stage], state: Tensors, given: Tensors, keep: str) -> Tensors:
    modules = [m for stage in stages for m in (*stage.head_modules, *stage.aside_modules)]
    modules += [m for stage in stages[:-1] for m in stage.tail_modules]
    held = (p for m in every(*modules) for p in m._parameters.values() if p is not None)
    # each once: layers may share one
    params = list(dict.fromkeys(p for p in held if p.requires_grad))
    moment = timestep.now()
    # a gradient of the timestep itself is left to ordinary autograd
    differentiated = moment is not None and moment.t.requires_grad
    if not differentiated and (params or any(x.requires_grad for x in (*state, *given))):
        plan = _Plan(tuple(stages), len(state), len(given), keep, tuple(modules))
        outs = record(Chain, plan, *state, *given, *params)
        if len(stages) > 1:
            state, outs = outs[: len(state)], outs[len(state) :]
        return stages[-1].tail(outs, state, given)
    return _straight(stages, state, given)


def _straight(stages: Sequence[Stage], state: Tensors, given: Tensors) -> Tensors:
    for stage in stages:
        outs = stage.core(stage.head(state, given), given)
        state = stage.tail((*outs, *stage.aside(state, given)), state, given)
    return state


class _Plan(NamedTuple):
    stages: tuple[Stage, ...]
    states: int
    givens: int
    keep: str  # of ops.validate.KEEPS: how the first state is kept
    modules: tuple[nn.Module, ...]  # all that is run again


def _condition(modules: Sequence[nn.Module]) -> list[Any]:
    """What must be the same when the modules run again: parameters, values, active adapters."""
    found: list[Any] = []
    for module in every(*modules):
        for p in module._parameters.values():
            if p is not None:
                found.append((id(p), None if p.is_inference() else p._version))
        if isinstance(module, AdaptedProjectionMixin):
            state = (module.enabled, module.merged is None, module.banks)
            found.append((*state, tuple(module.weights.items())))
        elif isinstance(module, BottleneckAdapter):
            found.append(module.scale)
        elif dropout(module) > 0:
            found.append(module.training)
    return found


class Chain(torch.autograd.Function):
    """The stages without the last tail: (state before the last stage, its outs and asides).

    A chain of one stage returns the latter alone.
    """

    operator = "lean_block"

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> Tensors:
        state = tensors[: plan.states]
        given = tensors[plan.states : plan.states + plan.givens]
        ctx.plan = plan
        ctx.params = tensors[plan.states + plan.givens :]
        ctx.condition = _condition(plan.modules)
        ctx.autocast = _autocast_now(state[0])
        ctx.moment = timestep.now()
        ctx.book = []
        ctx.dtypes = [x.dtype for x in state]
        ctx.memories = []
        saved = [*(part for x in state for part in _pack(x, plan.keep)), *given]
        names = [f"state[{i}]{part}" for i in range(len(state)) for part in _PACKED[plan.keep]]
        names += [f"given[{i}]" for i in range(len(given))]
        ctx.counts = []
        outs: Tensors = ()
        asides: Tensors = ()
        for index, stage in enumerate(plan.stages):
            parts = stage.head(state, given)
            outs, memory, kept = remember(lambda *p, s=stage: s.core(p, given), parts)
            with reruns.written(ctx.book):
                asides = stage.aside(state, given)
            ctx.memories.append(memory)
            between = index + 1 < len(plan.stages)
            ctx.counts.append((len(outs) if between else 0, len(kept)))
            saved += [*outs, *kept] if between else kept
            names += [f"stage[{index}].out"] * (len(outs) if between else 0)
            names += [f"stage[{index}].kept"] * len(kept)
            if between:
                with reruns.written(ctx.book):
                    state = stage.tail((*outs, *asides), state, given)
        ctx.save_for_backward(*saved)
        ctx.saved_names = tuple(names)
        ctx.set_materialize_grads(False)
        ends = (*outs, *asides)
        ctx.asides = len(asides)
        return (*state, *ends) if len(plan.stages) > 1 else ends

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        refuse_second_derivative()
        if _condition(ctx.plan.modules) != ctx.condition:
            raise RuntimeError(
                "lean: expected the model as it was in the forward, which the backward computes "
                "again in part, got one whose weights or active adapters were changed since; run "
                "the backward first (with torch.func: on the stock model, lean(model, 'off'))"
            )
        with _autocast_as(ctx.autocast), timestep.at(ctx.moment), reruns.read(ctx.book):
            return _Backward(ctx).run(grads)


class _Backward:
    """One backward of a chain: rebuilds the states, then goes through the stages from the last."""

    def __init__(self, ctx: Any) -> None:
        plan: _Plan = ctx.plan
        self.plan = plan
        self.memories = ctx.memories
        self.asides = ctx.asides
        needs = ctx.needs_input_grad[1:]
        saved = iter(ctx.saved_tensors)
        state = tuple(_unpack(saved, dtype, plan.keep) for dtype in ctx.dtypes)
        self.state = tuple(_leaf(x, need) for x, need in zip(state, needs, strict=False))
        needs = needs[plan.states :]
        self.given = tuple(_leaf(next(saved), needs[i]) for i in range(plan.givens))
        self.outs, self.kept = [], []
        for outs, kept in ctx.counts:
            self.outs.append(tuple(_leaf(next(saved), True) for _ in range(outs)))
            self.kept.append([next(saved) for _ in range(kept)])
        self.params = ctx.params
        shared = [x for x in (*self.given, *self.params) if x.requires_grad]
        self.shared = shared
        self.sums: dict[int, Tensor | None] = {id(x): None for x in shared}

    def run(self, grads: Sequence[Tensor | None]) -> tuple:
        plan = self.plan
        states, tails = self._rebuild()
        dstate: list[Tensor | None] = [None] * plan.states
        douts = list(grads)
        if len(plan.stages) > 1:
            dstate, douts = douts[: plan.states], douts[plan.states :]
        outs = len(douts) - self.asides
        douts, dasides = douts[:outs], douts[outs:]
        for index in reversed(range(len(plan.stages))):
            state = states.pop()
            if index < len(tails):
                outs = self.outs[index]
                found = self._gradients(tails.pop(), (*outs, *state), dstate)
                douts, dstate = found[: len(outs)], found[len(outs) :]
            dhead = self._through_head(index, state, douts, dasides)
            dasides = []
            dstate = [_sum(a, b) for a, b in zip(dstate, dhead, strict=True)]
            self.kept.pop()
        shared = {id(x): self.sums[id(x)] for x in self.shared}
        return (None, *dstate, *(shared.get(id(x)) for x in (*self.given, *self.params)))

    def _rebuild(self) -> tuple[list[Tensors], list[Tensors]]:
        """The state before each stage, and the tails' results with their graphs."""
        states, tails = [self.state], []
        for stage, outs in zip(self.plan.stages[:-1], self.outs, strict=False):
            with torch.enable_grad():
                asides = stage.aside(states[-1], self.given)
                after = stage.tail((*outs, *asides), states[-1], self.given)
            tails.append(after)
            states.append(tuple(_leaf(x.detach(), x.requires_grad) for x in after))
        return states, tails

    def _through_head(
        self, index: int, state: Tensors, douts: Sequence[Tensor | None],
        dasides: Sequence[Tensor | None],
    ) -> list[Tensor | None]:  # fmt: skip
        """Of the last stage through what is aside, too: of others the tail went through that."""
        stage = self.plan.stages[index]
        with torch.enable_grad():
            parts = stage.head(state, self.given)
        dparts: Sequence[Tensor | None] = [None] * len(parts)
        if any(x.requires_grad for x in parts):
            plain = tuple(x.detach() for x in parts)
            dparts = self.memories[index].backward(plain, self.kept[index], douts)
            del plain
        asides: Tensors = ()
        if dasides:
            with torch.enable_grad():
                asides = stage.aside(state, self.given)
        return self._gradients((*parts, *asides), state, (*dparts, *dasides))

    def _gradients(
        self, outputs: Tensors, inputs: Tensors, douts: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Those of `inputs`; those of text and parameters are added to the sums."""
        pairs = [
            (y, dy)
            for y, dy in zip(outputs, douts, strict=True)
            if dy is not None and y.requires_grad
        ]
        own = [x for x in inputs if x.requires_grad]
        wanted = [*own, *self.shared]
        if not pairs or not wanted:
            return [None] * len(inputs)
        found = torch.autograd.grad(
            [y for y, _ in pairs], wanted, [dy for _, dy in pairs], allow_unused=True
        )
        for x, dx in zip(self.shared, found[len(own) :], strict=True):
            self.sums[id(x)] = _sum(self.sums[id(x)], dx)
        grads = iter(found[: len(own)])
        return [next(grads) if x.requires_grad else None for x in inputs]


def _leaf(x: Tensor, needs: bool) -> Tensor:
    return x.detach().requires_grad_(needs)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


_PACKED = {"input": ("",), "int8": (".codes", ".ranges")}


def _pack(x: Tensor, keep: str) -> Tensors:
    return ops.quantize(x) if keep == "int8" else (x,)


def _unpack(saved: Any, dtype: torch.dtype, keep: str) -> Tensor:
    first = next(saved)
    return ops.dequantize(first, next(saved), dtype) if keep == "int8" else first


_Autocast = tuple[str, torch.dtype, bool] | None


def _autocast_now(x: Tensor) -> _Autocast:
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()


def _autocast_as(then: _Autocast) -> contextlib.AbstractContextManager:
    """Autocast as it was in the forward."""
    if then is None:
        return contextlib.nullcontext()
    device, dtype, cache = then
    return torch.autocast(device, dtype=dtype, cache_enabled=cache)
