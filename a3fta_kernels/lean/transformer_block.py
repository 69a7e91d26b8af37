"""BasicTransformerBlock in stages: self-attention, cross-attention, feed-forward.

    x1 = x0 + to_out(attention(q, k, v of norm1(x0)))
    x2 = x1 + to_out(attention(q of norm2(x1); k, v of the text))
    x3 = x2 + W2 (hidden * gelu(gate)),  hidden, gate of W1 norm3(x2)

recompute   kept: x0, x1, x2 and both attention outputs; q, k, v, hidden and gate are computed
            again from the normalised stream.
block       kept: x0 and both attention outputs; x1 and x2 are computed again by the output
            projections, which add the residual in the same op.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..processors.unet import A3FTAAttnProcessor, processor_for
from . import feed_forward
from .aside import Aside
from .compiled import compiled
from .rebuild import Stage, Tensors, run
from .swapping import LeanModule, drops, hooks_inside

_stock: Any = BasicTransformerBlock.forward


class LeanTransformerBlock(LeanModule, BasicTransformerBlock):
    """A transformer block with LayerNorms, by stages; any other call goes to the stock forward."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        inputs = (
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            timestep, cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
        if not torch.is_grad_enabled():
            return _stock(self, *inputs)
        fits = (
            all(key == "scale" for key in cross_attention_kwargs or ())
            and hidden_states.dim() == 3
            and why_not(self) is None
        )
        if torch.compiler.is_compiling():
            return compiled(_stock, LeanTransformerBlock._by_stages, self, inputs, fits)
        if not fits or drops(self):
            return _stock(self, *inputs)
        return self._by_stages(*inputs)

    def _by_stages(
        self, hidden_states: Tensor, attention_mask: Tensor | None, text: Tensor | None,
        text_mask: Tensor | None, *_: Any,
    ) -> Tensor:  # fmt: skip
        given: list[Tensor] = []
        stages = [
            _attention(
                self.norm1, self.attn1, text if self.only_cross_attention else None,
                attention_mask, hidden_states, given,
            )
        ]  # fmt: skip
        if self.attn2 is not None:
            stages.append(_attention(self.norm2, self.attn2, text, text_mask, hidden_states, given))
        stages.append(_feed_forward(self.norm3, self.ff))
        return run(stages, (hidden_states,), tuple(given), self.settings)[0]


def _attention(
    norm: nn.Module, attn: Attention, text: Tensor | None, mask: Tensor | None, x: Tensor,
    given: list[Tensor],
) -> Stage:  # fmt: skip
    """Appends what it reads beside the stream to `given`."""
    processor = _processor(attn)
    assert processor is not None
    if mask is not None:
        source = x if text is None else text
        mask = attn.prepare_attention_mask(mask, source.shape[1], source.shape[0])
    text_at, mask_at = (_place(t, given) for t in (text, mask))

    def head(state: Tensors, given: Tensors) -> Tensors:
        return processor.project(attn, norm(state[0]), _at(given, text_at))

    def core(parts: Tensors, given: Tensors) -> Tensors:
        query, key, value = parts
        return (processor.attend(attn, query, key, value, _at(given, mask_at)),)

    def tail(outs: Tensors, state: Tensors, given: Tensors) -> Tensors:
        return (aside.project(attn.to_out[0], outs[0], outs, residual=state[0]),)

    aside = Aside((attn.to_out[0], lambda state, given: norm(state[0])), onto=0)
    reads = [m for name, m in attn.named_children() if not name.startswith("to_out")]
    return Stage(head, core, tail, (norm, *reads), (attn.to_out[0],), aside, aside.modules)


def _feed_forward(norm: nn.Module, ff: Any) -> Stage:
    def head(state: Tensors, given: Tensors) -> Tensors:
        return (feed_forward.widen(ff, norm(state[0])),)

    def core(parts: Tensors, given: Tensors) -> Tensors:
        return (feed_forward.activate(ff, parts[0]),)

    def tail(outs: Tensors, state: Tensors, given: Tensors) -> Tensors:
        return (feed_forward.narrow(ff, outs[0]) + state[0],)

    return Stage(head, core, tail, (norm, ff.net[0]), tuple(ff.net[1:]))


def _place(x: Tensor | None, given: list[Tensor]) -> int | None:
    if x is None:
        return None
    given.append(x)
    return len(given) - 1


def _at(given: Tensors, index: int | None) -> Tensor | None:
    return None if index is None else given[index]


def _processor(attn: Attention) -> A3FTAAttnProcessor | None:
    """Ours, or ours in place of a stock one; None of one that is not known."""
    current = attn.get_processor()
    ours = current if isinstance(current, A3FTAAttnProcessor) else processor_for(current)
    # subclasses compute more than attention
    return ours if type(ours).__call__ is A3FTAAttnProcessor.__call__ else None


def why_not(block: Any) -> str | None:
    """Why the block cannot be computed in stages; None where it can."""
    if block.norm_type != "layer_norm":
        return f"its norms are of kind {block.norm_type!r}"
    if block.pos_embed is not None:
        return "it adds positional embeddings"
    if block._chunk_size is not None:
        return "its feed-forward is computed in chunks"
    for attn in (block.attn1, block.attn2):
        reason = None if attn is None else _why_not_attention(attn)
        if reason is not None:
            return reason
    return feed_forward.why_not(block.ff) or hooks_inside(block)


def _why_not_attention(attn: Attention) -> str | None:
    if _processor(attn) is None:
        return f"its attention processor is a {type(attn.get_processor()).__name__}"
    for name in ("spatial_norm", "group_norm"):
        if getattr(attn, name, None) is not None:
            return f"its attention has a {name}"
    if attn.residual_connection or attn.rescale_output_factor != 1:
        return "its attention adds a residual of its own"
    return None
