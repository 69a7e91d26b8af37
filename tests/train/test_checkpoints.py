"""Checkpoints: whole or not there, whatever kills the process that writes them."""

from __future__ import annotations

import errno
import itertools
import json
import os

import pytest

from a3fta_kernels.train import checkpoints
from a3fta_kernels.train.errors import TrainingError

# what the module does to the disk, by the functions that do it
DISK = ("fsync", "rename", "mkdir", "unlink", "rmdir")


def filler(step):
    def fill(folder):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_bytes(bytes([step % 256]) * 50)
        (folder / "training.pt").write_bytes(b"state %d" % step)

    return fill


def save(folder, *steps):
    for step in steps:
        checkpoints.save(folder, step, filler(step))


def whole(folder, step):
    """Asserts that the newest whole checkpoint is that of `step`, and is what was saved."""
    path, state = checkpoints.latest(folder)
    assert path == checkpoints.place(folder, step) and state["step"] == step
    assert (path / "adapter" / "weights").read_bytes() == bytes([step]) * 50
    assert (path / "training.pt").read_bytes() == b"state %d" % step


class Killed(BaseException):
    pass


def kill_at(monkeypatch, number):
    """From the operation of that number on, the process does nothing to the disk any more."""
    done = itertools.count(1)

    def dying(function):
        def call(*args, **options):
            if next(done) >= number:
                raise Killed
            return function(*args, **options)

        return call

    for name in DISK:
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


def every_kill(action, folder, monkeypatch, tmp_path):
    """Runs `action` on copies of `folder`, killed at its first operation, its second, ...;
    yields each copy, and last the one where it came to its end."""
    import shutil

    for number in itertools.count(1):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(folder, copy)
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                action(copy)
                ended = True
            except Killed:
                ended = False
        yield copy, ended
        if ended:
            assert number > 3
            return


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_newest_is_found(tmp_path):
    folder = tmp_path / "checkpoints"
    assert checkpoints.latest(folder) is None and checkpoints.steps(folder) == []
    save(folder, 2, 4, 1_000_000)
    (folder / "step-12").mkdir()
    (folder / "notes.txt").write_text("")
    assert checkpoints.steps(folder) == [2, 4, 1_000_000]
    path, state = checkpoints.latest(folder)
    assert path.name == "step-1000000" and state["step"] == 1_000_000
    assert set(state["files"]) == {"adapter/weights", "training.pt"}
    assert not hidden(folder)


