"""JointTransformerBlock (SD3, SD3.5) in stages: attention of image and text together, then one
feed-forward each.

    x1 = x0 + gate_x to_out(h_x),      c1 = c0 + gate_c to_add_out(h_c),  h of modulated norms
    x2 = x1 + gate_x' ff(norm2(x1)),   c2 = c1 + gate_c' ff_context(norm2_context(c1))

SD3.5's image stream has a second attention beside the first; the last block leaves the text.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn

from . import feed_forward
from .aside import Aside
from .compiled import compiled
from .modulated import feed_forward_stage, heads, modulations, reader
from .rebuild import Reader, Stage, Tensors, run
from .swapping import LeanModule, drops, hooks_inside

# where the chunks of the modulations begin among what is given to the stages
_IMAGE, _TEXT = 0, 9


_stock: Any = JointTransformerBlock.forward


class LeanJointTransformerBlock(LeanModule, JointTransformerBlock):
    """A joint block by stages; any other call goes to the stock forward."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Any, Tensor]:
        inputs = (hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        if not torch.is_grad_enabled():
            return _stock(self, *inputs)
        fits = not joint_attention_kwargs and why_not(self) is None
        if torch.compiler.is_compiling():
            return compiled(_stock, LeanJointTransformerBlock._by_stages, self, inputs, fits)
        if not fits or drops(self):
            return _stock(self, *inputs)
        return self._by_stages(*inputs)

    def _by_stages(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *_: Any
    ) -> tuple[Any, Tensor]:
        image = modulations(self.norm1, temb, 9 if self.use_dual_attention else 6)
        blank = (temb.new_empty(0),) * (_TEXT - len(image))
        if self.context_pre_only:
            scale, shift = modulations(self.norm1_context, temb, 2)
            given = (*image, *blank, shift, scale)
        else:
            given = (*image, *blank, *modulations(self.norm1_context, temb, 6))
        branches: list[tuple[Any, Any, int]] = [(self.norm2, self.ff, _IMAGE + 3)]
        if not self.context_pre_only:
            branches.append((self.norm2_context, self.ff_context, _TEXT + 3))
        stages = [self._attention_stage(), feed_forward_stage(branches)]
        x, c = run(stages, (hidden_states, encoder_hidden_states), given, self.settings)
        return None if self.context_pre_only else c, x

    def _attention_stage(self) -> Stage:
        attn, second = self.attn, self.attn2

        image = reader(self.norm1.norm, 0, _IMAGE)
        text = reader(self.norm1_context.norm, 1, _TEXT)
        image_again = reader(self.norm1.norm, 0, _IMAGE + 6)

        def head(state: Tensors, given: Tensors) -> Tensors:
            n, m = image(state, given), text(state, given)
            parts = [
                torch.cat(pair, dim=1) for pair in zip(_image(attn, n), _text(attn, m), strict=True)
            ]
            if second is not None:
                parts += _image(second, image_again(state, given))
            return tuple(parts)

        def core(parts: Tensors, given: Tensors) -> Tensors:
            return tuple(_attention(*parts[i : i + 3]) for i in range(0, len(parts), 3))

        def tail(outs: Tensors, state: Tensors, given: Tensors) -> Tensors:
            x, c = state
            tokens = x.shape[1]
            # in the order of the stock forward, by which adapters draw random numbers
            if not self.context_pre_only:
                y = aside.project(attn.to_add_out, outs[0][:, tokens:], outs)
                c = c + given[_TEXT + 2] * y
            y = aside.project(attn.to_out[0], outs[0][:, :tokens], outs)
            after = x + given[_IMAGE + 2] * y
            if second is not None:
                after = after + given[8] * aside.project(second.to_out[0], outs[1], outs)
            return after, c

        readers: list[tuple[nn.Module, Reader]] = (
            [] if self.context_pre_only else [(attn.to_add_out, text)]
        )
        readers.append((attn.to_out[0], image))
        if second is not None:
            readers.append((second.to_out[0], image_again))
        aside = Aside(*readers)

        layers = [attn] if second is None else [attn, second]
        children = [(n, m) for layer in layers for n, m in layer.named_children()]
        reads = [m for name, m in children if name not in ("to_out", "to_add_out")]
        writes = [m for name, m in children if name in ("to_out", "to_add_out")]
        norms = (self.norm1.norm, self.norm1_context.norm)
        return Stage(head, core, tail, (*norms, *reads), writes, aside, aside.modules)


def _image(attn: Attention, x: Tensor) -> Tensors:
    """q, k, v (B, L, H, D) of the image."""
    head_dim = attn.inner_dim // attn.heads
    return (
        heads(attn.to_q, attn.norm_q, x, head_dim),
        heads(attn.to_k, attn.norm_k, x, head_dim),
        heads(attn.to_v, None, x, head_dim),
    )


def _text(attn: Attention, c: Tensor) -> Tensors:
    head_dim = attn.inner_dim // attn.heads
    return (
        heads(attn.add_q_proj, attn.norm_added_q, c, head_dim),
        heads(attn.add_k_proj, attn.norm_added_k, c, head_dim),
        heads(attn.add_v_proj, None, c, head_dim),
    )


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, L, H, D) each -> (B, L, H * D)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def why_not(block: Any) -> str | None:
    """Why the block cannot be computed in stages; None where it can."""
    if block._chunk_size is not None:
        return "its feed-forward is computed in chunks"
    for attn in (block.attn, block.attn2):
        if attn is not None and type(attn.get_processor()) is not JointAttnProcessor2_0:
            return f"its attention processor is a {type(attn.get_processor()).__name__}"
    reason = feed_forward.why_not(block.ff)
    if reason is None and not block.context_pre_only:
        reason = feed_forward.why_not(block.ff_context)
    return reason or hooks_inside(block)
