"""What is shipped: versions, wheel and sdist, the README's code, the Makefile's documentation."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import a3fta_kernels as a3fta

from . import docs, models

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_one_version_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+", a3fta.__version__)
    assert f"\n## [{a3fta.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {a3fta.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"Version {a3fta.__version__}:" in README


def test_the_promise_of_the_version_is_written_down():
    assert "What a version promises" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The project without what was built in it: builders write beside the sources."""
    copy = tmp_path_factory.mktemp("tree") / "project"
    skip = shutil.ignore_patterns(
        ".git",
        ".venv*",
        "build",
        "dist",
        "outputs",
        "*.egg-info",
        "__pycache__",
        "*.so",
        ".*_cache",
    )
    shutil.copytree(ROOT, copy, ignore=skip)
    return copy


def build(tree: Path, hook: str, out: Path) -> Path:
    """Calls a hook of the build backend, as pip does, without compiling."""
    code = f"from setuptools import build_meta as b; b.build_{hook}({str(out)!r})"
    environment = {"A3FTA_NATIVE": "0", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next(out.iterdir())


def test_sdist_and_the_wheel_from_it(tree, tmp_path):
    sdist = build(tree, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = next((tmp_path / "unpacked").iterdir())
    for folder in ("a3fta_kernels", "benchmarks", "csrc", "docs", "examples", "scripts", "tests"):
        expected = {p.relative_to(tree) for p in (tree / folder).rglob("*") if p.is_file()}
        found = {p.relative_to(unpacked) for p in (unpacked / folder).rglob("*")}
        assert not expected - found, f"the sdist lacks {sorted(map(str, expected - found))}"
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "Makefile", "setup.py"):
        assert (unpacked / name).is_file(), f"the sdist lacks {name}"

    wheel = build(unpacked, "wheel", tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        scripts = archive.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    expected = {
        str(p.relative_to(tree)) for p in (tree / "a3fta_kernels").rglob("*") if p.is_file()
    }
    shipped = {n for n in names if ".dist-info/" not in n}
    assert shipped == expected
    assert f"Version: {a3fta.__version__}" in metadata
    assert "License-Expression: MIT" in metadata
    assert "a3fta = a3fta_kernels.cli:main" in scripts
    check_triton_alone(wheel, tmp_path / "installed")


ALONE = """
import torch, a3fta_kernels as a3fta
status = a3fta.backends()
assert "not built" in status["native"].reason, status["native"]
tensors = [torch.randn(s, requires_grad=True) for s in ((2, 5, 16), (4, 16), (16, 4))]
weight = torch.randn(12, 16)
results = []
for backend in ("reference", "triton"):
    y = a3fta.ops.adapter_linear(*tensors, weight, backend=backend)
    results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
for a, b in zip(*results):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
print(a3fta.__file__)
"""


def check_triton_alone(wheel: Path, folder: Path) -> None:
    """A wheel without the library, in a process of its own: kernels in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(folder)


def test_a_wheel_with_the_library_is_abi3(tree):
    """Asked of the builder itself, which does not compile for the answer."""
    code = """
from distutils.core import run_setup
dist = run_setup("setup.py", stop_after="commandline")
command = dist.get_command_obj("bdist_wheel")
command.ensure_finalized()
print("tag", "-".join(command.get_tag()[:2]))
"""
    environment = {"CXX": "c++", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", f"import setuptools\n{code}"],
        cwd=tree, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "tag cp311-abi3"


def test_the_requirements_leave_torch_alone():
    """Nothing that is installed may ask for another torch, or for CUDA."""
    project = PROJECT["project"]
    pinned = [d for d in project["dependencies"] if d.startswith("torch")]
    assert pinned == ["torch>=2.10"]
    assert not any(d.startswith("torch") for d in PROJECT["build-system"]["requires"])
    extras = project["optional-dependencies"]
    named = {re.match(r"[\w-]+", d)[0] for group in extras.values() for d in group}
    assert not named & {"torch", "torchvision", "torchaudio"}
    assert not [name for name in named if name.startswith(("nvidia", "cuda"))]


def test_the_table_of_versions():
    """docs/versions.md has the ranges of pyproject.toml, and what was tested lies in them. What it
    says was tested is not looked at: other versions may be here."""
    from packaging.specifiers import SpecifierSet

    extras = [r for extra in PROJECT["project"]["optional-dependencies"].values() for r in extra]
    asked = {*PROJECT["project"]["dependencies"], *extras}
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z]+) \| `(.*?)` \| (.*?) \| .* \|$", page, re.MULTILINE)
    assert len(rows) > 10
    for name, accepted, tested in rows:
        assert f"{name}{accepted}" in asked, name
        version, _, how = tested.partition(", ")
        assert how in ("", "by hand"), name
        assert tested.startswith("none: ") or version in SpecifierSet(accepted), name


def test_the_code_of_the_readme_runs(monkeypatch, tmp_path):
    import diffusers

    torch.manual_seed(0)
    unet = models.sd15()
    stock = {name: p.clone() for name, p in unet.state_dict().items()}
    monkeypatch.setattr(
        diffusers.StableDiffusionPipeline, "from_pretrained", lambda _: SimpleNamespace(unet=unet)
    )
    noisy, noise = torch.randn(2, 2, 4, 16, 16)
    text = torch.randn(2, 7, 32)
    names: dict = {}
    page = docs.steps("README.md", tmp_path, monkeypatch, names)
    next(page)  # the op
    next(page)
    first = names["step"](noisy, torch.tensor([3, 500]), text, noise)
    second = names["step"](noisy, torch.tensor([3, 500]), text, noise)
    assert second < first
    with torch.no_grad():
        trained = unet(noisy, 3, text).sample
    next(page)
    with torch.no_grad():
        assert torch.equal(unet(noisy, 3, text).sample, trained)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    a3fta.eject(unet)
    names["inputs"] = dict(sample=noisy, timestep=3, encoder_hidden_states=text)
    with torch.no_grad():
        untouched = unet(**names["inputs"]).sample
    next(page)
    with torch.no_grad():
        torch.testing.assert_close(unet(**names["inputs"]).sample, untouched)
    assert next(page, None) is None
    a3fta.lean(unet, "off")
    a3fta.eject(unet)
    assert all(torch.equal(p, stock[name]) for name, p in unet.state_dict().items())


@pytest.mark.parametrize("modulated", [False, True])
def test_the_equation_of_the_readme_is_the_op(modulated):
    names: dict = {}
    exec(docs.blocks("README.md")[0][1], names)
    torch.manual_seed(0)
    h, residual = torch.randn(2, 5, 16), torch.randn(2, 5, 12)
    tensors = [torch.randn(s) for s in [(4, 16), (16, 4), (12, 16), (12,), (4,), (16,)]]
    options = {"residual": residual, "scale": 0.5}
    if modulated:
        options |= {"gamma": torch.randn(2, 4), "beta": torch.randn(2, 4)}
    y = names["adapter_linear"](h, *tensors, **options)
    torch.testing.assert_close(a3fta.ops.adapter_linear(h, *tensors, **options), y)


def targets() -> dict[str, str]:
    return dict(re.findall(r"^([a-z]+):.*?## (.+)$", MAKEFILE, re.MULTILINE))


def test_every_target_is_documented():
    phony = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)[1].split()
    assert set(targets()) == set(phony) - {"FORCE"}


# how CONTRIBUTING shortens what stands in an environment's bin
SHORT = {"pip": "pip", "ruff": "ruff", "mypy": "mypy", "a3fta": "a3fta_kernels"}


def commands(cell: str) -> list[str]:
    """Those of a cell of CONTRIBUTING's table, in full."""
    found = re.findall(r"`(.+?)`", re.sub(r" \(.*\)$", "", cell))
    pattern = rf"^({'|'.join(SHORT)}) "
    return [
        re.sub(pattern, lambda word: f"python -m {SHORT[word[1]]} ", f"{x} ").strip() for x in found
    ]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_contributing_has_the_commands_of_every_target():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = dict(re.findall(r"^\| `make (\w+)` \| (.+) \|$", page, re.MULTILINE))
    assert set(rows) == set(targets()) - {"help"}
    for target, cell in rows.items():
        # of all but the set-up: without the set-up
        options = ["-B"] if target == "setup" else ["-o", "setup", "PYTHON=python"]
        done = subprocess.run(
            ["make", "-n", *options, "PY=python", target],
            cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = [line.strip() for line in done.stdout.splitlines()]
        if target == "setup":  # which asks and remembers things besides
            assert all(any(x in line for line in lines) for x in commands(cell)), target
        else:
            assert commands(cell) == lines, target


def test_the_files_that_targets_run_exist():
    for path in re.findall(r"\$\(PY(?:THON)?\) ([\w/]+\.py)", MAKEFILE):
        assert (ROOT / path).is_file(), f"the Makefile runs {path}, which is missing"


def test_files_that_the_readme_names_exist():
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    paths = re.findall(r"`((?:examples|scripts|benchmarks)/[\w./]+)`", README)
    commands = re.findall(r"`python ([\w./]+\.py)", README)
    assert links and paths and commands
    for name in [*links, *paths, *commands]:
        assert (ROOT / name).exists(), f"the README names {name}, which is missing"


def test_the_memory_table_is_what_was_counted():
    from benchmarks.count_saved import LORA, NATIVE

    counted = json.loads((ROOT / "benchmarks/results/saved_bytes.json").read_text())["rows"]
    tables = dict(re.findall(r"^\| (\S+ \d+x\d+) \| (.+) \|$", README, re.MULTILINE))
    assert set(tables) == {row["model"] for row in counted}
    columns = [
        "stock", "exact", "compressed", "recompute", "block", "block-int8", "checkpointing"
    ]  # fmt: skip
    for model, cells in tables.items():
        rows = {(r["method"], r["level"]): r for r in counted if r["model"] == model}
        ours = NATIVE if (NATIVE, "stock") in rows else LORA
        weights = rows[ours, "stock"]["frozen_bytes"]
        found = [rows[LORA, "stock"], *(rows[ours, level] for level in columns)]
        expected = [f"{weights / 2**20:,.0f}"]
        expected += [
            f"{r['saved_bytes'] / 2**20:,.0f} ({r['peak_bytes'] / 2**20:,.0f})" for r in found
        ]
        assert cells.split(" | ") == expected
        if model.startswith("SD") and "medium" not in model:
            # weights, gradients and two moments, in fp32
            states = f"{rows[NATIVE, 'stock']['trainable_parameters'] * 16 / 2**20:.0f}"
            assert f" {states} " in README[README.index("gradients and AdamW take") :][:100]


def test_the_table_of_steps_is_what_was_measured():
    rows = json.loads((ROOT / "benchmarks/results/step_nvidia-h200.json").read_text())["rows"]
    for label, method, variant in (
        ("PEFT LoRA r16", "PEFT LoRA r16", "stock"),
        ("A3FTA r64, `exact`", "A3FTA r64", "exact"),
        ("PEFT LoRA r16, graph", "PEFT LoRA r16", "graph"),
        ("A3FTA r64, `exact`, graph", "A3FTA r64", "exact, graph"),
        ("A3FTA r64, `block` with 8-bit norms, graph", "A3FTA r64", "block-int8, graph"),
    ):
        cells = [label]
        for model in ("SDXL 1024x1024", "SD1.5 512x512"):
            key = (model, 4, method, variant)
            names = ("model", "batch_size", "method", "variant")
            row = next(r for r in rows if tuple(r[n] for n in names) == key)
            peak = row["peak_bytes"]
            told = "" if peak is None else f" ({peak / 2**20:,.0f})"
            cells.append(f"{row['q50_us'] / 1e3:.0f}{told}")
        assert f"| {' | '.join(cells)} |" in README


def test_the_count_is_reproduced():
    if not a3fta.backends()["native"].available:
        pytest.skip("counted with the compiled library, which is not here")
    from benchmarks.count_saved import MODELS, NATIVE, kept_bytes

    counted = json.loads((ROOT / "benchmarks/results/saved_bytes.json").read_text())["rows"]
    key = ("SD1.5 512x512", NATIVE, "block-int8")
    row = next(r for r in counted if (r["model"], r["method"], r["level"]) == key)
    assert (
        dict(zip(("model", "method", "level"), key, strict=True))
        | kept_bytes(MODELS[key[0]], *key[1:])
        == row
    )


def test_ci_runs_what_a_user_runs():
    """On a library for fewer GPUs, which is quicker built."""
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines.pop(-2) == 'export A3FTA_CUDA_ARCHS="${A3FTA_CUDA_ARCHS:-80+PTX 90a}"'
    assert lines.pop(-2).startswith("# ")
    assert lines == [
        "#!/usr/bin/env bash",
        "set -euo pipefail",
        'cd "$(dirname "$0")/.."',
        "exec make test",
    ]


def test_the_steps_of_a_plan_are_as_many_as_the_readme_says():
    from a3fta_kernels.memory.plan import runs

    assert f"a plan, of {runs()} steps, in minutes" in README


def test_every_public_name_is_in_the_changelog_or_the_readme():
    told = README + (ROOT / "CHANGELOG.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    untold = [name for name in a3fta.__all__ if name not in told]
    assert not untold
