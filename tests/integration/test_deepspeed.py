"""DeepSpeed's ZeRO in two processes on the CPU, where the package is installed.

It is no part of the test extra: its first launch compiles a communication library for a minute.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import a3fta_kernels as a3fta

from .common import adapted_unet, loss, stock_unet
from .test_parallel import RANKS, free_port, joint, part

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
LR = 0.1


def train(stage: int, rank: int, folder: Path) -> dict[str, Any]:
    import deepspeed

    model = adapted_unet().train()
    # on the CPU ZeRO-3 keeps small parameters whole unless it is told not to
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(a3fta.trainable_parameters(model)),
        optimizer=torch.optim.SGD(a3fta.trainable_parameters(model), lr=LR),
        config={
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        },
    )  # fmt: skip
    engine.backward(loss(engine, part(joint(model), rank)))
    engine.step()
    said = ""
    parameters = list(a3fta.trainable_parameters(engine))
    if stage == 3:
        for call in (a3fta.save_adapter, a3fta.load_adapter):
            with pytest.raises(ValueError, match="ZeRO-3") as error:
                a3fta.save_adapter(adapted_unet(), folder / f"whole{rank}")
                call(engine, folder / f"whole{rank}")
            said = str(error.value)
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            a3fta.save_adapter(engine, folder / f"zero3-{rank}")
            a3fta.load_adapter(engine, folder / f"whole{rank}")
        with deepspeed.zero.GatheredParameters(parameters):
            loaded = [p.detach().clone() for p in parameters]
    else:
        a3fta.save_adapter(engine, folder / f"zero2-{rank}")
        loaded = []
    return {"said": said, "loaded": loaded}


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import deepspeed

    deepspeed.init_distributed("gloo")
    results = {stage: train(stage, rank, Path(folder)) for stage in (2, 3)}
    torch.save(results, Path(folder) / f"results{rank}.pt")


@needs_deepspeed
@pytest.mark.timeout(600)
def test_a_step_is_that_of_the_joint_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(worker, args=(free_port(), os.fspath(tmp_path)), nprocs=RANKS)
    model = adapted_unet().train()
    before = [p.detach().clone() for p in a3fta.trainable_parameters(model)]
    loss(model, joint(model)).backward()
    torch.optim.SGD(a3fta.trainable_parameters(model), lr=LR).step()
    for rank in range(RANKS):
        results = torch.load(tmp_path / f"results{rank}.pt")
        assert "deepspeed.zero.GatheredParameters" in results[3]["said"]
        pairs = zip(results[3]["loaded"], before, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        for stage in (2, 3):
            other = stock_unet()
            a3fta.load_adapter(other, tmp_path / f"zero{stage}-{rank}")
            parameters = [a3fta.trainable_parameters(m) for m in (other, model)]
            for a, b, was in zip(*parameters, before, strict=True):
                assert (b - was).norm() > 0
                assert (a - b).norm() <= 1e-4 * (b - was).norm()
