from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .harness import Runner, Settings, entries

_settings = pytest.StashKey[Settings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("op benchmarks")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--bench-device", default=default, choices=("cpu", "cuda"))
    group.addoption("--bench-quick", action="store_true", help="few workloads, few rounds")
    group.addoption("--bench-threads", type=int, help="of the CPU")
    group.addoption("--bench-rank", type=int, help="workloads of this rank alone")
    group.addoption("--bench-without", default="", help="a pattern of variants to leave out")
    group.addoption("--bench-rows", type=Path, help="a file that each row is added to")
    group.addoption("--bench-minutes", type=float, default=1e9, help="no new group after this")


def pytest_configure(config: pytest.Config) -> None:
    quick = config.getoption("--bench-quick")
    if config.getoption("--bench-threads"):
        torch.set_num_threads(config.getoption("--bench-threads"))
    device = torch.device(config.getoption("--bench-device"))
    seconds = 0.1 if quick else (0.75 if device.type == "cpu" else 0.3)
    config.stash[_settings] = Settings(
        device,
        quick,
        config.getoption("--bench-minutes"),
        seconds,
        config.getoption("--bench-rank"),
        config.getoption("--bench-without"),
        config.getoption("--bench-rows"),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = metafunc.module.__name__.rpartition(".")[2].removeprefix("bench_")
    found = entries(op, metafunc.config.stash[_settings])
    metafunc.parametrize("entry", found, ids=str)


@pytest.fixture(scope="session")
def runner(pytestconfig: pytest.Config) -> Runner:
    return Runner(pytestconfig.stash[_settings])
