"""The end of a run: what it says of itself, and the chosen adapter in its place."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from ..inject import trainable_parameters
from . import checkpoints, optimizers, records
from .card import write_card
from .dataset import Data
from .errors import TrainingError
from .families import Family
from .loop import Result
from .report import write_report
from .settings import Settings

# where it stands in a run's folder
SUMMARY, ADAPTER = "summary.json", "adapter"


def summary(
    settings: Settings, family: Family, data: Data, result: Result, chosen: dict[str, Any],
    folds: list[dict[str, Any]], warnings: list[str],
) -> dict[str, Any]:  # fmt: skip
    import accelerate
    import diffusers

    versions = {
        "a3fta_kernels": sys.modules["a3fta_kernels"].__version__, "torch": torch.__version__,
        "diffusers": diffusers.__version__, "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    return {
        "chosen_step": chosen["step"],
        "why": chosen["why"],
        "folds_best": chosen["folds_best"],
        "steps_done": result.step,
        "stopped_early": result.stopped_early,
        "rule": data.split.rule,
        "fold_curves": folds,
        "parameters": sum(p.numel() for p in trainable_parameters(family.denoiser)),
        "placement": settings.adapter().placement,
        "resolution": settings.resolution or family.resolution,
        "learning_rate": optimizers.rate(settings),
        "base": settings.model,
        "family": family.name,
        "versions": versions,
        "warnings": warnings,
    }


def spent(output: Path) -> float:
    """Seconds of all steps, of folds too, in whatever process they were made."""
    runs = [output, *output.glob("folds/*")]
    return sum(entry["seconds"] for run in runs for entry in records.read(run, records.LOG))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def finish(output: Path, step: int, summary: dict[str, Any]) -> None:
    """The chosen checkpoint's adapter in its place, and what explains it."""
    chosen = checkpoints.place(output / "checkpoints", step)
    checkpoints.check(chosen)
    source = chosen / "adapter"
    new, target = output / f".{ADAPTER}.new", output / ADAPTER
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for file in source.iterdir():
        records.write(new / file.name, file.read_bytes())
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)
    records.write_json(output / SUMMARY, summary)
    write_report(output)
    write_card(output, target)


def push(adapter: Path, repository: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=adapter)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise TrainingError(
            f"push_to_hub: {repository} did not take the adapter, which lies in {adapter}: {error}"
        ) from error
