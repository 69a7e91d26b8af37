from __future__ import annotations

import numpy as np
from PIL import Image

from a3fta_kernels.study import figures
from a3fta_kernels.study.methods import HEADLINE, METHODS
from tests.study.fakes import run


def by_method():
    return {
        name: [
            run(name, seed=seed, kid=0.1 * (i + 1) + 0.01 * seed, copies=0.02 * i)
            for seed in range(4)
        ]
        for i, name in enumerate(HEADLINE)
    }


def test_every_method_has_a_colour_of_its_own():
    assert set(figures.COLOURS) == set(HEADLINE)
    assert len(set(figures.COLOURS.values())) == len(HEADLINE)
    # of candidates, as many as are ever in one picture
    drawn = {name: () for name in [*HEADLINE, *list(METHODS)[-12:]]}
    colours = figures._colours(drawn)
    assert set(colours) == set(drawn) and len(set(colours.values())) == len(drawn)


def test_means_and_intervals_are_over_seeds():
    mean, low, high = figures._mean([run(kid=[1, 2, 3]), run(kid=[3, 2, 3])], "kid", 10)
    assert mean == [20, 20, 30]
    assert low[0] < 20 < high[0] and low[1] == high[1] == 20


def test_every_method_is_in_the_headline(tmp_path):
    figures.headline(tmp_path / "headline.png", by_method(), 100.0, 0.01, "title")
    image = np.asarray(Image.open(tmp_path / "headline.png").convert("RGB"))
    colours = {tuple(c) for c in image.reshape(-1, 3)}
    for method in set(HEADLINE) - {"base"}:
        colour = figures.COLOURS[method]
        rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert rgb in colours, method


def test_methods_with_the_same_runs_share_a_path():
    runs = by_method() | {"full-slow": by_method()["full"]}
    groups = [names for names, _ in figures._alike(runs)]
    assert ["full", "full-slow"] in groups
    assert sorted(name for names in groups for name in names) == sorted(set(runs) - {"base"})


def test_grids_show_the_chosen_and_the_last_step(tmp_path, monkeypatch):
    def gray(value):
        return [Image.new("L", (4, 4), value)] * 25

    drawn = {25: gray(25), 50: gray(50), 100: gray(100)}
    kept = figures.sheet_path(tmp_path, "full", 20, 0)
    figures.keep_samples(kept, drawn, gray(200)[:3])
    sheet = np.asarray(Image.open(kept))
    assert sheet.shape == (16, 80)
    assert [sheet[i, 0] for i in (0, 4, 8, 12)] == [200, 25, 50, 100] and sheet[0, -1] == 0
    shown = []
    from matplotlib.axes import Axes

    monkeypatch.setattr(Axes, "imshow", lambda self, image, **_: shown.append(image[0, 0]))
    page = tmp_path / "grid.png"
    # samples of one seed, or k, do not stand for another's
    for other in (run(seed=1, early=50), run(k=10, early=50)):
        assert not figures.grids(page, tmp_path, {"full": [other]}) and not page.exists()
    assert figures.grids(page, tmp_path, {"full": [run(early=50)], "gelu": [run("gelu")]})
    assert shown == [200, 50, 100] and page.exists()
