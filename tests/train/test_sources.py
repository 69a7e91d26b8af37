"""Captions and classes as files hold them, and the errors that name file and line."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from a3fta_kernels.train.errors import TrainingError
from a3fta_kernels.train.sources import read_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate("ab"):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def captions(folder: Path) -> dict[str, str]:
    return {entry.name: entry.caption for entry in read_folder(folder, True, True).entries}


LINE_2 = r"metadata\.jsonl, line 2: "


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", LINE_2 + "expected JSON, "),
        ("[" * 100_000, LINE_2 + "expected JSON, "),
        ("[1]", LINE_2 + r'expected \{"file_name": ..., "text": ...\}, got \[1\]'),
        ('{"text": "x"}', LINE_2 + "expected .*file_name.* got .*text"),
        ('{"file_name": 3}', LINE_2 + "expected .*file_name"),
        ('{"file_name": "c.png", "text": "x"}', LINE_2 + "there is no image 'c.png'"),
        ('{"file_name": "../a.png", "text": "x"}', LINE_2 + "there is no image '../a.png'"),
        ('{"file_name": "a.png", "text": "x"}', LINE_2 + "'a.png' is listed twice"),
        ('{"file_name": "b.png", "text": 3}', LINE_2 + "expected the caption as text, got 3"),
        (
            '{"file_name": "b.png", "label": 1.5}',
            LINE_2 + "expected a class or its index .* got 1.5",
        ),
        (
            '{"file_name": "b.png", "label": true}',
            LINE_2 + "expected a class or its index .* got True",
        ),
    ],
)
def test_a_line_of_metadata_that_is_wrong(folder, line, message):
    first = json.dumps({"file_name": "a.png", "text": "a ball", "label": 0})
    (folder / "metadata.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(TrainingError, match=message):
        read_folder(folder, True, True)
    read_folder(folder, False, False)  # not read where nothing of it is wanted


def test_metadata_of_folders_below(folder):
    (folder / "sub").mkdir()
    Image.new("RGB", (40, 40)).save(folder / "sub" / "c.png")
    (folder / "sub" / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "below"}')
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "above"}')
    assert captions(folder) == {"a.png": "above", "b.png": "", "sub/c.png": "below"}
    (folder / "metadata.jsonl").write_text('{"file_name": "sub/c.png", "text": "above"}')
    with pytest.raises(TrainingError, match=r"line 1: 'c\.png' is listed twice"):
        captions(folder)


def test_metadata_may_name_a_file_that_is_left_out(folder):
    (folder / "c.heic").write_bytes(b"\0")
    (folder / "metadata.jsonl").write_text('{"file_name": "c.heic", "text": "x"}')
    assert set(captions(folder)) == {"a.png", "b.png"}


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_either_form_of_unicode(tmp_path, forms):
    name, listed = (unicodedata.normalize(form, "é.png") for form in forms)
    Image.new("RGB", (40, 40)).save(tmp_path / name)
    row = {"file_name": listed, "text": "a\u2028b"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    assert captions(tmp_path) == {name: "a b"}


def test_text_that_is_not_utf8(folder):
    (folder / "a.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(TrainingError, match=r"a\.txt: expected text in UTF-8, found"):
        captions(folder)
    (folder / "a.txt").unlink()
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xff"}')
    with pytest.raises(TrainingError, match=r"metadata\.jsonl: expected text in UTF-8"):
        captions(folder)


def test_a_caption_that_cannot_be_read(folder):
    (folder / "a.txt").mkdir()
    with pytest.raises(TrainingError, match=r"a\.txt: cannot be read \(Is a directory\)"):
        captions(folder)
