from __future__ import annotations

import dataclasses

import pytest

from a3fta_kernels.study import plan as plans
from a3fta_kernels.study.hypotheses import contestants
from a3fta_kernels.study.methods import HEADLINE, METHODS
from a3fta_kernels.study.plan import Plan


def test_a_beginning_of_the_runs_is_balanced():
    runs = list(Plan().runs())
    assert len(runs) == len(set(runs)) == 3 * 10 * len(HEADLINE)
    first = runs[: 2 * len(HEADLINE)]
    assert {k for _, k, _ in first} == {20} and {seed for _, _, seed in first} == {0, 1}
    assert [name for name, _, _ in first] == list(HEADLINE) * 2


def test_every_method_has_as_many_trials():
    counts = {name: 0 for name in Plan().trained()}
    for name, _, _ in Plan().trials():
        counts[name] += 1
    assert len(set(counts.values())) == 1 and "base" not in counts


def test_every_method_that_trains_can_be_asked_for():
    assert set(HEADLINE) < set(METHODS)
    assert dataclasses.replace(Plan(), methods=tuple(METHODS)).trained()[-1] not in HEADLINE
    assert not Plan().search and dataclasses.replace(Plan(), pair="digits-search").search


def test_the_digest_is_of_what_a_line_means():
    one = Plan()
    for changes in ({"batch": 8}, {"checkpoints": (25, 50)}, {"pair": "greek"}, {"guidance": 2.0}):
        assert dataclasses.replace(one, **changes).digest() != one.digest()
    for changes in ({"ks": (5,)}, {"seeds": (3,)}, {"methods": ("base", "full")}):
        assert dataclasses.replace(one, **changes).digest() == one.digest()
    judged = dataclasses.replace(one, methods=contestants("film"), contender="film")
    assert judged.digest() == one.digest()


def test_the_shipped_lines_are_of_this_plan():
    assert Plan().digest() == "a0c22c16ddfb"


def test_the_digest_knows_the_methods_numbers(monkeypatch):
    before = Plan().digest()
    for name in ("RANK", "LORA_RANK", "PULL", "VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(plans, name, 99)
            assert Plan().digest() != before


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"methods": ("fll",)}, "method: expected one of base, full, .*, got 'fll'"),
        ({"seeds": (1000,)}, "tuning_seeds: expected seeds that no run has"),
        ({"checkpoints": (50, 25)}, "checkpoints: expected rising steps"),
        ({"checkpoints": (0, 25)}, "checkpoints: expected rising steps"),
        # a run that is done twice would make a file that the next start refuses
        ({"ks": (20, 20)}, "k: expected each once, got 20 20"),
        ({"seeds": (0, 1, 0)}, "seeds: expected each once, got 0 1 0"),
        ({"ks": (20, 2)}, "k: expected at least the 3 folds, got 2"),
        ({"folds": 1}, "folds: expected at least 2, got 1"),
        ({"contender": "rank-8"}, "contender: expected one of full, .*, got 'rank-8'"),
        ({"contender": "base"}, "contender: expected one of full, .*, got 'base'"),
        ({"contender": "full"}, "contender: expected none of its rivals, got 'full'"),
        (
            {"contender": "film"},
            "methods: expected those that film .*, got no full-slow, lora-slow",
        ),
        ({"contender": "film", "pair": "digits-search"}, "contender: a search chooses one"),
        ({"samples": 1}, "samples: expected at least 2, got 1"),
        ({"guidance": float("nan")}, "guidance: expected a finite number, got nan"),
    ],
)
def test_a_plan_that_cannot_be(changes, told):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(Plan(), **changes)
