from __future__ import annotations

import dataclasses
import re

import pytest

from a3fta_kernels.study import report
from a3fta_kernels.study.hypotheses import contestants
from a3fta_kernels.study.methods import HEADLINE, METHODS
from a3fta_kernels.study.plan import Plan
from a3fta_kernels.study.run import columns
from a3fta_kernels.study.table import shown
from a3fta_kernels.train.errors import TrainingError
from tests.study.fakes import STEPS, run


def line(one):
    cells = {
        "plan": "p", "pair": "digits", "method": one.method, "k": one.k, "seed": one.seed,
        "rate": 1e-3, "parameters": 10, "step_ms": 5.0, "peak_bytes": 2048, "saved_bytes": 1024,
        "seconds": 1.0, "early": one.early, "steps": list(one.steps), **one.curves,
        "fold_steps": [], "fold_losses": [],
    }  # fmt: skip
    return {name: shown(cells[name]) for name in columns(Plan())}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "results").mkdir()
    runs = [
        run(name, seed=seed, kid=2.0 if name == "base" else [1, 0.5, 0.4 + 0.1 * seed])
        for name in HEADLINE for seed in range(3)
    ]  # fmt: skip
    runs += [run(name, k=10) for name in HEADLINE]
    # a seed that is not whole is in no table, and no k is in another's
    runs.append(run("full", seed=3, kid=9.0))
    trials = [
        {"method": "full", "rate": shown(rate), "seed": "1000", "best": shown(0.3 + rate)}
        for rate in METHODS["full"].trials
    ]
    path = report.write_report(
        folder / "results", Plan(), [line(r) for r in runs], trials, folder / "PAGE.md"
    )
    return path, path.read_text()


def table(text, heading):
    part = text.split(f"### {heading}")[1].split("\n\n")[1]
    return {
        r.split("|")[1].strip(): [c.strip() for c in r.split("|")[2:-1]] for r in part.splitlines()
    }


def test_it_says_how_much_of_the_plan_is_in(page):
    _, text = page
    assert (
        "**37 of the plan's 270 runs are in** (k = 20: 28 of 90, k = 10: 9 of 90, k = 50: 0" in text
    )
    assert text.count("at this scale |") == 4
    assert "**Preliminary: 3 of 10 seeds are whole.**" in text


def test_verdicts_of_all_seeds_are_not_preliminary(tmp_path, monkeypatch):
    for name in ("headline", "curves"):
        monkeypatch.setattr(report.figures, name, lambda *_: None)
    plan = dataclasses.replace(Plan(), ks=(20,), seeds=(0, 1, 2))
    runs = [line(run(name, seed=seed)) for name in HEADLINE for seed in range(3)]
    text = report.write_report(tmp_path, plan, runs, []).read_text()
    assert "**27 of the plan's 27 runs are in**" in text and "Preliminary" not in text


def test_pictures_are_there_and_linked(page):
    path, text = page
    links = re.findall(r"\]\((.+?\.png)\)", text)
    assert len(links) == 2 and all((path.parent / link).is_file() for link in links)


def test_cells_are_means_over_whole_seeds_at_the_view(page):
    _, text = page
    last, early = table(text, "Last step, an"), table(text, "Stopped early, by")
    at = last[""].index("KID")
    assert last["full tuning"][at].startswith("25.00 ±")  # 0.5 of 2, by the mean of three seeds
    assert early["full tuning"][at] == "25.00 ± 0.00"
    assert last["base, not tuned"][at].startswith("100.00")
    step = last[""].index("step")
    assert last["full tuning"][step].startswith(str(STEPS[-1]))
    assert early["full tuning"][step].startswith("50")
    assert "## k = 10, 1 seeds" in text and "## k = 50" not in text


def test_trials_are_told(page):
    assert "- full tuning: **3e-05: 0.3000**; 0.0001: 0.3001" in page[1]
    assert "this plan cannot say" in page[1] and "0.05, Holm over all." in page[1]
    assert "0.001: 0.3010; at the end of its row" in page[1]
    assert report._trials({1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0}).endswith(
        "**0.01: 1.0000**; 0.1: 3.0000"
    )


def test_a_cell_that_is_no_number_is_told(tmp_path):
    bad = line(run("full", seed=3)) | {"early": "soon"}
    with pytest.raises(TrainingError, match=r"runs\.csv: full, k 20, seed 3: .*'soon'"):
        report.write_report(tmp_path, Plan(), [bad], [])


def test_without_runs_it_says_so(tmp_path):
    text = report.write_report(tmp_path, Plan(), [], []).read_text()
    assert "**0 of the plan's 270 runs are in**" in text
    assert text.count("**too few runs**") == 4


def test_a_contender_is_judged_in_place_of_the_headline(tmp_path, monkeypatch):
    for name in ("headline", "curves"):
        monkeypatch.setattr(report.figures, name, lambda *_: None)
    names = contestants("film")
    plan = dataclasses.replace(
        Plan(), ks=(20,), seeds=(0, 1, 2), methods=names, contender="film"
    )  # fmt: skip
    # seeds of another plan in the same folder are not this one's
    runs = [line(run(name, seed=seed)) for name in names for seed in range(5)]
    text = report.write_report(tmp_path, plan, runs, []).read_text()
    assert "| H5 | film beats full tuning" in text and "| H4 |" not in text
    assert text.count("at this scale | 3 |") == 4 and "Preliminary" not in text
    assert "`full-slow` beside `full` says how much" in text and "this plan cannot say" not in text


