"""One training loop for every method, and the methods that the demo compares."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import DemoData, Digits

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Settings:
    """The same for every method, except for the learning rate."""

    steps: int = 500
    batch_size: int = 32
    warmup: int = 20
    eval_every: int = 25
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """`prepare(model)` makes a fresh base ready to train and returns what trains."""

    key: str
    label: str
    lr: float
    prepare: Callable[[nn.Module], list[nn.Parameter]]


@dataclass
class Losses:
    """Losses on fixed noise and timesteps, at the steps in `steps`."""

    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    selection: list[float] = field(default_factory=list)
    heldout: list[float] = field(default_factory=list)


@dataclass
class Run:
    """What came out: `model` is at its last step, `best_state` at its best selection loss."""

    method: Method
    model: nn.Module
    trainable: int
    losses: Losses
    best_step: int
    best_state: dict[str, Tensor]
    steps_per_second: float

    def at_best(self) -> nn.Module:
        """Puts the model back to its best step."""
        self.model.load_state_dict(self.best_state)
        return self.model


def full_tuning(model: nn.Module) -> list[nn.Parameter]:
    return list(model.requires_grad_(True).parameters())


def lora(rank: int) -> Callable[[nn.Module], list[nn.Parameter]]:
    def prepare(model: nn.Module) -> list[nn.Parameter]:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS))
        inject_adapter_in_model(config, model.requires_grad_(False))
        return [p for p in model.parameters() if p.requires_grad]

    return prepare


class FixedLoss:
    """The denoising loss of a set on noise and timesteps that never change.

    Each image is seen `repeats` times; the timesteps are spread evenly over the schedule, so
    that two sets, and two models, are judged at the same noise levels.
    """

    def __init__(self, digits: Digits, schedule: Any, seed: int, repeats: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, self.labels = digits.x.repeat(repeats, 1, 1, 1), digits.y.repeat(repeats)
        noise = torch.randn(x.shape, generator=generator)
        spread = torch.randperm(len(x), generator=generator) + 0.5
        self.t = (spread * schedule.config.num_train_timesteps / len(x)).long()
        self.noisy = schedule.add_noise(x, noise, self.t)
        self.target = schedule.get_velocity(x, noise, self.t)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        model.eval()
        prediction = model(self.noisy, self.t, class_labels=self.labels).sample
        model.train()
        return F.mse_loss(prediction, self.target).item()


def batches(digits: Digits, schedule: Any, settings: Settings) -> Iterator[tuple[Tensor, ...]]:
    """(noisy, t, labels, target), endlessly; the same sequence for every method."""
    generator = torch.Generator().manual_seed(settings.seed)
    last, size = schedule.config.num_train_timesteps, settings.batch_size
    while True:
        index = torch.randint(len(digits), (size,), generator=generator)
        x = digits.x[index]
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(last, (size,), generator=generator)
        target = schedule.get_velocity(x, noise, t)
        yield schedule.add_noise(x, noise, t), t, digits.y[index], target


def fine_tune(
    method: Method,
    model: nn.Module,
    data: DemoData,
    schedule: Any,
    settings: Settings,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Run:
    """Trains `model` on the 20 digits with AdamW: short warm-up, then a cosine decay.

    `on_step(step, batch loss)` is called after every step. Steps per second count the training
    steps alone, without the first and without the evaluations between them.
    """
    torch.manual_seed(settings.seed)
    parameters = method.prepare(model)
    optimizer = torch.optim.AdamW(parameters, lr=method.lr, weight_decay=0.0)
    warmup = max(1, min(settings.warmup, settings.steps // 2))
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * i / settings.steps))),
    )
    judges = {
        "train": FixedLoss(data.train, schedule, settings.seed + 1, repeats=10),
        "selection": FixedLoss(data.selection, schedule, settings.seed + 2, repeats=2),
        "heldout": FixedLoss(data.heldout, schedule, settings.seed + 3, repeats=2),
    }
    losses, best, best_state, best_step = Losses(), math.inf, {}, 0

    def judge(step: int) -> None:
        nonlocal best, best_state, best_step
        losses.steps.append(step)
        for name, measure in judges.items():
            getattr(losses, name).append(measure(model))
        if losses.selection[-1] < best:
            best, best_step = losses.selection[-1], step
            best_state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    judge(0)
    model.train()
    spent = 0.0
    stream = batches(data.train, schedule, settings)
    for step in range(1, settings.steps + 1):
        noisy, t, labels, target = next(stream)
        begin = time.perf_counter()
        loss = F.mse_loss(model(noisy, t, class_labels=labels).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if step > 1:
            spent += time.perf_counter() - begin
        on_step(step, loss.item())
        if step % settings.eval_every == 0 or step == settings.steps:
            judge(step)
    return Run(
        method,
        model,
        sum(p.numel() for p in parameters),
        losses,
        best_step,
        best_state,
        (settings.steps - 1) / spent if spent else math.nan,
    )
