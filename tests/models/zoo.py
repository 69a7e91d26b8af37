"""Small models of every family, by name."""

from __future__ import annotations

from . import (
    ace_step,
    allegro,
    audioldm2,
    cogvideox,
    cosmos,
    easyanimate,
    hunyuan_video,
    kandinsky5,
    ltx,
    mochi,
    pixart,
    sana_video,
    stable_audio,
    video_unet,
    wan,
)
from .small import Small

ZOO: dict[str, Small] = {
    **pixart.MODELS,
    **ace_step.MODELS,
    **allegro.MODELS,
    **audioldm2.MODELS,
    **cogvideox.MODELS,
    **cosmos.MODELS,
    **easyanimate.MODELS,
    **hunyuan_video.MODELS,
    **kandinsky5.MODELS,
    **ltx.MODELS,
    **mochi.MODELS,
    **sana_video.MODELS,
    **stable_audio.MODELS,
    **video_unet.MODELS,
    **wan.MODELS,
}
