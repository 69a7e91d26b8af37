"""Printed glyphs of the text fonts that matplotlib ships, drawn into a target's frame.

A glyph is cropped and scaled to the frame, varied in shift, scale, shear, rotation and stroke
width, drawn as a bitmap, and counted in blocks of `Frame.block`: the way scikit-learn's
handwritten digits were scanned (32 x 32 bitmaps in blocks of 4 x 4, so 8 x 8 pixels of 0 to 16).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# text fonts only: matplotlib's symbol fonts hold other shapes under the codes of letters
_SANS = (
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf",
)  # fmt: skip
_DEJAVU = (
    *_SANS,
    "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-Oblique.ttf", "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf",
)  # fmt: skip
_STIX = (
    "STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf",
)  # fmt: skip
_COMPUTER_MODERN = (
    "cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmtt10.ttf", "cmti10.ttf", "cmmi10.ttf",
)  # fmt: skip


def _letters(*spans: tuple[int, int], without: str = "") -> str:
    found = (chr(code) for first, last in spans for code in range(first, last + 1))
    return "".join(c for c in found if c not in without)


@dataclass(frozen=True)
class Script:
    characters: str
    fonts: tuple[str, ...]  # those that have all of its characters


SCRIPTS = {
    "digits": Script("0123456789", _DEJAVU + _STIX + _COMPUTER_MODERN),
    "latin": Script(_letters((0x41, 0x5A), (0x61, 0x7A)), _DEJAVU + _STIX + _COMPUTER_MODERN),
    "cyrillic": Script(_letters((0x410, 0x44F)), _DEJAVU + _STIX),
    "greek": Script(_letters((0x391, 0x3A9), (0x3B1, 0x3C9), without="\u03a2"), _DEJAVU + _STIX),
    "armenian": Script(_letters((0x531, 0x556), (0x561, 0x586)), _DEJAVU),
    "georgian": Script(_letters((0x10D0, 0x10F0)), _DEJAVU),
    # the vowels and their series of p, t, k: a letter each, without the combining finals
    "canadian": Script(
        _letters((0x1401, 0x1406), (0x142F, 0x1434), (0x144C, 0x1451), (0x146B, 0x1470)), _SANS
    ),
}


@dataclass(frozen=True)
class Frame:
    """side: of an image, in pixels; block: bits per pixel and direction; canvas: of the glyph
    before it is varied; height: what the glyph fills of the canvas, by its longer side."""

    side: int = 8
    block: int = 4
    canvas: int = 96
    height: int = 64


def render(script: Script, frame: Frame) -> tuple[Tensor, Tensor]:
    """Every character of every font, scaled to the frame.

    Returns:
        (fonts * characters, 1, canvas, canvas) in 0..1, and the characters' indices.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images, labels = [], []
    for name in script.fonts:
        font = ImageFont.truetype(str(folder / name), 160)
        for label, character in enumerate(script.characters):
            page = Image.new("L", (400, 400), 0)
            ImageDraw.Draw(page).text((80, 60), character, font=font, fill=255)
            glyph = page.crop(page.getbbox())
            scale = frame.height / max(glyph.size)
            width, height = (max(1, round(side * scale)) for side in glyph.size)
            glyph = glyph.resize((width, height), Image.Resampling.LANCZOS)
            canvas = Image.new("L", (frame.canvas, frame.canvas), 0)
            canvas.paste(glyph, ((frame.canvas - width) // 2, (frame.canvas - height) // 2))
            images.append(np.asarray(canvas, dtype=np.float32) / 255)
            labels.append(label)
    return torch.from_numpy(np.stack(images))[:, None], torch.tensor(labels)


def soften(glyphs: Tensor, frame: Frame) -> Tensor:
    """Blurred, so that a threshold thins or thickens their strokes: what `vary` takes."""
    reach = frame.canvas // 48
    return F.avg_pool2d(glyphs, 2 * reach + 1, stride=1, padding=reach)


def vary(soft: Tensor, frame: Frame, generator: torch.Generator) -> Tensor:
    """(B, 1, side, side) in -1..1, of block * block + 1 grey levels: one variation of each."""
    size = len(soft)

    def draw(low: float, high: float) -> Tensor:
        return torch.empty(size).uniform_(low, high, generator=generator)

    angle, shear = draw(-0.12, 0.12), draw(-0.2, 0.2)
    wide, tall = draw(0.75, 1.1), draw(0.96, 1.04)
    # theta maps the bitmap's coordinates to the canvas's: the inverse of what the glyph does
    zoom = frame.height / frame.canvas
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([cos * zoom / wide, (shear + sin) * zoom, draw(-0.06, 0.06)], 1),
            torch.stack([-sin * zoom, cos * zoom / tall, draw(-0.03, 0.03)], 1),
        ],
        1,
    )
    scan = frame.side * frame.block
    grid = F.affine_grid(theta, [size, 1, scan, scan], align_corners=False)
    bitmap = F.grid_sample(soft, grid, align_corners=False) > draw(0.2, 0.5).view(-1, 1, 1, 1)
    return F.avg_pool2d(bitmap.float(), frame.block) * 2 - 1


def batch(
    soft: Tensor, labels: Tensor, size: int, frame: Frame, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`size` varied glyphs, drawn with replacement, and their characters."""
    index = torch.randint(len(soft), (size,), generator=generator)
    return vary(soft[index], frame, generator), labels[index]
