from __future__ import annotations

import pytest

from a3fta_kernels.study.hypotheses import (
    HYPOTHESES,
    Claim,
    Either,
    contest,
    contestants,
    judge,
    singles,
)
from a3fta_kernels.study.methods import METHODS
from a3fta_kernels.study.views import VIEWS
from tests.study.fakes import run


def study(seeds=6, **changes):
    """A world in which all four hold, but for what is changed; noise makes intervals."""
    world = {
        "base": {"kid": 2.0},
        "full": {"kid": 1.0, "recall": 0.4, "copies": 0.4, "heldout": 0.7, "train": 0.3},
        "attention": {"kid": 0.8, "recall": 0.6, "copies": 0.1},
        "lora": {"kid": 0.8, "recall": 0.6},
        "gelu": {"kid": 0.5, "recall": 0.7},
        "adapter+attention": {"kid": 0.5, "recall": 0.7},
    }
    for name, values in changes.items():
        name = name.replace("_slow", "-slow").replace("_", "+")
        world.setdefault(name, {}).update(values)

    def noisy(value, seed):
        one = 0.01 * (seed % 3)
        return [v + one for v in value] if isinstance(value, list) else value + one

    return [
        run(name, seed=seed, **{m: noisy(v, seed) for m, v in values.items()})
        for seed in range(seeds)
        for name, values in world.items()
    ]


def words(runs):
    return [v.word for v in judge(runs, 20)]


def test_all_hold_in_a_world_where_they_do():
    assert words(study()) == ["supported"] * 4
    assert all(v.seeds == 6 and v.corrected >= v.p for v in judge(study(), 20))


@pytest.mark.parametrize(
    "changes, number",
    [
        ({"full": {"copies": 0.02}}, 0),
        ({"full": {"heldout": 0.3}}, 0),
        ({"attention": {"copies": 0.6}}, 1),
        ({"adapter_attention": {"kid": 0.9}}, 2),
        ({"adapter_attention": {"recall": 0.4}}, 2),
        ({"gelu": {"kid": 1.1}}, 3),  # worse than both, by more than the margin
        ({"gelu": {"recall": 0.3}}, 3),
        ({"lora": {"kid": 0.3}}, 3),
    ],
)
def test_a_claim_that_fails_takes_its_hypothesis_along(changes, number):
    found = words(study(**changes))
    assert found[number] == "not supported"
    others = {i for i, word in enumerate(found) if word != "supported"} - {number}
    # what full tuning does is in two hypotheses
    assert others <= ({0, 1, 3} if "full" in changes else set())


def test_a_difference_within_the_margin_is_not_inferior_but_better_in_nothing():
    found = judge(study(gelu={"kid": 0.8, "recall": 0.6}), 20)[3]
    assert found.word != "supported"


def test_noise_is_inconclusive():
    runs = [r for r in study() if r.method != "adapter+attention"]
    for seed in range(6):
        kid = 0.8 + (0.3 if seed % 2 else -0.35)
        runs.append(run("adapter+attention", seed=seed, kid=kid, recall=0.7))
    assert words(runs)[2] == "inconclusive"


def test_two_seeds_say_nothing_and_another_k_is_another_matter():
    assert words(study(seeds=2)) == ["too few runs"] * 4
    assert {v.word for v in judge(study(), 50)} == {"too few runs"}


def test_pairs_are_of_one_seed():
    runs = [r for r in study() if not (r.method == "full" and r.seed == 0)]
    assert judge(runs, 20)[1].seeds == 5


def test_kid_is_in_percent_of_the_bases():
    claim = Claim("kid", "gelu", "full", "last", False, 0.0)
    by_seed = {0: {r.method: r for r in study() if r.seed == 0}}
    assert claim.difference(by_seed).mean == pytest.approx(-25)


def test_hypotheses_are_of_methods_and_views_that_there_are():
    for hypothesis in (*HYPOTHESES, *contest("film")):
        for claim in singles(hypothesis):
            assert claim.method in METHODS and claim.rival in (None, *METHODS)
            assert claim.view in VIEWS and (claim.rival_view or claim.view) in VIEWS
    assert any(isinstance(claim, Either) for claim in HYPOTHESES[3].claims)
    assert len(singles(HYPOTHESES[3])) == 12


def contenders(**changes):
    """A world in which film beats its rivals: early is step 50, passes is step 100, last too."""
    world = {name: {"kid": [1.5, 1.2, 0.8]} for name in ("lora_slow", "full_slow", "film")}
    world |= {"full": {"kid": [1.5, 1.2, 1.0]}, "attention": {"kid": [1.5, 1.2, 0.8]}}
    world["film"] = {"kid": [1.5, 0.9, 0.4], "recall": 0.7}
    world["gelu"] = {"kid": [1.5, 1.2, 0.8]}
    return study(**(world | changes))


def test_a_contender_is_judged_against_what_reaches_as_far():
    asked = contest("film")
    assert [h.name for h in asked] == ["H5", "H6", "H7", "H8"]
    assert {c.rival for c in singles(asked[1])} == {"lora-slow"}
    assert {c.rival for c in singles(contest("film+affine")[1])} == {"affine"}
    assert [v.word for v in judge(contenders(), 20, asked)] == ["supported"] * 4


@pytest.mark.parametrize(
    "changes, number",
    [
        ({"full": {"kid": [1.5, 0.2, 1.0]}}, 0),  # better where folds stop it, not after
        ({"full_slow": {"kid": 0.2}}, 0),
        ({"lora_slow": {"kid": 0.2}}, 1),
        ({"attention": {"kid": 0.2}}, 2),
        ({"gelu": {"kid": [1.5, 0.7, 0.8]}}, 3),  # worse after as many passes
        ({"gelu": {"kid": [1.5, 1.2, 0.8], "recall": [0.7, 0.7, 0.5]}}, 3),  # better, for recall
    ],
)
def test_a_rival_that_is_better_somewhere(changes, number):
    words = [v.word for v in judge(contenders(**changes), 20, contest("film"))]
    assert words[number] == "not supported"
    assert all(w == "supported" for i, w in enumerate(words) if i not in (number, 2))


def test_a_claim_names_both_views():
    claim = contest("film")[3].claims[0]
    assert str(claim) == "kid of film less that of film (early), passes: below 0 % of the base's"


def test_nobody_is_measured_against_itself():
    assert contestants("film+affine")[:2] == ("base", "film+affine")
    assert {"full", "full-slow", "attention", "lora-slow", "affine", "gelu", "film"} <= set(
        contestants("film+affine")
    )
    for name in ("full", "attention", "lora-slow"):
        with pytest.raises(ValueError, match="contender: expected none of its rivals"):
            contestants(name)
