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
import torch.nn.functional as F
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.cli.demo import base, compare, metrics, training
from a3fta_kernels.cli.demo import data as digits

from .measure import environment

RESULTS = Path(__file__).parent / "results"
LEVELS = {
    "stock": ("off", "input"),
    "exact": ("exact", "input"),
    "block": ("block", "input"),
    "compressed": ("compressed", "input"),
    "block, norms in 8 bits": ("block", "int8"),
}
EXACT = ("exact", "block")
EIGHT_BITS = ("compressed", "block, norms in 8 bits")
ROUNDING, CLOSE = 1 - 1e-5, 0.999  # cosines
SAME_LOSS = 1e-4  # of the loss
RANK = 16

Batch = tuple[Tensor, ...]  # noisy, t, labels, target


@dataclass(frozen=True)
class Options:
    steps: int = 60
    batch_size: int = 16
    seeds: tuple[int, ...] = (0, 1, 2)
    pretraining: int = 200
    heldout_per_class: int = 20


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


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    noisy, t, labels, target = batch
    return F.mse_loss(model(noisy, t, class_labels=labels).sample, target)


def set_level(model: nn.Module, level: str) -> None:
    lean, norms = LEVELS[level]
    a3fta.lean(getattr(model, "unet", model), lean, norms=norms)


def gradients(model: nn.Module, level: str, batch: Batch) -> dict[str, Tensor]:
    """By tensor, flat and in float64, of a copy of the model at a level."""
    model = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    set_level(model, level)
    loss_of(model, batch).backward()
    return {
        name: p.grad.flatten().double()
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }


def cosine(a: Tensor, b: Tensor) -> float:
    """1 where both are zero, as w_down's gradient is before the first step; 0 where one is."""
    norms = a.norm() * b.norm()
    return float(a @ b / norms) if norms > 0 else float(not a.any() and not b.any())


def probe(model: nn.Module, step: int, batch: Batch, other: Batch) -> dict[str, Any]:
    """Gradients of all levels beside the stock ones, and those of another batch beside both.

    `share` is the worst tensor's norm, of that of the whole gradient.
    """
    stock = gradients(model, "stock", batch)
    elsewhere = gradients(model, "stock", other)
    whole = torch.cat(list(stock.values()))
    found: dict[str, Any] = {
        "step": step,
        "zero": sum(not g.any() for g in stock.values()),
        "other batch": statistics.median(cosine(elsewhere[n], g) for n, g in stock.items()),
        "levels": {},
    }
    for level in LEVELS:
        if level == "stock":
            continue
        grads = gradients(model, level, batch)
        assert grads.keys() == stock.keys()
        cosines = {n: cosine(grads[n], g) for n, g in stock.items()}
        worst = min(cosines, key=lambda n: cosines[n])
        errors = [(grads[n] - g).norm() / g.norm() for n, g in stock.items() if g.any()]
        found["levels"][level] = {
            "whole": cosine(torch.cat(list(grads.values())), whole),
            "min": cosines[worst],
            "worst": worst,
            "share": float(stock[worst].norm() / whole.norm()),
            "max error": float(max(errors)),
            "cosines": cosines,
        }
    return found


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


def kept_bytes(trunk: nn.Module, level: str, batch: Batch) -> int:
    model = copy.deepcopy(trunk).train()
    compare.methods(RANK, "auto")[0].prepare(getattr(model, "unet", model))
    set_level(model, level)
    return metrics.saved_for_backward(model, *batch[:2], class_labels=batch[2])


def verdict(runs: dict[str, dict[int, Run]]) -> dict[str, Any]:
    """`runs` by level and seed; seed noise needs two seeds."""
    final = {lv: {s: list(r.heldout.values())[-1] for s, r in of.items()} for lv, of in runs.items()}
    stock = final["stock"]
    noise = statistics.stdev(stock.values()) if len(stock) > 1 else None
    probes = [p for run in runs["stock"].values() for p in run.probes]
    found: dict[str, Any] = {"seed noise": noise, "levels": {}}
    for level in (*EXACT, *EIGHT_BITS):
        seen = [p["levels"][level] for p in probes]
        worst = min(seen, key=lambda s: s["min"])
        moved = {s: loss - stock[s] for s, loss in final[level].items()}
        shift = max(abs(d) for d in moved.values())
        least = ROUNDING if level in EXACT else CLOSE
        allowed = SAME_LOSS * min(stock.values()) if level in EXACT else noise
        found["levels"][level] = {
            "min cosine": worst["min"],
            "worst tensor": worst["worst"],
            "its share": worst["share"],
            "min cosine, whole gradient": min(s["whole"] for s in seen),
            "max relative error": max(s["max error"] for s in seen),
            "gradients": worst["min"] >= least,
            "final loss less stock's": moved,
            "max shift": shift,
            "shift allowed": allowed,
            "loss": None if allowed is None else shift <= allowed,
        }
    return found


def by_tensor(stock: dict[int, Run]) -> dict[str, dict[str, float]]:
    """The lowest cosine of every tensor over steps and seeds, at every level."""
    found: dict[str, dict[str, float]] = {}
    for one in (p for run in stock.values() for p in run.probes):
        for level, seen in one["levels"].items():
            least = found.setdefault(level, {})
            for name, value in seen.pop("cosines").items():
                least[name] = min(value, least.get(name, 1.0))
    return found


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
            "min cosines": by_tensor(runs["stock"]),
            "probes": {s: run.probes for s, run in runs["stock"].items()},
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
    for level, of in said["levels"].items():
        say(
            f"  {level:22s} min cosine {of['min cosine']:.7f} {words[of['gradients']]} "
            f"({of['worst tensor']}); final loss off by {of['max shift']:.1e} at most, "
            f"{words[of['loss']]}; keeps {found['kept bytes, batch 32'][level] / 2**20:.1f} of "
            f"{found['kept bytes, batch 32']['stock'] / 2**20:.1f} MiB"
        )


def rounded(found: Any) -> Any:
    """Losses, bytes and cosines with nine digits."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [rounded(value) for value in found]
    return float(f"{found:.9g}") if isinstance(found, float) else found


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
    found = rounded({"environment": about, **measure(options)})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    verdicts = [v for t in found["trunks"].values() for v in t["verdict"]["levels"].values()]
    return int(any(v["gradients"] is False or v["loss"] is False for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
