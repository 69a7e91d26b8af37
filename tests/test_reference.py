"""`make docs`: every public name is on its page, with its docstring."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest


def documented(value: Any) -> bool:
    """Whether it has a docstring of its own: dataclasses and tuples with names make one up."""
    made_up = f"{value.__name__}("
    return bool(value.__doc__) and not value.__doc__.startswith(made_up)


def test_every_public_name_is_there(tmp_path):
    pytest.importorskip("pdoc")
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    reference = importlib.import_module("scripts.make_reference")
    reference.write(tmp_path)
    for page in reference.PAGES:
        module = importlib.import_module(f"a3fta_kernels{page}")
        file = tmp_path / f"{module.__name__.replace('.', '/')}.html"
        html = file.read_text(encoding="utf-8")
        for name in module.__all__:
            value = getattr(module, name)
            if not hasattr(value, "__path__"):  # packages have pages of their own
                assert f'id="{name}"' in html, f"{module.__name__}.{name}"
            if inspect.isroutine(value) or inspect.isclass(value):
                assert documented(value), f"{module.__name__}.{name}"
    found = {p.stem for p in (tmp_path / "a3fta_kernels").glob("*.html")}
    assert found == {page[1:] for page in reference.PAGES if page}
