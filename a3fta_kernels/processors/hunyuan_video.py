"""HunyuanVideo, its image-to-video and FramePack kinds; HunyuanVideo 1.5; HunyuanImage 2.1.

Dual blocks hand over the video's attention to `attn.to_out[0]`, the text's to `attn.to_add_out`;
single blocks, which 1.5 does not have, to the first columns of the block's `proj_out`. The blocks
that refine the text's embedding have a `to_out[0]` as well.
"""

from __future__ import annotations

from . import flux
from .clock import steps
from .family import Family

FAMILIES = (
    flux.family(
        "hunyuan_video",
        steps,
        "HunyuanVideoTransformerBlock",
        "HunyuanVideoSingleTransformerBlock",
        "HunyuanVideoTokenReplaceTransformerBlock",
        "HunyuanVideoTokenReplaceSingleTransformerBlock",
    ),
    Family("hunyuan_video15", ("HunyuanVideo15TransformerBlock",), steps),
    flux.family(
        "hunyuan_image", steps, "HunyuanImageTransformerBlock", "HunyuanImageSingleTransformerBlock"
    ),
)
