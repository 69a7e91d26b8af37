"""The pages under docs/ that show code: all of it runs, on small models."""

from __future__ import annotations

import ast
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import a3fta_kernels as a3fta

from . import docs, models


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipelines = pytest.importorskip("tests.examples.pipelines")
    folder = tmp_path_factory.mktemp("sd")
    pipelines.write_sd(folder)
    return folder / "pipeline"


@pytest.fixture
def pipeline(written: Path) -> Any:
    """A tiny Stable Diffusion."""
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(written)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def page(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Runs docs/<name>.md, with `pipe` and what a loop has at hand."""
    text = torch.randn(2, 7, 32)
    latents = [torch.randn(2, 4, 16, 16) for _ in range(2)]

    def run(name: str, **names: Any) -> dict[str, Any]:
        given = dict(pipe=pipeline, text=text, noisy=latents[0], latents=latents[0])
        given["batches"] = [(x, text) for x in latents]
        return docs.run(f"docs/{name}.md", tmp_path, monkeypatch, given | names)

    return run


def saved(folder: Path, pipe: Any, seed: int) -> str:
    """The folder of an adapter that changes the pipeline."""
    a3fta.inject(pipe, a3fta.AdapterConfig(rank=4))
    models.randomize(pipe.unet, std=0.5, seed=seed)
    a3fta.save_adapter(pipe, folder)
    a3fta.eject(pipe)
    return str(folder)


@pytest.mark.usefixtures("fresh_accelerate")
def test_train(page: Callable[..., dict[str, Any]], tmp_path: Path):
    names = page("train")
    assert len(names["losses"]) == 6 and all(loss > 0 for loss in names["losses"])
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json"
    }  # fmt: skip


def test_sample(page: Callable[..., dict[str, Any]], pipeline: Any, tmp_path: Path):
    names = page("sample", folder=saved(tmp_path / "adapter", pipeline, 2))
    assert names["image"].tobytes() != names["stock"].tobytes()
    assert not a3fta.projections(pipeline.unet)


def test_combine(page: Callable[..., dict[str, Any]], pipeline: Any, tmp_path: Path):
    folders = {
        name: saved(tmp_path / name, pipeline, seed) for seed, name in enumerate(("anna", "ben"))
    }
    names = page("combine", **folders)
    assert len(names["images"]) == 3
    assert names["only_anna"].tobytes() != names["both"].tobytes()
    assert not a3fta.projections(pipeline.unet)


def test_export(
    page: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    page("export")
    assert {path.name for path in (tmp_path / "my-lora").iterdir()} == {
        "pytorch_lora_weights.safetensors", "kohya_lora.safetensors"
    }  # fmt: skip
    assert "expected linear adapters to merge" in capsys.readouterr().out


# pages whose code is not run, and why
NOT_RUN = {"docs/finetune.md": "it trains Stable Diffusion; tests/train/test_docs.py compiles it"}


def pages_run(code: str) -> set[str]:
    """The pages that the functions test_* of a file give to docs.run, docs.steps or page."""
    tests = [x for x in ast.parse(code).body if isinstance(x, ast.FunctionDef)]
    found = set()
    for node in (n for x in tests if x.name.startswith("test_") for n in ast.walk(x)):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called, name = ast.unparse(node.func), node.args[0].value
            if called in ("docs.run", "docs.steps"):
                found.add(name)
            elif called == "page":
                found.add(f"docs/{name}.md")
    return found


def test_every_page_with_code_is_run_somewhere():
    tests = (docs.ROOT / "tests").rglob("test_*.py")
    found = set().union(*(pages_run(path.read_text(encoding="utf-8")) for path in tests))
    names = {"README.md", *(f"docs/{path.name}" for path in (docs.ROOT / "docs").glob("*.md"))}
    assert found & names == {name for name in names if docs.blocks(name)} - set(NOT_RUN)


def test_a_mention_of_a_page_runs_nothing():
    code = "PAGE = 'docs/a.md'\ndef test():\n    docs.blocks('docs/b.md')\n"
    assert pages_run(code) == set()
    calls = "    docs.run('docs/a.md', {})\n    next(docs.steps('docs/b.md'))\n    page('c')\n"
    assert pages_run(f"def helper():\n{calls}") == set()
    assert pages_run(f"def test_it():\n{calls}") == {"docs/a.md", "docs/b.md", "docs/c.md"}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe = SimpleNamespace(unet=models.build("sd15"), components={})
    names = docs.run("docs/peft.md", tmp_path, monkeypatch, {"pipe": pipe})
    unet = names["unet"]
    assert unet is pipe.unet and list(unet.peft_config) == ["style", "lora"]
    assert {p.shape for p in names["trained"]} >= {torch.Size([16, 64]), torch.Size([64, 16])}
    assert {n for p in a3fta.projections(unet).values() for n in p.adapters} == {"ours"}
    files = {path.parent.name for path in tmp_path.rglob("adapter_model.safetensors")}
    assert files == {"style", "style-peft", "style-peft-again"}


def test_an_error_names_the_page_and_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\n```\n\nText.\n\n```python\ny = x\n1 / 0\n```\n")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    names: dict = {}
    with pytest.raises(ZeroDivisionError) as caught:
        docs.run("page.md", tmp_path, monkeypatch, names)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.lineno) == (str(page), 11) and names["y"] == 1
    page.write_text("# Nothing\n")
    with pytest.raises(AssertionError, match="no python blocks"):
        docs.run("page.md", tmp_path, monkeypatch, names)
