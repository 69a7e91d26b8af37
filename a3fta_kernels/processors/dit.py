"""DiT: blocks of a U-Net's kind with self-attention alone, on classes."""

from __future__ import annotations

from . import unet

FAMILY = unet.family("dit", "DiTTransformer2DModel")
