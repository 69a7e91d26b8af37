"""Z-Image and its ControlNet: `attention.to_out[0]`, in the refiners of image and text too."""

from __future__ import annotations

from .clock import share_left
from .family import Family

FAMILY = Family("z_image", ("ZImageTransformerBlock",), share_left)
