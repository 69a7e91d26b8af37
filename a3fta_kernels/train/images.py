"""An image file's bytes as pixels to train on: upright, RGB (or gray), whole, and one frame.

What cannot be used raises `Unusable` with the reason; what was changed on the way is noted.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# by content, whatever the file is called; not all of PIL's, some of which start other programs
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_GRAY = ("1", "L", "LA", "F")
_MODES = {1: "L", 3: "RGB"}


class Unusable(Exception):
    """The message is the reason why this image is left out."""


def decode(blob: bytes, channels: int) -> tuple[Image.Image, tuple[str, ...]]:
    """The image of mode "RGB" (channels = 3) or "L" (channels = 1), and what was done to it.

    Everything is decoded: a file that is cut off or damaged does not pass.
    """
    if not blob:
        raise Unusable("an empty file")
    with warnings.catch_warnings():
        # of odd metadata, and of large photos; what is too large raises
        warnings.simplefilter("ignore")
        try:
            return _decode(blob, channels)
        except UnidentifiedImageError as error:
            known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
            raise Unusable(f"expected a {known} image, found none in the file") from error
        except Image.DecompressionBombError as error:
            raise Unusable(f"too large: {error}") from error
        except (Unusable, MemoryError):
            raise
        except Exception as error:  # damaged bytes make decoders raise anything
            raise Unusable(f"damaged: {error or type(error).__name__}") from error


def _decode(blob: bytes, channels: int) -> tuple[Image.Image, tuple[str, ...]]:
    opened = Image.open(io.BytesIO(blob), formats=FORMATS)
    # cameras write JPEGs with a preview or a depth map behind the photo, which PIL calls MPO
    frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
    if frames > 1:
        raise Unusable(f"{frames} frames or pages: expected a still image")
    opened.load()
    notes = []
    image: Image.Image = opened
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged tags make the reader raise anything
        notes.append("unreadable EXIF, taken as upright")
    gray = image.mode in _GRAY or image.mode.startswith("I")
    if image.mode.startswith("I") or image.mode == "F":
        image, note = _to_eight_bits(image)
        notes.append(note)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent, laid on white")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
        image = image.convert("L" if gray else "RGB")
    if channels == 3 and gray:
        notes.append("grayscale, made RGB")
    elif channels == 1 and not gray:
        notes.append("color, made grayscale")
    elif image.mode == "CMYK":
        notes.append("CMYK, made RGB")
    return image.convert(_MODES[channels]), tuple(notes)


def _to_eight_bits(image: Image.Image) -> tuple[Image.Image, str]:
    """16-bit, 32-bit and float grays scaled from their whole range; PIL would clip them at 255."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise Unusable("pixels that are not finite")
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16"):
        full, note = 65535, "16 bits, made 8"
    elif image.mode == "F":
        full, note = (1 if high <= 1 else 255), "floating point, made 8 bits"
    else:
        full, note = (255 if high <= 255 else 65535), "32 bits, made 8"
    if low < 0 or high > full:
        raise Unusable(f"pixels from {low:g} to {high:g}: expected a range of 0 to {full}")
    scaled = np.rint(values.astype(np.float64) * (255 / full))
    return Image.fromarray(scaled.astype(np.uint8)), note
