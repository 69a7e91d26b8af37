from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from a3fta_kernels.study import training
from a3fta_kernels.study.methods import METHODS
from tests.study.tiny import plan

CHOSEN = (0, 1, 2, 3, 4, 5)


def courses(subject, name="full", rate=1e-2, chosen=CHOSEN, seed=0, method=None, **changes):
    """Per checkpoint the step and the trained parameters."""
    found = []
    for course in training.train(
        subject, method or METHODS[name], rate, chosen, seed, plan(**changes)
    ):
        assert not course.family.denoiser.training
        found.append((course.step, [p.detach().clone() for p in course.parameters]))
    return found


def far(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def test_a_checkpoint_is_the_end_of_a_shorter_run(subject):
    long = courses(subject, "gelu", checkpoints=(2, 4))
    short = courses(subject, "gelu", checkpoints=(2,))
    assert [step for step, _ in long] == [2, 4]
    assert far(long[0][1], short[0][1]) == 0 < far(long[0][1], long[1][1])


def test_evaluating_between_steps_changes_nothing(subject):
    assert far(courses(subject, checkpoints=(1, 2, 4))[-1][1], courses(subject)[-1][1]) == 0


def test_it_follows_seed_images_and_rate(subject):
    one = courses(subject)[-1][1]
    assert far(one, courses(subject)[-1][1]) == 0
    assert far(one, courses(subject, seed=1)[-1][1]) > 0
    assert far(one, courses(subject, chosen=CHOSEN[:4])[-1][1]) > 0
    assert far(one, courses(subject, rate=1e-3)[-1][1]) > 0


def test_methods_of_a_seed_see_the_same(subject, monkeypatch):
    seen = []
    real = training._loss

    def watched(family, rows, draw, device):
        seen.append(([int(r["label"]) for r in rows], draw.initial_seed()))
        return real(family, rows, draw, device)

    monkeypatch.setattr(training, "_loss", watched)
    for name in ("full", "gelu"):
        courses(subject, name)
    assert seen[:4] == seen[4:] and len({seed for _, seed in seen}) == 4


def test_the_warmup_is_a_ramp_to_the_rate(subject):
    """Adam's first step is as long as its rate."""
    whole = courses(subject, checkpoints=(1,), warmup=1)[0][1]
    half = courses(subject, checkpoints=(1,), warmup=2)[0][1]
    start = [p.detach() for p in subject.fresh().denoiser.parameters()]
    assert far(half, start) == pytest.approx(far(whole, start) / 2, rel=0.01)


def test_l2sp_stays_closer_to_the_start(subject):
    start = [p.detach() for p in subject.fresh().denoiser.parameters()]

    def moved(pull):
        method = dataclasses.replace(METHODS["l2sp"], pull=pull)
        end = courses(subject, method=method, checkpoints=(12,))[-1][1]
        return sum(float((a - b).square().sum()) for a, b in zip(end, start, strict=True))

    assert moved(10.0) < 0.9 * moved(0.0)
    assert moved(0.0) == pytest.approx(
        sum(
            float((a - b).square().sum())
            for a, b in zip(courses(subject, checkpoints=(12,))[-1][1], start, strict=True)
        )
    )


def test_losses_are_per_range_and_fall_with_training(subject):
    family, told = subject.fresh(), plan()
    family.denoiser.eval()
    asked = (subject.rows, subject.digests, CHOSEN, 2, told)
    before = training.losses(family, *asked)
    assert len(before) == told.bins and before == training.losses(family, *asked)
    *_, end = training.train(
        subject, METHODS["full"], 1e-2, CHOSEN, 0, plan(checkpoints=(40,), batch=6)
    )
    assert training.mean(training.losses(end.family, *asked)) < 0.9 * training.mean(before)
    assert math.isnan(training.mean([1.0, math.nan]))


def test_folds_leave_out_what_they_judge_and_choose_the_lowest(subject, monkeypatch):
    trained, judged = [], []
    real_train = training.train

    def watched(subject, method, rate, chosen, seed, plan):
        trained.append(set(chosen))
        yield from real_train(subject, method, rate, chosen, seed, plan)

    # fold 1: 5, 1, 7; fold 2: 5, 3, 7, by step 2, 4, 6
    curves = iter([5.0, 1.0, 7.0, 5.0, 3.0, 7.0])

    def losses(family, rows, digests, chosen, draws, plan):
        judged.append(set(chosen))
        return [next(curves)] * plan.bins

    monkeypatch.setattr(training, "train", watched)
    monkeypatch.setattr(training, "losses", losses)
    best, curve = training.stopping(
        subject, METHODS["gelu"], 1e-2, CHOSEN, 0, plan(checkpoints=(2, 4, 6))
    )
    assert best == 4
    assert [(e["step"], e["heldout_mean"]) for e in curve] == [(2, 5), (4, 2), (6, 7)]
    assert all(
        a | b == set(CHOSEN) and not a & b for a, b in zip(trained, judged[::3], strict=True)
    )
    assert judged[0] | judged[3] == set(CHOSEN)


def test_a_fold_that_overfits_ends_and_one_that_diverges_chooses_the_last(subject, monkeypatch):
    told = plan(checkpoints=(1, 2, 3, 4), patience=2)
    losses = iter([1.0, 2.0, 3.0] * 2)
    monkeypatch.setattr(training, "losses", lambda *_: [next(losses)] * 2)
    best, curve = training.stopping(subject, METHODS["gelu"], 1e-2, CHOSEN, 0, told)
    assert best == 1 and [e["step"] for e in curve] == [1, 2, 3]
    monkeypatch.setattr(training, "losses", lambda *_: [math.nan] * 2)
    best, _ = training.stopping(subject, METHODS["gelu"], 1e-2, CHOSEN, 0, told)
    assert best == 4


def test_step_times_leave_out_the_first(subject):
    course = training.Course(subject.fresh(), [], 5, [9.0, 9.0, 9.0, 0.001, 0.003, 0.002])
    assert course.step_ms == pytest.approx(2)
    assert math.isnan(training.Course(subject.fresh(), [], 0, []).step_ms)


def test_it_trains_on_the_model_that_torch_seeds_do_not_reach(subject):
    torch.manual_seed(1)
    one = courses(subject, "gelu")[-1][1]
    torch.manual_seed(2)
    assert far(one, courses(subject, "gelu")[-1][1]) == 0
