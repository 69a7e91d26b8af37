from __future__ import annotations

import importlib.util

import pytest

NEEDED = ("diffusers", "matplotlib", "peft", "PIL", "scipy", "sklearn", "transformers", "yaml")
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def subject():
    """A model of milliseconds and 60 images of two classes."""
    from tests.study.tiny import make

    return make()
