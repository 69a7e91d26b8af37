"""Latte: blocks of a U-Net's kind, over the tokens of a frame and over the frames of a token."""

from __future__ import annotations

from . import unet

FAMILY = unet.family("latte", "LatteTransformer3DModel")
