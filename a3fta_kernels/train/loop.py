"""One run from its first step, or its newest checkpoint, to its last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import checkpoints, monitor, records
from .errors import TrainingError
from .trainer import Run, Trainer


@dataclass(frozen=True)
class Result:
    step: int  # the last that was done
    best: int | None  # by held-out loss
    stopped_early: bool
    evaluations: list[dict[str, Any]]


def train(run: Run) -> Result:
    """Runs to the last step, or until patience is at an end; goes on from the newest checkpoint
    of the folder. The adapter is the denoiser's; it is left as it is at the last step."""
    settings, main = run.settings, run.accelerator.is_main_process
    trainer = Trainer(run)
    try:
        # those after a run's end are removed: not because a flag was forgotten
        if (done := max(checkpoints.steps(run.checkpoints), default=0)) > settings.steps:
            raise TrainingError(
                f"steps: expected at least the {done} that are done, got {settings.steps}"
            )
        found = checkpoints.latest(run.checkpoints, run.steps)
        if found is not None:
            trainer.load(found[0], found[1]["step"])
            run.listener.say(f"{run.title}: goes on after step {trainer.done}")
        if main:
            run.folder.mkdir(parents=True, exist_ok=True)
            records.cut(run.folder, trainer.done if found is not None else -1)
            checkpoints.after(run.checkpoints, trainer.done)
        run.accelerator.wait_for_everyone()
        run.listener.begin(run.title, trainer.done, run.steps)
        if found is None:
            _watch(trainer)
        evaluations = records.read(run.folder, records.EVALUATIONS)
        stopped = monitor.exhausted(evaluations, settings.patience)
        while trainer.done < run.steps and not stopped:
            entry = trainer.advance()
            if main:
                records.append(run.folder, records.LOG, entry)
                run.accelerator.log(
                    {k: v for k, v in entry.items() if v is not None and k != "step"}, trainer.done
                )
            run.listener.step(entry)
            judged = _watch(trainer)
            if judged:
                evaluations.append(judged)
                stopped = monitor.exhausted(evaluations, settings.patience)
            last = trainer.done == run.steps or stopped
            if judged or last or trainer.done % settings.checkpoint_every == 0:
                trainer.save()
                if main:
                    best = monitor.best_step(evaluations)
                    checkpoints.prune(
                        run.checkpoints, settings.checkpoint_limit, [] if best is None else [best]
                    )
    finally:
        trainer.close()
    return Result(trainer.done, monitor.best_step(evaluations), stopped, evaluations)


def _watch(trainer: Trainer) -> dict[str, Any] | None:
    """Evaluates and samples where this step is due; the evaluation, or None."""
    run, settings, step = trainer.run, trainer.run.settings, trainer.done
    last = step == run.steps
    entry = None
    if settings.evaluate_every and (last or step % settings.evaluate_every == 0):
        entry = trainer.evaluate()
        if run.accelerator.is_main_process:
            records.append(run.folder, records.EVALUATIONS, entry)
            means = {k: v for k, v in entry.items() if k.endswith("_mean") and v is not None}
            run.accelerator.log(means, step)
    if settings.sample_every and (last or step % settings.sample_every == 0):
        # only the main process has a sampler
        if run.sampler is not None:
            trainer.forget_recordings()  # images are decoded where steps ran
            with trainer.shown():
                run.sampler(step)
        run.accelerator.wait_for_everyone()
    return entry
