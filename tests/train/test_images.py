"""Bytes to pixels: every mode with its values, and the reasons why an image is left out."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from a3fta_kernels.train.images import Unusable, decode

W, H = 12, 8
RAMP = np.linspace(0, 255, W * H).astype(np.uint8).reshape(H, W)
COLORS = np.stack([RAMP, 255 - RAMP, RAMP // 2], -1)


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(blob: bytes, channels: int = 3) -> np.ndarray:
    return np.asarray(decode(blob, channels)[0])


def notes(blob: bytes, channels: int = 3) -> tuple[str, ...]:
    return decode(blob, channels)[1]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_rgb_comes_as_it_is(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    blob = encoded(Image.fromarray(COLORS), kind, **options)
    assert np.array_equal(pixels(blob), COLORS)
    assert notes(blob) == ()


def test_jpeg():
    blob = encoded(Image.fromarray(COLORS), "JPEG", quality=100, subsampling=0)
    assert np.abs(pixels(blob).astype(int) - COLORS).max() < 16
    assert notes(blob) == ()


@pytest.mark.parametrize("channels", [1, 3])
def test_grayscale(channels):
    blob = encoded(Image.fromarray(RAMP))
    expected = RAMP if channels == 1 else np.stack([RAMP] * 3, -1)
    assert np.array_equal(pixels(blob, channels), expected)
    assert notes(blob, channels) == (("grayscale, made RGB",) if channels == 3 else ())


def test_color_made_gray():
    image, done = decode(encoded(Image.new("RGB", (W, H), (255, 0, 0))), 1)
    assert image.mode == "L" and image.getpixel((0, 0)) == 76
    assert done == ("color, made grayscale",)


def test_black_and_white():
    assert np.array_equal(
        pixels(encoded(Image.fromarray(RAMP > 99)), 1), np.where(RAMP > 99, 255, 0)
    )


def test_palette():
    image = Image.new("P", (W, H), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert (pixels(encoded(image)) == (10, 200, 30)).all()
    assert notes(encoded(image)) == ()
    blob = encoded(image, transparency=1)
    assert (pixels(blob) == 255).all()
    assert notes(blob) == ("transparent, laid on white",)


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (W, H), (200, 0, 100, 0))
    image.putpixel((1, 0), (200, 0, 100, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    found = pixels(encoded(image))
    assert tuple(found[0, 0]) == (255, 255, 255)
    assert tuple(found[0, 1]) == (200, 0, 100)
    assert abs(int(found[0, 2, 0]) - 127) <= 1
    assert notes(encoded(image)) == ("transparent, laid on white",)


def test_an_opaque_alpha_is_not_worth_a_note():
    assert notes(encoded(Image.new("RGBA", (W, H), (1, 2, 3, 255)))) == ()


def test_gray_with_alpha():
    blob = encoded(Image.new("LA", (W, H), (0, 0)))
    assert (pixels(blob) == 255).all()
    assert notes(blob) == ("transparent, laid on white", "grayscale, made RGB")
    assert decode(blob, 1)[0].mode == "L"
    assert notes(blob, 1) == ("transparent, laid on white",)


def test_a_transparent_color_without_an_alpha_channel():
    blob = encoded(Image.new("RGB", (W, H), (9, 9, 9)), transparency=(9, 9, 9))
    assert (pixels(blob) == 255).all()


def test_cmyk():
    blob = encoded(Image.new("CMYK", (W, H), (0, 255, 255, 0)), "TIFF")
    assert (pixels(blob) == (255, 0, 0)).all()
    assert notes(blob) == ("CMYK, made RGB",)


@pytest.mark.parametrize(("kind", "order"), [("PNG", "<"), ("TIFF", "<"), ("TIFF", ">")])
def test_sixteen_bits_are_scaled_and_not_clipped(kind, order):
    values = np.array([[0, 257, 32896, 65535], [128, 129, 385, 386]], dtype=f"{order}u2")
    blob = encoded(Image.fromarray(values), kind)
    assert pixels(blob, 1).tolist() == [[0, 1, 128, 255], [0, 1, 1, 2]]
    assert notes(blob) == ("16 bits, made 8", "grayscale, made RGB")


@pytest.mark.parametrize(
    ("values", "expected", "note"),
    [
        (np.float32([[0, 0.5, 1]]), [[0, 128, 255]], "floating point, made 8 bits"),
        (np.float32([[0, 2, 254.6]]), [[0, 2, 255]], "floating point, made 8 bits"),
        (np.int32([[0, 7, 255]]), [[0, 7, 255]], "32 bits, made 8"),
        (np.int32([[0, 257, 65535]]), [[0, 1, 255]], "32 bits, made 8"),
    ],
)
def test_wide_pixels(values, expected, note):
    blob = encoded(Image.fromarray(values), "TIFF")
    assert pixels(blob, 1).tolist() == expected
    assert notes(blob, 1) == (note,)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.float32([[0, np.nan]]), "not finite"),
        (np.float32([[-1, 1]]), "from -1 to 1: expected a range of 0 to 1"),
        (np.float32([[0, 300]]), "from 0 to 300: expected a range of 0 to 255"),
        (np.int32([[0, 70000]]), "from 0 to 70000: expected a range of 0 to 65535"),
    ],
)
def test_pixels_without_a_known_range(values, reason):
    with pytest.raises(Unusable, match=reason):
        decode(encoded(Image.fromarray(values), "TIFF"), 3)


# what a viewer has to do for the value of the tag, from EXIF's table
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    blob = encoded(Image.fromarray(COLORS), exif=exif)
    assert np.array_equal(pixels(blob), UPRIGHT[orientation](COLORS))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_damaged_exif_is_a_note(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    blob = encoded(Image.fromarray(COLORS), kind, exif=b"Exif\0\0nonsense", **options)
    assert np.array_equal(pixels(blob), COLORS)
    assert notes(blob) == ("unreadable EXIF, taken as upright",)


@pytest.mark.filterwarnings("error")
def test_exif_that_is_cut_off_does_not_matter():
    blob = encoded(Image.fromarray(COLORS), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0")
    assert np.array_equal(pixels(blob), COLORS)


def test_a_cameras_preview_is_no_second_frame():
    photo, preview = Image.fromarray(COLORS), Image.new("RGB", (4, 4))
    blob = encoded(photo, "MPO", save_all=True, append_images=[preview])
    with Image.open(io.BytesIO(blob)) as opened:
        assert opened.format == "MPO" and opened.n_frames == 2
    assert pixels(blob).shape == (H, W, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_animations_and_pages_are_left_out(kind):
    frames = [Image.new("RGB", (W, H), color) for color in ("red", "blue", "green")]
    with pytest.raises(Unusable, match="3 frames or pages: expected a still image"):
        decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
def test_a_file_that_is_cut_off(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    blob = encoded(Image.fromarray(noise), kind)
    with pytest.raises(Unusable):
        decode(blob[: len(blob) // 2], 3)


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (b"", "an empty file"),
        (b"a caption in a file called a.png", "expected a JPEG, PNG, WEBP, BMP or TIFF image"),
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "found none in the file"),
        # PIL gives these to Ghostscript
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "found none"),
    ],
)
def test_what_is_no_image(blob, reason):
    with pytest.raises(Unusable, match=reason):
        decode(blob, 3)


def test_a_flipped_bit_is_seen_by_the_checksum_of_png():
    blob = bytearray(encoded(Image.fromarray(COLORS)))
    blob[blob.index(b"IDAT") + 20] ^= 1
    with pytest.raises(Unusable, match="damaged"):
        decode(bytes(blob), 3)


def test_a_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", W * H // 2 - 1)
    with pytest.raises(Unusable, match="too large"):
        decode(encoded(Image.fromarray(COLORS)), 3)


@pytest.mark.filterwarnings("error")
def test_a_large_photo_is_no_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", W * H - 1)
    assert np.array_equal(pixels(encoded(Image.fromarray(COLORS))), COLORS)


SEEDS = [
    encoded(Image.fromarray(COLORS), "JPEG"),
    encoded(Image.fromarray(COLORS)),
    encoded(Image.fromarray(COLORS), "WEBP"),
    encoded(Image.fromarray(COLORS), "TIFF"),
    encoded(Image.fromarray(RAMP.astype(np.uint16) * 257)),
]


@given(
    blob=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_bytes_give_pixels_or_a_reason(blob, edits):
    damaged = bytearray(blob)
    for place, value in edits:
        damaged[place % len(damaged)] = value
    try:
        image, _ = decode(bytes(damaged), 3)
    except Unusable as reason:
        assert str(reason)
    else:
        assert image.mode == "RGB" and len(image.tobytes()) == 3 * image.width * image.height
