"""A pytest plugin: tests that need an optional package which is not installed are skipped, visibly.

`make test` installs every package and does without this; a machine with a GPU and no network may
lack some. A package that is installed and fails to import stays an error.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Generator
from typing import Any

import pytest

OPTIONAL = ("triton", "diffusers", "transformers", "accelerate", "peft", "safetensors", "sklearn",
            "matplotlib", "PIL", "rich", "yaml", "datasets", "prodigyopt", "bitsandbytes",
            "tensorboard", "xformers", "mypy", "ruff", "build")  # fmt: skip


def absent(name: str | None) -> bool:
    root = (name or "").partition(".")[0]
    return root in OPTIONAL and importlib.util.find_spec(root) is None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: Any) -> Generator[None, Any, Any]:
    report = yield
    found = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", str(report.longrepr))
    if report.failed and found and absent(found[1]):
        reason = f"Skipped: {found[1]} is not installed"
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, reason)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:
    report = yield
    error = call.excinfo.value if call.excinfo else None
    if report.failed and isinstance(error, ModuleNotFoundError) and absent(error.name):
        reason = f"Skipped: {error.name} is not installed"
        report.outcome, report.longrepr = "skipped", (str(item.path), 1, reason)
    return report
