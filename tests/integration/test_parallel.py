"""Two processes: DDP, accelerate, FSDP2. They see what one process with the joint batch sees.

One launch, and one test, serve all checks, as every process takes seconds to import: both run
TASKS, and CHECKS judge what they return.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import a3fta_kernels as a3fta
from a3fta_kernels.adapters import DESIGNS
from a3fta_kernels.projection import AdaptedProjection

from .common import adapted_unet, adapter_grads, inputs, loss, randomize, stock_unet

RANKS = 2
PER_RANK = 2
LEVELS = ("off", "exact", "block")
Grads = dict[str, Tensor]
Ranks = list[dict[str, Any]]  # by rank: what each task returned


def every_design() -> nn.Module:
    model = adapted_unet()
    for design in DESIGNS:
        a3fta.inject(model, a3fta.AdapterConfig(rank=4, design=design), name=design)
    randomize(model)
    return model.train()


def joint(model: nn.Module) -> dict[str, Tensor]:
    return inputs(model, batch=RANKS * PER_RANK)


def part(batch: dict[str, Tensor], index: int, count: int = RANKS) -> dict[str, Tensor]:
    return {name: value.chunk(count)[index] for name, value in batch.items()}


def ddp(rank: int, folder: Path) -> list[Grads]:
    model = every_design()
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    found = []
    for _ in range(2):  # the second forward is where unused parameters would raise
        loss(parallel, part(joint(model), rank)).backward()
        found.append(adapter_grads(model))
        model.zero_grad(set_to_none=True)
    return found


def ddp_lean(rank: int, folder: Path) -> Grads:
    model = adapted_unet().train()
    a3fta.lean(model, "block")
    parallel = DistributedDataParallel(model)
    loss(parallel, part(joint(model), rank)).backward()
    return adapter_grads(model)


def accelerate(rank: int, folder: Path) -> dict[str, Any]:
    """Two batches a step: the first backward stays in its process."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    stock = adapted_unet().train()
    optimizer = torch.optim.SGD(a3fta.trainable_parameters(stock), lr=0.1)
    model, optimizer = accelerator.prepare(stock, optimizer)
    halves = [part(part(joint(stock), rank), half, 2) for half in range(2)]
    local, joined = [], []
    for half in halves:
        with accelerator.accumulate(model):
            accelerator.backward(loss(model, half))
            (joined if accelerator.sync_gradients else local).append(adapter_grads(stock))
            optimizer.step()
            optimizer.zero_grad()
    folder = a3fta.save_adapter(model, folder / f"accelerate{rank}")
    return {"local": local, "joined": joined, "wrapped": type(model).__name__}


def shard(model: nn.Module, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    options = {} if policy is None else {"mp_policy": policy}
    for module in list(model.modules()):
        if isinstance(module, BasicTransformerBlock):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def gathered(model: nn.Module) -> Grads:
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}


