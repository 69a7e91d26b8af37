"""The command line: subcommands, exit codes, and errors that help."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from a3fta_kernels import cli
from a3fta_kernels.backends import BACKENDS
from a3fta_kernels.cli import demo, errors


def test_backends_names_each_backend_and_its_reason(capsys):
    assert cli.main(["backends", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(BACKENDS) < set(found)
    assert all(status["reason"] for status in found.values())


def test_backends_prints_a_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["backends"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*BACKENDS, "xformers", "runs on"))


def test_backends_without_rich(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", _without("rich"))
    assert cli.main(["backends"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed][: len(BACKENDS)] == list(BACKENDS)


def test_module_and_help():
    done = subprocess.run(
        [sys.executable, "-m", "a3fta_kernels", "--help"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom a3fta_kernels import cli\ncli.build_parser()\n"
        "print([m for m in ('diffusers', 'peft', 'sklearn', 'matplotlib', 'rich') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["demo", "--steps", "0"], "at least 1"),
        (["demo", "--rank", "many"], "many"),
        (["demo", "--backend", "abacus"], "abacus"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(argv, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("module", demo.NEEDS)
def test_a_missing_extra_is_named(module, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", _without(module))
    assert cli.main(["demo", "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert module in said
    assert 'pip install "a3fta-kernels[demo]"' in said
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert cli.main(["demo", "--quick", "--output", str(tmp_path / "taken")]) == 1
    assert "taken" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_require_passes_where_nothing_is_missing():
    errors.require(["json", "math"], "demo")
    with pytest.raises(errors.CommandError, match="no_such_module"):
        errors.require(["json", "no_such_module"], "demo")


def _without(missing):
    import importlib.util

    find = importlib.util.find_spec

    def spec(name, *rest):
        return None if name == missing else find(name, *rest)

    return spec
