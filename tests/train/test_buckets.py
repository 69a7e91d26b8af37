"""Buckets keep budget, multiple and aspect; fit covers and centers; pixels become -1..1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from a3fta_kernels.train.buckets import choices, fit, sizes, to_tensor
from a3fta_kernels.train.errors import TrainingError

SIDES = st.integers(1, 5000)
GRIDS = st.sampled_from([(512, 8), (512, 64), (1024, 16), (64, 8), (32, 16), (8, 8), (768, 32)])


def test_the_buckets_of_512():
    assert choices(512, 8) == [
        (512, 512),
        (568, 456),
        (592, 440),
        (624, 416),
        (680, 384),
        (712, 368),
    ]


def test_photos_of_common_sizes():
    photos = [(4000, 3000), (3000, 4000), (3000, 2000), (1080, 1920), (700, 700), (6000, 1000)]
    assert sizes(photos, 512, 8, True) == [
        (592, 440),
        (440, 592),
        (624, 416),
        (384, 680),
        (512, 512),
        (712, 368),
    ]


def test_the_nearest_aspect_is_that_by_its_logarithm():
    # 1.12 is nearer to 1 than to 568 / 456 by difference, and the other way round by ratio
    assert sizes([(1120, 1000), (1000, 1120)], 512, 8, True) == [(568, 456), (456, 568)]


def test_without_buckets_all_are_square():
    assert sizes([(1, 9), (9, 1)], 64, 8, False) == [(64, 64), (64, 64)]


@given(GRIDS, SIDES, SIDES)
def test_a_bucket_is_within_budget_and_the_nearest(grid, width, height):
    resolution, multiple = grid
    ((w, h),) = sizes([(width, height)], resolution, multiple, True)
    assert w % multiple == h % multiple == 0 < min(w, h)
    assert w * h <= resolution**2
    # a row more on the longer side would be over it
    assert (max(w, h) + multiple) * min(w, h) > resolution**2
    assert max(w, h) <= 2 * min(w, h)
    assert (w >= h) == (width >= height) or w == h
    every = {*choices(resolution, multiple)} | {(b, a) for a, b in choices(resolution, multiple)}
    assert (w, h) in every

    def distance(size):
        return abs(math.log(size[0] / size[1]) - math.log(width / height))

    assert distance((w, h)) <= min(map(distance, every)) + 1e-9
    assert sizes([(height, width)], resolution, multiple, True) == [(h, w)]


@pytest.mark.parametrize("resolution", [0, 500, -8])
def test_a_resolution_that_the_model_cannot_have(resolution):
    with pytest.raises(TrainingError, match=f"multiple of 8 for this model, got {resolution}"):
        sizes([(9, 9)], resolution, 8, False)


def test_fit_takes_the_center():
    pixels = np.zeros((10, 31, 3), np.uint8)
    pixels[:, 10:20] = 200
    image, corner = fit(Image.fromarray(pixels), (10, 10))
    assert corner == (0, 10)
    assert (np.asarray(image) == 200).all()
    image, corner = fit(Image.fromarray(pixels.swapaxes(0, 1)), (10, 10))
    assert corner == (10, 0)
    assert (np.asarray(image) == 200).all()


def test_fit_scales_first_and_counts_in_the_scaled_image():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    image, corner = fit(Image.fromarray(pixels), (10, 10))
    assert corner == (0, 10)
    assert np.asarray(image)[:, 3:7].min() > 190
    image, corner = fit(Image.fromarray(pixels), (40, 40))
    assert corner == (0, 40)
    assert np.asarray(image)[:, 8:-8].min() > 190


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 9), st.integers(1, 9))
def test_fit_covers_and_wastes_less_than_a_row_besides_the_crop(width, height, w, h):
    size = (8 * w, 8 * h)
    image, (top, left) = fit(Image.new("L", (width, height), 77), size)
    assert image.size == size
    # no black border where the crop would leave the image
    assert image.getextrema() == (77, 77)
    assert top >= 0 and left >= 0
    assert min(top, left) == 0


def test_an_image_that_fits_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    image, corner = fit(Image.fromarray(pixels), (16, 8))
    assert np.array_equal(np.asarray(image), pixels) and corner == (0, 0)


def test_pixels_as_a_tensor():
    pixels = np.array([[[0, 51, 255], [255, 0, 0]]], np.uint8)
    found = to_tensor(Image.fromarray(pixels))
    assert found.dtype == torch.float32 and found.shape == (3, 1, 2) and found.is_contiguous()
    expected = torch.tensor([[[-1, 1]], [[-0.6, -1]], [[1, -1]]])
    torch.testing.assert_close(found, expected)
    gray = to_tensor(Image.fromarray(pixels[..., 1]))
    torch.testing.assert_close(gray, expected[1:2])
