"""What docs and README tell a user to type exists."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

import yaml

from a3fta_kernels import cli
from a3fta_kernels.train.settings import Settings
from tests import docs

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/finetune.md")
}
COMMANDS = ("finetune", "sample")


def blocks(language: str) -> list[tuple[str, str]]:
    return [(page, code) for page in PAGES for _, code in docs.blocks(page, language)]


def lines() -> list[str]:
    """The commands `a3fta finetune ...` and `a3fta sample ...`, continued lines joined."""
    found = []
    for _, code in blocks(""):
        joined = code.replace("\\\n", " ")
        found += [x for x in joined.splitlines() if re.match(rf"a3fta ({'|'.join(COMMANDS)}) ", x)]
    return found


def test_the_commands_parse():
    assert len(lines()) >= 4
    for line in lines():
        args = cli.build_parser().parse_args(shlex.split(line)[1:])
        if args.command == "finetune":
            from a3fta_kernels.train.settings import given

            Settings.from_dict(given(args))


def test_the_yaml_is_read():
    found = blocks("yaml")
    assert found
    for _, code in found:
        Settings.from_dict(yaml.safe_load(code))


def test_the_flags_exist():
    """Also those between the lines of the guide."""
    parser = cli.build_parser()
    sub = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    known = {
        flag
        for name in ("finetune", "sample", "plan")
        for action in sub.choices[name]._actions
        for flag in action.option_strings
    }
    told = set(re.findall(r"`[^`]*?(--[a-z][a-z-]+)", PAGES["docs/finetune.md"]))
    assert len(told) > 20
    assert told - known <= {"--no-build-isolation"}


def test_the_figures_are_of_the_recorded_run():
    """`python examples/finetune_digits.py --record docs/finetune.json` made them."""
    found = json.loads((ROOT / "docs" / "finetune.json").read_text())
    losses = dict(zip(found["steps"], found["heldout_mean"], strict=True))
    best, chosen = found["folds_best"], found["chosen_step"]
    assert losses[best] == min(v for step, v in losses.items() if step)
    assert f"step {best} of {max(losses)} is best" in PAGES["README.md"].replace("\n", " ")
    rise = round(100 * (losses[max(losses)] / losses[best] - 1))
    guide = " ".join(PAGES["docs/finetune.md"].split())
    assert f"best near step {best} and {rise} % worse at step {max(losses)}" in guide
    assert f"run, on all 20, ends at {chosen}" in guide
    assert all(abs(step - best) <= 25 for step in found["folds"].values())


def test_the_python_compiles_and_its_names_are_there():
    import a3fta_kernels.train as train

    code = next(code for page, code in blocks("python") if page == "docs/finetune.md")
    compile(code, "docs/finetune.md", "exec")
    names = re.search(r"from a3fta_kernels.train import (.*)", code)[1].split(", ")
    assert all(getattr(train, name) for name in names)