def test_a_save_that_is_killed_leaves_the_one_before_or_the_new_one(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    found = []
    for copy, ended in every_kill(lambda f: save(f, 2), folder, monkeypatch, tmp_path):
        there = checkpoints.steps(copy)
        assert there in ([1], [1, 2])
        whole(copy, there[-1])
        checkpoints.tidy(copy)
        assert not hidden(copy)
        # and the next run saves
        save(copy, 3)
        whole(copy, 3)
        found.append(there)
        assert there == [1, 2] or not ended
    assert found == sorted(found) and found[0] == [1] and found[-1] == [1, 2]


def test_the_first_save_that_is_killed_leaves_none(tmp_path, monkeypatch):
    folder = tmp_path / "nothing"
    folder.mkdir()
    for copy, ended in every_kill(
        lambda f: save(f / "checkpoints", 1), folder, monkeypatch, tmp_path
    ):
        if checkpoints.latest(copy / "checkpoints") is not None:
            whole(copy / "checkpoints", 1)
        else:
            assert not ended


@pytest.mark.parametrize(
    ("action", "left"),
    [
        (lambda folder: checkpoints.prune(folder, 1, [2]), [2, 4]),
        (lambda folder: checkpoints.after(folder, 2), [1, 2]),
    ],
)
def test_a_removal_that_is_killed_leaves_whole_ones(action, left, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    save(folder, 1, 2, 3, 4)
    for copy, ended in every_kill(action, folder, monkeypatch, tmp_path):
        there = checkpoints.steps(copy)
        assert set(left) <= set(there)
        for step in there:
            checkpoints.check(checkpoints.place(copy, step))
        assert there == left or not ended
        checkpoints.tidy(copy)
        action(copy)
        assert checkpoints.steps(copy) == left and not hidden(copy)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_is_named_and_touches_nothing(tmp_path, monkeypatch, error):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    for number in itertools.count(1):
        done = itertools.count(1)

        def failing(function, number=number, done=done):
            def call(*args, **options):
                if next(done) == number:
                    raise OSError(error, os.strerror(error))
                return function(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "mkdir"):
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                save(folder, 2)
                break
            except TrainingError as told:
                assert "cannot be written: " + os.strerror(error) in str(told)
        # the last operation syncs what is in its place already
        whole(folder, checkpoints.steps(folder)[-1])
        assert not hidden(folder)
        checkpoints.after(folder, 1)
    assert number > 5
    whole(folder, 2)


def test_what_fill_raises_comes_through(tmp_path):
    save(tmp_path, 1)

    def fill(folder):
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("no such tensor")

    with pytest.raises(RuntimeError, match="no such tensor"):
        checkpoints.save(tmp_path, 2, fill)
    whole(tmp_path, 1)
    assert not hidden(tmp_path)


def test_one_that_is_there_is_not_replaced(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(TrainingError, match="cannot be written: Directory not empty"):
        checkpoints.save(tmp_path, 1, filler(7))
    whole(tmp_path, 1)
    assert not hidden(tmp_path)


@pytest.mark.parametrize("name", ["adapter/weights", "training.pt", "state.json"])
def test_a_flipped_bit_anywhere_is_passed_over(name, tmp_path, caplog):
    save(tmp_path, 1, 2)
    path = checkpoints.place(tmp_path, 2) / name
    whole_file = path.read_bytes()
    for place in range(len(whole_file)):
        for bit in (0, 5, 7):
            damaged = bytearray(whole_file)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            if name == "state.json" and _same(whole_file, bytes(damaged)):
                continue  # a space that is another one
            caplog.clear()
            whole(tmp_path, 1)
            assert f"checkpoint {path.parents[name.count('/')]} is damaged" in caplog.text
            assert "trying the one before" in caplog.text
    path.write_bytes(whole_file)
    whole(tmp_path, 2)


def _same(one, other):
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("damage", ["empty", "cut", "gone", "folder", "null", "list"])
def test_a_damaged_state_is_passed_over(damage, tmp_path, caplog):
    save(tmp_path, 1, 2)
    path = checkpoints.place(tmp_path, 2) / "state.json"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes(
            {"empty": b"", "cut": content[:-9], "null": b"null", "list": b"[]"}[damage]
        )
    whole(tmp_path, 1)
    assert "step-000002 is damaged" in caplog.text


def test_a_file_that_is_gone_is_named(tmp_path, caplog):
    save(tmp_path, 1, 2)
    (checkpoints.place(tmp_path, 2) / "training.pt").unlink()
    whole(tmp_path, 1)
    assert "step-000002 is damaged" in caplog.text and "training.pt" in caplog.text


def test_where_none_is_whole_all_are_named(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        (checkpoints.place(tmp_path, step) / "training.pt").write_bytes(b"")
    told = "no checkpoint is whole: .*step-000002 .*step-000001 .*To begin again, remove"
    with pytest.raises(TrainingError, match=told):
        checkpoints.latest(tmp_path)


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (0, [], [1, 2, 3, 4, 5]),
        (2, [], [4, 5]),
        (2, [2], [2, 4, 5]),
        (2, [5, 9], [4, 5]),
        (1, [1, 3], [1, 3, 5]),
        (9, [], [1, 2, 3, 4, 5]),
    ],
)
def test_prune_keeps_the_newest_and_the_best(limit, keep, left, tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5)
    checkpoints.prune(tmp_path, limit, keep)
    assert checkpoints.steps(tmp_path) == left and not hidden(tmp_path)


def test_after_removes_what_comes_later(tmp_path):
    save(tmp_path, 1, 2, 3)
    checkpoints.after(tmp_path, 2)
    assert checkpoints.steps(tmp_path) == [1, 2]
    checkpoints.after(tmp_path, 0)
    assert checkpoints.latest(tmp_path) is None
    checkpoints.after(tmp_path / "gone", 0)


def test_tidy_removes_what_was_left_half_done_alone(tmp_path):
    save(tmp_path, 1)
    left = (".step-000002.0a1b2c3d.tmp", ".step-000001.0a1b2c3d.gone", ".a.0a1b2c3d4e5f6071.tmp")
    for name in left:
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "adapter" / "weights").write_bytes(b"x")
    (tmp_path / ".lock").write_text("")
    for name in (".mine", ".notes.new", ".draft.tmp"):
        (tmp_path / name).mkdir()
    checkpoints.tidy(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".draft.tmp", ".lock", ".mine", ".notes.new", "step-000001"]
    checkpoints.tidy(tmp_path / "gone")
