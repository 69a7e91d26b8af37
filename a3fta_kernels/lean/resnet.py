"""Residual blocks of a U-Net: GroupNorm and SiLU are one op that keeps its input."""

from __future__ import annotations

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .. import ops
from ..forwards import has_hooks
from .swapping import LeanModule, trains


class LeanResnetBlock2D(LeanModule, ResnetBlock2D):
    """ResnetBlock2D, of which stays:

        h = conv1(resample(silu(norm1(x)))) + time_emb_proj(silu(temb))
        y = (shortcut(resample(x)) + conv2(silu(norm2(h)))) / output_scale_factor

    kept for the backward: x and h, with their groups' statistics.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        norms = self.norm1, self.norm2
        if args or kwargs or trains(*norms) or any(has_hooks(norm) for norm in norms):
            return ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)
        x = input_tensor
        h = self._norm_silu(self.norm1, x)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            if self.upsample is not None and h.shape[0] >= 64:
                # interpolation of large channels-last batches fails in the library
                x, h = x.contiguous(), h.contiguous()
            x, h = resample(x), resample(h)
        h = self.conv1(h)
        if self.time_emb_proj is not None:
            temb = temb if self.skip_time_act else self.nonlinearity(temb)
            temb = self.time_emb_proj(temb)[:, :, None, None]
        if self.time_embedding_norm == "default" and temb is not None:
            h = h + temb
        h = self.conv2(self.dropout(self._norm_silu(self.norm2, h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        y = x + h
        return y if self.output_scale_factor == 1 else y / self.output_scale_factor

    def _norm_silu(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        return ops.group_norm(
            x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, activation="silu",
            keep=self.settings.norms,
        )  # fmt: skip


def why_not(block: Any) -> str | None:
    if not isinstance(block.nonlinearity, nn.SiLU):
        return f"its activation is {type(block.nonlinearity).__name__}"
    if block.time_embedding_norm != "default":
        return f"its time embedding is of kind {block.time_embedding_norm!r}"
    for norm in (block.norm1, block.norm2):
        if not isinstance(norm, nn.GroupNorm):
            return f"its norm is a {type(norm).__name__}"
        if has_hooks(norm):
            return "its norms carry hooks"
    return "its norms train" if trains(block.norm1, block.norm2) else None
