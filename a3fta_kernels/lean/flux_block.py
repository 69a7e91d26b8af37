"""The blocks of Flux in stages.

Dual blocks have a stream of the image and one of the text, as SD3's; text comes first in
attention, and q and k are rotated by position. Single blocks have one stream of both:

    y = s + gate proj_out([attention(q, k, v) | gelu(proj_mlp(n))]),  n = modulated norm of s
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor

from . import feed_forward
from .aside import Aside
from .compiled import compiled
from .modulated import clipped, feed_forward_stage, heads, modulations, reader
from .rebuild import Stage, Tensors, run
from .swapping import LeanModule, drops, hooks_inside

# where the chunks of the modulations begin among what is given to the stages; rotations are last
_IMAGE, _TEXT = 0, 6


class LeanFluxBlock(LeanModule):
    """What the two kinds share: a call with a rotation and nothing else goes by stages, any other
    to the stock forward.
    """

    _stock: Any

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        inputs = (
            hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )  # fmt: skip
        stock = type(self)._stock
        if not torch.is_grad_enabled():
            return stock(self, *inputs)
        rotates = isinstance(image_rotary_emb, tuple)
        fits = rotates and not joint_attention_kwargs and why_not(self) is None
        if torch.compiler.is_compiling():
            return compiled(stock, type(self)._by_stages, self, inputs, fits)
        if not fits or drops(self):
            return stock(self, *inputs)
        return self._by_stages(*inputs)

    def _by_stages(
        self, x: Tensor, c: Tensor, temb: Tensor, rotation: Any, *_: Any
    ) -> tuple[Tensor, Tensor]:
        """(text, image), as the stock forward returns them."""
        raise NotImplementedError


class LeanFluxTransformerBlock(LeanFluxBlock, FluxTransformerBlock):
    """A dual block."""

    _stock = FluxTransformerBlock.forward

    def _by_stages(
        self, x: Tensor, c: Tensor, temb: Tensor, rotation: Any, *_: Any
    ) -> tuple[Tensor, Tensor]:
        given = (
            *modulations(self.norm1, temb, 6), *modulations(self.norm1_context, temb, 6), *rotation
        )  # fmt: skip
        feed_forwards = feed_forward_stage(
            [
                (self.norm2, self.ff, _IMAGE + 3),
                (self.norm2_context, self.ff_context, _TEXT + 3),
            ]
        )
        x, c = run([self._attention_stage(), feed_forwards], (x, c), given, self.settings)
        return clipped(c), x

    def _attention_stage(self) -> Stage:
        attn = self.attn

        image = reader(self.norm1.norm, 0, _IMAGE)
        text = reader(self.norm1_context.norm, 1, _TEXT)

        def head(state: Tensors, given: Tensors) -> Tensors:
            n, m = image(state, given), text(state, given)
            d = attn.head_dim
            query = torch.cat(
                (
                    heads(attn.add_q_proj, attn.norm_added_q, m, d),
                    heads(attn.to_q, attn.norm_q, n, d),
                ),
                dim=1,
            )
            key = torch.cat(
                (
                    heads(attn.add_k_proj, attn.norm_added_k, m, d),
                    heads(attn.to_k, attn.norm_k, n, d),
                ),
                dim=1,
            )
            value = torch.cat(
                (heads(attn.add_v_proj, None, m, d), heads(attn.to_v, None, n, d)), dim=1
            )
            return _rotated(query, given), _rotated(key, given), value

        def core(parts: Tensors, given: Tensors) -> Tensors:
            return (_attention(attn, *parts),)

        def tail(outs: Tensors, state: Tensors, given: Tensors) -> Tensors:
            x, c = state
            tokens = c.shape[1]
            y = aside.project(attn.to_out[0], outs[0][:, tokens:].contiguous(), outs)
            after = x + given[_IMAGE + 2] * y
            y = aside.project(attn.to_add_out, outs[0][:, :tokens].contiguous(), outs)
            return after, c + given[_TEXT + 2] * y

        aside = Aside((attn.to_out[0], image), (attn.to_add_out, text))
        children = list(attn.named_children())
        reads = [m for name, m in children if name not in ("to_out", "to_add_out")]
        writes = [m for name, m in children if name in ("to_out", "to_add_out")]
        norms = (self.norm1.norm, self.norm1_context.norm)
        return Stage(head, core, tail, (*norms, *reads), writes, aside, aside.modules)


class LeanFluxSingleTransformerBlock(LeanFluxBlock, FluxSingleTransformerBlock):
    """A single block: one stage."""

    _stock = FluxSingleTransformerBlock.forward

    def _by_stages(
        self, x: Tensor, c: Tensor, temb: Tensor, rotation: Any, *_: Any
    ) -> tuple[Tensor, Tensor]:
        tokens = c.shape[1]
        given = (*modulations(self.norm, temb, 3), *rotation)
        (y,) = run([self._stage()], (torch.cat([c, x], dim=1),), given, self.settings)
        y = clipped(y)
        return y[:, :tokens], y[:, tokens:]

    def _stage(self) -> Stage:
        attn = self.attn

        read = reader(self.norm.norm, 0, 0)

        def head(state: Tensors, given: Tensors) -> Tensors:
            n = read(state, given)
            query = heads(attn.to_q, attn.norm_q, n, attn.head_dim)
            key = heads(attn.to_k, attn.norm_k, n, attn.head_dim)
            value = heads(attn.to_v, None, n, attn.head_dim)
            return _rotated(query, given), _rotated(key, given), value, self.proj_mlp(n)

        def core(parts: Tensors, given: Tensors) -> Tensors:
            return _attention(attn, *parts[:3]), self.act_mlp(parts[3])

        def tail(outs: Tensors, state: Tensors, given: Tensors) -> Tensors:
            y = aside.project(self.proj_out, torch.cat(outs[:2], dim=2), outs)
            return (state[0] + given[2] * y,)

        aside = Aside((self.proj_out, read))
        reads = (self.norm.norm, attn, self.proj_mlp)
        return Stage(head, core, tail, reads, (self.proj_out,), aside, aside.modules)


def _rotated(x: Tensor, given: Tensors) -> Tensor:
    rotate: Any = apply_rotary_emb
    return rotate(x, (given[-2], given[-1]), sequence_dim=1)


def _attention(attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, L, H, D) each -> (B, L, H * D), by the kernel that diffusers is told to use."""
    backend = attn.processor._attention_backend
    h = dispatch_attention_fn(query, key, value, backend=backend)
    return h.flatten(2).to(query.dtype)


def why_not(block: Any) -> str | None:
    """Why the block cannot be computed in stages; None where it can."""
    attn: Any = block.attn
    processor: Any = attn.processor
    kind = type(processor)
    if type(attn) is not FluxAttention or kind is not FluxAttnProcessor:
        return f"its attention processor is a {kind.__name__}"
    if getattr(attn, "fused_projections", False):
        return "its projections are fused"
    if processor._parallel_config is not None:
        return "its attention is spread over devices"
    reason = hooks_inside(block)
    if reason is not None or isinstance(block, FluxSingleTransformerBlock):
        return reason
    return feed_forward.why_not(block.ff) or feed_forward.why_not(block.ff_context)
