"""GEGLU: the activation keeps its input alone, and computes gelu(gate) again."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU
from torch import Tensor

from .. import ops
from .swapping import LeanModule


class LeanGEGLU(LeanModule, GEGLU):
    """hidden * gelu(gate) by `ops.geglu`; the projection before it is called as it is."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return ops.geglu(self.proj(hidden_states), keep=self.settings.activations)
