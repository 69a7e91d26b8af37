"""`a3fta finetune`: flags and files, and failures of one line."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from a3fta_kernels import cli
from a3fta_kernels.cli import finetune as command
from a3fta_kernels.train.settings import Settings, read_yaml

PATHS = ("--model", "m", "--data", "d")


def run(*argv):
    return cli.main(["finetune", *map(str, argv)])


@pytest.fixture
def printed(capsys, tmp_path):
    """What --print-config prints, read back."""

    def printed(*argv):
        assert run("--print-config", *argv) == 0
        path = tmp_path / "printed.yaml"
        path.write_text(capsys.readouterr().out, encoding="utf-8")
        return Settings.from_dict(read_yaml(path))

    return printed


def test_the_settings_are_printed(printed):
    assert printed(*PATHS) == Settings(model="m", data="d")
    found = printed(*PATHS, "--no-buckets", "--steps", 7, "--learning-rate", "1e-4", "--flip",
                    "--sample-prompts", "a cat", "ein Kätzchen: süß", "--mixed-precision", "no",
                    "--resolution", 64, "--lean", "off")  # fmt: skip
    assert found == Settings(
        model="m", data="d", buckets=False, steps=7, learning_rate=1e-4, flip=True, lean="off",
        sample_prompts=("a cat", "ein Kätzchen: süß"), resolution=64,
    )  # fmt: skip


def test_flags_win_over_the_file(printed, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("model: a\ndata: b\nsteps: 5\nlearning-rate: 1e-3\nflip: true\nbatch: 3\n")
    found = printed("--config", path, "--steps", 9, "--no-flip", "--data", "c")
    assert found == Settings(
        model="a", data="c", steps=9, learning_rate=1e-3, flip=False, batch=3
    )  # fmt: skip
    # and what a printed file says is said again
    (tmp_path / "again.yaml").write_text(found.to_yaml())
    assert printed("--config", tmp_path / "again.yaml") == found


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "model: expected a path, got nothing"),
        (["--model", "m"], "data: expected a path, got nothing"),
        ([*PATHS, "--rank", "0"], "rank: expected at least 1, got 0"),
        ([*PATHS, "--ema", "nan"], "ema: expected a finite number, got nan"),
        ([*PATHS, "--budget", "1GiB"], "lean: expected auto beside a budget, got 'exact'"),
        ([*PATHS, "--rank-pattern", "attn"], "rank_pattern: expected REGEX=RANK, got 'attn'"),
        ([*PATHS, "--optimizer", "sgd"], "optimizer: expected one of adamw"),
        ([*PATHS, "--log-with", "paper"], "log_with: expected one of those installed"),
        ([*PATHS, "--model", "/nowhere"], "model: /nowhere cannot be loaded"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--config", "/"], "Is a directory"),
    ],
)
def test_failures_are_one_line(argv, told, capsys, tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    *_, error = captured.err.strip().splitlines()
    assert error.startswith("a3fta finetune: ") and told in error
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stepps: 3", "settings: there is no 'stepps'; did you mean steps?"),
        ("steps: many", "steps: expected an integer, got 'many'"),
        ("just text", "expected lines of name: value"),
        ("a: [", "expected YAML"),
    ],
)
def test_a_file_that_does_not_fit_is_named(text, told, capsys, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    assert run("--config", path, *PATHS) == 1
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--steps", "x"], "--steps: invalid int value: 'x'"),
        (["--lean", "most"], "--lean: invalid choice: 'most'"),
        (["--wings"], "unrecognized arguments: --wings"),
        (["--flip", "yes"], "unrecognized arguments: yes"),
        (["--sample-prompts"], "--sample-prompts: expected at least one argument"),
    ],
)
def test_wrong_usage(argv, told, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*PATHS, *argv)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_help_is_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for heading in (
        "base and photos:",
        "adapter:",
        "training:",
        "memory:",
        "watching:",
        "running:",
    ):
        assert f"\n{heading}\n" in text
    assert "SUPPRESS" not in text
    assert "aspect ratios (on)" in text and "optimizer steps (1000)" in text


def test_a_missing_extra_is_named(capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name)
    )
    assert run(*PATHS) == 1
    assert capsys.readouterr().err == (
        'a3fta finetune: needs accelerate: pip install "a3fta-kernels[train]"\n'
    )


def test_the_extra_brings_what_is_asked_for():
    """Else the advice above would not help."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def named(extra):
        for entry in extras[extra]:
            inner = re.match(r"a3fta-kernels\[([\w,]+)\]", entry)
            if inner:
                for name in inner[1].split(","):
                    yield from named(name)
            else:
                yield re.match(r"[\w-]+", entry)[0]

    brought = {{"pillow": "PIL", "pyyaml": "yaml"}.get(name, name) for name in named("train")}
    assert set(command.NEEDS) <= brought


