"""PixArt, alpha and sigma: blocks of a U-Net's kind, without the U-Net."""

from __future__ import annotations

from . import unet

FAMILY = unet.family("pixart", "PixArtTransformer2DModel")
