"""Small models of every family, by name."""

from __future__ import annotations

from . import (
    auraflow,
    bria,
    chroma,
    cogview,
    dit,
    flux1,
    flux2,
    hidream,
    hunyuan_dit,
    latte,
    longcat,
    lumina,
    omnigen,
    ovis,
    pixart,
    prx,
    qwen,
    sana,
    stable_diffusion_3,
    unet,
    z_image,
)
from .small import Small

ZOO: dict[str, Small] = {
    **unet.MODELS,
    **pixart.MODELS,
    **dit.MODELS,
    **latte.MODELS,
    **stable_diffusion_3.MODELS,
    **flux1.MODELS,
    **chroma.MODELS,
    **bria.MODELS,
    **longcat.MODELS,
    **ovis.MODELS,
    **flux2.MODELS,
    **auraflow.MODELS,
    **hunyuan_dit.MODELS,
    **lumina.MODELS,
    **sana.MODELS,
    **cogview.MODELS,
    **hidream.MODELS,
    **omnigen.MODELS,
    **qwen.MODELS,
    **z_image.MODELS,
    **prx.MODELS,
}
