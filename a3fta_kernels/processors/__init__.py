"""Processors: strategies that compute attention and hand its output to the projection.

They own no parameters. One file per family of models; `FAMILIES` in the order they are asked.
"""

from __future__ import annotations

from torch import nn

from . import (
    ace_step,
    allegro,
    audioldm2,
    auraflow,
    bria,
    chroma,
    cogvideox,
    cogview,
    cosmos,
    dit,
    easyanimate,
    flux,
    flux2,
    hidream,
    hunyuan_dit,
    hunyuan_video,
    kandinsky5,
    latte,
    longcat,
    ltx,
    lumina,
    mochi,
    omnigen,
    ovis,
    pixart,
    prx,
    qwen,
    sana,
    sana_video,
    sd3,
    stable_audio,
    structure,
    unet,
    video_unet,
    wan,
    z_image,
)
from .family import Family, Site, class_names, processor_of
from .unet import A3FTAAttnAddedKVProcessor, A3FTAAttnProcessor, A3FTAFusedAttnProcessor

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *unet.FAMILIES,
        pixart.FAMILY,
        dit.FAMILY,
        latte.FAMILY,
        sd3.FAMILY,
        flux.FAMILY,
        chroma.FAMILY,
        bria.FAMILY,
        longcat.FAMILY,
        ovis.FAMILY,
        flux2.FAMILY,
        auraflow.FAMILY,
        hunyuan_dit.FAMILY,
        lumina.FAMILY,
        sana.FAMILY,
        cogview.FAMILY,
        hidream.FAMILY,
        omnigen.FAMILY,
        qwen.FAMILY,
        z_image.FAMILY,
        prx.FAMILY,
        ace_step.FAMILY,
        allegro.FAMILY,
        audioldm2.FAMILY,
        cogvideox.FAMILY,
        cosmos.FAMILY,
        easyanimate.FAMILY,
        *hunyuan_video.FAMILIES,
        kandinsky5.FAMILY,
        *ltx.FAMILIES,
        mochi.FAMILY,
        sana_video.FAMILY,
        stable_audio.FAMILY,
        *video_unet.FAMILIES,
        wan.FAMILY,
        structure.FAMILY,
    )
}


def family_of(model: nn.Module) -> Family:
    """The first family that the model belongs to; the last one, by structure, takes any."""
    names = class_names(model)
    found = (f for f in FAMILIES.values() if not names.isdisjoint(f.holds))
    return next(found, structure.FAMILY)


__all__ = [
    "FAMILIES",
    "A3FTAAttnAddedKVProcessor",
    "A3FTAAttnProcessor",
    "A3FTAFusedAttnProcessor",
    "Family",
    "Site",
    "family_of",
    "processor_of",
]
