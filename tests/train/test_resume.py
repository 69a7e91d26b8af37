"""A run that is killed at random moments, and goes on, ends as one that is not.

SIGKILL comes after a random time, or in the middle of a random disk operation: opening, syncing,
renaming, removing. A3FTA_FUZZ_KILLS says how many kills each run survives (3).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from a3fta_kernels.train import Settings, TrainingError, finetune, records
from tests.train import runs_on_disk as runs

KILLS = int(os.environ.get("A3FTA_FUZZ_KILLS", "3"))
# what a run does to the disk, by the functions that do it
DISK = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that have imported everything before they begin."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["a3fta_kernels.train.recipe", "tests.train.runs_on_disk"])
    return context


def child(settings: Settings, operations: int | None) -> None:
    """Runs to its end, or until SIGKILL at the given disk operation."""
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    left = [operations]

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] is not None:
                left[0] -= 1
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in DISK:
        setattr(os, name, counted(getattr(os, name)))
    finetune(settings)


def started(processes: Any, settings: Settings, operations: int | None = None) -> Any:
    process = processes.Process(target=child, args=(settings, operations))
    process.start()
    return process


def ended(run: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on its history."""
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    state = torch.load(last / "training.pt", weights_only=True)
    logs = {
        str(path.relative_to(run)): [
            {k: v for k, v in entry.items() if k not in ("seconds", "memory")}
            for entry in records.read(path.parent, path.name)
        ]
        for path in sorted(run.rglob("*.jsonl"))
    }
    pictures = {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted((run / "samples").rglob("*.png"))
    }
    return {"adapter": adapter, "state": _plain(state), "logs": logs, "pictures": pictures}