def fsdp(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    fused: list[bool] = []
    unfused_reason = AdaptedProjection.unfused_reason
    for level in LEVELS:
        model = adapted_unet().train()
        a3fta.lean(model, level)
        shard(model)
        AdaptedProjection.unfused_reason = lambda self, *active: (
            fused.append(unfused_reason(self, *active) is None) or unfused_reason(self, *active)
        )
        loss(model, part(joint(model), rank)).backward()
        AdaptedProjection.unfused_reason = unfused_reason
        found[level] = gathered(model)
    return {"grads": found, "fused": fused}


def fsdp_half(rank: int, folder: Path) -> list[tuple[set, set]]:
    """A bf16 trunk beside fp32 adapters, and all of it cast to bf16 by FSDP2."""
    found = []
    for policy in (None, MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
        model = nn.Module.to(stock_unet(), torch.bfloat16)
        a3fta.inject(model, a3fta.AdapterConfig(rank=4))
        randomize(model)
        shard(model, policy)
        loss(model, part(joint(model), rank)).backward()
        grads = gathered(model)
        found.append(({g.dtype for g in grads.values()}, {bool(g.any()) for g in grads.values()}))
    return found


def fsdp_files(rank: int, folder: Path) -> dict[str, Any]:
    model = shard(adapted_unet())
    a3fta.save_adapter(model, folder / "sharded")
    dist.barrier()
    other = adapted_unet()
    with torch.no_grad():
        for parameter in a3fta.trainable_parameters(other):
            parameter.zero_()
    shard(other)
    a3fta.load_adapter(other, folder / "sharded")
    parameters = list(a3fta.trainable_parameters(other))
    refusals = {}
    for name, call in {
        "inject": lambda: a3fta.inject(model, name="late"),
        "merge": lambda: a3fta.merge(shard(adapted_unet(activation="identity"))),
        "lean": lambda: a3fta.lean(model, "exact"),
    }.items():
        with pytest.raises(ValueError) as error:
            call()
        refusals[name] = str(error.value)
    return {
        "sharded": {isinstance(p, DTensor) for p in parameters},
        "loaded": [p.full_tensor().detach() for p in parameters],
        "refusals": refusals,
        "kept": a3fta.freeze_for_inference(model),
        "late": [name for name, _ in model.named_parameters() if ".late." in name],
    }


def accelerate_fsdp(rank: int, folder: Path) -> dict[str, Any]:
    """accelerate's own preparation. On a CPU it takes DDP instead, so that is set by hand."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BasicTransformerBlock"], cpu_ram_efficient_loading=False,
    )  # fmt: skip
    model = adapted_unet().train()
    a3fta.lean(model, "block")  # the blocks are still found by their stock name
    optimizer = torch.optim.SGD(a3fta.trainable_parameters(model), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(loss(model, part(joint(model), rank)))
    grads = gathered(model)
    optimizer.step()
    a3fta.save_adapter(model, folder / "stepped")
    wrapped = [type(m).__name__ for m in model.modules() if "FSDPModule" in str(type(m).__mro__)]
    return {"grads": grads, "wrapped": wrapped}


TASKS: list[Callable[[int, Path], Any]] = [
    ddp, ddp_lean, accelerate, fsdp, fsdp_half, fsdp_files, accelerate_fsdp
]  # fmt: skip


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    dist.init_process_group("gloo")
    try:
        results = {task.__name__: task(rank, Path(folder)) for task in TASKS}
        torch.save(results, Path(folder) / f"results{rank}.pt")
    finally:
        dist.destroy_process_group()


def expected_grads(model: nn.Module) -> Grads:
    loss(model, joint(model)).backward()
    return adapter_grads(model)


def assert_close(found: Grads, expected: Grads, tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys() and expected
    for name, grad in expected.items():
        assert grad.norm() > 0, name
        assert (found[name] - grad).norm() <= tolerance * grad.norm(), name


def assert_equal(a: Grads, b: Grads) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def short(grads: Grads) -> Grads:
    """By the names that `adapter_grads` gives."""
    return {name.replace(".adapters.", "."): grad for name, grad in grads.items()}


def check_ddp_takes_every_design(ranks: Ranks, folder: Path) -> None:
    expected = expected_grads(every_design())
    assert len(expected) == len(list(a3fta.trainable_parameters(every_design())))
    for step in range(2):
        assert_equal(ranks[0]["ddp"][step], ranks[1]["ddp"][step])
        assert_close(ranks[0]["ddp"][step], expected)


def check_ddp_takes_lean_blocks(ranks: Ranks, folder: Path) -> None:
    assert_equal(ranks[0]["ddp_lean"], ranks[1]["ddp_lean"])
    assert_close(ranks[0]["ddp_lean"], expected_grads(adapted_unet().train()))


def check_accelerate_joins_gradients_at_the_last_batch_of_a_step(
    ranks: Ranks, folder: Path
) -> None:
    model = adapted_unet().train()
    expected = expected_grads(model)
    for rank in ranks:
        found = rank["accelerate"]
        assert found["wrapped"] == "DistributedDataParallel"
        assert len(found["local"]) == len(found["joined"]) == 1
        assert_close(found["joined"][0], expected)
    local = [rank["accelerate"]["local"][0] for rank in ranks]
    assert not any(torch.equal(local[0][name], local[1][name]) for name in expected)
    torch.optim.SGD(a3fta.trainable_parameters(model), lr=0.1).step()
    assert_saved(folder / "accelerate0", model)


def check_fsdp_gives_the_gradients_of_the_joint_batch(ranks: Ranks, folder: Path) -> None:
    expected = expected_grads(adapted_unet().train())
    for level in LEVELS:
        grads = [short(rank["fsdp"]["grads"][level]) for rank in ranks]
        assert_equal(*grads)
        assert_close(grads[0], expected)
    # inside the forward the weights are whole and plain: the fused op reads them
    assert ranks[0]["fsdp"]["fused"] and all(ranks[0]["fsdp"]["fused"])


def check_fsdp_takes_a_trunk_in_half_precision(ranks: Ranks, folder: Path) -> None:
    assert ranks[0]["fsdp_half"] == [({torch.float32}, {True})] * 2


def check_fsdp_files_hold_whole_tensors(ranks: Ranks, folder: Path) -> None:
    model = adapted_unet()
    assert_saved(folder / "sharded", model)
    for rank in ranks:
        found = rank["fsdp_files"]
        assert found["sharded"] == {True}
        wanted = list(a3fta.trainable_parameters(model))
        assert all(torch.equal(a, b) for a, b in zip(found["loaded"], wanted, strict=True))


def check_fsdp_refusals_change_nothing(ranks: Ranks, folder: Path) -> None:
    found = ranks[0]["fsdp_files"]
    said = found["refusals"]
    assert "got a DTensor in" in said["inject"] and "inject first" in said["inject"]
    assert "plain weights to merge into" in said["merge"] and "DTensor" in said["merge"]
    assert "fully_shard wrapped; lean first" in said["lean"]
    assert found["kept"] == 0 and found["late"] == []


def check_accelerate_prepares_fsdp(ranks: Ranks, folder: Path) -> None:
    model = adapted_unet().train()
    expected = expected_grads(model)
    assert_close(short(ranks[0]["accelerate_fsdp"]["grads"]), expected)
    blocks = sum(isinstance(m, BasicTransformerBlock) for m in model.modules())
    assert ranks[0]["accelerate_fsdp"]["wrapped"].count("FSDPBasicTransformerBlock") == blocks
    torch.optim.SGD(a3fta.trainable_parameters(model), lr=0.1).step()
    assert_saved(folder / "stepped", model)


def assert_saved(folder: Path, model: nn.Module) -> None:
    """The file loads into a model of one process, which then has this model's adapter."""
    other = stock_unet()
    a3fta.load_adapter(other, folder)
    pairs = zip(*(a3fta.trainable_parameters(m) for m in (other, model)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


CHECKS: list[Callable[[Ranks, Path], None]] = [
    check_ddp_takes_every_design,
    check_ddp_takes_lean_blocks,
    check_accelerate_joins_gradients_at_the_last_batch_of_a_step,
    check_fsdp_gives_the_gradients_of_the_joint_batch,
    check_fsdp_takes_a_trunk_in_half_precision,
    check_fsdp_files_hold_whole_tensors,
    check_fsdp_refusals_change_nothing,
    check_accelerate_prepares_fsdp,
]


def free_port() -> int:
    """One that is free now, and in a moment."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(worker, args=(free_port(), os.fspath(tmp_path)), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"results{rank}.pt") for rank in range(RANKS)]
    for check in CHECKS:
        check(ranks, tmp_path)
