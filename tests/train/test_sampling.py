"""sample: a grid of base and adapters from the same noise, and `a3fta sample`."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from a3fta_kernels import cli
from a3fta_kernels.adapters import AdapterConfig
from a3fta_kernels.inject import inject, trainable_parameters
from a3fta_kernels.storage import save_adapter
from a3fta_kernels.train import TrainingError, sample
from a3fta_kernels.train.families import load
from a3fta_kernels.train.sampling import _MARGIN, _TITLE, grid

SIDE = {"sd": 32, "unet": 16, "classes": 16}


@pytest.fixture(scope="module")
def adapters(pipelines, tmp_path_factory):
    """The folder of an adapter of that pipeline, one for each seed."""
    made = {}

    def folder(kind, seed=0):
        if (kind, seed) not in made:
            denoiser = load(pipelines(kind), torch.float32).denoiser
            inject(denoiser, AdapterConfig(rank=4))
            generator = torch.Generator().manual_seed(seed)
            for parameter in trainable_parameters(denoiser):
                parameter.data.normal_(0, 0.5, generator=generator)
            made[kind, seed] = str(
                save_adapter(denoiser, tmp_path_factory.mktemp(f"{kind}-{seed}-"))
            )
        return made[kind, seed]

    return folder


def cells(page, side):
    """The pictures of the page, row by row."""
    step = (side + _MARGIN, side + _TITLE + _MARGIN)
    columns = (page.width - _MARGIN) // step[0]
    count = (page.height - _MARGIN - _TITLE) // step[1]
    return [
        [
            np.asarray(page.crop((x, y, x + side, y + side)), dtype=int)
            for x in range(_MARGIN, _MARGIN + columns * step[0], step[0])
        ]
        for y in range(_MARGIN + 2 * _TITLE, _MARGIN + 2 * _TITLE + count * step[1], step[1])
    ]


def same(ours, theirs):
    return all(
        abs(a - np.asarray(b, dtype=int)).max() <= 1 for a, b in zip(ours, theirs, strict=True)
    )


@pytest.fixture
def drawn(pipelines):
    def drawn(kind, adapters, prompts=(), **options):
        page = sample(
            pipelines(kind), adapters, prompts,
            **{"steps": 2, "count": 3, "resolution": SIDE[kind]} | options,
        )  # fmt: skip
        return cells(page, SIDE[kind])

    return drawn


def test_the_first_row_is_the_stock_pipeline(drawn, pipelines, adapters):
    base, adapted = drawn("sd", [(adapters("sd"), 1.0)], ["a cat", "two dogs"], seed=5)
    stock = DiffusionPipeline.from_pretrained(pipelines("sd"))
    stock.set_progress_bar_config(disable=True)
    expected = [
        stock(
            words, width=32, height=32, num_inference_steps=2, guidance_scale=5.0,
            generator=torch.Generator().manual_seed(5 + i),
        ).images[0]
        for i, words in enumerate(["a cat", "two dogs", "a cat"])
    ]  # fmt: skip
    assert same(base, expected) and len(base) == 3
    assert not same(adapted, expected)


def test_a_row_for_each_adapter_and_one_together(drawn, adapters):
    one, two = adapters("unet"), adapters("unet", 1)
    base, first, second, together = drawn("unet", [(one, 1.0), (two, 0.5)])
    alone = drawn("unet", [(two, 0.5)])
    assert same(alone[0], base) and same(alone[1], second)
    rows = [base, first, second, together]
    assert not any(same(a, b) for i, a in enumerate(rows) for b in rows[:i])


def test_a_weight_of_nothing_is_the_base(drawn, adapters):
    one, two = adapters("unet"), adapters("unet", 1)
    base, nothing, second, together = drawn("unet", [(one, 0.0), (two, 1.0)])
    assert same(nothing, base) and same(together, second) and not same(second, base)


def test_columns_share_their_noise(drawn, adapters):
    one = [(adapters("unet"), 1.0)]
    base, adapted = drawn("unet", one, seed=4)
    later = drawn("unet", one, seed=5)
    assert same(later[0][:2], base[1:]) and same(later[1][:2], adapted[1:])
    together = drawn("unet", one, seed=4, batch=3)
    assert same(together[0], base) and same(together[1], adapted)


def test_classes_are_asked_by_number(drawn, adapters):
    one = [(adapters("classes"), 1.0)]
    turns = drawn("classes", one)
    asked = drawn("classes", one, ["2", "0"])
    assert same(asked[0][1:2], drawn("classes", one, ["1", "0"])[0][1:2])
    assert not same(asked[0], turns[0])


def test_every_prompt_has_a_column(drawn, adapters):
    rows = drawn("classes", [(adapters("classes"), 1.0)], ["0", "1", "2", "0", "1"], count=2)
    assert [len(row) for row in rows] == [5, 5]


def edited(folder, tmp_path):
    """The adapter with a bit of its weights flipped."""
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    blob = bytearray((copy / "adapter_model.safetensors").read_bytes())
    blob[-9] ^= 1
    (copy / "adapter_model.safetensors").write_bytes(blob)
    return str(copy)


@pytest.mark.parametrize(
    ("kind", "prompts", "options", "told"),
    [
        ("unet", ["a cat"], {}, "prompt: expected none, as this model takes none"),
        ("sd", [], {}, "prompt: expected at least one for this model, got none"),
        ("classes", ["3"], {}, r"prompt: expected classes 0\.\.2 for this model, got '3'"),
        ("classes", ["-1"], {}, r"got '-1'"),
        ("classes", ["²"], {}, r"got '²'"),
        ("classes", ["cat"], {}, r"got 'cat'"),
        ("unet", [], {"resolution": 17}, "resolution: expected a multiple of 2 .* got 17"),
    ],
)
def test_what_does_not_fit_is_named(drawn, adapters, kind, prompts, options, told):
    with pytest.raises(TrainingError, match=told):
        drawn(kind, [(adapters(kind), 1.0)], prompts, **options)


def test_adapters_that_do_not_fit_are_named(drawn, adapters, tmp_path):
    with pytest.raises(TrainingError, match=r"gone.adapter_model\.safetensors"):
        drawn("unet", [(str(tmp_path / "gone"), 1.0)])
    with pytest.raises(TrainingError, match="UNet2DConditionModel"):
        drawn("unet", [(adapters("sd"), 1.0)])
    with pytest.raises(TrainingError, match="expected contents of SHA-256"):
        drawn("unet", [(edited(adapters("unet"), tmp_path), 1.0)])


def test_another_base_has_to_be_allowed(pipelines, adapters, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(pipelines("unet"))
    for parameter in pipe.unet.parameters():
        parameter.data.mul_(1.1)
    pipe.save_pretrained(tmp_path / "other")
    options = {"steps": 1, "count": 1}
    with pytest.raises(TrainingError, match="base"):
        sample(str(tmp_path / "other"), [(adapters("unet"), 1.0)], [], **options)
    sample(str(tmp_path / "other"), [(adapters("unet"), 1.0)], [], allow_other_base=True, **options)


def test_long_titles_are_cut():
    white = Image.new("RGB", (40, 40), "white")
    page = grid([("base", [white, white])], ["a" * 500, "b"])
    plain = grid([("base", [white, white])], ["", "b"])
    assert page.size == plain.size
    # the first column's title ends before the second column begins
    gap = (_MARGIN + 40, 0, _MARGIN + 40 + _MARGIN, page.height)
    assert page.crop(gap).getextrema() == ((255, 255),) * 3
    assert page.tobytes() != plain.tobytes()


def test_titles_of_several_lines_are_one():
    rows = [("base", [Image.new("RGB", (80, 40), "white")])]
    assert grid(rows, ["a\n b"]).tobytes() == grid(rows, ["a b"]).tobytes()


def run(*argv):
    return cli.main(["sample", *map(str, argv)])


def test_the_command_writes_a_grid(pipelines, adapters, tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    argv = ["--model", pipelines("unet"), "--count", 2, "--steps", 1, "--out", out]
    argv += ["--adapter", f"{adapters('unet')}=0.5", "--adapter", adapters("unet", 1)]
    assert run(*argv) == 0
    page = Image.open(out)
    assert len(cells(page, 16)) == 4
    assert capsys.readouterr().out == f"{out}: {page.width} x {page.height}\n"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--adapter", "/nowhere"], "/nowhere"),
        (["--model", "/nowhere"], "model: /nowhere cannot be loaded"),
        (["--prompt", "a cat"], "prompt: expected none"),
        (["--out", "grid"], "out: expected a picture's name such as samples.png, got grid"),
        (["--out", "grid.txt"], "got grid.txt"),
        (["--resolution", "9"], "resolution: expected a multiple of 2"),
        (
            ["--out", "/proc/grid.png"],
            "out: expected a file that can be written, got /proc/grid.png",
        ),
        (["--steps", "5000"], "the pipeline does not draw this: "),
    ],
)
def test_the_command_s_failures_are_one_line(pipelines, adapters, capsys, changes, told):
    argv = ["--model", pipelines("unet"), "--adapter", adapters("unet"), "--steps", 1]
    assert run(*argv, *changes) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("a3fta sample: ") and told in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", ("a", 1.0)), ("a=0.5", ("a", 0.5)), ("a=b", ("a=b", 1.0)), ("a=b=-1", ("a=b", -1.0))],
)
def test_an_adapter_s_weight_follows_its_folder(text, expected):
    from a3fta_kernels.cli.sample import _adapter

    assert _adapter(text) == expected


def test_an_adapter_s_folder_may_look_like_a_weight(tmp_path):
    from a3fta_kernels.cli.sample import _adapter

    (tmp_path / "rate=3").mkdir()
    assert _adapter(f"{tmp_path}/rate=3") == (f"{tmp_path}/rate=3", 1.0)
    assert _adapter(f"{tmp_path}/rate=3=0.5") == (f"{tmp_path}/rate=3", 0.5)


@pytest.mark.parametrize("weight", ["nan", "inf"])
def test_a_weight_that_is_no_number_is_wrong_usage(capsys, weight):
    with pytest.raises(SystemExit) as stop:
        run("--model", "m", "--adapter", f"a={weight}")
    assert stop.value.code == 2
    assert "expected FOLDER or FOLDER=WEIGHT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--seed", "99999999999", "expected an integer from 0 to 4294967295, got 99999999999"),
        ("--guidance", "nan", "expected a finite number, got nan"),
        ("--count", "abc", "expected an integer of at least 1, got abc"),
    ],
)
def test_numbers_are_told_what_they_may_be(capsys, option, value, told):
    with pytest.raises(SystemExit):
        run("--model", "m", "--adapter", "a", option, value)
    assert told in capsys.readouterr().err


def test_adapters_of_two_runs_have_names_of_their_own():
    from a3fta_kernels.train.sampling import _name

    assert [_name(x) for x in ("/a/dog/adapter", "/a/cat/adapter/", "/a/mine")] == [
        "dog/adapter", "cat/adapter", "mine"
    ]  # fmt: skip


def test_a_picture_that_is_there_stays_until_another_is_drawn(tmp_path):
    from a3fta_kernels.cli.errors import CommandError, check_writable

    there, new = tmp_path / "there.png", tmp_path / "new" / "a.png"
    there.write_bytes(b"picture")
    check_writable("out", there)
    check_writable("out", new)
    assert there.read_bytes() == b"picture" and not new.exists() and new.parent.is_dir()
    with pytest.raises(
        CommandError, match=r"out: expected a file that can be written, got .*a.png"
    ):
        check_writable("out", there / "a.png")
