"""AdaptedProjection: the linear layer that consumes attention, with its adapters.

`forward` is the one place that chooses how the adapters are computed. conversion.py makes such a
layer of a linear one, and undoes it.

Where the layer reads more than attention (Flux's single blocks), adapters act on a slice of its
input's columns alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import ops, placements
from .adapters import BottleneckAdapter
from .backends import resolve
from .bank import Bank
from .forwards import has_hooks
from .ops.adapter_linear import api as adapter_linear_api
from .ops.adapter_linear import contract as adapter_linear_contract
from .ops.cross_attention_adapter import api as cross_attention_api
from .ops.rule import acc_dtype, autocast_dtype, cast
from .stack import Stack, Weighted, for_samples, stacks
from .whereabouts import unreadable_weight

logger = logging.getLogger("a3fta_kernels")

Columns = tuple[int, int] | None  # (start, length) of a layer's input; None: all of it
_logged: set[tuple[str, str]] = set()


class Frozen(NamedTuple):
    """What `freeze` keeps: the stack, and V and the bias that were made of it."""

    stack: Stack
    v: Tensor
    v_bias: Tensor | None


class Merged(NamedTuple):
    """What `unmerge` needs: the weight and bias from before the merge."""

    weight: Tensor
    bias: Tensor | None


class Acting(NamedTuple):
    """An adapter that acts."""

    name: str
    adapter: BottleneckAdapter
    weight: float
    factor: Tensor  # the weight, in a tensor of no dimension


# beside some linear class, which the type checker takes for nn.Linear
if TYPE_CHECKING:
    _Linear = nn.Linear
else:
    _Linear = nn.Module


class AdaptedProjectionMixin(_Linear):
    """What an adapted layer adds to the linear class it had before."""

    adapters: nn.ModuleDict
    acting: list[Acting]  # changed by `choose` alone
    enabled: bool
    backend: str
    columns: Columns  # what the adapters read and write
    merged: Merged | None
    frozen: Frozen | None
    banks: tuple[Bank, ...] | None  # each sample with its own adapter, in place of `weights`
    source: Tensor | None  # what attention was given, on its way to a parallel adapter
    resting: tuple[str, ...]  # adapters that were chosen not to train
    foreign: ClassVar[bool] = False  # PEFT has its adapters, and switches and saves them

    def forward(
        self, h: Tensor, residual: Tensor | None = None, beside: Sequence[Weighted] = (),
        acted: bool = False,
    ) -> Tensor:  # fmt: skip
        """y = h' @ weight.T + bias [+ residual],  h' = h + sum of weight_i * adapter_i(h).

        h (..., K), residual (..., N). With columns = (start, C) the adapters have that slice for h
        and h', and what is beside it stays. With no active adapter this is the layer as it was.
        `beside`: further adapters of this forward, which a layer around this one has. acted:
        without those that read what attention is given, as they acted already.
        """
        banks = self.acting_banks()
        active = [*(self.active() if banks is None else ()), *beside]
        if acted:
            active = [pair for pair in active if pair[0].config.placement != "parallel"]
        if banks is not None:
            kept = [bank for bank in banks if not (acted and bank.placement == "parallel")]
            return _add(self._by_sample(h, kept, active), residual)
        if not active:
            return _add(super().forward(h), residual)
        early = placements.split(active, "pre")
        if len(early) < len(active):
            _log_once("its adapter apart from the layer", placements.why_apart(active) or "")
            return _add(placements.behind(self, self._in_front(h, None, early), active), residual)
        if residual is not None and residual.dtype != h.dtype:
            return _add(AdaptedProjectionMixin.forward(self, h, beside=beside), residual)
        frozen = None if beside else self._frozen_for(h)
        if frozen is not None:
            return self._forward_frozen(h, residual, frozen, for_samples(frozen.stack, active, h))
        return self._in_front(h, residual, active)

    def _in_front(self, h: Tensor, residual: Tensor | None, active: list[Weighted]) -> Tensor:
        """The layer behind these adapters: in one op where that can be."""
        if not active:
            return _add(super().forward(h), residual)
        found = stacks(active, h)
        first, *others = found
        reason = self.unfused_reason(active)
        if reason is None and not others and not first.norm:
            return ops.adapter_linear(
                h, first.w_down, first.w_up, self.weight, self.bias, first.b_down, first.b_up,
                residual=residual, columns=self.columns, scale=first.scale,
                activation=first.activation, gamma=first.gamma, beta=first.beta,
                backend=self.backend,
            )  # fmt: skip
        _log_once("its adapter apart from the layer", reason or "its adapters differ in activation")
        before, inside, after = self._parts(h)
        adapted = placements.in_front(inside, found, self.backend)
        return _add(super().forward(_whole(before, adapted, after)), residual)

    def _by_sample(self, h: Tensor, banks: Sequence[Bank], beside: Sequence[Weighted]) -> Tensor:
        """The layer, as it is, with a batch whose samples have adapters of their own.

        With V by sample there is no wide product to save: z @ V.T would be a skinny kernel of its
        own that writes what the projection then reads, as h' is written and read here, and V of
        every adapter would be made first. And so any layer will do, a quantized one too.
        """
        early = [bank for bank in banks if bank.placement == "pre"]
        ahead = placements.split(beside, "pre")
        if early or ahead:
            before, inside, after = self._parts(h)
            adapted = placements.in_front(inside, stacks(ahead, inside), self.backend, early)
            h = _whole(before, adapted, after)
        y = super().forward(h)
        return placements.behind(self, y, beside, banks)

    def acting_banks(self) -> tuple[Bank, ...] | None:
        """The banks, where each sample has its own adapters in the next forward."""
        return self.banks if self.enabled and self.merged is None else None

    def _parts(self, h: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """h before, inside and after the adapters' columns; (None, h, None) where that is all."""
        if self.columns is None:
            return None, h, None
        start, length = self.columns
        before, inside, after = h.split((start, length, h.shape[-1] - start - length), dim=-1)
        # a copy: kept for the backward, a view would hold the whole of h
        return before, inside.contiguous(), after

    def _forward_frozen(
        self, h: Tensor, residual: Tensor | None, frozen: Frozen, stack: Stack
    ) -> Tensor:
        dtype = frozen.v.dtype
        return adapter_linear_api.apply_prepared(
            cast(h, dtype), stack.w_down, stack.w_up, self.weight, self.bias, stack.b_down,
            stack.b_up, residual, span(self, self.columns)[0], stack.scale, stack.activation,
            stack.gamma, stack.beta, "auto", resolve(self.backend, h.device, dtype), frozen.v,
            frozen.v_bias,
        )  # fmt: skip

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, heads: int, mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """`forward` of softmax(q k^T / sqrt(head_dim) + mask) v, attention included, in one op.

        q (B, Lq, C), k and v (B, Lk, C), heads side by side, mask as in `cross_attention_adapter`.
        None where that op cannot be: then the caller computes attention, and `forward` the rest.
        """
        active = self.active()
        if not active or self.banks is not None:
            return None
        reason = self.unattended_reason(q, k, heads, mask, active)
        if reason is not None:
            _log_once("attention to few keys apart from the layer", reason)
            return None
        frozen = self._frozen_for(q)
        if frozen is None:
            stack, v_up, v_bias = stacks(active, q)[0], None, None
        else:
            stack, v_up, v_bias = frozen
            stack = for_samples(stack, active, q)
        dtype = autocast_dtype(q)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(dtype)
        return cross_attention_api.apply_prepared(
            cast(q, dtype), cast(k, dtype), cast(v, dtype), stack.w_down, stack.w_up, self.weight,
            self.bias, stack.b_down, stack.b_up, heads, mask, None, residual, stack.scale,
            stack.activation, stack.gamma, stack.beta, v_up, v_bias,
        )  # fmt: skip

    def unattended_reason(
        self, q: Tensor, k: Tensor, heads: int, mask: Tensor | None,
        active: list[Weighted],
    ) -> str | None:  # fmt: skip
        """Why `attend` cannot compute attention with this layer now; None where it can."""
        reason = self.unfused_reason(active)
        if reason is None and self.columns is not None:
            reason = "the layer reads more than attention"
        if reason is None and len({adapter.activation for adapter, _ in active}) > 1:
            reason = "its adapters differ in activation"
        if reason is None and has_hooks(self):
            reason = "the layer carries hooks, which want its input"
        if reason is None and q.dtype != k.dtype:
            reason = f"the queries are {q.dtype}, the keys {k.dtype}"
        if reason is not None:
            return reason
        rank = sum(adapter.rank for adapter, _ in active)
        return cross_attention_api.unfused_reason(q, k, heads, rank, mask, self.backend)

    def _frozen_for(self, h: Tensor) -> Frozen | None:
        """What `freeze` kept, where it holds for h."""
        frozen = self.frozen
        if frozen is None or self.training or frozen.v.dtype != autocast_dtype(h):
            return None
        return frozen

    @property
    def weights(self) -> Mapping[str, float]:
        """The adapters that act, by name, and their mixing weights. Read only: see `choose`."""
        return MappingProxyType({x.name: x.weight for x in self.acting})

    def choose(self, weights: Mapping[str, float]) -> None:
        """Makes these adapters act, with these weights."""
        adapters: Any = self.adapters
        self.acting = []
        for name, weight in weights.items():
            like = adapters[name].w_down
            device = "cpu" if like.device.type == "meta" else like.device
            # a tensor made in inference mode could not serve a backward
            with torch.inference_mode(False):
                factor = torch.full((), weight, dtype=acc_dtype(like.dtype), device=device)
            self.acting.append(Acting(name, adapters[name], weight, factor))
        self.frozen = None

    def active(self) -> list[Weighted]:
        """The adapters that act in the next forward, with their weights.

        Of compiled code a name or a number would be a constant, and each choice would compile
        anew; a place in a list and a tensor are not.
        """
        if not self.enabled or self.merged is not None:
            return []
        if torch.compiler.is_compiling():
            return [(x.adapter, x.factor) for x in self.acting]
        return [(x.adapter, x.weight) for x in self.acting]

    def unfused_reason(self, active: Sequence[Weighted] | None = None) -> str | None:
        """Why the fused op cannot be this layer now, with these adapters; None where it can."""
        active = self.active() if active is None else active
        reason = self.unreadable_reason()
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if reason is None and torch.is_grad_enabled() and trains:
            return "the layer itself trains"
        if reason is None and any(adapter.config.layer_norm for adapter, _ in active):
            return "its adapter reads attention normalised"
        return reason or placements.why_apart(active)

    def unreadable_reason(self) -> str | None:
        """Why this layer's weight is no plain tensor at hand; None where it is."""
        if type(self) is not AdaptedProjection:
            stock = stock_class(self)
            kind = type(self) if stock is nn.Linear else stock  # fully_shard makes subclasses
            return f"the layer is of class {kind.__name__}, not a plain Linear"
        reason = unreadable_weight(self.weight)
        if reason is None and self.weight.shape != (self.out_features, self.in_features):
            return f"its weight is not whole here, but of shape {tuple(self.weight.shape)}"
        return reason

    def freeze(self) -> bool:
        """Computes V and the bias once; False where this layer has nothing to keep."""
        self.frozen = None
        active = self.active()
        late = len(placements.split(active, "pre")) < len(active)
        if not active or late or self.unreadable_reason() is not None:
            return False
        dtype = autocast_dtype(self.weight)
        backend = resolve(self.backend, self.weight.device, dtype)
        if backend == "reference":
            return False
        # a tensor made in inference mode could not serve a forward outside it
        with torch.inference_mode(False), torch.no_grad():
            first, *others = stacks(active, None)
            if others or first.norm:
                return False
            _, v, v_bias = adapter_linear_contract.merged(
                backend, self.weight, self.bias, first.w_down, first.w_up, first.b_up, None,
                first.scale, span(self, self.columns)[0], dtype,
            )  # fmt: skip
        self.frozen = Frozen(first, v, v_bias)
        return True

    def __getstate__(self) -> dict[str, Any]:
        # a copy is outside the block of adapters_per_sample, which would never end for it, and of
        # a forward that an exception cut off
        return {**self.__dict__, "banks": None, "source": None}

    def train(self, mode: bool = True) -> AdaptedProjectionMixin:
        if mode:
            self.frozen = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedProjectionMixin:
        super()._apply(fn, recurse)
        if self.banks is not None:
            self.banks = tuple(bank.moved(fn) for bank in self.banks)
        self.choose(self.weights)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        if self.merged is not None and f"{prefix}weight" in state_dict:
            errors.append(f"{prefix}weight: an adapter is merged into it; call unmerge first")
            return
        self.frozen = None
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )


class AdaptedProjection(AdaptedProjectionMixin, nn.Linear):
    """An adapted plain `nn.Linear`. Made by `conversion.adapt`, never by its constructor."""


def stock_class(projection: AdaptedProjectionMixin) -> type:
    """The class the layer had before, and has after `restore`."""
    order = type(projection).__mro__
    return order[order.index(AdaptedProjectionMixin) + 1]


def span(linear: nn.Linear, columns: Columns) -> tuple[int, int]:
    """(start, length) of the layer's input that adapters act on."""
    return columns or (0, linear.in_features)


def _whole(before: Tensor | None, adapted: Tensor, after: Tensor | None) -> Tensor:
    """What `_parts` took apart, in the dtype of the adapters' part."""
    if before is None or after is None:
        return adapted
    return torch.cat((before.to(adapted.dtype), adapted, after.to(adapted.dtype)), dim=-1)


def _add(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else y + residual


def _log_once(what: str, reason: str) -> None:
    if torch.compiler.is_compiling() or (what, reason) in _logged:
        return
    _logged.add((what, reason))
    logger.info("a projection computes %s: %s", what, reason)
