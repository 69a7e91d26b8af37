"""The pictures of a run: that they show what the files say, and that no text is cut or covered."""

from __future__ import annotations

import io
import itertools
import json
import shutil

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

from a3fta_kernels.train import figures
from a3fta_kernels.train.run_files import Run

from .runs import lines, run_folder

LONG = "a photograph of sks dog in a ridiculously extravagant hat, $5 and $6, _x_ at golden hour"
DRAW = {
    name: getattr(figures, name)
    for name in ("curves", "noise_levels", "copies", "sample_grid", "nearest_pairs")
}
CASES = {
    "plain": {},
    "kfold": {"folds": 4, "heldout": 0},
    "nothing held out": {"heldout": 0},
    "one point": {
        "steps": 100, "every": 200, "best": 100, "samples_every": 100, "prompts": (LONG,),
    },
    "no samples": {"samples_every": 0},
    "no prompt": {"prompts": ("",)},
    "chosen last": {"best": 600},
    "many": {
        "steps": 20_000, "every": 20, "best": 6900, "samples_every": 400,
        "prompts": tuple(f"{i} {LONG}" for i in range(40)),
    },
    "cut short": {"steps": 3, "samples_every": 0, "finished": False},
}  # fmt: skip
ABSENT = {
    "nothing held out": {"noise_levels"},
    "one point": {"noise_levels"},
    "no samples": {"copies", "sample_grid", "nearest_pairs"},
    "cut short": {"noise_levels", "copies", "sample_grid", "nearest_pairs"},
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Case -> figure's name -> figure."""
    found = {}
    for case, options in CASES.items():
        run = Run(run_folder(tmp_path_factory.mktemp("figures"), **options))
        found[case] = {name: draw(run) for name, draw in DRAW.items()}
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_there_is_nothing_for_is_absent(drawn, case):
    assert {k for k, figure in drawn[case].items() if figure is None} == ABSENT.get(case, set())


def shown_texts(figure):
    """All texts but ticks beyond the limits, which matplotlib keeps and does not draw."""
    unseen = set()
    for ax in figure.axes:
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            unseen |= {label for at, label in ticks if not limits[0] <= at <= limits[1]}
    texts = figure.findobj(lambda x: hasattr(x, "get_text") and x.get_text().strip())
    return [t for t in texts if t.get_visible() and t not in unseen]


@pytest.mark.parametrize("case", CASES)
def test_text_is_inside_the_picture_and_covers_no_other(drawn, case):
    for name, figure in drawn[case].items():
        if figure is None:
            continue
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.canvas.draw()
        boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in shown_texts(figure)]
        assert len(boxes) > 2
        for words, box in boxes:
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width
            assert inside and box.y1 <= figure.bbox.height, (name, words, box)
        for (one, a), (two, b) in itertools.combinations(boxes, 2):
            wide = min(a.x1, b.x1) - max(a.x0, b.x0)
            high = min(a.y1, b.y1) - max(a.y0, b.y0)
            # a pixel of leading may be shared
            assert wide <= 1 or high <= 2, (name, one, two)


def test_pictures_decode_at_twice_700_pixels(drawn):
    for figure in drawn["plain"].values():
        image = Image.open(io.BytesIO(figures.png(figure)))
        image.load()
        assert image.format == "PNG" and image.width == 1400
        assert len(image.convert("RGB").getcolors(2**24)) > 50


def test_curves_hold_the_numbers(drawn, tmp_path):
    run = Run(run_folder(tmp_path))
    ax = drawn["plain"]["curves"].axes[0]
    by_colour = {to_hex(line.get_color()): line for line in ax.lines if len(line.get_xdata()) == 7}
    held, train = by_colour[figures.HELDOUT], by_colour[figures.TRAIN]
    assert list(held.get_ydata()) == [row["heldout_mean"] for row in run.evaluations]
    assert list(train.get_ydata()) == [row["train_mean"] for row in run.evaluations]
    assert "chosen: step 300" in [t.get_text() for t in ax.texts]
    dot = next(line for line in ax.lines if line.get_markersize() == 8)
    assert dot.get_xdata()[0] == 300 and dot.get_ydata()[0] == min(held.get_ydata())


def test_the_dot_is_where_the_folds_were_best(tmp_path):
    folder = run_folder(tmp_path, heldout=0, folds=3)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(
        json.dumps(summary | {"folds_best": 300, "chosen_step": 450})
    )
    ax = figures.curves(Run(folder)).axes[0]
    assert "chosen: step 450, by the folds' step 300" in [t.get_text() for t in ax.texts]
    dot = next(line for line in ax.lines if line.get_markersize() == 8)
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (300, Run(folder).heldout.at(300))


def test_the_band_spans_the_folds(drawn):
    ax = drawn["kfold"]["curves"].axes[0]
    (band,) = ax.collections
    line = next(x for x in ax.lines if to_hex(x.get_color()) == figures.HELDOUT)
    box = band.get_paths()[0].get_extents()
    assert box.y0 < min(line.get_ydata()) and box.y1 > max(line.get_ydata())


def test_noise_levels_are_shares_of_the_start(drawn, tmp_path):
    rows = Run(run_folder(tmp_path)).evaluations
    change, gap = drawn["plain"]["noise_levels"].axes
    lines_of = [[x for x in ax.lines if len(x.get_xdata()) == 7] for ax in (change, gap)]
    for i in range(5):
        first = rows[0]["heldout"][i]
        expected = [(row["heldout"][i] - first) / first for row in rows]
        assert list(lines_of[0][i].get_ydata()) == pytest.approx(expected)
        expected = [(row["heldout"][i] - row["train"][i]) / first for row in rows]
        assert list(lines_of[1][i].get_ydata()) == pytest.approx(expected)
    names = [t.get_text() for t in gap.texts]
    assert set(names) >= {"0 to 0.2", "0.2 to 0.4", "0.8 to 1"}


