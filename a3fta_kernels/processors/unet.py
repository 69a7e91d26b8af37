"""The U-Nets of images: `to_out[0]` of every attention layer.

UNet2DConditionModel (SD1.x, SD2.x, SDXL, Kolors; Kandinsky 2 with added keys and values), its
ControlNet, Kandinsky 3, UNet2DModel; and our processors for all models whose attention layers have
those of the U-Nets.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..checks import check_choice, describe
from ..projection import AdaptedProjectionMixin
from . import engines, qkv
from .clock import Clock, steps
from .family import Family

# engines that leave the kernel open: attention to few keys may then be part of the projection's op
FUSABLE = ("auto", "sdpa")


class A3FTAAttnProcessor:
    """Drop-in for AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor and XFormersAttnProcessor.

    Args:
        attention: the engine. "auto": what was measured to be the fastest here, else "sdpa",
            PyTorch's own choice (AttnProcessor2_0). "flash", "cudnn", "efficient": that kernel of
            PyTorch. "flash3" (FlashAttention 3), "xformers": the package. "math"
            (AttnProcessor), "sliced". One that cannot run a call raises
            BackendUnavailableError with the reason.
        slice_size: heads at a time, for "sliced".
        attention_op: xformers' own choice of operator, for "xformers".

    It holds no parameters: the adapter is part of `attn.to_out[0]`. On a layer without an
    adapter it computes what the stock processor does.
    """

    joins = True  # it computes projections of one input together

    def __init__(
        self,
        attention: str = "auto",
        *,
        slice_size: int | None = None,
        attention_op: Any = None,
        **unknown: Any,
    ) -> None:
        if unknown or not isinstance(attention, str):
            got = ", ".join(unknown) or describe(attention)
            raise TypeError(
                f"{type(self).__name__}: expected attention, slice_size or attention_op, got "
                f"{got}. It owns no parameters: call a3fta_kernels.inject(model, "
                f"AdapterConfig(rank=...)), or model.set_attn_processor("
                f"a3fta_kernels.attn_processors(model, AdapterConfig(rank=...)))"
            )
        check_choice("attention", attention, engines.ENGINES)
        if attention == "sliced" and (not isinstance(slice_size, int) or slice_size < 1):
            raise ValueError(
                f"slice_size: expected a number of heads for attention='sliced', "
                f"got {describe(slice_size)}"
            )
        engines.check_installed(attention)
        self.attention = attention
        self.slice_size = slice_size
        self.attention_op = attention_op

    def __repr__(self) -> str:
        # diffusers prints this where set_default_attn_processor meets a class it does not know
        return (
            f"{type(self).__name__}(attention={self.attention!r}) "
            f"[a3fta_kernels.eject(model) restores the stock processors]"
        )

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attention_mask is not None:
            source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            attention_mask = attn.prepare_attention_mask(
                attention_mask, source.shape[1], source.shape[0]
            )
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        query, key, value = self.project(attn, hidden_states, encoder_hidden_states)
        cross = encoder_hidden_states is not None

        # the last division is skipped at 1: it changes nothing
        if attn.residual_connection and len(shape) == 3 and not _drops(attn.to_out[1]):
            y = self.output(attn, query, key, value, attention_mask, cross, residual)
        else:
            y = attn.to_out[1](self.output(attn, query, key, value, attention_mask, cross))
            if len(shape) == 4:
                y = y.transpose(-1, -2).reshape(shape)  # a view
            if attn.residual_connection:
                y = y + residual
        return y if attn.rescale_output_factor == 1 else y / attn.rescale_output_factor

    def project(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if encoder_hidden_states is None:
            query, key, value = qkv.project((attn.to_q, attn.to_k, attn.to_v), hidden_states)
            return query, key, value
        query = attn.to_q(hidden_states)
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        key, value = qkv.project((attn.to_k, attn.to_v), encoder_hidden_states)
        return query, key, value

    def output(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        cross: bool, residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """to_out[0] of attention [+ residual]: in one op where the layer takes a text's keys."""
        layer = attn.to_out[0]
        plain = attn.norm_q is None and attn.norm_k is None and key.shape[-1] == query.shape[-1]
        fusable = cross and plain and self.attention in FUSABLE
        if fusable and isinstance(layer, AdaptedProjectionMixin):
            by_head = mask
            if mask is not None:
                by_head = mask.view(key.shape[0], attn.heads, -1, mask.shape[-1])
            y = layer.attend(query, key, value, heads=attn.heads, mask=by_head, residual=residual)
            if y is not None:
                return y
        h = self.attend(attn, query, key, value, mask)
        return layer(h) if residual is None else project_out(layer, h, residual)

    def attend(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        if self.attention == "sliced":
            assert self.slice_size is not None
            return engines.sliced(attn, query, key, value, mask, self.slice_size)
        if self.attention == "xformers":
            return engines.xformers(attn, query, key, value, mask, self.attention_op)
        return engines.PLAIN[self.attention](attn, query, key, value, mask)


class A3FTAFusedAttnProcessor(A3FTAAttnProcessor):
    """Drop-in for FusedAttnProcessor2_0: one product for q, k and v (cross-attention: k and v)."""

    joins = False  # diffusers keeps a second copy of the weights for it

    def project(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if encoder_hidden_states is None:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
            return query, key, value
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        key, value = attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
        return attn.to_q(hidden_states), key, value


class A3FTAAttnAddedKVProcessor(A3FTAAttnProcessor, stock.AttnAddedKVProcessor2_0):
    """Drop-in for AttnAddedKVProcessor and kin: keys and values of the text come first.

    A subclass of the stock one, because `enable_xformers_memory_efficient_attention` asks.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
        batch, tokens, _ = hidden_states.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        key, value = qkv.project((attn.add_k_proj, attn.add_v_proj), encoder_hidden_states)
        if attn.only_cross_attention:
            query = attn.to_q(hidden_states)
        else:
            layers = (attn.to_q, attn.to_k, attn.to_v)
            query, own_key, own_value = qkv.project(layers, hidden_states)
            key = torch.cat([key, own_key], dim=1)
            value = torch.cat([value, own_value], dim=1)
        h = self.attend(attn, query, key, value, attention_mask)

        y = attn.to_out[1](attn.to_out[0](h))
        return y.transpose(-1, -2).reshape(residual.shape) + residual


# Attention.forward asks for the signature in every call: kept, it costs a third
for _kind in (A3FTAAttnProcessor, A3FTAAttnAddedKVProcessor):
    _kind.__call__.__signature__ = inspect.signature(_kind.__call__)  # type: ignore[attr-defined]


def project_out(layer: nn.Module, h: Tensor, residual: Tensor) -> Tensor:
    """layer(h) + residual, in one op where the layer can: PEFT's wrappers add outside."""
    if isinstance(layer, AdaptedProjectionMixin):
        return layer(h, residual=residual)
    return layer(h) + residual


def _drops(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Dropout) or (layer.training and layer.p > 0)


# stock class, exactly -> ours
REPLACEMENTS: dict[type, Callable[[Any], A3FTAAttnProcessor]] = {
    stock.AttnProcessor2_0: lambda _: A3FTAAttnProcessor(),
    stock.AttnProcessor: lambda _: A3FTAAttnProcessor("math"),
    stock.SlicedAttnProcessor: lambda p: A3FTAAttnProcessor("sliced", slice_size=p.slice_size),
    stock.XFormersAttnProcessor: lambda p: A3FTAAttnProcessor(
        "xformers", attention_op=p.attention_op
    ),
    stock.FusedAttnProcessor2_0: lambda _: A3FTAFusedAttnProcessor(),
    stock.AttnAddedKVProcessor2_0: lambda _: A3FTAAttnAddedKVProcessor(),
    stock.AttnAddedKVProcessor: lambda _: A3FTAAttnAddedKVProcessor("math"),
    stock.SlicedAttnAddedKVProcessor: lambda p: A3FTAAttnAddedKVProcessor(
        "sliced", slice_size=p.slice_size
    ),
    stock.XFormersAttnAddedKVProcessor: lambda p: A3FTAAttnAddedKVProcessor(
        "xformers", attention_op=p.attention_op
    ),
}


def processor_for(processor: Any) -> A3FTAAttnProcessor | None:
    make = REPLACEMENTS.get(type(processor))
    return None if make is None else make(processor)


def joinable(attn: Any) -> list[tuple[nn.Module, ...]]:
    """The layer's projections that read one input, in groups."""
    found: list[tuple[nn.Module, ...]] = []
    if attn.is_cross_attention or attn.only_cross_attention:
        found.append((attn.to_k, attn.to_v))
    else:
        found.append((attn.to_q, attn.to_k, attn.to_v))
    if getattr(attn, "add_k_proj", None) is not None:
        found.append((attn.add_k_proj, attn.add_v_proj))
    return [group for group in found if all(layer is not None for layer in group)]


def owns(processor: Any) -> bool:
    return isinstance(processor, A3FTAAttnProcessor)


def family(name: str, *holds: str, timesteps: Clock = steps) -> Family:
    return Family(name, holds, timesteps, processor_for=processor_for, owns=owns, joinable=joinable)


FAMILIES = (
    family("unet_condition", "UNet2DConditionModel", "ControlNetModel", "Kandinsky3UNet"),
    family("unet", "UNet2DModel"),
)
