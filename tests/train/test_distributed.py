"""Two processes over gloo train what one does in two batches per step."""

from __future__ import annotations

import multiprocessing
import os
import socket
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from a3fta_kernels.train import Settings, finetune, records
from tests.train import runs_on_disk as runs


def process(settings: Settings, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port),
        "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    finetune(settings)


def together(settings: Settings) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["a3fta_kernels.train.recipe", "tests.train.runs_on_disk"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [context.Process(target=process, args=(settings, rank, port)) for rank in (0, 1)]
    for one in both:
        one.start()
    return both


def losses(folder: str, name: str, key: str) -> list[float]:
    from pathlib import Path

    return [entry[key] for entry in records.read(Path(folder), name)]


def test_two_processes_are_one_with_two_batches(tmp_path):
    runs.write_unet(tmp_path)
    runs.write_photos(tmp_path, 6)
    # one size: else the two batches of a step would have to be of the same
    alone = runs.settings(
        tmp_path, heldout="holdout", heldout_count=2, accumulate=2, buckets=False, flip=True,
        prior_weight=0.5,
    )  # fmt: skip
    both = together(replace(alone, accumulate=1, output=str(tmp_path / "two")))
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0]
    finetune(alone)
    for name, key in (
        (records.LOG, "loss"), (records.LOG, "grad_norm"), (records.EVALUATIONS, "heldout_mean"),
    ):  # fmt: skip
        one, two = losses(alone.output, name, key), losses(str(tmp_path / "two"), name, key)
        assert len(one) > 3 and two == pytest.approx(one, rel=1e-5)
    ours, theirs = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (tmp_path / "run", tmp_path / "two")
    )
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4)


def test_both_stop_where_one_cannot_go_on(tmp_path):
    runs.write_unet(tmp_path)
    (tmp_path / "photos").mkdir()
    both = together(runs.settings(tmp_path))
    for one in both:
        one.join(60)
    assert all(one.exitcode not in (0, None) for one in both)
