"""The feed-forward of a transformer block, in the parts of a stage."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from .. import ops


def why_not(feed_forward: nn.Module) -> str | None:
    if not isinstance(feed_forward, FeedForward):
        return f"its feed-forward is a {type(feed_forward).__name__}"
    first = feed_forward.net[0]
    if not isinstance(first, (GEGLU, GELU)):
        return f"its activation is a {type(first).__name__}"
    return None


def widen(feed_forward: Any, x: Tensor) -> Tensor:
    """What the activation reads: computed again in the backward."""
    return feed_forward.net[0].proj(x)


def activate(feed_forward: Any, p: Tensor) -> Tensor:
    first = feed_forward.net[0]
    return ops.geglu(p) if isinstance(first, GEGLU) else first.gelu(p)


def narrow(feed_forward: Any, x: Tensor) -> Tensor:
    for module in feed_forward.net[1:]:
        x = module(x)
    return x