def test_a_contender_stands_beside_each_other_method_by_seed(tmp_path, monkeypatch):
    for name in ("headline", "curves"):
        monkeypatch.setattr(report.figures, name, lambda *_: None)
    plan = dataclasses.replace(
        Plan(), ks=(20, 10), seeds=(0, 1, 2), methods=contestants("film"), contender="film"
    )  # fmt: skip
    runs = [run("base", k=k, seed=s, kid=2.0) for k in (20, 10) for s in range(3)]
    for k in (20, 10):
        for seed in range(3):
            runs.append(run("full", k=k, seed=seed, kid=1.0 + seed, recall=0.8))
            apart = [0.1, 0.1, 0.1 * (1 + seed)] if k == 20 else [0.3] * 3
            curve = [1.0 + seed - d for d in apart]
            runs.append(run("film", k=k, seed=seed, kid=curve, recall=0.9))
    text = report.write_report(tmp_path, plan, [line(r) for r in runs], []).read_text()
    first, second = text.split("time-aware less the others, paired by seed")[1:]
    row = "| full tuning | -10.0 (-22.4 to 2.4) | 10.0 (10.0 to 10.0) |"
    assert row in first and "-15.0 (-15.0 to -15.0) | 10.0 (10.0 to 10.0) |" in second
    assert "without correction" in first and "| A3FTA time-aware |" not in first.split("\n\n")[2]


def test_compared_methods_have_a_table_each_and_nothing_is_judged(tmp_path, monkeypatch):
    for name in ("headline", "curves"):
        monkeypatch.setattr(report.figures, name, lambda *_: None)
    plan = dataclasses.replace(
        Plan(), ks=(20,), seeds=(0, 1), methods=("base", "full", "film", "gelu"),
        compared=("film", "gelu"),
    )  # fmt: skip
    runs = [line(run(name, seed=seed)) for name in plan.methods for seed in range(2)]
    text = report.write_report(tmp_path, plan, runs, []).read_text()
    assert text.count("less the others, paired by seed") == 2
    assert not any(word in text for word in ("Verdicts", "Margins", "supported", "Supported"))
    assert plan.digest() == dataclasses.replace(plan, compared=()).digest()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compared": ("nobody",)}, "compare: expected one of"),
        ({"compared": ("film",), "contender": "film"}, "compare: expected none beside a contender"),
        ({"compared": ("film",), "contender": "parallel-8"}, "compare: expected none beside"),
        ({"compared": ("film", "film")}, "compare: expected each once, got film film"),
        ({"compared": ("film",), "pair": "digits-search"}, "compare: expected none beside"),
    ],
    ids=str,
)
def test_a_comparison_that_cannot_be_is_refused(options, match):
    methods = (*contestants("film"), "parallel-8")
    with pytest.raises(ValueError, match=match):
        Plan(**{"methods": methods, **options})


def test_a_search_has_a_rule_and_no_verdicts(tmp_path, monkeypatch):
    for name in ("headline", "curves"):
        monkeypatch.setattr(report.figures, name, lambda *_: None)
    names = ("base", "full", "gelu", "rank-8", "rank-64", "post", "gated")
    plan = dataclasses.replace(
        Plan(), ks=(20,), seeds=(0, 1), pair="digits-search", methods=names
    )  # fmt: skip
    worth = {
        "base": {"kid": 1.0}, "gelu": {"kid": 0.1}, "rank-8": {"kid": 0.2, "copies": 0.02},
        "rank-64": {"kid": 0.3, "recall": 0.44}, "post": {"kid": 0.45}, "gated": {"kid": 0.4},
    }  # fmt: skip
    runs = [
        line(run(name, seed=seed, **({"copies": 0.0} | worth.get(name, {}))))
        for name in names for seed in (0, 1)
    ]  # fmt: skip
    text = report.write_report(tmp_path, plan, runs, []).read_text()
    assert "means over 2 seeds. It chooses: **A3FTA gated** (`gated`).\n" in text
    assert "Verdicts" not in text and "Holm" not in text and "Supported" not in text
    assert "only seeds that it has not seen say" in text
    order = re.findall(r"^\| (.+?) \| \d+\.\d\d \| .* \| (.+) \|$", text.split("## k =")[0], re.M)
    assert order == [
        ("A3FTA GELU", "no candidate"), ("A3FTA, rank 8", "copies, 2 % or more"),
        ("A3FTA, rank 64", "recall below 45.0 %"), ("A3FTA gated", "can win"),
        ("A3FTA behind the projection", "can win"), ("full tuning", "no candidate"),
    ]  # fmt: skip
    more = dataclasses.replace(plan, seeds=(0, 1, 2))
    text = report.write_report(tmp_path, more, runs, []).read_text()
    assert "**Preliminary: 2 of 3 seeds are whole.**" in text
    nothing = report.write_report(tmp_path, plan, runs[:2], []).read_text()
    assert "It needs runs of base and full" in nothing
