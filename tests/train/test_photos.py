"""find(): which photos of a folder train, with which captions and classes, and why not others."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from a3fta_kernels.train.errors import TrainingError
from a3fta_kernels.train.photos import find


def photo(path: Path, color: Any = None, size: tuple[int, int] = (40, 32), **options: Any) -> Path:
    """A file of that colour, else one that its name decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    color = color or tuple(hashlib.sha256(path.name.encode()).digest()[:3])
    Image.new("RGB", size, color).save(path, **options)
    return path


def look(folder: Path, **options: Any) -> Any:
    return find(folder, **{"resolution": 32, "captions": False, **options})


def names(found: Any) -> list[str]:
    return [item.name for item in found.items]


def test_the_files_of_a_folder(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.jpeg", "d.webp", "e.bmp", "f.tif", "g.tiff", "sub/a b.png"):
        photo(tmp_path / name)
    photo(tmp_path / "Größe 猫.png")
    photo(tmp_path / ".hidden.png")
    photo(tmp_path / ".cache" / "x.png")
    (tmp_path / "notes.md").write_text("not an image")
    found = look(tmp_path)
    assert names(found) == sorted(names(found))
    assert set(names(found)) == {
        *("a.jpg", "b.PNG", "c.jpeg", "d.webp", "e.bmp", "f.tif", "g.tiff", "sub/a b.png"),
        "Größe 猫.png",
    }
    assert found.skipped == {} and found.classes == ()
    item = next(item for item in found.items if item.name == "a.jpg")
    assert (item.caption, item.label, item.size, item.notes) == ("", None, (40, 32), ())
    assert item.digest == hashlib.sha256((tmp_path / "a.jpg").read_bytes()).hexdigest()


def test_a_photo_opens_upright_and_rgb(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    (item,) = look(tmp_path).items
    assert item.size == item.open().size == (32, 40)
    assert item.notes == ("grayscale, made RGB",)
    assert item.open().mode == "RGB"
    assert np.array_equal(np.asarray(item.open())[..., 1], np.rot90(pixels, -1))
    (gray,) = look(tmp_path, channels=1).items
    assert gray.open().mode == "L" and gray.notes == ()
    # loaders hand photos to other processes
    assert pickle.loads(pickle.dumps(item)).open().tobytes() == item.open().tobytes()


def test_a_photo_that_changes_after_it_was_found(tmp_path):
    path = photo(tmp_path / "a.png")
    (item,) = look(tmp_path).items
    photo(path, color="red")
    with pytest.raises(TrainingError, match=r"a\.png: the file has changed"):
        item.open()
    path.unlink()
    with pytest.raises(TrainingError, match=r"a\.png: cannot be read any more"):
        item.open()


def test_what_cannot_be_used_is_named(tmp_path):
    photo(tmp_path / "good.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    blob = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(blob[: len(blob) // 2])
    (tmp_path / "text.png").write_text("a caption")
    (tmp_path / "zero.png").touch()
    photo(tmp_path / "dot.png", size=(1, 1))
    photo(tmp_path / "flat.png", size=(500, 15))
    (tmp_path / "phone.HEIC").write_bytes(b"\0")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    frames = [Image.new("RGB", (40, 40), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    found = look(tmp_path)
    assert names(found) == ["good.png"]
    reasons = {
        "cut.jpg": "damaged: ",
        "text.png": "found none in the file",
        "zero.png": "an empty file",
        "dot.png": "1x1: expected a shorter side of at least 16 (min_side)",
        "flat.png": "500x15: expected a shorter side of at least 16 (min_side)",
        "phone.HEIC": ".HEIC files are not read: convert it to PNG or JPEG",
        "gone.png": "cannot be read: No such file",
        "moving.webp": "2 frames or pages",
    }
    assert set(found.skipped) == set(reasons)
    for name, reason in reasons.items():
        assert reason in found.skipped[name]


def test_min_side_and_the_note_on_enlarging(tmp_path):
    photo(tmp_path / "large.png", size=(100, 64))
    photo(tmp_path / "small.png", size=(100, 40))
    photo(tmp_path / "tiny.png", size=(100, 31))
    found = look(tmp_path, resolution=64)
    assert {item.name: item.notes for item in found.items} == {
        "large.png": (),
        "small.png": ("enlarged up to 1.6x",),
    }
    assert names(look(tmp_path, resolution=64, min_side=64)) == ["large.png"]
    assert names(look(tmp_path, resolution=64, min_side=1)) == [*names(found), "tiny.png"]


def test_a_photo_that_is_there_twice(tmp_path):
    first = photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    shutil.copy(first, tmp_path / "c.png")
    Image.open(first).save(tmp_path / "d.bmp")  # other bytes, the same pixels
    (tmp_path / "e.png").symlink_to(first)
    Image.open(first).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png")
    found = look(tmp_path)
    assert names(found) == ["a.png", "b.png", "turned.png"]
    assert found.skipped == dict.fromkeys(("c.png", "d.bmp", "e.png"), "the same as a.png")


def test_linked_folders_are_followed_once_around(tmp_path):
    photo(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    found = look(tmp_path / "photos")
    assert names(found) == ["more/a.png"] and found.skipped == {}


@pytest.mark.skipif(os.name != "posix", reason="names are text there")
def test_a_name_that_is_no_text(tmp_path):
    path = photo(tmp_path / "a.png")
    try:
        os.rename(path, os.fsencode(tmp_path) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system has text only")
    (item,) = look(tmp_path).items
    assert item.name == r"caf\udce9.png"
    item.name.encode()
    assert item.open().size == (40, 32)


def test_captions(tmp_path):
    for name in ("a", "b", "c", "d", "e", "f"):
        photo(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("\ufeffa red\n ball \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_text("A SKS dog, sitting")
    (tmp_path / "d.txt").write_text("he asks a sksy dog")
    rows = [
        {"file_name": "a.png", "text": "the file beside it counts"},
        {"file_name": "b.png", "text": "a blue  ball"},
        {"file_name": "./e.png", "caption": "ein grüner Ball", "more": [1]},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    found = look(tmp_path, captions=True, trigger=" sks ")
    assert {item.name[0]: item.caption for item in found.items} == {
        "a": "sks, a red ball",
        "b": "sks, a blue ball",
        "c": "A SKS dog, sitting",
        "d": "sks, he asks a sksy dog",
        "e": "sks, ein grüner Ball",
        "f": "sks",
    }
    assert {item.caption for item in look(tmp_path, trigger="sks").items} == {""}


def test_missing_captions_are_an_error_that_names_them(tmp_path):
    for name in "abcdefgh":
        photo(tmp_path / f"{name}.png")
    (tmp_path / "b.txt").write_text("a ball")
    photo(tmp_path / "tiny.png", size=(1, 1))  # what is left out needs none
    with pytest.raises(TrainingError) as raised:
        look(tmp_path, captions=True)
    assert str(raised.value) == (
        f"photos: {tmp_path}: no caption for a.png, c.png, d.png, e.png, f.png and 2 more: "
        "write a.txt and so on, add them to metadata.jsonl, or give --trigger"
    )


def test_a_trigger_of_several_words_and_signs(tmp_path):
    photo(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a photo of <sks> (dog)")
    assert look(tmp_path, captions=True, trigger="<sks> (dog)").items[0].caption == (
        "a photo of <sks> (dog)"
    )


def test_classes_of_subfolders(tmp_path):
    for name in ("dog/a.png", "cat/b.png", "cat/more/c.png", "bird/tiny.png"):
        photo(tmp_path / name, size=(1, 1) if "tiny" in name else (40, 40))
    found = look(tmp_path, labels=5)
    # bird keeps its place: a photo that is mended must not move the others
    assert found.classes == ("bird", "cat", "dog")
    assert {item.name: item.label for item in found.items} == {
        "cat/b.png": 1,
        "cat/more/c.png": 1,
        "dog/a.png": 2,
    }
    with pytest.raises(TrainingError, match=r"3 classes \(bird, cat, dog\); the model has 2"):
        look(tmp_path, labels=2)
    photo(tmp_path / "stray.png")
    with pytest.raises(TrainingError, match=r"no class for stray\.png: put each into a subfolder"):
        look(tmp_path, labels=5)
    assert {item.label for item in look(tmp_path).items} == {None}


def test_classes_that_are_numbers_are_indices(tmp_path):
    for name in ("10/a.png", "3/b.png", "007/c.png"):
        photo(tmp_path / name)
    found = look(tmp_path, labels=11)
    assert {item.name: item.label for item in found.items} == {
        "10/a.png": 10,
        "3/b.png": 3,
        "007/c.png": 7,
    }
    assert found.classes == tuple(map(str, range(11)))
    with pytest.raises(TrainingError, match="expected classes of 0 to 9, got 10"):
        look(tmp_path, labels=10)


def test_classes_of_metadata(tmp_path):
    photo(tmp_path / "dog" / "a.png")
    photo(tmp_path / "dog" / "b.png")
    metadata = tmp_path / "dog" / "metadata.jsonl"
    metadata.write_text('{"file_name": "b.png", "label": "wolf"}\n')
    found = look(tmp_path, labels=2)
    assert [(item.name, item.label) for item in found.items] == [("dog/a.png", 0), ("dog/b.png", 1)]
    metadata.write_text('{"file_name": "b.png", "label": 1}\n')
    with pytest.raises(TrainingError, match="all names or all indices, got dog, 1"):
        look(tmp_path, labels=2)
    metadata.write_text('{"file_name": "b.png", "label": -1}\n{"file_name": "a.png", "label": 0}')
    with pytest.raises(TrainingError, match="expected classes of 0 to 1, got -1"):
        look(tmp_path, labels=2)


def test_nothing_to_use(tmp_path):
    with pytest.raises(TrainingError, match=f"there is no folder {tmp_path / 'none'}"):
        look(tmp_path / "none")
    with pytest.raises(TrainingError, match=r"expected a folder, got the file .*a\.png"):
        look(photo(tmp_path / "file" / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match=r"empty has no images; expected files of \.jpg, "):
        look(tmp_path / "empty", captions=True)
    for i in range(7):
        photo(tmp_path / "small" / f"{i}.png", size=(4, i + 1))
    with pytest.raises(TrainingError) as raised:
        look(tmp_path / "small")
    lines = str(raised.value).splitlines()
    assert lines[0] == f"photos: no image of {tmp_path / 'small'} can be used:"
    assert lines[1] == "  0.png: 4x1: expected a shorter side of at least 16 (min_side)"
    assert lines[5:] == [
        "  4.png: 4x5: expected a shorter side of at least 16 (min_side)",
        "  and 2 more",
    ]


def test_channels_that_no_photo_has(tmp_path):
    photo(tmp_path / "a.png")
    with pytest.raises(TrainingError, match="1 or 3 channels, the model wants 4"):
        look(tmp_path, channels=4)
