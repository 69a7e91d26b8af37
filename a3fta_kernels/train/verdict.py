"""What a run's numbers say, in sentences: for the head of the report and for the model card."""

from __future__ import annotations

from .monitor import same_passes
from .run_files import Curve, Run, is_copy

FEW = 4  # with fewer photos held out, their choice of a step is half luck
RISE = 0.01  # a held-out loss this share above its lowest is called overfitting, less is a plateau


def number(value: float) -> str:
    return f"{value:.4g}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if abs(share) >= 0.0995 or not share else f"{100 * share:.1f} %"


def count(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def change(now: float, before: float) -> str:
    """ "8.1 % below" what it was before, or "the same as"."""
    share = now / before - 1 if before else 0.0
    if abs(share) < 0.0005:
        return "the same as"
    return f"{percent(abs(share))} {'below' if share < 0 else 'above'}"


def _above(value: float, lowest: float) -> str:
    return percent(value / lowest - 1) if lowest else number(value)


def verdict(run: Run) -> list[str]:
    """The sentences, most important first, and what the run warned of."""
    warnings = [f"Warning: {text}" for text in run.summary.get("warnings") or []]
    return measured(run) + warnings


def measured(run: Run) -> list[str]:
    """The sentences that follow from the numbers. None of them says more than was measured."""
    return [*_choice(run), *_overfitting(run), *_samples(run)]


def judged_by(run: Run) -> str:
    """Whose loss `run.heldout` is."""
    if run.mean_of("heldout_mean"):
        n = _held(run)
        return f"the held-out loss of {count(n, 'photo')}" if n else "the held-out loss"
    folds = count(len(run.folds), "fold")
    if run.summary.get("rule", run.settings.get("heldout")) == "leave-one-out":
        return f"the held-out loss of {folds} that leave one photo out each"
    return f"the mean held-out loss of {folds}"


def _held(run: Run) -> int:
    """Photos held out of training, where their loss was taken."""
    if not run.mean_of("heldout_mean"):
        return 0
    return sum(photo.get("split") == "heldout" for photo in run.photos["used"])


def _choice(run: Run) -> list[str]:
    tried = max(run.summary.get("steps_done", 0), run.span)
    if run.chosen is None:
        planned = run.settings.get("steps")
        of = f" of {planned:,}" if isinstance(planned, int) else ""
        if not run.last_step and not run.evaluations:
            return ["This run has recorded no step yet."]
        return [
            f"This run has not finished: step {run.last_step:,}{of} is the last one on record, and "
            "no adapter has been chosen."
        ]
    curve = run.heldout
    said = f"Chosen: step {run.chosen:,} of {tried:,}"
    judged = run.chosen if run.judged is None else run.judged
    value, start = (curve.at(judged), curve.at(0)) if curve else (None, None)
    if value is None:
        said += "."
    elif run.settings.get("choose") == "last":
        said += f", the last one, as asked for; {judged_by(run)} there: {number(value)}"
        said += _below(value, start)
    elif judged != run.chosen:
        wanted = same_passes(judged, len(run.folds))
        many = "as many" if wanted == run.chosen else f"the last; {wanted:,} would be as many"
        said += (
            f", {many} passes over all photos as the folds made over theirs by step {judged:,}, "
            f"by {judged_by(run)} there: {number(value)}{_below(value, start)}"
        )
    else:
        said += f", by {judged_by(run)}: {number(value)}{_below(value, start)}"
    sentences = [said]
    if value is not None and (n := _held(run)) and n < FEW:
        sentences.append(
            f"{count(n, 'photo')} held out {'is' if n == 1 else 'are'} a weak witness: others "
            "might choose another step. With heldout set to kfold, all photos have their turn."
        )
    elif len(run.folds) > 1 and value is not None:
        own = sorted(fold.best() for fold in run.folds)
        alike = own[0] == own[-1]
        sentences.append(
            f"Every fold by itself is best at step {own[0]:,}." if alike else
            f"Folds by themselves are best between step {own[0]:,} and {own[-1]:,}."
        )  # fmt: skip
    if value is not None and start is not None and value >= start:
        sentences.append("By that measure no step is better than the untouched base.")
    if run.summary.get("stopped_early"):
        planned = run.settings.get("steps")
        of = f" of the {planned:,} steps asked for" if isinstance(planned, int) else ""
        done = run.summary.get("steps_done", run.last_step)
        sentences.append(f"It stopped early, after {done:,}{of}.")
    return sentences


def _below(value: float, start: float | None) -> str:
    return f", {change(value, start)} the start ({number(start)})." if start else "."


def overfits_from(curve: Curve) -> int | None:
    """The first step from which on the loss stays more than `RISE` above its lowest."""
    best = curve.best()
    limit = min(curve.values) * (1 + RISE)
    since = None
    for step, value in zip(curve.steps, curve.values, strict=True):
        if step <= best or value <= limit:
            since = None
        elif since is None:
            since = step
    return since


def _overfitting(run: Run) -> list[str]:
    curve = run.heldout
    if curve is None:
        return _nothing_held_out(run)
    if len(curve.steps) < 2:
        return ["One evaluation says nothing about overfitting yet."]
    best, last = curve.best(), curve.steps[-1]
    lowest = min(curve.values)
    since = overfits_from(curve)
    # a fold sees its photos more often: its steps are not the last run's
    who = "it overfits" if run.judged == run.chosen else "the folds overfit"
    if since is not None:
        said = (
            f"From step {since:,} on {who}: the held-out loss is lowest at step {best:,} "
            f"({number(lowest)}) and {_above(curve.values[-1], lowest)} higher at step "
            f"{last:,}{_training_meanwhile(run, best, last)}."
        )
        return [said, *_worst_bin(run, best, last)]
    if best == last:
        return [
            f"No sign of overfitting: the held-out loss is lowest at the last evaluation, step "
            f"{last:,}. More steps may help."
        ]
    return [
        f"No clear overfitting: the held-out loss is lowest at step {best:,} ({number(lowest)}) "
        f"and ends {_above(curve.values[-1], lowest)} above that."
    ]


def _training_meanwhile(run: Run, best: int, last: int) -> str:
    curve = run.mean_of("train_mean")
    before, after = (curve.at(best), curve.at(last)) if curve else (None, None)
    if not before or after is None or after >= before:
        return ""
    return f", while the loss of the training photos falls by {percent(1 - after / before)}"


def worst_bin(run: Run, best: int, last: int) -> tuple[list[float], float] | None:
    """The range of noise levels whose held-out loss rose most from step best to last, as a share
    of what it was, and that share."""
    rows = {row["step"]: row for row in run.binned}
    if best not in rows or last not in rows:
        return None
    pairs = zip(rows[last]["bins"], rows[best]["heldout"], rows[last]["heldout"], strict=True)
    rises = [(after / before - 1, span) for span, before, after in pairs if before and after]
    if len(rises) < 2:
        return None
    share, span = max(rises)
    return span, share


def _worst_bin(run: Run, best: int, last: int) -> list[str]:
    found = worst_bin(run, best, last)
    if found is None or found[1] <= 0:
        return []
    (low, high), share = found
    return [
        f"Most of all at noise levels {low:.2g} to {high:.2g} (0 is the photo, 1 is noise): "
        f"{percent(share)} higher."
    ]


def _nothing_held_out(run: Run) -> list[str]:
    if not run.last_step:
        return []
    said = ["Nothing was held out, so no loss here tells when it overfits: the loss of photos that "
            "it trains on falls either way."]  # fmt: skip
    curve = run.mean_of("train_mean")
    if curve and len(curve.steps) > 1:
        said.append(
            f"That loss went from {number(curve.values[0])} at step {curve.steps[0]:,} to "
            f"{number(curve.values[-1])} at step {curve.steps[-1]:,}."
        )
    return said


def _samples(run: Run) -> list[str]:
    row = run.sample_row()
    if row is None:
        return []
    n, step = len(row["files"]), row["step"]
    said = []
    if row.get("copies") is not None:
        near = sum(is_copy(row, i) for i in range(n))
        said.append(
            f"Of {count(n, 'sample')} at step {step:,}, {near} "
            f"{'is a near-copy' if near == 1 else 'are near-copies'} of a training photo "
            f"({percent(row['copies'])})."
        )
        if later := _copies_later(run, step, row["copies"]):
            said.append(later)
    if row.get("recall") is not None:
        said.append(f"The samples reach {percent(row['recall'])} of the training photos.")
    return said


def _copies_later(run: Run, step: int, share: float) -> str | None:
    last = run.samples[-1]
    if last["step"] <= step or last.get("copies") is None or last["copies"] <= share:
        return None
    return f"By step {last['step']:,} that share grows to {percent(last['copies'])}."
