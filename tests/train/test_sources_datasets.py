"""Folders by `datasets`' save_to_disk: captions, classes, bad rows, columns that are not there."""

from __future__ import annotations

import builtins
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

datasets: Any = pytest.importorskip("datasets")

from a3fta_kernels.train.errors import TrainingError  # noqa: E402
from a3fta_kernels.train.photos import find  # noqa: E402


def pictures(count: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)) for _ in range(count)
    ]


def saved(path: Path, columns: dict[str, list[Any]], **features: Any) -> Path:
    features = {"image": datasets.Image(), **features}
    data = datasets.Dataset.from_dict(columns, datasets.Features(features))
    data.save_to_disk(str(path))
    return path


TEXT = datasets.Value("string")


@pytest.mark.parametrize("column", ["text", "caption"])
def test_a_dataset(tmp_path, column):
    images = pictures(3)
    columns = {"image": [*images, images[0]], column: ["one ", None, "three", "four"]}
    saved(tmp_path / "data", columns, **{column: TEXT})
    found = find(tmp_path / "data", resolution=32, captions=True, trigger="sks")
    assert [(item.name, item.caption) for item in found.items] == [
        ("row 0", "sks, one"),
        ("row 1", "sks"),
        ("row 2", "sks, three"),
    ]
    assert found.skipped == {"row 3": "the same as row 0"}
    for item, image in zip(found.items, images, strict=True):
        assert item.open().tobytes() == image.tobytes() and item.size == (32, 40)
    with pytest.raises(TrainingError, match="no caption for row 1: fill the column text"):
        find(tmp_path / "data", resolution=32, captions=True)


def test_bad_rows_of_a_dataset_are_named(tmp_path):
    good = io.BytesIO()
    pictures(1)[0].save(good, "PNG")
    images = [{"bytes": good.getvalue()[:100]}, None, {"bytes": good.getvalue()}]
    found = find(saved(tmp_path / "data", {"image": images}), resolution=32, captions=False)
    assert [item.name for item in found.items] == ["row 2"]
    assert set(found.skipped) == {"row 0", "row 1"}
    assert found.skipped["row 1"] == "cannot be read: the row has no image"


def test_classes_of_a_dataset(tmp_path):
    columns = {"image": pictures(2), "label": [1, 0]}
    # the dataset's order of classes, not that of their names
    saved(tmp_path / "data", columns, label=datasets.ClassLabel(names=["dog", "cat"]))
    found = find(tmp_path / "data", resolution=32, captions=False, labels=3)
    assert [item.label for item in found.items] == [1, 0] and found.classes == ("dog", "cat")
    with pytest.raises(TrainingError, match=r"2 classes \(dog, cat\); the model has 1"):
        find(tmp_path / "data", resolution=32, captions=False, labels=1)
    saved(tmp_path / "named", {**columns, "label": ["dog", "cat"]}, label=TEXT)
    found = find(tmp_path / "named", resolution=32, captions=False, labels=3)
    assert [item.label for item in found.items] == [1, 0] and found.classes == ("cat", "dog")
    saved(tmp_path / "some", {**columns, "label": [None, 2]}, label=datasets.Value("int64"))
    with pytest.raises(TrainingError, match="no class for row 0: fill the column label"):
        find(tmp_path / "some", resolution=32, captions=False, labels=3)


def test_columns_that_are_not_as_expected(tmp_path):
    columns = {"image": pictures(1), "text": [3], "label": [0.5]}
    number = datasets.Value("float32")
    path = saved(tmp_path / "data", columns, text=datasets.Value("int64"), label=number)
    with pytest.raises(TrainingError, match=r"text in the column text, found .* text \(Value"):
        find(path, resolution=32, captions=True)
    with pytest.raises(TrainingError, match="a column label, of classes or their indices"):
        find(path, resolution=32, captions=False, labels=3)
    find(path, resolution=32, captions=False)
    saved(
        tmp_path / "other",
        {"image": ["a.png"], "photo": pictures(1)},
        image=TEXT,
        photo=datasets.Image(),
    )
    with pytest.raises(TrainingError, match=r"column image, of images, .* photo \(Image"):
        find(tmp_path / "other", resolution=32, captions=False)


def test_a_dataset_of_splits(tmp_path):
    data = datasets.Dataset.from_dict(
        {"image": pictures(2)}, datasets.Features({"image": datasets.Image()})
    )
    datasets.DatasetDict(train=data, test=data).save_to_disk(str(tmp_path / "both"))
    found = find(tmp_path / "both", resolution=32, captions=False)
    assert [item.name for item in found.items] == ["row 0", "row 1"]
    datasets.DatasetDict(test=data).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(TrainingError, match="expected a split train, found test"):
        find(tmp_path / "one", resolution=32, captions=False)


def test_a_damaged_dataset(tmp_path):
    path = saved(tmp_path / "data", {"image": pictures(1)})
    (arrow,) = path.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:50])
    with pytest.raises(TrainingError, match="data: a damaged datasets folder"):
        find(path, resolution=32, captions=False)
    (path / "state.json").write_text("{")
    with pytest.raises(TrainingError, match="data: a damaged datasets folder"):
        find(path, resolution=32, captions=False)


def test_without_the_package(tmp_path, monkeypatch):
    path = saved(tmp_path / "data", {"image": pictures(1)})
    real = builtins.__import__

    def missing(name, *args):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(TrainingError, match="is a datasets folder; to read it, pip install data"):
        find(path, resolution=32, captions=False)
