"""The pages under docs/ that show code: all of it runs, on small models."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import a3fta_kernels as a3fta

from . import docs, models


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe = SimpleNamespace(unet=models.build("sd15"), components={})
    names = docs.run("docs/peft.md", tmp_path, monkeypatch, {"pipe": pipe})
    unet = names["unet"]
    assert unet is pipe.unet and list(unet.peft_config) == ["style", "lora"]
    assert {p.shape for p in names["trained"]} >= {torch.Size([16, 64]), torch.Size([64, 16])}
    assert {n for p in a3fta.projections(unet).values() for n in p.adapters} == {"ours"}
    written = {path.parent.name for path in tmp_path.rglob("adapter_model.safetensors")}
    assert written == {"style", "style-peft", "style-peft-again"}


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
