from __future__ import annotations

import re

import pytest

from a3fta_kernels.study.table import Table, numbers, owned, shown
from a3fta_kernels.train.errors import TrainingError

COLUMNS = ("plan", "method", "seed", "steps")


def table(path, plan="abc"):
    return Table(path / "runs.csv", COLUMNS, ("method", "seed"), plan)


def line(method="full", seed=0):
    return {"method": method, "seed": seed, "steps": [25, 50.5]}


def test_lines_come_back(tmp_path):
    one = table(tmp_path)
    assert one.read() == []
    one.append(line())
    one.append(line(seed=1))
    assert [entry["seed"] for entry in table(tmp_path).read()] == ["0", "1"]
    assert numbers(one.read()[0]["steps"]) == [25, 50.5]
    assert one.name(one.read()[1]) == one.name(line(seed=1)) == ("full", "1")


def test_half_a_line_is_dropped_and_finished_ones_stay(tmp_path):
    one = table(tmp_path)
    one.append(line())
    whole = one.path.read_bytes()
    for cut in (1, 5, 9):
        one.path.write_bytes(whole + b"abc,full,1"[:cut])
        assert len(one.read()) == 1
        one.mend()
        assert one.path.read_bytes() == whole
    one.append(line(seed=1))
    assert len(one.read()) == 2


def test_half_a_heading_is_an_empty_file(tmp_path):
    one = table(tmp_path)
    one.path.write_text("plan,met")
    assert one.read() == []
    one.mend()
    one.append(line())
    assert len(one.read()) == 1


def test_another_plan_is_refused(tmp_path):
    table(tmp_path, "abc").append(line())
    with pytest.raises(TrainingError, match=r"runs.csv: line 2 is of plan abc, this is plan xyz"):
        table(tmp_path, "xyz").read()


@pytest.mark.parametrize(
    "text, told",
    [
        ("plan,method\nabc,full\n", "expected the columns plan, method, seed, steps, got plan"),
        ("plan,method,seed,steps\nabc,full\n", "line 2: expected 4 values, got 2"),
        ("plan,method,seed,steps\n" + "abc,full,0,1\n" * 2, re.escape("('full', '0')")),
    ],
)
def test_a_damaged_file_is_told(tmp_path, text, told):
    one = table(tmp_path)
    one.path.write_text(text)
    with pytest.raises(TrainingError, match=told):
        one.read()


def test_bytes_that_are_no_text_are_told(tmp_path):
    one = table(tmp_path)
    one.append(line())
    one.path.write_bytes(one.path.read_bytes() + b"\xff\n")
    with pytest.raises(TrainingError, match=r"runs\.csv: expected text in UTF-8"):
        one.read()


def test_a_folder_has_one_study_at_a_time(tmp_path):
    told = pytest.raises(TrainingError, match="in use by another study")
    with owned(tmp_path), told, owned(tmp_path):
        pass
    with owned(tmp_path):
        pass


def test_cells():
    assert shown(0.000123456) == "0.00012346"
    assert shown([1, 0.5, float("nan")]) == "1 0.5 nan"
    assert numbers("1 0.5")[1] == 0.5 and numbers("") == []
