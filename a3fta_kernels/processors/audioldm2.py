"""AudioLDM 2: blocks of a U-Net's kind, beside each other for each of its text encoders.

Its U-Net class is part of diffusers' pipeline. Attention is handed over to `to_out[0]`, and the
processors are those of the image U-Nets.
"""

from __future__ import annotations

from . import unet

FAMILY = unet.family("audioldm2", "AudioLDM2UNet2DConditionModel")
