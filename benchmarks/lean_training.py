"""What the lean levels do to a training run: `python -m benchmarks.lean_training`.

On the CPU, in fp32. An A3FTA adapter is trained with `a3fta demo`'s loop, on its 20 handwritten
digits, in two trunks:

    demo         the demo's pre-trained U-Net: convolutions, GroupNorm, attention; it has no
                 transformer block, so block does there what exact does, and compressed what block
                 with norms="int8" does
    transformer  a small conditional U-Net with transformer blocks (LayerNorm, GEGLU), pre-trained
                 here, once, on mirrored digits

Every level of one seed starts from the same weights and sees the same batches; seeds differ in the
adapter's initial values and in the batches, not in the digits nor in the held-out noise. Recorded
are the losses, and on the weights of the stock run, at steps along it, the gradient of every
adapter tensor at every level beside the stock one, on one batch. The verdict:

    gradients    exact, block: every cosine >= 1 - 1e-5; 8 bits: every cosine >= 0.999
    loss         exact, block: |final held-out loss - stock's of the same seed| <= 1e-4 of it;
                 8 bits: below the seed noise, the standard deviation of stock's over the seeds

Writes results/lean_training_cpu.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.cli.demo import base, compare, metrics, training
from a3fta_kernels.cli.demo import data as digits

from .lean_gradients import EIGHT_BITS, EXACT, LEVELS, loss_of, probe, set_level
from .measure import environment

RESULTS = Path(__file__).parent / "results"
ROUNDING, CLOSE = 1 - 1e-5, 0.999  # cosines
SAME_LOSS = 1e-4  # of the loss
RANK = 16


@dataclass(frozen=True)
class Options:
    steps: int = 40
    batch_size: int = 16
    seeds: tuple[int, ...] = (0, 1, 2)
    pretraining: int = 150
    heldout_per_class: int = 10


@dataclass
class Run:
    """train: the batch's loss at every step. heldout: by step. probes: of the stock run."""

    train: list[float] = field(default_factory=list)
    heldout: dict[int, float] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)


class Conditional(nn.Module):
    """A conditional U-Net whose text is four fixed tokens for each class."""

    def __init__(self) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.unet: Any = UNet2DConditionModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64),
            layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32,
            attention_head_dim=4, norm_num_groups=8,
        )  # fmt: skip
        self.tokens: Tensor
        self.register_buffer("tokens", torch.randn(digits.CLASSES, 4, 32))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Any:
        return self.unet(x, t, encoder_hidden_states=self.tokens[class_labels])


