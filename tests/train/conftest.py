from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# bits are promised on the CPU; test_gpu.py runs where there is a GPU
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
# everything here, and below, is about the extra `train`
NEEDED = ("accelerate", "diffusers", "matplotlib", "PIL", "transformers", "yaml")
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session", autouse=True)
def few_objects_to_walk() -> Iterator[None]:
    """A run ends with a collection of garbage, which takes half a second among all that a test
    process has imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def accelerators(fresh_accelerate: Callable[[], None]) -> Callable[..., Any]:
    """Makes accelerators on the CPU, each as if it were the process's first."""
    import accelerate

    def make(**options: Any) -> Any:
        fresh_accelerate()
        return accelerate.Accelerator(cpu=True, **options)

    return make


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny pipeline on disk: "unet", "classes", "sd" or "sdxl"."""
    made: dict[str, str] = {}

    def folder(kind: str) -> str:
        from tests.examples.pipelines import write_sd, write_sdxl
        from tests.train.runs_on_disk import write_unet

        if kind not in made:
            path: Path = tmp_path_factory.mktemp(kind)
            if kind == "classes":
                write_unet(path, num_class_embeds=3)
            else:
                {"unet": write_unet, "sd": write_sd, "sdxl": write_sdxl}[kind](path)
            made[kind] = str(path / "pipeline")
        return made[kind]

    return folder


@pytest.fixture
def trainers(tmp_path: Path, accelerators: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a trainer of a new model, its adapter not at its start, and `setups.watch` of it."""
    import torch

    from a3fta_kernels.train.trainer import Trainer
    from tests.train import setups

    def make(
        folder: str = "run", family: Any = None, trained: bool = True, precision: str = "no",
        **changes: Any,
    ) -> tuple[Trainer, Any]:  # fmt: skip
        accelerator = accelerators(mixed_precision=precision)
        run = setups.make_run(
            tmp_path / folder, accelerator, family, mixed_precision=precision, **changes
        )
        trainer = Trainer(run)
        if trained:
            generator = torch.Generator().manual_seed(5)
            for parameter in trainer.parameters:
                parameter.data.normal_(0, 0.3, generator=generator)
        return trainer, setups.watch(run.family)

    return make
