from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small pipeline of common.PIPELINES; nothing writes there."""
    from tests.train.families import common

    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            common.PIPELINES[name](written[name])
        return written[name] / "pipeline"

    return folder


@pytest.fixture
def load(pipeline: Callable[[str], Path]) -> Callable[..., Any]:
    """A family of a freshly loaded pipeline."""
    from a3fta_kernels.train import families

    def loaded(name: str, dtype: torch.dtype = torch.float32) -> Any:
        return families.load(str(pipeline(name)), dtype)

    return loaded