def pretrained(reference: digits.Digits, schedule: Any, steps: int) -> Conditional:
    """Every weight trained on mirrored digits, of which adaptation sees none."""
    torch.manual_seed(0)
    model = Conditional().train()
    mirrored = digits.Digits(reference.x.flip(-1), reference.y)
    stream = training.batches(mirrored, schedule, training.Settings(batch_size=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        loss = loss_of(model, next(stream))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def train(
    trunk: nn.Module, level: str, seed: int, data: digits.DemoData, schedule: Any, options: Options
) -> Run:
    """One run of the demo's loop; gradients are probed along the stock run."""
    settings = training.Settings(
        steps=options.steps, batch_size=options.batch_size, eval_every=options.steps, seed=seed
    )
    judge = training.FixedLoss(data.heldout, schedule, seed=0)
    probes = training.batches(data.train, schedule, replace(settings, seed=seed + 1000))
    n, run, model = options.steps, Run(), copy.deepcopy(trunk)
    a3fta_method = compare.methods(RANK, "auto")[0]

    def look(step: int) -> None:
        if step in (0, n // 4, n // 2, 3 * n // 4, n):
            run.heldout[step] = judge(model)
        if level == "stock" and step in (0, 1, n // 2, n):
            run.probes.append(probe(model.train(), step, next(probes), next(probes)))

    def prepare(model: nn.Module) -> list[nn.Parameter]:
        parameters = a3fta_method.prepare(getattr(model, "unet", model))
        set_level(model, level)
        look(0)
        return parameters

    def on_step(step: int, loss: float) -> None:
        run.train.append(loss)
        look(step)

    # the loop's own evaluations are not used: their noise differs between seeds
    few = digits.Digits(data.selection.x[:1], data.selection.y[:1])
    light = replace(data, selection=few, heldout=few)
    training.fine_tune(
        replace(a3fta_method, prepare=prepare), model, light, schedule, settings, on_step
    )
    return run


def kept_bytes(trunk: nn.Module, level: str, batch: tuple[Tensor, ...]) -> int:
    model = copy.deepcopy(trunk).train()
    compare.methods(RANK, "auto")[0].prepare(getattr(model, "unet", model))
    set_level(model, level)
    return metrics.saved_for_backward(model, *batch[:2], class_labels=batch[2])


def verdict(runs: dict[str, dict[int, Run]]) -> dict[str, Any]:
    """Of `runs` by level and seed; seed noise needs two seeds."""
    final = {lv: {s: r.heldout[max(r.heldout)] for s, r in of.items()} for lv, of in runs.items()}
    stock = final["stock"]
    noise = statistics.stdev(stock.values()) if len(stock) > 1 else None
    found: dict[str, Any] = {"seed noise": noise, "levels": {}}
    for level in (*EXACT, *EIGHT_BITS):
        probes = [
            {"seed": seed, "step": p["step"], **p["levels"][level]}
            for seed, run in runs["stock"].items()
            for p in run.probes
        ]
        seen = [
            {**tensor, "seed": p["seed"], "step": p["step"]}
            for p in probes
            for tensor in p["tensors"]
            if tensor["cosine"] < 1 or tensor["error"] is not None  # else zero, as in stock
        ]
        seen.sort(key=lambda tensor: tensor["cosine"])
        shifts = {s: loss - stock[s] for s, loss in final[level].items()}
        shift = max(map(abs, shifts.values()))
        least = ROUNDING if level in EXACT else CLOSE
        allowed = SAME_LOSS * min(stock.values()) if level in EXACT else noise
        found["levels"][level] = {
            "worst": seen[0],
            "gradients": seen[0]["cosine"] >= least,
            "below": [tensor for tensor in seen if tensor["cosine"] < least],
            "compared": len(seen),
            # of every tensor its lowest, over steps and seeds
            "min cosines": {t["tensor"]: t["cosine"] for t in reversed(seen)},
            "median cosine": statistics.median(tensor["cosine"] for tensor in seen),
            "min cosine, whole gradient": min(p["whole"] for p in probes),
            "final loss less stock's": shifts,
            "max shift": shift,
            "shift allowed": allowed,
            "loss": None if allowed is None else shift <= allowed,
        }
    return found


def brief(probe: dict[str, Any]) -> dict[str, Any]:
    """Of a probe's tensors only the one of the lowest cosine at each level."""
    levels = {
        level: {"whole": of["whole"], "worst": min(of["tensors"], key=lambda t: t["cosine"])}
        for level, of in probe["levels"].items()
    }
    return {**probe, "levels": levels}


def measure(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    began, began_cpu = time.perf_counter(), time.process_time()
    start = base.load()
    schedule = start.noise()
    data = digits.load(0, heldout_per_class=options.heldout_per_class)
    trunks = {
        "demo": start.model,
        "transformer": lambda: pretrained(data.reference, schedule, options.pretraining),
    }
    found: dict[str, Any] = {}
    for name, build in trunks.items():
        trunk = build()
        runs: dict[str, dict[int, Run]] = {level: {} for level in LEVELS}
        for seed in options.seeds:
            for level in LEVELS:
                runs[level][seed] = train(trunk, level, seed, data, schedule, options)
        batch = next(training.batches(data.train, schedule, training.Settings()))
        found[name] = {
            "kept bytes, batch 32": {level: kept_bytes(trunk, level, batch) for level in LEVELS},
            "verdict": verdict(runs),
            "probes": {s: [brief(p) for p in run.probes] for s, run in runs["stock"].items()},
            "losses": {
                level: {s: {"heldout": r.heldout, "train": r.train} for s, r in of.items()}
                for level, of in runs.items()
            },
        }
        tell(name, found[name], say)
    seconds = {"wall": time.perf_counter() - began, "cpu": time.process_time() - began_cpu}
    return {"options": vars(options) | {"rank": RANK}, "seconds": seconds, "trunks": found}


def tell(name: str, found: dict[str, Any], say: Callable[[str], None]) -> None:
    said = found["verdict"]
    words = {True: "met", False: "MISSED", None: "not judged"}
    say(f"{name}: CPU, fp32; seed noise of the final held-out loss {said['seed noise'] or 0:.2e}")
    kept = {level: n / 2**20 for level, n in found["kept bytes, batch 32"].items()}
    for level, of in said["levels"].items():
        worst = of["worst"]
        say(
            f"  {level}: keeps {kept[level]:.1f} of {kept['stock']:.1f} MiB\n"
            f"    cosines {words[of['gradients']]}: {len(of['below'])} of {of['compared']} below; "
            f"least {worst['cosine']:.7f}, step {worst['step']}, seed {worst['seed']}, "
            f"{worst['share']:.1e} of the gradient: {worst['tensor']}\n"
            f"    final loss {words[of['loss']]}: off by {of['max shift']:.1e} at most"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="lean levels in a training run, on the CPU")
    parser.add_argument("--steps", type=int, default=Options.steps)
    parser.add_argument("--batch-size", type=int, default=Options.batch_size)
    parser.add_argument("--seeds", type=int, default=len(Options.seeds))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "lean_training_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    import diffusers

    about = environment(torch.device("cpu")) | {"diffusers": diffusers.__version__}
    about |= {"a3fta_kernels": a3fta.__version__, "dtype": "float32"}
    options = Options(arguments.steps, arguments.batch_size, tuple(range(arguments.seeds)))
    found = {"environment": about, **measure(options)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    verdicts = [v for t in found["trunks"].values() for v in t["verdict"]["levels"].values()]
    return int(any(v["gradients"] is False or v["loss"] is False for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