def _plain(value: Any) -> Any:
    """Tensors as lists, so that == compares."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value


CASES = {
    "holdout": {"heldout": "holdout", "heldout_count": 2, "dropout": 0.2, "ema": 0.9, "steps": 12},
    "folds": {
        "heldout": "kfold", "folds": 2, "schedule": "cosine", "warmup": 2, "accumulate": 2,
        "flip": True, "checkpoint_every": 1,
    },
}  # fmt: skip


@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", CASES)
def test_kills_leave_no_trace(case, tmp_path, processes):
    runs.write_unet(tmp_path)
    runs.write_photos(tmp_path, 6)
    unbroken = runs.settings(tmp_path, **CASES[case])
    began = time.monotonic()
    process = started(processes, unbroken)
    process.join()
    seconds = time.monotonic() - began
    assert process.exitcode == 0
    expected = ended(tmp_path / "run")

    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    killed = replace(unbroken, output=str(tmp_path / "killed"), resume=True)
    kills = 0
    while kills < KILLS:
        by_disk = draw.random() < 0.7
        process = started(processes, killed, draw.randrange(1, 90) if by_disk else None)
        if not by_disk:
            time.sleep(draw.uniform(0, seconds))
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), f"seed {seed}"
        kills += process.exitcode != 0
        if process.exitcode == 0 and kills < KILLS:  # it came to its end: begin another
            assert ended(tmp_path / "killed") == expected, f"seed {seed}"
            killed = replace(killed, output=str(tmp_path / f"killed-{kills}"))
    process = started(processes, killed)
    process.join()
    assert process.exitcode == 0, f"seed {seed}"
    assert ended(Path(killed.output)) == expected, f"seed {seed}"
    left = [p.name for p in Path(killed.output).rglob(".*") if p.name != ".lock"]
    assert not left, f"seed {seed}"


def test_a_run_that_would_end_later_is_not_another_run(tmp_path):
    """More steps of a constant rate: the same as if they had been asked for at once."""
    runs.write_unet(tmp_path)
    runs.write_photos(tmp_path, 4)
    options = {"heldout": "none", "schedule": "constant", "warmup": 0}
    short = runs.settings(tmp_path, steps=4, **options)
    finetune(short)
    finetune(replace(short, steps=6, resume=True))
    finetune(replace(short, steps=6, output=str(tmp_path / "long")))
    resumed, long = ended(tmp_path / "run"), ended(tmp_path / "long")
    assert resumed["adapter"] == long["adapter"] and resumed["state"] == long["state"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"learning_rate": 1e-3}, "learning_rate was 0.01, is 0.001"),
        ({"rank": 8, "seed": 1}, "rank was 4, is 8; seed was 0, is 1"),
        ({"schedule": "linear"}, "schedule was"),
    ],
)
def test_other_settings_do_not_resume(change, told, tmp_path):
    runs.write_unet(tmp_path)
    runs.write_photos(tmp_path, 3)
    first = runs.settings(tmp_path, steps=2, heldout="none", sample_every=0)
    finetune(first)
    before = ended(tmp_path / "run")
    with pytest.raises(TrainingError, match=told):
        finetune(replace(first, resume=True, **change))
    with pytest.raises(TrainingError, match="has a run already; --resume"):
        finetune(first)
    assert ended(tmp_path / "run") == before


def test_other_photos_do_not_resume(tmp_path):
    runs.write_unet(tmp_path)
    runs.write_photos(tmp_path, 3)
    first = runs.settings(tmp_path, steps=2, heldout="none", sample_every=0)
    finetune(first)
    (tmp_path / "photos" / "1.png").unlink()
    with pytest.raises(TrainingError, match=r"data: expected the photos .* began with.*1\.png"):
        finetune(replace(first, resume=True))


def test_other_numbers_of_processes_do_not_resume(tmp_path):
    """They would see other batches."""
    runs.write_unet(tmp_path)
    runs.write_photos(tmp_path, 3)
    first = runs.settings(tmp_path, steps=2, heldout="none", sample_every=0)
    finetune(first)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    state = torch.load(checkpoint / "training.pt", weights_only=True)
    assert state["processes"] == 1
    torch.save({**state, "processes": 2}, checkpoint / "training.pt")
    facts = json.loads((checkpoint / "state.json").read_text())
    digest = hashlib.sha256((checkpoint / "training.pt").read_bytes()).hexdigest()
    facts["files"]["training.pt"] = digest
    (checkpoint / "state.json").write_text(json.dumps(facts))
    with pytest.raises(TrainingError, match=r"expected 2 processes, .* began, got 1"):
        finetune(replace(first, resume=True))


def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
    runs.write_unet(tmp_path)
    runs.write_photos(tmp_path, 3)
    first = runs.settings(tmp_path, heldout="none", sample_every=0)
    finetune(first)
    expected = ended(tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "step-000006" / "training.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    finetune(replace(first, resume=True))
    assert "step-000006 is damaged: training.pt is not what was saved" in caplog.text
    assert ended(tmp_path / "run") == expected


def test_two_runs_do_not_share_a_folder(tmp_path):
    import fcntl

    runs.write_unet(tmp_path)
    runs.write_photos(tmp_path, 3)
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match="in use by another run"):
            finetune(runs.settings(tmp_path))


def test_folds_that_found_another_step_later(tmp_path, monkeypatch):
    """More steps may bring the folds to an earlier best than the last run has reached: it then
    goes back to a checkpoint before, or begins again."""
    from a3fta_kernels.train import monitor

    runs.write_unet(tmp_path)
    runs.write_photos(tmp_path, 4)
    options = {"heldout": "kfold", "folds": 2, "schedule": "constant", "sample_every": 0}
    chosen = {"step": 4}
    monkeypatch.setattr(
        monitor, "average",
        lambda curves, weights: [{"step": chosen["step"], "heldout_mean": 1.0}],
    )  # fmt: skip
    first = runs.settings(tmp_path, steps=4, **options)
    finetune(first)
    # two folds: as many passes over all photos are twice the steps, if there are so many
    for best, step in ((6, 6), (2, 4)):
        chosen["step"] = best
        finetune(replace(first, steps=6, resume=True))
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["chosen_step"] == summary["steps_done"] == step
        assert [e["step"] for e in records.read(tmp_path / "run", records.LOG)][-1] == step
        finetune(replace(first, steps=6, output=str(tmp_path / f"at-once-{step}")))
        adapters = [
            (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
            for name in ("run", f"at-once-{step}")
        ]
        assert adapters[0] == adapters[1]