def test_noise_levels_bear_a_missing_number(tmp_path):
    folder = run_folder(tmp_path)
    rows = Run(folder).evaluations
    rows[3]["heldout"][0] = rows[-1]["train"][1] = None
    lines(folder / "evaluations.jsonl", rows)
    assert figures.png(figures.noise_levels(Run(folder)))


def red_frames(figure):
    return sum(ax.spines["left"].get_linewidth() == 3.0 for ax in figure.axes)


def test_red_frames_are_the_near_copies(drawn, tmp_path):
    run = Run(run_folder(tmp_path))
    copies = sum(d < row["threshold"] for row in run.samples for d in row["distance"])
    assert red_frames(drawn["plain"]["sample_grid"]) == copies == 3
    assert red_frames(drawn["chosen last"]["nearest_pairs"]) == 2
    assert red_frames(drawn["plain"]["nearest_pairs"]) == 0


def test_a_grid_keeps_the_chosen_step_and_says_what_it_leaves_out(drawn):
    figure = drawn["many"]["sample_grid"]
    assert len(figure.axes) == figures.ROWS * figures.COLUMNS
    words = " ".join(t.get_text() for t in figure.texts)
    assert "the first 6 of 40; 8 of 50 times" in words and "20,000" in words and "400" in words
    assert "6,800" in words  # the last samples before the chosen step
    plain = [t.get_text() for t in drawn["chosen last"]["sample_grid"].texts]
    assert "600\nchosen" in plain and "200" in plain


def test_pairs_come_closest_first(drawn, tmp_path):
    run = Run(run_folder(tmp_path, prompts=("a", "b", "c")))
    row = run.samples[0]
    row["distance"] = [0.9, 0.1, 0.5]
    lines(run.folder / "samples.jsonl", [row])
    figure = figures.nearest_pairs(Run(run.folder))
    words = [t.get_text() for t in figure.texts]
    shown = [w for w in words if w[:2] == "0." or w.startswith("photo-")]
    assert shown == ["0.10 near-copy", "photo-001", "0.50", "photo-002", "0.90", "photo-000"]


def test_pictures_that_are_gone_are_named(tmp_path):
    folder = run_folder(tmp_path)
    shutil.rmtree(folder / "samples")
    shutil.rmtree(tmp_path / "photos")
    grid, pairs = figures.sample_grid(Run(folder)), figures.nearest_pairs(Run(folder))
    assert all(ax.texts[0].get_text() == "image\nnot found" for ax in grid.axes)
    assert [ax.texts[0].get_text() for ax in pairs.axes] == [
        "sample\nnot found", "photo\nnot found", "sample\nnot found", "photo\nnot found",
    ]  # fmt: skip


def test_copies_leave_out_what_was_not_measured(tmp_path):
    folder = run_folder(tmp_path)
    rows = [{**row, "recall": None} for row in Run(folder).samples]
    lines(folder / "samples.jsonl", rows)
    ax = figures.copies(Run(folder)).axes[0]
    assert list(ax.lines[0].get_ydata()) == [row["copies"] for row in rows]
    assert not any("reach" in t.get_text() for t in ax.texts)
    lines(folder / "samples.jsonl", [{**row, "copies": None} for row in rows])
    assert figures.copies(Run(folder)) is None


def test_a_log_alone_is_drawn(tmp_path):
    folder = run_folder(tmp_path)
    (folder / "evaluations.jsonl").unlink()
    (folder / "summary.json").unlink()
    ax = figures.curves(Run(folder)).axes[0]
    low, high = ax.get_ylim()
    assert len(ax.lines) == 1 and low < ax.lines[0].get_ydata()[-1] < high


def test_labels_move_apart_and_stay_inside():
    assert figures.spread([0.2, 0.8], [0.1, 0.1]) == [0.2, 0.8]
    assert figures.spread([0.5, 0.5, 0.5], [0.1] * 3) == pytest.approx([0.5, 0.6, 0.7])
    assert figures.spread([1.0, 1.0], [0.1, 0.3]) == pytest.approx([0.8, 1.0])
    assert figures.spread([], []) == []


def test_smoothing_is_a_running_mean():
    points = [(i, float(i)) for i in range(1, 101)]
    smooth = dict(figures._smooth(points))
    assert smooth[100] == pytest.approx(sum(range(91, 101)) / 10)
    assert smooth[1] == 1.0
    assert len(figures._smooth([(i, 1.0) for i in range(10_000)])) <= 500


def test_unreadable_numbers_do_not_stop_a_drawing(tmp_path):
    folder = run_folder(tmp_path)
    text = (folder / "log.jsonl").read_text().splitlines()
    text[5] = json.dumps({**json.loads(text[5]), "loss": None})
    (folder / "log.jsonl").write_text("\n".join([*text, '{"step": 60']))
    assert figures.curves(Run(folder)) is not None


def test_folds_show_beyond_the_last_run(tmp_path):
    """The last run ends where the folds were best; what came after is what the choice rests on."""
    folder = run_folder(tmp_path, heldout=0, folds=3)
    evaluations = folder / "evaluations.jsonl"
    evaluations.write_text("".join(evaluations.read_text().splitlines(keepends=True)[:3]))
    run = Run(folder)
    last = run.folds[0].steps[-1]
    assert run.evaluations[-1]["step"] < last == run.span
    for figure in (figures.curves(run), figures.noise_levels(run)):
        assert all(ax.get_xlim()[1] >= last for ax in figure.axes)
