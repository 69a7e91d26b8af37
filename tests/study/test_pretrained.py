from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from a3fta_kernels.study import pretrained, run
from a3fta_kernels.study.subject import PARTS
from a3fta_kernels.train.errors import TrainingError
from tests.study import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline with classes, and photos in a folder per class, as a user has them."""
    path = tmp_path_factory.mktemp("own")
    tiny.pipeline().save_pretrained(path / "pipeline")
    draw = np.random.default_rng(0)
    for i in range(44):
        place = path / "photos" / ("even", "odd")[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (10, 10 + i % 3), dtype=np.uint8)).save(place)
    return path


@pytest.fixture(scope="module")
def own(folder):
    return pretrained.load(str(folder / "pipeline"), str(folder / "photos"), folder / "study")


def test_photos_are_dealt_into_parts_in_proportion(own):
    assert sum(len(own.parts[name]) for name in PARTS) == 44
    assert len(own.parts["reference"]) == 9 and len(own.parts["pool"]) > 10
    for part in own.parts.values():
        share = sum(own.labels[i] for i in part) / len(part)
        assert abs(share - 0.5) <= 0.5 / len(part) + 1e-9
    assert {image.size for image in own.images} == {own.size} == {(8, 8)}


def test_a_run_of_it_is_a_line(own):
    line = run.run(own, tiny.plan(), "base", 6, 0, 0.0)
    assert np.isfinite(line["kid"]).all() and np.isfinite(line["heldout"]).all()
    # it has no images of its base's own kind
    assert all(np.isnan(line["source"]))


def test_every_model_is_fresh(own):
    one, two = own.fresh(), own.fresh()
    next(one.denoiser.parameters()).data.add_(1)
    assert not np.allclose(*(next(f.denoiser.parameters()).detach() for f in (one, two)))


def test_too_few_photos_are_refused(folder, tmp_path):
    few = tmp_path / "few" / "even"
    few.mkdir(parents=True)
    for path in sorted((folder / "photos" / "even").iterdir())[:5]:
        (few / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TrainingError, match=r"images: expected at least 40 .* got 5 in "):
        pretrained.load(str(folder / "pipeline"), str(few.parent), tmp_path / "study")
