"""A run on a GPU, from the command line: it learns, is counted, and goes on where it stopped."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from a3fta_kernels.train import records
from tests.examples import pipelines
from tests.train import runs_on_disk as runs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")


def command(folder: Path, *more: str) -> None:
    """In a process of its own, as the tests beside it keep theirs on the CPU."""
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [
            sys.executable, "-m", "a3fta_kernels", "finetune", "--model", str(folder / "pipeline"),
            "--data", str(folder / "photos"), "--output", str(folder / "run"), "--rank", "4",
            "--batch", "2", "--warmup", "0", "--learning-rate", "0.01", "--evaluate-every", "2",
            "--checkpoint-every", "2", "--sample-every", "4", "--sample-count", "2",
            "--sample-steps", "2", "--min-side", "8", "--heldout", "holdout", "--heldout-count",
            "2", *more,
        ],
        cwd=root, env=environment, check=True,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_of_replayed_graphs(precision, tmp_path):
    """The losses of a run without; and the same once more after an interruption."""
    found = {}
    for name, more in (("eager", ()), ("graph", ("--cuda-graph",))):
        folder = tmp_path / name
        folder.mkdir()
        runs.write_unet(folder)
        runs.write_photos(folder, 6)
        command(folder, "--mixed-precision", precision, "--steps", "6", *more)
        if more:
            command(folder, "--mixed-precision", precision, "--steps", "8", "--resume", *more)
        found[name] = [entry["loss"] for entry in records.read(folder / "run", records.LOG)]
    assert len(found["graph"]) == 8
    assert found["graph"][:6] == pytest.approx(found["eager"], rel=0.02)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_on_a_gpu(precision, tmp_path):
    runs.write_unet(tmp_path)
    runs.write_photos(tmp_path, 6)
    command(tmp_path, "--mixed-precision", precision, "--steps", "20")
    command(tmp_path, "--mixed-precision", precision, "--steps", "24", "--resume")
    log = records.read(tmp_path / "run", records.LOG)
    assert [entry["step"] for entry in log] == list(range(1, 25))
    assert all(math.isfinite(entry["loss"]) and entry["memory"] > 0 for entry in log)
    judged = [e["heldout_mean"] for e in records.read(tmp_path / "run", records.EVALUATIONS)]
    assert min(judged[1:]) < judged[0]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("more", [(), ("--cuda-graph",)], ids=["eager", "graph"])
def test_a_run_on_a_packed_base(more, tmp_path):
    """Of 4 bits, packed on the GPU; samples and evaluations multiply by them without gradients."""
    pytest.importorskip("bitsandbytes")
    pipelines.write_flux(tmp_path)
    runs.write_photos(tmp_path, 6, side=32)
    text = ("--resolution", "32", "--trigger", "a dog", "--lean", "block")
    packed = ("--mixed-precision", "bf16", "--quantize", "nf4")
    command(tmp_path, *text, *packed, "--steps", "6", *more)
    command(tmp_path, *text, *packed, "--steps", "8", "--resume", *more)
    log = records.read(tmp_path / "run", records.LOG)
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in log)
