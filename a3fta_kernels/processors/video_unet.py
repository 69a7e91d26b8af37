"""U-Nets of videos: blocks as the image U-Nets', and others that attend over the frames.

UNetMotionModel (AnimateDiff; its MotionAdapter alone), UNetSpatioTemporalConditionModel (Stable
Video Diffusion), UNet3DConditionModel (ModelScope, ZeroScope), I2VGenXLUNet. Attention is handed
over to `to_out[0]`, and the processors are those of the image U-Nets.
"""

from __future__ import annotations

from . import unet
from .clock import log_sigma

FAMILIES = (
    unet.family("unet_motion", "UNetMotionModel", "MotionAdapter"),
    unet.family("unet_spatio_temporal", "UNetSpatioTemporalConditionModel", timesteps=log_sigma),
    unet.family("unet_3d", "UNet3DConditionModel", "I2VGenXLUNet"),
)
