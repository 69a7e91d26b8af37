"""The block of Z-Image in stages: attention over text and image as one stream, then a gated
feed-forward, each between two RMS norms.

    x1 = x0 + gate norm2(to_out(h)),   h of norm1(x0) * scale
    x2 = x1 + gate' ffn_norm2(w2(silu(w1 n) w3 n)),   n = ffn_norm1(x1) * scale'

The refiner of the text has no scales and gates. At level block the whole feed-forward is computed
again, as the norm behind it wants its output; at recompute all of it but w2.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import (
    FeedForward,
    ZImageTransformerBlock,
    ZSingleStreamAttnProcessor,
)
from torch import Tensor

from ..ops.rule import without_autocast
from .aside import Aside
from .compiled import compiled
from .modulated import heads
from .rebuild import Stage, Tensors, run
from .silu_gate import gate
from .swapping import LeanModule, drops, hooks_inside

# where scale and gate are among what is given to the stages, behind rotation and mask
_ATTENTION, _FEED_FORWARD = 2, 4

_stock: Any = ZImageTransformerBlock.forward


class LeanZImageTransformerBlock(LeanModule, ZImageTransformerBlock):
    """A block by stages; a call whose tokens have noise of their own goes to the stock forward."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        freqs_cis: Tensor | None,
        adaln_input: Tensor | None = None,
        noise_mask: Tensor | None = None,
        adaln_noisy: Tensor | None = None,
        adaln_clean: Tensor | None = None,
    ) -> Tensor:
        inputs: tuple[Any, ...] = (
            x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean
        )  # fmt: skip
        if not torch.is_grad_enabled():
            return _stock(self, *inputs)
        fits = noise_mask is None and freqs_cis is not None and why_not(self) is None
        if torch.compiler.is_compiling():
            return compiled(_stock, LeanZImageTransformerBlock._by_stages, self, inputs, fits)
        if not fits or drops(self):
            return _stock(self, *inputs)
        return self._by_stages(*inputs)

    def _by_stages(
        self, x: Tensor, attn_mask: Tensor | None, freqs_cis: Tensor,
        adaln_input: Tensor | None = None, *_: Any,
    ) -> Tensor:  # fmt: skip
        # a tensor stands for the mask where there is none
        given: Tensors = (freqs_cis, x.new_empty(0) if attn_mask is None else attn_mask)
        if self.modulation:
            made = self.adaLN_modulation(adaln_input).unsqueeze(1)
            scale, gated, scale_ffn, gated_ffn = made.chunk(4, dim=2)
            given += (1 + scale, gated.tanh(), 1 + scale_ffn, gated_ffn.tanh())
        whole = self.settings.level == "block"
        stages = [self._attention_stage(attn_mask is not None), self._feed_forward_stage(whole)]
        (y,) = run(stages, (x,), given, self.settings)
        return y

    def _read(self, norm: Any, x: Tensor, given: Tensors, at: int) -> Tensor:
        return norm(x) * given[at] if self.modulation else norm(x)

    def _add(self, x: Tensor, y: Tensor, given: Tensors, at: int) -> Tensor:
        return x + given[at + 1] * y if self.modulation else x + y

    def _attention_stage(self, masked: bool) -> Stage:
        attn: Any = self.attention

        def read(state: Tensors, given: Tensors) -> Tensor:
            return self._read(self.attention_norm1, state[0], given, _ATTENTION)

        def head(state: Tensors, given: Tensors) -> Tensors:
            n = read(state, given)
            query = heads(attn.to_q, attn.norm_q, n, self.head_dim)
            key = heads(attn.to_k, attn.norm_k, n, self.head_dim)
            value = heads(attn.to_v, None, n, self.head_dim)
            return _rotated(query, given[0]), _rotated(key, given[0]), value

        def core(parts: Tensors, given: Tensors) -> Tensors:
            mask = given[1] if masked else None
            if mask is not None and mask.ndim == 2:
                mask = mask[:, None, None, :]
            query, key, value = parts
            backend = attn.processor._attention_backend
            h = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)
            return (h.flatten(2).to(query.dtype),)

        def tail(outs: Tensors, state: Tensors, given: Tensors) -> Tensors:
            y = attn.to_out[1](aside.project(attn.to_out[0], outs[0], outs))
            return (self._add(state[0], self.attention_norm2(y), given, _ATTENTION),)

        aside = Aside((attn.to_out[0], read))
        reads = [m for name, m in attn.named_children() if name != "to_out"]
        writes = (attn.to_out, self.attention_norm2)
        return Stage(head, core, tail, (self.attention_norm1, *reads), writes, aside, aside.modules)

    def _feed_forward_stage(self, whole: bool) -> Stage:
        """`whole`: up to the norm behind it is the head, so that nothing of it is kept."""
        ff: Any = self.feed_forward

        def wide(state: Tensors, given: Tensors) -> Tensors:
            n = self._read(self.ffn_norm1, state[0], given, _FEED_FORWARD)
            return ff.w1(n), ff.w3(n)

        def head(state: Tensors, given: Tensors) -> Tensors:
            parts = wide(state, given)
            return (self.ffn_norm2(ff.w2(gate(*parts))),) if whole else parts

        def core(parts: Tensors, given: Tensors) -> Tensors:
            return parts if whole else (ff.w2(gate(*parts)),)

        def tail(outs: Tensors, state: Tensors, given: Tensors) -> Tensors:
            y = outs[0] if whole else self.ffn_norm2(outs[0])
            return (self._add(state[0], y, given, _FEED_FORWARD),)

        reads = (self.ffn_norm1, ff, self.ffn_norm2)
        return Stage(head, core, tail, reads, () if whole else (self.ffn_norm2,))


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """x (B, L, H, D), its pairs of channels turned by rotation (B, L, D / 2), which is complex."""
    with without_autocast(x):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * rotation.unsqueeze(2)).flatten(3).type_as(x)


def why_not(block: Any) -> str | None:
    """Why the block cannot be computed in stages; None where it can."""
    attn: Any = block.attention
    processor: Any = attn.processor
    kind = type(processor)
    if type(attn) is not Attention or kind is not ZSingleStreamAttnProcessor:
        return f"its attention processor is a {kind.__name__}"
    if attn.fused_projections:
        return "its projections are fused"
    if processor._parallel_config is not None:
        return "its attention is spread over devices"
    if not isinstance(block.feed_forward, FeedForward):
        return f"its feed-forward is a {type(block.feed_forward).__name__}"
    return hooks_inside(block)