def test_the_command_line_imports_nothing_heavy():
    code = (
        "import sys\nfrom a3fta_kernels import cli\n"
        "cli.main(['finetune', '--model', 'm', '--data', 'd', '--print-config'])\n"
        "print([m for m in ('diffusers', 'accelerate', 'transformers', 'PIL', 'matplotlib') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_one_process_of_several_says_where_it_lies(capsys, monkeypatch):
    train = pytest.importorskip("a3fta_kernels.train.recipe")
    import a3fta_kernels.train

    assert train
    monkeypatch.setattr(
        a3fta_kernels.train, "finetune", lambda settings, bars: Path("run/adapter"), raising=False
    )
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert run(*PATHS) == 0
        assert len(capsys.readouterr().out.splitlines()) == lines


def test_a_run_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("accelerate")
    runs = pytest.importorskip("tests.train.runs_on_disk")
    runs.write_unet(tmp_path)
    runs.write_photos(tmp_path, 3)
    path = tmp_path / "s.yaml"
    path.write_text(runs.settings(tmp_path, steps=2, heldout="none", sample_every=0).to_yaml())
    # what cannot be leaves no run behind that would have to go on
    for wrong in (["--targets", "nothing"], ["--lean", "auto", "--budget", "1KiB"]):
        assert run("--config", path, *wrong) == 1
    capsys.readouterr()
    assert run("--config", path) == 0
    captured = capsys.readouterr()
    folder = tmp_path / "run"
    assert captured.out == (
        f"{folder / 'adapter'}: the adapter and its card; {folder / 'report.html'}: how it went\n"
    )
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "report.html").is_file()
    assert "2/2" in captured.err and "loss" in captured.err and "s/step" in captured.err

    assert run("--config", path) == 1
    assert "has a run already; --resume goes on with it" in capsys.readouterr().err
    assert run("--config", path, "--resume", "--rank", 9) == 1
    assert "rank was 4, is 9" in capsys.readouterr().err
    assert run("--config", path, "--resume") == 0


@pytest.mark.parametrize(
    "words", ["CUDA out of memory. Tried\nand more", "cuDNN: unable to find an engine", "shapes"]
)
@pytest.mark.parametrize("name", ["finetune", "sample"])
def test_too_little_memory_is_told_in_a_line(name, words, monkeypatch, capsys, tmp_path):
    from a3fta_kernels import train

    def fails(*_, **__):
        raise RuntimeError(words)

    monkeypatch.setattr(train, name, fails, raising=False)
    beside = ["--data", "d"] if name == "finetune" else [
        "--adapter", "a", "--prompt", "p", "--out", str(tmp_path / "a.png")
    ]  # fmt: skip
    argv = [name, "--model", "m", *beside]
    if words == "shapes":  # another failure is no lack of memory
        with pytest.raises(RuntimeError, match="shapes"):
            cli.main(argv)
        return
    assert cli.main(argv) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert (
        said[-1].startswith(f"a3fta {name}: out of memory; ") and words.split("\n")[0] in said[-1]
    )


def test_an_interrupted_run_says_how_it_goes_on(capsys, monkeypatch):
    pytest.importorskip("a3fta_kernels.train.recipe")
    import a3fta_kernels.train

    def interrupted(settings, bars):
        raise KeyboardInterrupt

    monkeypatch.setattr(a3fta_kernels.train, "finetune", interrupted, raising=False)
    assert run(*PATHS) == 130
    assert "interrupted; the same with --resume goes on" in capsys.readouterr().err
