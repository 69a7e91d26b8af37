"""`a3fta ledger` and `a3fta plan` on a small model's folder."""

from __future__ import annotations

import json

import pytest

from a3fta_kernels import cli
from a3fta_kernels.cli import ledger_picture
from a3fta_kernels.memory import Entry, Ledger

from .. import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    models.build(
        "sd15", block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
    ).save_config(path)  # fmt: skip
    return str(path)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_the_ledger_prints_its_tables(folder, capsys):
    assert cli.main(["ledger", "--model", folder, "--rank", "4", "--depth", "1"]) == 0
    said = capsys.readouterr().out
    for words in (
        "UNet2DConditionModel", "128 x 128", "a3fta of rank 4", "saved for backward", "AdamW",
        "group_norm", "up_blocks", "gelu.input",
    ):  # fmt: skip
        assert words in said


def test_the_ledger_as_json_and_as_a_picture(folder, capsys, tmp_path):
    out = tmp_path / "new" / "ledger.png"
    common = ["ledger", "--model", folder, "--method", "full", "--resolution", "64", "--json"]
    assert cli.main([*common, "--batch", "2", "--out", str(out)]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["total"] == sum(entry["bytes"] for entry in whole["entries"])
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    assert cli.main([*common, "--batch", "2", "--level", "checkpointing"]) == 0
    lean = json.loads(capsys.readouterr().out)
    assert lean["total"] < whole["total"] / 2 and "checkpoint" in lean["by_operator"]
    assert cli.main([*common, "--batch", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] > 1.9 * whole["total"]


def test_the_plan_prints_what_fits(folder, capsys):
    common = ["plan", "--model", folder, "--rank", "4", "--workers", "1", "--allowance", "700MiB"]
    one = ["--precision", "bf16", "--level", "stock"]
    assert cli.main([*common, "--memory", "800MiB", *one]) == 0
    said = capsys.readouterr().out
    assert "parallel, rank 4" in said  # what `a3fta finetune` trains
    assert "stock" in said and "the largest batch that fits" in said
    assert cli.main([*common, "--memory", "800MiB", "--level", "stock", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert [row["level"] for row in read["rows"]] == ["stock", "stock"]
    assert f" {read['rows'][0]['batch']} │" in said


def test_a_memory_that_fits_nothing_is_told_what_would(folder, capsys):
    common = ["plan", "--model", folder, "--workers", "1", "--precision", "bf16"]
    common += ["--level", "block"]
    assert cli.main([*common, "--memory", "700MiB"]) == 1
    said = capsys.readouterr()
    assert "memory: 700 MiB fit nothing; batch 1 needs at least" in said.err
    assert "with level block in bf16" in said.err and "none" in said.out


@pytest.mark.parametrize("command", [["ledger"], ["plan", "--memory", "8GiB", "--workers", "1"]])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "sd7"], "expected one of sd15"),
        (["--model", "sd15", "--resolution", "500"], "a multiple of 64"),
        (["--model", "{plain}", "--method", "a3fta"], "a model with attention layers"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(command, options, says, capsys, tmp_path):
    plain = models.unet2d(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
    )  # fmt: skip
    plain.save_config(tmp_path)
    options = [option.format(plain=tmp_path) for option in options]
    assert cli.main([*command, *options]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert says in said[-1] and said[-1].startswith(f"a3fta {command[0]}: ")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["ledger"], "--model"),
        (["ledger", "--model", "sd15", "--level", "thin"], "thin"),
        (["ledger", "--model", "sd15", "--batch", "0"], "at least 1"),
        (["plan", "--model", "sd15"], "--memory"),
        (["plan", "--model", "sd15", "--memory", "plenty"], "such as 12GiB"),
    ],
)
def test_wrong_usage(argv, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("module", ["diffusers", "peft", "rich", "matplotlib"])
def test_a_missing_package_is_named(module, folder, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == module else find(name, *rest),
    )
    argv = ["ledger", "--model", folder, "--method", "lora", "--out", "never.png"]
    assert cli.main(argv) == 1
    assert f"needs {module}" in capsys.readouterr().err


def test_the_levels_of_a_picture():
    def of(*modules: str) -> dict[str, list[str]]:
        return ledger_picture.levels(
            Ledger(tuple(Entry(m, "mul", "self", (1,), "int8", 1) for m in modules))
        )

    assert of("conv_in", "down_blocks.0.a", "mid_block.b", "down_blocks.0.c") == {
        "down_blocks.0": ["down_blocks.0.a", "down_blocks.0.c"],
        "mid_block": ["mid_block.b"],
        "other layers": ["conv_in"],
    }
    many = of(*(f"blocks.{i}" for i in range(38)))
    assert list(many)[:2] == ["blocks.0-2", "blocks.3-5"]
    assert list(many)[-1] == "blocks.36-37"
    assert len(many) <= ledger_picture.LEVELS and sum(map(len, many.values())) == 38
    assert of() == {}


def test_a_folder_s_name_is_no_markup(folder, capsys, tmp_path):
    import shutil

    odd = shutil.copytree(folder, tmp_path / "un[b]e[/x]t")
    assert cli.main(["ledger", "--model", str(odd), "--rank", "4", "--resolution", "64"]) == 0
    assert "un[b]e[/x]t" in "".join(capsys.readouterr().out.split())
    out = str(tmp_path / "ledger.xyz")
    assert cli.main(["ledger", "--model", folder, "--out", out]) == 1
    assert "out: expected a picture's name such as ledger.png" in capsys.readouterr().err
