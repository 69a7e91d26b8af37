"""A run's state, and one step of it.

What step s does is a function of the settings, the photos and the parameters before it: batches,
noise and dropout are drawn from generators seeded by the step. So a checkpoint is the parameters
and what the optimizer knows, and a resumed run repeats an unbroken one.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..captured import Captured
from ..inject import disabled, trainable_parameters
from ..storage import AdapterFileError, load_adapter, save_adapter
from . import checkpoints, monitor, records
from .batches import Order, generator
from .errors import TrainingError, is_out_of_memory
from .families import Family, Row, stack
from .listener import Listener, Share
from .optimizers import build, schedule
from .settings import Settings

# photos of an evaluation at a time, which keeps nothing for a backward
_EVALUATED = 4

# on the device; what was stacked of rows has names that begin with _ROW
Batch = Mapping[str, Tensor]
_ROW = "row "


@dataclass(frozen=True)
class Material:
    """Encoded photos, and the texts that belong to no photo."""

    rows: Sequence[Row]
    mirrored: Sequence[Row]  # the same photos the other way round; empty: never
    digests: Sequence[str]
    names: Sequence[str]
    empty: Row  # the text of no words
    prior_text: Row  # empty dict: the model takes no text
    prior: Sequence[Row]  # images of the prior; empty: the photos


@dataclass
class Run:
    """What `train` needs. `sampler(step)` draws and records samples; None: never."""

    settings: Settings
    family: Family
    accelerator: Any
    material: Material
    folder: Path
    train: tuple[int, ...]
    heldout: tuple[int, ...]
    title: str
    listener: Listener = field(default_factory=Listener)
    sampler: Callable[[int], None] | None = None
    stop: int | None = None  # the last step, where it is not the settings'
    fold: bool = False  # of which the losses of photos left out are all that anybody reads

    @property
    def steps(self) -> int:
        return self.settings.steps if self.stop is None else self.stop

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


class Trainer:
    """The state of a run: parameters, optimizer, schedule, average, step."""

    def __init__(self, run: Run) -> None:
        settings = run.settings
        self.run = run
        self.accelerator = run.accelerator
        self.plain = run.family.denoiser
        self.parameters = list(trainable_parameters(self.plain))
        names = {id(p): name for name, p in self.plain.named_parameters()}
        self.names = [names[id(p)] for p in self.parameters]
        optimizer = build(settings, self.parameters)
        self.model, self.optimizer = self.accelerator.prepare(self.plain, optimizer)
        # of the plain optimizer: accelerate's wrapper would step it once per process
        self.rate = schedule(settings, optimizer)
        self.average: Any = None
        if settings.ema:
            from diffusers.training_utils import EMAModel

            self.average = EMAModel(self.parameters, decay=settings.ema, use_ema_warmup=True)
        self.order = _order(run.material.rows, run.train, settings)
        self.prior_order: Order | None = None
        if prior := run.material.prior:
            self.prior_order = _order(prior, range(len(prior)), settings)
        self.device = self.accelerator.device
        self.captured = Captured(self._share, self.parameters) if settings.cuda_graph else None
        self.done = 0

    def advance(self) -> dict[str, Any]:
        """One optimizer step; its log entry."""
        settings, began = self.run.settings, time.perf_counter()
        step = self.done + 1
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.plain.train()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # of this step, not of samples
        # dropout draws from the process's own generator
        torch.manual_seed(
            int(torch.randint(2**62, (), generator=generator(settings.seed, "step", step, rank)))
        )
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        photos: list[int] = []
        for turn in range(settings.accumulate):
            # numbered over processes too: two processes see what one sees in two turns
            number = ((step - 1) * settings.accumulate + turn) * world + rank
            chosen = self.order[number]
            photos += chosen
            parts = self._parts(number, chosen)
            for i, batch in enumerate(parts):
                last = turn == settings.accumulate - 1 and i == len(parts) - 1
                total += self._descend(batch, last)
        if world > 1:
            total = self.accelerator.reduce(total, "mean")
        loss_value = float(total)
        self._check(step, "loss", loss_value, photos)
        norm = self.accelerator.clip_grad_norm_(self.parameters, settings.max_grad_norm or math.inf)
        # a scaler of losses leaves out steps whose gradients overflow, and lowers its scale
        if self.accelerator.scaler is None:
            self._check(step, "gradient", float(norm), photos)
        rate = self.rate.get_last_lr()[0]
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.step(self.parameters)
        self.done = step
        return {
            "step": step, "loss": loss_value, "lr": rate, "grad_norm": float(norm),
            "seconds": time.perf_counter() - began, "memory": self._peak(),
        }  # fmt: skip

    def _loss(self, batch: Batch) -> Tensor:
        return self._of_photos(batch) if "target" in batch else self._of_prior(batch)

    def _share(self, batch: Batch) -> Tensor:
        return self._loss(batch) / self.run.settings.accumulate

    def _descend(self, batch: Batch, last: bool) -> Tensor:
        """Adds the gradients of a part of the step; its share of the loss, in float64."""
        if self.captured is not None:
            try:
                return self.captured(batch).double()
            except RuntimeError as error:
                if is_out_of_memory(error):  # no fault of the recording
                    raise
                raise TrainingError(f"cuda_graph: {error}") from error
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            value = self._loss(batch)
            self.accelerator.backward(value / self.run.settings.accumulate)
        return value.detach().double() / self.run.settings.accumulate

    def _parts(self, number: int, chosen: Sequence[int]) -> list[Batch]:
        """What to minimise for batch `number`, each its own forward and backward."""
        settings, material, family = self.run.settings, self.run.material, self.run.family
        draw = generator(settings.seed, "batch", number)
        mirrored = torch.rand(len(chosen), generator=draw) < 0.5
        rows = [
            (material.mirrored if material.mirrored and flip else material.rows)[i]
            for i, flip in zip(chosen, mirrored.tolist(), strict=True)
        ]
        silent = torch.rand(len(chosen), generator=draw) < settings.caption_dropout
        rows = [
            {**row, **material.empty} if quiet else row
            for row, quiet in zip(rows, silent.tolist(), strict=True)
        ]
        noisy, target, level = self._noised(rows, draw)
        weight = family.noise.weight(level, settings.snr_gamma)
        parts = [self._batch(rows, noisy, level, target=target, weight=weight)]
        if settings.prior_weight:
            if self.prior_order is not None:
                rows = [material.prior[i] for i in self.prior_order[number]]
            rows = [{**row, **material.prior_text} for row in rows]
            noisy, _, level = self._noised(rows, generator(settings.seed, "prior", number))
            parts.append(self._batch(rows, noisy, level))
        return parts

    def _batch(self, rows: list[Row], noisy: Tensor, level: Tensor, **more: Tensor) -> Batch:
        found = {"noisy": noisy, "time": self.run.family.noise.time(level), **more}
        found |= {f"{_ROW}{name}": value for name, value in stack(rows).items()}
        return {name: x.to(self.device) for name, x in found.items()}

    def _of_photos(self, batch: Batch) -> Tensor:
        errors = (self._predict(self.model, batch).float() - batch["target"]).square()
        return (batch["weight"] * errors.flatten(1).mean(1)).mean()

    def _of_prior(self, batch: Batch) -> Tensor:
        """The model's distance from itself without its adapters."""
        with torch.no_grad(), disabled(self.plain):
            teacher = self._predict(self.plain, batch).float()
        errors = (self._predict(self.model, batch).float() - teacher).square()
        return self.run.settings.prior_weight * errors.mean()

    def _noised(self, rows: list[Row], draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy, target), and the levels."""
        noise_of, batch = self.run.family.noise, stack(rows)
        x = self.run.family.clean(batch, draw)
        noise = torch.randn(x.shape, generator=draw)
        if self.run.settings.noise_offset:
            shared = torch.randn(*x.shape[:2], 1, 1, generator=draw)
            noise = noise + self.run.settings.noise_offset * shared
        level = noise_of.draw(len(x), draw)
        return noise_of.noisy(x, noise, level), noise_of.target(x, noise, level), level

    def _predict(self, model: nn.Module, batch: Batch) -> Tensor:
        row = {k.removeprefix(_ROW): x for k, x in batch.items() if k.startswith(_ROW)}
        with self.accelerator.autocast():
            return self.run.family.predict(model, batch["noisy"], batch["time"], row)

    def _peak(self) -> int | None:
        """Bytes of the GPU; of a replay what is set aside, as its memory counts as free."""
        if self.device.type != "cuda":
            return None
        if self.captured is not None:
            return torch.cuda.max_memory_reserved(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def _check(self, step: int, what: str, value: float, photos: Sequence[int]) -> None:
        if math.isfinite(value):
            return
        names = ", ".join(dict.fromkeys(self.run.material.names[i] for i in photos))
        there = checkpoints.steps(self.run.checkpoints)
        kept = f"the checkpoint of step {there[-1]} is whole" if there else "nothing was saved yet"
        raise TrainingError(
            f"step {step}: the {what} is {value} (photos {names}); {kept}. A lower "
            f"learning_rate, more warmup, or mixed_precision bf16 in place of fp16 may help"
        )

    def forget_recordings(self) -> None:
        """Gives back the memory of recorded steps, which the next ones record again."""
        if self.captured is not None:
            self.captured.reset()
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def shown(self) -> Any:
        """The adapter as it is evaluated, drawn and kept: the average where there is one."""
        self.plain.eval()
        if self.average is not None:
            self.average.store(self.parameters)
            self.average.copy_to(self.parameters)
        try:
            with self.accelerator.autocast():
                yield
        finally:
            if self.average is not None:
                self.average.restore(self.parameters)

    def save(self) -> None:
        """The checkpoint of this step, by the main process; the others wait for it."""
        if self.accelerator.is_main_process:
            # a checkpoint of a step that no record knows would resume into a gap
            records.sync(self.run.folder)
            checkpoints.save(self.run.checkpoints, self.done, self._fill)
        self.accelerator.wait_for_everyone()

    def _fill(self, folder: Path) -> None:
        with self.shown():
            told = {**self.run.settings.of("training"), "steps": self.done}
            save_adapter(self.plain, folder / "adapter", training=told)
        scaler = self.accelerator.scaler
        state = {
            "parameters": dict(zip(self.names, (p.detach() for p in self.parameters), strict=True)),
            "optimizer": self.optimizer.state_dict(),
            "rate": self.rate.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "processes": self.accelerator.num_processes,
        }
        # torch.save to a file hides why a write failed
        buffer = io.BytesIO()
        torch.save(state, buffer)
        (folder / "training.pt").write_bytes(buffer.getbuffer())

    def load(self, path: Path, step: int) -> None:
        state = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
        if list(state["parameters"]) != self.names:
            raise TrainingError(
                f"checkpoint {path}: expected the parameters of this adapter, got others"
            )
        if state["processes"] != self.accelerator.num_processes:
            raise TrainingError(
                f"resume: expected {state['processes']} processes, with which the run began, got "
                f"{self.accelerator.num_processes}"
            )
        try:
            # what counts is in `state`; this one's file knows its base
            load_adapter(self.plain, str(path / "adapter"))
        except AdapterFileError as error:
            told = str(error).partition("; allow_other_base")[0]
            raise TrainingError(f"resume: {told}") from error
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rate.load_state_dict(state["rate"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.average.to(self.device)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.done = step

    def evaluate(self) -> dict[str, Any]:
        """The entry of `evaluations.jsonl`: losses of as many training photos as are held out, in
        a fold of none."""
        settings, material, accelerator = self.run.settings, self.run.material, self.accelerator
        order = torch.randperm(len(self.run.train), generator=generator(settings.seed, "watched"))
        count = len(self.run.heldout) or min(len(self.run.train), 8)
        sets = {
            "train": [] if self.run.fold else [self.run.train[i] for i in order[:count].tolist()],
            "heldout": list(self.run.heldout),
        }
        asked = {
            name: monitor.questions(
                photos, material.digests, settings.bins, settings.draws, settings.seed
            )
            for name, photos in sets.items()
        }
        entry: dict[str, Any] = {"step": self.done, "bins": monitor.ranges(settings.bins)}
        told = Share(self.run.listener, "evaluation", sum(map(len, asked.values())))
        with self.shown():
            for name, questions in asked.items():
                found = monitor.losses(
                    self.run.family, material.rows, questions, settings.bins,
                    max(settings.batch, _EVALUATED), self.device,
                    (accelerator.process_index, accelerator.num_processes),
                    lambda sums: accelerator.reduce(sums, "sum"),
                    lambda count: told.more(count * accelerator.num_processes),
                ) if questions else None  # fmt: skip
                entry[name] = found
                entry[f"{name}_mean"] = None if found is None else monitor.mean(found)
        return entry

    def close(self) -> None:
        """Takes accelerate's wrapping off the model again, and lets go of recordings."""
        self.captured = None
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()


def _order(rows: Sequence[Row], chosen: Sequence[int], settings: Settings) -> Order:
    by_shape: dict[torch.Size, list[int]] = {}
    for i in chosen:
        by_shape.setdefault(rows[i]["mean"].shape, []).append(i)
    return Order(tuple(map(tuple, by_shape.values())), settings.batch, settings.seed)
