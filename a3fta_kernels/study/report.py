"""STUDY.md: verdicts first, then the figures and tables that they rest on."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from ..train.errors import TrainingError
from . import figures, notes, ranking
from .hypotheses import HYPOTHESES, Claim, Either, Verdict, contest, judge
from .methods import BASELINE, METHODS
from .plan import Plan
from .statistics import difference, interval
from .table import Line, numbers
from .views import VIEWS, Run, matched_loss, parse, step_of, value

_SHARES = ("precision", "recall", "coverage", "copies")


def write_report(
    folder: Path, plan: Plan, lines: Sequence[Line], trials: Sequence[Line],
    path: Path | None = None,
) -> Path:  # fmt: skip
    """Draws the figures into `folder` and writes the report to `path` (STUDY.md of the folder)."""
    path = path or folder / "STUDY.md"
    runs = [_parsed(line, folder, plan.folds) for line in lines]
    report = _Report(folder, plan, runs, trials, Path(os.path.relpath(folder, path.parent)))
    path.write_text("\n".join(report.lines()) + "\n", encoding="utf-8")
    return path


def _parsed(line: Line, folder: Path, folds: int) -> Run:
    try:
        return parse(line, folds)
    except ValueError as error:
        which = f"{line['method']}, k {line['k']}, seed {line['seed']}"
        raise TrainingError(f"{folder / 'runs.csv'}: {which}: {error}") from error


class _Report:
    def __init__(
        self, folder: Path, plan: Plan, runs: list[Run], trials: Sequence[Line], link: Path
    ) -> None:
        self.folder, self.plan, self.runs, self.trials, self.link = folder, plan, runs, trials, link

    def of(self, k: int) -> dict[str, list[Run]]:
        """Runs of that k by method, by seed; of seeds that all methods that ran have."""
        here = [run for run in self.runs if run.k == k]
        seeds = [{r.seed for r in here if r.method == name} for name in {r.method for r in here}]
        common = set.intersection(*seeds) if seeds else set()
        found: dict[str, list[Run]] = {}
        for run in sorted(here, key=lambda r: r.seed):
            if run.seed in common:
                found.setdefault(run.method, []).append(run)
        return {name: found[name] for name in METHODS if name in found}

    def lines(self) -> list[str]:
        plan = self.plan
        found = self._head()
        if plan.search:
            found += ranking.lines(self.of(plan.ks[0]), len(plan.seeds))
        elif plan.judges:
            found += self._verdicts()
        for k in plan.ks:
            runs = self.of(k)
            if figures.trained(runs):
                found += self._size(k, runs)
        return [*found, *self._rates(), *notes.lines(plan, self.runs)]

    def _head(self) -> list[str]:
        plan = self.plan
        planned = list(plan.runs())
        done = {(r.method, r.k, r.seed) for r in self.runs}
        per_k = ", ".join(
            f"k = {k}: {sum((m, k, s) in done for m in plan.methods for s in plan.seeds)} of "
            f"{len(plan.methods) * len(plan.seeds)}"
            for k in plan.ks
        )
        whole = sum(run in done for run in planned)
        return [
            f"# The study: {plan.pair}",
            "",
            f"**{whole} of the plan's {len(planned)} runs are in** ({per_k}). Drawn by "
            "`a3fta study --only report` from the results of one plan "
            f"(`{plan.digest()}`). Everything here is about this scale: small models of small "
            "images. It says nothing about large ones.",
            "",
        ]

    def _verdicts(self) -> list[str]:
        k = self.plan.ks[0]
        lines = [
            f"## Verdicts, at this scale (k = {k})",
            "",
            "| | hypothesis | verdict | seeds | p | p, Holm |",
            "|---|---|---|---:|---:|---:|",
        ]
        asked = contest(self.plan.contender) if self.plan.contender else HYPOTHESES
        runs = [run for run in self.runs if run.seed in self.plan.seeds]
        verdicts = judge(runs, k, asked)
        seeds = min(v.seeds for v in verdicts)
        if seeds < len(self.plan.seeds):
            lines[1:1] = [
                "",
                f"**Preliminary: {seeds} of {len(self.plan.seeds)} seeds are whole.** The plan's "
                "verdicts are those of all seeds; until then they may change.",
            ]
        for v in verdicts:
            lines.append(
                f"| {v.hypothesis.name} | {v.hypothesis.text} | **{v.word}** at this scale | "
                f"{v.seeds} | {v.p:.2g} | {v.corrected:.2g} |"
            )
        lines += ["", "All claims of a hypothesis must hold:", ""]
        lines += ["| | claim | difference | 95 % interval | p |", "|---|---|---:|---:|---:|"]
        lines += [row for v in verdicts for row in self._claims(v, k)]
        return [*lines, ""]

    def _claims(self, verdict: Verdict, k: int) -> list[str]:
        by_seed: dict[int, dict[str, Run]] = {}
        for run in self.runs:
            if run.k == k and run.seed in self.plan.seeds:
                by_seed.setdefault(run.seed, {})[run.method] = run
        rows = []
        for claim in verdict.hypothesis.claims:
            parts: tuple[Claim, ...] = claim.claims if isinstance(claim, Either) else (claim,)
            for part in parts:
                d = part.difference(by_seed)
                alone = "one of two: " if isinstance(claim, Either) else ""
                rows.append(
                    f"| {verdict.hypothesis.name} | {alone}{part} | {d.mean:.3g} | "
                    f"{d.low:.3g} to {d.high:.3g} | {part.p(by_seed):.2g} |"
                )
        return rows

    def _size(self, k: int, runs: dict[str, list[Run]]) -> list[str]:
        first = k == self.plan.ks[0]
        count = len(next(iter(runs.values())))
        lines = [f"## k = {k}, {count} seeds", ""]
        if first:
            lines += self._figures(k, runs)
        views = VIEWS if first else ("last", "early", "passes")
        for view in views:
            lines += [f"### {_ABOUT[view]}", "", *self._table(runs, view, ""), ""]
        for name in (self.plan.contender, *self.plan.compared):
            if name in runs:
                lines += self._paired(runs, name)
        if first:
            if next(iter(runs.values()))[0].curves["kid_2"]:
                for view in ("last", "early"):
                    lines += [f"### {_ABOUT[view]}; features: raw pixels", ""]
                    lines += [*self._table(runs, view, "_2"), ""]
            lines += [*self._bins(runs), *self._costs(runs)]
        return lines

    def _figures(self, k: int, runs: dict[str, list[Run]]) -> list[str]:
        count = len(next(iter(runs.values())))
        title = f"{self.plan.pair}, k = {k}, {count} seeds: from the first checkpoint to the last"
        figures.headline(self.folder / "headline.png", runs, _percent(runs, "kid"), 0.01, title)
        figures.curves(self.folder / "curves.png", runs, _percent(runs, "kid"))
        lines = [
            f"![KID against the share of near-copies]({self.link / 'headline.png'})",
            "",
            "KID rewards copying: low and to the left is what is wanted. A small dot is the first "
            "checkpoint, a large one the last, a square is where folds say to stop; shaded, from "
            "four seeds on and to ten methods, 95 % intervals over seeds.",
            "",
            f"![Curves over steps]({self.link / 'curves.png'})",
            "",
        ]
        if figures.grids(self.folder / "grid.png", self.folder / "samples", runs):
            seed = next(iter(runs.values()))[0].seed
            lines += [f"![Samples of seed {seed}]({self.link / 'grid.png'})", ""]
        return lines

    def _table(self, runs: dict[str, list[Run]], view: str, suffix: str) -> list[str]:
        columns = ["held-out", "gap", "KID", *_SHARES, "density", "Vendi", "source loss", "step"]
        lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
        seeds = range(len(next(iter(runs.values()))))
        levels = [matched_loss([found[i] for found in runs.values()]) for i in seeds]
        for name, found in runs.items():

            def cell(metric: str, scale: float, digits: int) -> str:
                values = [
                    scale * value(run, _view(run, view), metric, level)
                    for run, level in zip(found, levels, strict=True)  # noqa: B023
                ]
                return _told(values, digits)

            at = zip(found, levels, strict=True)
            steps = [float(step_of(run, _view(run, view), level)) for run, level in at]
            cells = [
                cell("heldout", 1, 4), cell("gap", 1, 4),
                cell(f"kid{suffix}", _percent(runs, f"kid{suffix}"), 2),
                *(cell(f"{share}{suffix}", 100, 1) for share in _SHARES),
                cell(f"density{suffix}", 1, 2), cell(f"vendi{suffix}", 1, 2), cell("source", 1, 4),
                _told(steps, 0),
            ]  # fmt: skip
            lines.append(f"| {METHODS[name].label} | {' | '.join(cells)} |")
        return lines

    def _paired(self, runs: dict[str, list[Run]], chosen: str) -> list[str]:
        """The chosen method less each other one, of the same seeds."""
        asked = [(metric, view) for view in ("last", "passes") for metric in ("kid", "recall")]
        heads = [f"{'KID' if metric == 'kid' else metric}, {view}" for metric, view in asked]
        scales = {"kid": _percent(runs, "kid"), "recall": 100.0}
        lines = [
            f"### {METHODS[chosen].label} less the others, paired by seed", "",
            "Secondary: means with 95 % intervals, without correction.", "",
            f"| less | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads),
        ]  # fmt: skip
        for name, found in figures.trained(runs).items():
            if name == chosen:
                continue
            cells = []
            for metric, view in asked:
                pairs = zip(runs[chosen], found, strict=True)
                values = [value(a, view, metric) - value(b, view, metric) for a, b in pairs]
                d = difference([scales[metric] * v for v in values])
                spread = "" if math.isnan(d.low) else f" ({d.low:.1f} to {d.high:.1f})"
                cells.append(f"{d.mean:.1f}{spread}")
            lines.append(f"| {METHODS[name].label} | {' | '.join(cells)} |")
        return [*lines, ""]

    def _bins(self, runs: dict[str, list[Run]]) -> list[str]:
        bins = range(1, self.plan.bins + 1)
        heads = [f"{(i - 1) / self.plan.bins:g} to {i / self.plan.bins:g}" for i in bins]
        lines = [
            "### Held-out loss less training loss by noise level, last step", "",
            f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads),
        ]  # fmt: skip
        for name, found in runs.items():
            cells = [
                _told([_last(r, f"heldout_bin{i}") - _last(r, f"train_bin{i}") for r in found], 4)
                for i in bins
            ]
            lines.append(f"| {METHODS[name].label} | {' | '.join(cells)} |")
        return [*lines, ""]

    def _costs(self, runs: dict[str, list[Run]]) -> list[str]:
        lines = [
            "### Costs", "",
            "| | trains | ms per step | peak, KiB | saved for the backward, KiB | rate |",
            "|---|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for name, found in figures.trained(runs).items():
            run = found[0]
            step = sorted(r.step_ms for r in found)[len(found) // 2]
            lines.append(
                f"| {METHODS[name].label} | {run.parameters:,} | {step:.0f} | "
                f"{run.peak_bytes / 1024:,.0f} | {run.saved_bytes / 1024:,.0f} | {run.rate:g} |"
            )
        said = (
            "Processor time of a step on one core, or on a GPU its time, the median over seeds, of "
            "a machine that did other things too: a hint, not a benchmark. Bytes are counted, not "
            "measured (`a3fta.memory`), above the weights."
        )
        return [*lines, "", said, ""]

    def _rates(self) -> list[str]:
        if not self.trials:
            return []
        seeds = sorted({line["seed"] for line in self.trials})
        lines = [
            f"## Trials of learning rates (k = {self.plan.tuning_k}, seeds {', '.join(seeds)}, on "
            "images apart)", "",
            "Lowest held-out loss of each rate, mean over the seeds; the lowest is frozen.", "",
        ]  # fmt: skip
        for name in self.plan.trained():
            means: dict[float, float] = {}
            for rate in METHODS[name].trials:
                best = [
                    numbers(line["best"])[0] for line in self.trials
                    if line["method"] == name and float(line["rate"]) == rate
                ]  # fmt: skip
                if best:
                    means[rate] = math.fsum(best) / len(best)
            if means:
                lines.append(f"- {METHODS[name].label}: {_trials(means)}")
        return [*lines, ""]


_ABOUT = {
    "last": "Last step, an equal budget",
    "early": "Stopped early, by folds inside the k images",
    "passes": "Stopped after as many passes over the images as the folds made",
    "oracle": "Oracle: the lowest loss of the large held-out set",
    "converged": "Converged: less than 2 % of training loss are to come; else the last step",
    "matched": "At matched training loss",
}


def _percent(runs: dict[str, list[Run]], metric: str) -> float:
    """What makes percent of the base's of it."""
    bases = [run.at(metric, 0) for run in runs.get(BASELINE, [])]
    return 100 * len(bases) / math.fsum(bases) if bases else math.nan


def _view(run: Run, view: str) -> str:
    """The base has one step, which is all of them."""
    return "last" if run.method == BASELINE else view


def _trials(means: dict[float, float]) -> str:
    """The lowest in bold; at an end of its row a lower one may lie beyond."""
    lowest = min(means, key=lambda rate: (math.isnan(means[rate]), means[rate]))
    told = [
        f"**{rate:g}: {mean:.4f}**" if rate == lowest else f"{rate:g}: {mean:.4f}"
        for rate, mean in means.items()
    ]
    end = "; at the end of its row" if lowest in (min(means), max(means)) else ""
    return "; ".join(told) + end


def _last(run: Run, metric: str) -> float:
    return run.at(metric, run.steps[-1])


def _told(values: Sequence[float], digits: int) -> str:
    mean = math.fsum(values) / len(values)
    low, high = interval(values)
    spread = "" if math.isnan(low) else f" ± {(high - low) / 2:.{digits}f}"
    return f"{mean:.{digits}f}{spread}"
