from __future__ import annotations

import pytest
import torch

from a3fta_kernels.study import features
from a3fta_kernels.train.errors import TrainingError
from tests.study import tiny


@pytest.fixture(scope="module")
def learned():
    from a3fta_kernels.train.families.family import to_images

    x, labels = tiny.images()
    images = to_images(x)
    return features.learn(images[:40], labels[:40], seed=0), images, labels


def test_the_network_reads_what_it_has_not_seen(learned):
    network, images, labels = learned
    assert tiny.accuracy(network, images[40:], labels[40:]) > 0.9
    assert tiny.accuracy(network, images[40:], 1 - labels[40:]) < 0.1


def test_features_are_scaled_over_what_it_learned_from(learned):
    network, images, _ = learned
    found = network.extract(images[:40])
    assert found.shape == (40, features.WIDTH) and not found.requires_grad
    live = found.std(0) > 0
    assert live.any() and torch.allclose(found.mean(0), torch.zeros(features.WIDTH), atol=1e-4)
    assert torch.allclose(found.std(0)[live], torch.ones(int(live.sum())), atol=1e-4)


def test_it_is_the_same_from_its_file_and_from_its_seed(learned, tmp_path):
    network, images, _ = learned
    features.save(network, tmp_path / "a" / "n.safetensors")
    again = features.load(tmp_path / "a" / "n.safetensors", tiny.SIDE, 2)
    assert torch.equal(again.extract(images), network.extract(images))
    with pytest.raises(TrainingError, match=r"n\.safetensors: expected the feature network of 3"):
        features.load(tmp_path / "a" / "n.safetensors", tiny.SIDE, 3)
    (tmp_path / "b").write_bytes(b"no such thing")
    with pytest.raises(TrainingError, match="remove it to make it anew"):
        features.load(tmp_path / "b", tiny.SIDE, 2)


def test_pixels_are_all_values(learned):
    _, images, _ = learned
    found = features.pixels(images[:3])
    assert found.shape == (3, 64) and found.min() >= 0 and found.max() <= 1
    assert found[1, 8] == images[1].getpixel((0, 1)) / 255
