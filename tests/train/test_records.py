"""The files of a run: whole lines, or what was there."""

from __future__ import annotations

import errno
import json
import math
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a3fta_kernels import adapter_file
from a3fta_kernels.train import records
from a3fta_kernels.train.errors import TrainingError
from a3fta_kernels.train.records import EVALUATIONS, LOG, SAMPLES


def fill(run, *steps, name=LOG):
    for step in steps:
        records.append(run, name, {"step": step, "loss": step / 2})


def steps(run, name=LOG):
    return [entry["step"] for entry in records.read(run, name)]


def test_lines_come_back_in_order(tmp_path):
    assert records.read(tmp_path, LOG) == []
    fill(tmp_path, 1, 2, 3)
    assert records.read(tmp_path, LOG)[1] == {"step": 2, "loss": 1.0}
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("kept", range(1, 12))
def test_a_half_written_line_is_dropped_and_cut_off(tmp_path, kept):
    fill(tmp_path, 1, 2)
    path = tmp_path / LOG
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[1][:kept])
    assert steps(tmp_path) == [1, 2]
    records.cut(tmp_path, 2)
    assert path.read_bytes() == whole
    fill(tmp_path, 3)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_letter_cut_in_half_is_a_half_written_line(tmp_path):
    records.append(tmp_path, SAMPLES, {"step": 1, "prompts": ["é"]})
    path = tmp_path / SAMPLES
    line = path.read_bytes()
    path.write_bytes(line + line[: line.index("é".encode()) + 1])
    assert steps(tmp_path, SAMPLES) == [1]
    records.cut(tmp_path, 1)
    assert path.read_bytes() == line


def test_a_damaged_line_is_named(tmp_path):
    fill(tmp_path, 1, 2, 3)
    lines = (tmp_path / LOG).read_text().splitlines()
    (tmp_path / LOG).write_text(f"{lines[0]}\n{lines[1][:-3]}\n{lines[2]}\n")
    with pytest.raises(TrainingError, match=r"log\.jsonl: line 2 is damaged"):
        records.read(tmp_path, LOG)


@pytest.mark.parametrize(("step", "left"), [(-1, []), (0, [0]), (2, [0, 1, 2]), (9, [0, 1, 2, 3])])
def test_cut_drops_later_steps_of_every_file(tmp_path, step, left):
    for name in (LOG, EVALUATIONS, SAMPLES):
        fill(tmp_path, 0, 1, 2, 3, name=name)
    (tmp_path / "other.jsonl").write_text("x")
    records.cut(tmp_path, step)
    assert [steps(tmp_path, name) for name in (LOG, EVALUATIONS, SAMPLES)] == [left] * 3
    assert (tmp_path / "other.jsonl").read_text() == "x"


def test_cut_keeps_bytes_of_what_it_keeps(tmp_path):
    entry = {"step": 1, "loss": 0.1 + 0.2, "tiny": 5e-324, "names": ["ü\u2028\n", "\udcff", "😀"]}
    records.append(tmp_path, LOG, entry)
    before = (tmp_path / LOG).read_bytes()
    fill(tmp_path, 2)
    records.cut(tmp_path, 1)
    assert (tmp_path / LOG).read_bytes() == before
    assert records.read(tmp_path, LOG) == [entry]


def test_what_is_no_number_is_null(tmp_path):
    entry = {"step": 1, "loss": math.nan, "bins": [[0.0, math.inf], (1.0, -math.inf)]}
    records.append(tmp_path, LOG, entry)
    assert records.read(tmp_path, LOG) == [
        {"step": 1, "loss": None, "bins": [[0, None], [1, None]]}
    ]
    records.write_json(tmp_path / "s.json", {"a": [math.nan, {"b": math.inf}]})
    assert json.loads((tmp_path / "s.json").read_text()) == {"a": [None, {"b": None}]}


TEXT = st.text(st.characters() | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=5,
)  # fmt: skip


@given(st.lists(st.dictionaries(TEXT, VALUES, max_size=3), max_size=3))
def test_anything_json_comes_back(tmp_path_factory, entries):
    run = tmp_path_factory.getbasetemp()
    (run / LOG).unlink(missing_ok=True)
    entries = [{**entry, "step": step} for step, entry in enumerate(entries)]
    for entry in entries:
        records.append(run, LOG, entry)
    assert records.read(run, LOG) == entries


@pytest.mark.parametrize("line", ['{"loss": 1}', '{"step": null}', "[1]", "7", '{"step": 1'])
def test_a_line_that_is_no_entry_is_named(tmp_path, line):
    (tmp_path / LOG).write_text(f'{{"step": 0}}\n{line}\n')
    with pytest.raises(TrainingError, match=r"log\.jsonl: line 2 is damaged"):
        records.read(tmp_path, LOG)
    assert records.read(tmp_path, LOG, strict=False) == [{"step": 0}]


def test_text_of_any_language_stays_readable(tmp_path):
    records.append(tmp_path, SAMPLES, {"step": 0, "prompts": ["一只猫"]})
    records.write_json(tmp_path / "photos.json", {"name": "Kätzchen.png"})
    assert "一只猫" in (tmp_path / SAMPLES).read_text(encoding="utf-8")
    assert "Kätzchen" in (tmp_path / "photos.json").read_text(encoding="utf-8")


def test_names_that_are_not_utf8_come_back(tmp_path):
    """A file's name may be any bytes; Python gives the others as lone surrogates."""
    name = os.fsdecode(b"\xff.png")
    records.write_json(tmp_path / "photos.json", {"name": name})
    assert json.loads((tmp_path / "photos.json").read_text(encoding="utf-8")) == {"name": name}


class Full:
    """A disk that takes so many bytes more."""

    def __init__(self, stream, room):
        self.stream, self.room = stream, room

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.stream.write(text[: self.room])
        if len(text) > self.room:
            self.stream.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(monkeypatch, room):
    def full(*args, **options):
        return Full(open(*args, **options), room)

    for module in (records, adapter_file):
        monkeypatch.setattr(module, "open", full, raising=False)


def test_a_full_disk_leaves_a_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    records.write(path, "before")
    fill_disk(monkeypatch, 2)
    with pytest.raises(TrainingError, match=r"cannot be written: No space left.*--resume"):
        records.write(path, "what comes after")
    monkeypatch.undo()
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_lines_that_can_be_read(tmp_path, monkeypatch):
    fill(tmp_path, 1)
    fill_disk(monkeypatch, 5)
    with pytest.raises(TrainingError, match="No space left"):
        fill(tmp_path, 2)
    monkeypatch.undo()
    assert steps(tmp_path) == [1]
    records.cut(tmp_path, 1)
    fill(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch, name):
    path = tmp_path / "settings.yaml"
    records.write(path, "before")

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(TrainingError, match="Input/output error"):
        records.write(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TrainingError, match="gone cannot be written: No such file"):
        records.append(tmp_path / "gone", LOG, {"step": 1})


@pytest.mark.parametrize(
    ("number", "advised"), [(errno.ENOSPC, True), (errno.EROFS, False), (errno.EACCES, False)]
)
def test_room_is_asked_for_where_there_is_none(tmp_path, number, advised):
    with (
        pytest.raises(TrainingError, match=re.escape(os.strerror(number))) as told,
        records.explained(tmp_path),
    ):
        raise OSError(number, os.strerror(number))
    assert ("make room" in str(told.value)) == advised
