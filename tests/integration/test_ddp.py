"""DistributedDataParallel: two processes see what one process with the joint batch sees."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import a3fta_kernels as a3fta
from a3fta_kernels.adapters import DESIGNS

from .common import adapted_unet, adapter_grads, inputs, loss, randomize

RANKS = 2
PER_RANK = 2


def every_design():
    model = adapted_unet()
    for design in DESIGNS:
        a3fta.inject(model, a3fta.AdapterConfig(rank=4, design=design), name=design)
    randomize(model)
    return model.train()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    try:
        model = every_design()
        parallel = DistributedDataParallel(model, find_unused_parameters=False)
        batch = inputs(model, batch=RANKS * PER_RANK)
        mine = {k: v[rank * PER_RANK : (rank + 1) * PER_RANK] for k, v in batch.items()}
        found = []
        for _ in range(2):  # the second forward is where unused parameters would raise
            loss(parallel, mine).backward()
            found.append(adapter_grads(model))
            model.zero_grad(set_to_none=True)
        torch.save(found, Path(folder) / f"grads{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_get_the_gradients_of_the_joint_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(worker, args=(os.fspath(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"grads{rank}.pt") for rank in range(RANKS)]

    model = every_design()
    loss(model, inputs(model, batch=RANKS * PER_RANK)).backward()
    expected = adapter_grads(model)
    assert len(expected) == len(list(a3fta.trainable_parameters(model)))
    for step in range(2):
        assert ranks[0][step].keys() == expected.keys()
        for name, grad in expected.items():
            assert torch.equal(ranks[0][step][name], ranks[1][step][name]), name
            assert grad.abs().max() > 0, name
            torch.testing.assert_close(
                ranks[0][step][name], grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )
