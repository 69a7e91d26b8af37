"""finetune: from a folder of photos to an adapter that explains itself.

Photos are found and encoded once; folds of them train where too few can be held out; the last
run trains what is kept. A report, a card and the chosen adapter close it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..inject import inject, trainable_parameters
from ..lean import lean
from . import checkpoints, closing, monitor, optimizers, packing, records
from .batches import generator
from .dataset import PHOTOS, Data, encode, gather, keep
from .drawing import DTYPES, Prompt, Sampler
from .errors import TrainingError
from .families import Family, load, stack
from .listener import Listener
from .loop import Result, train
from .report import write_report
from .settings import Settings, read_yaml
from .trainer import Run

# where they stand in a run's folder
SETTINGS = "settings.yaml"
# and what is there before it has begun
_BEFORE = ("cache", PHOTOS)


def finetune(settings: Settings, listener: Listener | None = None) -> Path:
    """Trains an adapter as `settings` say, and returns its folder, `<output>/adapter`.

    Everything is in `settings.output`; docs/finetune.md lists the files. With
    `settings.resume` a run goes on where it was cut off, with the same losses as if it had not
    been. Raises TrainingError for what a person can mend; what was saved stays then.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    listener = listener or Listener()
    optimizers.check(settings.optimizer)
    packing.check(settings.quantize)
    _check_paths(settings)
    output = Path(settings.output)
    try:
        accelerator = Accelerator(
            mixed_precision=_autocast(settings), log_with=_trackers(settings),
            project_dir=str(output), cpu=not torch.cuda.is_available(),
            # the settings say it, not the environment of `accelerate launch`
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )  # fmt: skip
    except ValueError as error:  # no such precision here, or not after a run of another
        raise TrainingError(f"mixed_precision {settings.mixed_precision}: {error}") from error
    main = accelerator.is_main_process
    _check_graph(settings, accelerator)
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32
    with _owned(output, main):
        _check_folder(output, settings)
        if main:
            checkpoints.tidy(output)
        accelerator.wait_for_everyone()
        family = load(settings.model, DTYPES[settings.mixed_precision], settings.variant)
        _check_family(settings, family)
        packing.pack(family.denoiser, settings.quantize, accelerator.device)
        _check_room(family, accelerator.device)
        data = gather(settings, family)
        listener.say(str(data))
        if main:
            keep(output, data, begun=(output / SETTINGS).exists())
        if family.captions:
            listener.say("Photos and texts are encoded, but for what is in the cache")
        # the main process fills the cache, the others read it
        encoding = family.encoding(accelerator.device, listener.say)
        with accelerator.main_process_first(), encoding:
            material, prompts = encode(settings, family, data, output, listener)
        family.denoiser.to(accelerator.device)
        warnings = _prepare(settings, family, listener)
        base = Run(settings, family, accelerator, material, output, (), (), "", listener)
        _lean(base, data)
        sampler = None
        if settings.sample_every and main:
            # what it needs may be missing
            sampler = _sampler(base, data, prompts)
        if accelerator.device.type == "cuda":
            listener.say("The first step of each size compiles its kernels, if no earlier run did")
        if main:
            # from here on there is a run: what could not be was told before
            records.write(output / SETTINGS, settings.to_yaml())
        if settings.log_with:
            accelerator.init_trackers("a3fta", config=_plain(settings))
        try:
            result, chosen, folds = _train(base, data, sampler)
        except Exception:
            if main:  # how far it came, where that can be written
                with contextlib.suppress(Exception):  # the failure itself is what matters
                    write_report(output)
            raise
        folder = output / closing.ADAPTER
        if main:
            summary = closing.summary(settings, family, data, result, chosen, folds, warnings)
            summary["seconds"] = closing.spent(output)
            summary["device"] = closing.device_name(accelerator.device)
            closing.finish(output, chosen["step"], summary)
            if settings.push_to_hub:
                closing.push(folder, settings.push_to_hub)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return folder


def _check_paths(settings: Settings) -> None:
    """Before a model is loaded, which takes its time."""
    output = Path(settings.output).resolve()
    if output.exists() and not output.is_dir():
        raise TrainingError(f"output: expected a folder, got the file {settings.output}")
    for name, folder in (("data", settings.data), ("prior_data", settings.prior_data)):
        if folder and not Path(folder).is_dir():
            raise TrainingError(f"{name}: expected a folder, got {folder}")
        if folder and output.is_relative_to(Path(folder).resolve()):
            raise TrainingError(
                f"output: expected a folder outside of {name}, which its samples would join, got "
                f"{settings.output} in {folder}"
            )


def _autocast(settings: Settings) -> str:
    """accelerate's. In bf16 all that is frozen is so already, the ops bring adapters to it, and
    autocast would compute norms in fp32 and keep them: that is for fp16."""
    return "fp16" if settings.mixed_precision == "fp16" else "no"


def _check_room(family: Family, device: torch.device) -> None:
    """Whether the frozen weights alone fit, before what takes long."""
    if device.type != "cuda":
        return
    needed = sum(p.nbytes for p in family.denoiser.parameters())
    memory = torch.cuda.get_device_properties(device).total_memory
    if needed > memory:
        raise TrainingError(
            f"the model: expected weights that fit into the {memory >> 20:,} MiB of the GPU, got "
            f"{needed >> 20:,} MiB; mixed_precision bf16 halves what is float32, and quantize nf4 "
            f"takes a quarter of that for linear layers"
        )


def _check_graph(settings: Settings, accelerator: Any) -> None:
    if not settings.cuda_graph:
        return
    if accelerator.device.type != "cuda" or accelerator.num_processes > 1:
        raise TrainingError(
            f"cuda_graph: expected one process and its GPU, got {accelerator.num_processes} on "
            f"{accelerator.device.type}"
        )


def _check_family(settings: Settings, family: Family) -> None:
    """What only the kind of model tells to be wrong, before anything is encoded."""
    family.noise.weight(torch.full((1,), 0.5), settings.snr_gamma)  # raises where there is none
    if settings.cuda_graph and not family.fixed:
        raise TrainingError(
            f"cuda_graph: expected a model whose texts have one length, which a recording is for, "
            f"got {type(family).__name__}"
        )
    if family.captions:
        if settings.prior_weight and not settings.prior_prompt:
            raise TrainingError(
                "prior_prompt: expected a caption such as 'a photo of a dog' beside prior_weight, "
                "got nothing"
            )
        return
    for name in ("trigger", "caption_dropout", "prior_prompt", "sample_prompts"):
        if value := getattr(settings, name):
            raise TrainingError(f"{name}: expected none for a model without texts, got {value!r}")


@contextlib.contextmanager
def _owned(output: Path, main: bool) -> Iterator[None]:
    """The folder, for this run alone; a killed process gives it back."""
    import fcntl

    with records.explained(output):
        output.mkdir(parents=True, exist_ok=True)
        with open(output / ".lock", "w") as stream:
            if main:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise TrainingError(f"output: {output} is in use by another run") from None
            yield


def _trackers(settings: Settings) -> list[Any] | None:
    """accelerate leaves out those that are not installed."""
    from accelerate.tracking import get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    for name in settings.log_with:
        if name not in available:
            raise TrainingError(
                f"log_with: expected one of those installed ({', '.join(available) or 'none is'}), "
                f"got {name!r}"
            )
    return list(settings.log_with) or None


def _check_folder(output: Path, settings: Settings) -> None:
    path = output / SETTINGS
    if not path.exists():
        # a run replaces what is there under its own names, such as adapter/
        others = [p.name for p in output.iterdir() if not p.name.startswith(".")]
        if strange := sorted(set(others).difference(_BEFORE)):
            raise TrainingError(
                f"output: expected a new or empty folder, or one of a run, got {output} with "
                f"{', '.join(strange[:5])}{', ...' if len(strange) > 5 else ''}"
            )
        return
    if not settings.resume:
        raise TrainingError(
            f"output: {output} has a run already; --resume goes on with it, another --output "
            f"begins anew"
        )
    try:
        # without a word of it, it began when there was no other placement
        before = Settings.from_dict({"placement": "pre", **read_yaml(path)})
    except (TypeError, ValueError) as error:
        raise TrainingError(
            f"resume: expected {path} as the run wrote it, got another: {error}"
        ) from error
    changes = before.changes(settings)
    if changes:
        told = "; ".join(f"{name} was {a!r}, is {b!r}" for name, (a, b) in changes.items())
        raise TrainingError(
            f"resume: expected the settings that the run began with, got others: {told}. Take "
            f"them back, or begin anew with another --output"
        )
    runs = [output, *output.glob("folds/*")]
    done = max(max(checkpoints.steps(run / "checkpoints"), default=0) for run in runs)
    if done > settings.steps:  # before anything is written
        raise TrainingError(
            f"steps: expected at least the {done} that are done, got {settings.steps}"
        )


def _prepare(settings: Settings, family: Family, listener: Listener) -> list[str]:
    """Adapters and checkpointing; what the report should warn of."""
    model: Any = family.denoiser
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator(settings.seed, "adapter"))))
    try:
        report = inject(model, settings.adapter())
        listener.say(str(report))
        warnings = [f"{n} has no adapter: {why}" for n, why in report.unadapted.items()]
        if settings.gradient_checkpointing:
            model.enable_gradient_checkpointing()
    except (TypeError, ValueError) as error:
        raise TrainingError(str(error)) from error
    return warnings


def _train(
    base: Run, data: Data, sampler: Sampler | None
) -> tuple[Result, dict[str, Any], list[dict[str, Any]]]:
    """The last run's result, what is chosen and why, and the curves of folds."""
    settings, model = base.settings, base.family.denoiser
    last = dataclasses.replace(
        base, train=data.train, heldout=data.split.heldout, title="training", sampler=sampler
    )
    if sampler is not None and data.split.folds:
        # it may not fit into memory: better told before the folds
        model.eval()
        with base.accelerator.autocast():
            sampler.draw(sampler.prompts[:1])
    start = [p.detach().clone() for p in trainable_parameters(model)]
    # of a fold only its losses are of use later; all of them run to the end, as they are compared
    # at the steps that all have reached
    short = dataclasses.replace(settings, checkpoint_limit=1, patience=0)
    curves, folds, best = [], data.split.folds, None
    reason = "the last step; nothing was held out"
    if data.split.heldout or folds:
        reason = "the last step; no held-out loss was a number"
    for number, fold in enumerate(folds):
        _reset(model, start)
        rest = tuple(i for i in data.train if i not in fold)
        title = f"fold {number + 1} of {len(folds)}"
        folder = base.folder / "folds" / str(number + 1)
        run = dataclasses.replace(
            base, settings=short, folder=folder, train=rest, heldout=fold, title=title, fold=True
        )
        curves.append(train(run).evaluations)
    if curves:
        mixed = monitor.average(curves, [len(fold) for fold in folds])
        best = monitor.best_step(mixed)
        if settings.choose == "best" and best is not None:
            wanted = monitor.same_passes(best, len(curves))
            last.stop = min(wanted, settings.steps)
            reason = (
                f"as many passes over all photos as the folds made over theirs by step {best}, "
                f"which has the lowest mean loss of the photos left out of {len(curves)} folds"
            )
            if wanted > settings.steps:
                reason = f"the last step; {reason}, would take {wanted}"
    _reset(model, start)
    result = train(last)
    step = result.step
    if settings.choose == "best" and result.best is not None:
        step, reason = result.best, f"the lowest loss of {len(data.split.heldout)} held-out photos"
    elif settings.choose == "last":
        reason = "the last step, as asked for"
    return result, {"step": step, "why": reason, "folds_best": best}, _curves(curves)


def _reset(model: nn.Module, start: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(trainable_parameters(model), start, strict=True):
            parameter.copy_(value)


def _lean(base: Run, data: Data) -> None:
    """The memory-lean trunk, which for lean=auto needs to see a batch."""
    settings, family = base.settings, base.family
    if settings.lean == "off":
        return
    options: dict[str, Any] = {}
    if settings.lean == "auto":
        largest = max(data.train, key=lambda i: base.material.rows[i]["mean"].numel())
        batch = stack([base.material.rows[largest]] * settings.batch)
        row = {name: value.to(base.accelerator.device) for name, value in batch.items()}
        time = family.noise.time(torch.full((settings.batch,), 0.5)).to(base.accelerator.device)
        options = {"budget": settings.budget, "inputs": family.inputs(row["mean"], time, row)}
    try:
        report = lean(family.denoiser, settings.lean, norms=settings.norms, **options)
    except (TypeError, ValueError) as error:
        raise TrainingError(str(error)) from error
    base.listener.say(str(report))


def _sampler(run: Run, data: Data, prompts: Sequence[Prompt]) -> Sampler:
    side = run.settings.resolution or run.family.resolution
    return Sampler(
        run.folder, run.family, run.settings, prompts, run.material.empty,
        data.images(data.train), [run.material.names[i] for i in data.train],
        data.images(data.split.heldout), (side, side),
        run.accelerator.device, run.listener,
    )  # fmt: skip


def _curves(curves: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {
            "fold": number, "steps": [e["step"] for e in curve],
            "heldout_mean": [e["heldout_mean"] for e in curve],
        }
        for number, curve in enumerate(curves, 1)
    ]  # fmt: skip


def _plain(settings: Settings) -> dict[str, Any]:
    """For trackers, which take no lists."""
    return {k: str(v) if isinstance(v, list) else v for k, v in settings.to_dict().items()}
