"""A pytest plugin for tests on a GPU: a failure is told at once, a lost context ends its process.

After an illegal access every further call in the process fails, whatever it is. pytest-xdist starts
a new process in the place of one that ended, and blames the test that it ran.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

LOST = (
    "an illegal memory access was encountered",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert triggered",
    # a capture that broke off
    "captures_underway",
    "stream is capturing",
)


class Watch:
    def __init__(self, worker: bool) -> None:
        self.worker = worker  # of pytest-xdist; its reports are told by the process that gets them

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.failed:
            return
        text = str(report.longrepr)
        lost = any(reason in text for reason in LOST)
        if lost or not self.worker:
            errors = [line for line in text.splitlines() if line.startswith("E ")]
            why = errors[0][1:].strip() if errors else text[-200:].strip()
            print(f"\nfailed: {report.nodeid}: {why}", file=sys.__stderr__, flush=True)
        if lost and self.worker:
            os._exit(1)
        if lost:
            pytest.exit("the GPU's context is lost: no further test can run in this process")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Watch(worker=hasattr(config, "workerinput")))
