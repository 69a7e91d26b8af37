"""A run's state: what is kept, judged and loaded, and what ends it."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from a3fta_kernels import adapter_file
from a3fta_kernels.train import checkpoints, monitor
from a3fta_kernels.train.errors import TrainingError
from tests.train import setups
from tests.train.setups import same, values


def test_an_entry_says_what_happened(trainers):
    trainer, _ = trainers(schedule="constant_with_warmup", warmup=2, learning_rate=0.5)
    entries = [trainer.advance() for _ in range(3)]
    assert [e["step"] for e in entries] == [1, 2, 3]
    assert [e["lr"] for e in entries] == [0.0, 0.25, 0.5]
    assert all(e["seconds"] > 0 and e["memory"] is None for e in entries)
    assert all(type(e["loss"]) is float and type(e["grad_norm"]) is float for e in entries)


def test_a_rate_of_nothing_changes_nothing(trainers):
    trainer, _ = trainers(warmup=1)
    before = values(trainer)
    trainer.advance()
    assert same(values(trainer), before)
    trainer.advance()
    assert not same(values(trainer), before)


def test_only_adapters_train(trainers):
    trainer, _ = trainers()
    frozen = {
        n: p.detach().clone() for n, p in trainer.plain.named_parameters() if n not in trainer.names
    }
    trainer.advance()
    assert frozen and trainer.names and all("adapter" in name for name in trainer.names)
    for name, parameter in trainer.plain.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]) and parameter.grad is None


def averaged(trainer, steps, decay):
    """Trains, and averages by hand as EMAModel's warmup has it."""
    average = None
    for number in range(steps):
        trainer.advance()
        weight = min(decay, 1 - (1 + number) ** (-2 / 3)) if number else 0.0
        now = values(trainer)
        average = now if average is None else [
            weight * a + (1 - weight) * p for a, p in zip(average, now, strict=True)
        ]  # fmt: skip
    return average


@pytest.mark.parametrize("decay", [0.4, 0.999])
def test_the_average_is_kept_and_judged_and_the_raw_adapter_trains_on(trainers, decay):
    raw, _ = trainers("raw")
    for _ in range(4):
        raw.advance()
    trainer, _ = trainers("averaged", ema=decay, heldout=(3,))
    # the same training photos
    trainer.order = raw.order
    expected = averaged(trainer, 4, decay)
    before = values(trainer)
    assert same(before, values(raw))
    with trainer.shown():
        for ours, theirs in zip(values(trainer), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        assert not trainer.plain.training
    judged = trainer.evaluate()
    trainer.save()
    assert same(values(trainer), before)

    place = checkpoints.place(trainer.run.checkpoints, 4)
    about = adapter_file.read(place / "adapter").about["training"]
    assert about["steps"] == 4 and about["ema"] == decay and "learning_rate" in about
    assert not {"data", "output", "prior_data"} & set(about)  # no paths of this machine
    kept = load_file(place / "adapter" / "adapter_model.safetensors")
    shadow = trainer.average.shadow_params
    assert len(kept) == len(shadow) > 0
    assert sorted(t.double().sum().item() for t in kept.values()) == pytest.approx(
        sorted(t.double().sum().item() for t in shadow), rel=1e-6
    )
    with torch.no_grad():
        for parameter, value in zip(raw.parameters, shadow, strict=True):
            parameter.copy_(value)
    raw.run.train, raw.run.heldout = trainer.run.train, trainer.run.heldout
    plainly = raw.evaluate()
    assert judged["heldout"] == plainly["heldout"] and judged["train"] == plainly["train"]


def test_an_error_while_the_average_is_shown_brings_the_adapter_back(trainers):
    trainer, _ = trainers(ema=0.9)
    for _ in range(2):
        trainer.advance()
    before = values(trainer)
    with pytest.raises(KeyError), trainer.shown():
        assert not same(values(trainer), before)
        raise KeyError
    assert same(values(trainer), before)


@pytest.mark.parametrize("there", [False, True])
def test_a_loss_that_is_none_is_named_and_nothing_changes(trainers, there):
    rows = [{"mean": setups.photo(i)} for i in range(3)]
    trainer, _ = trainers(rows=rows, batch=1)
    if there:
        trainer.advance()
        trainer.save()
    before = values(trainer)
    bad = trainer.order[trainer.done][0]
    rows[bad]["mean"] = rows[bad]["mean"] * math.nan
    step = trainer.done + 1
    kept = "the checkpoint of step 1 is whole" if there else "nothing was saved yet"
    with pytest.raises(
        TrainingError, match=rf"step {step}: the loss is nan \(photos {bad}.png\); {kept}"
    ):
        trainer.advance()
    assert same(values(trainer), before) and trainer.done == step - 1
    assert checkpoints.steps(trainer.run.checkpoints) == ([1] if there else [])


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_gradient_that_is_none_is_named_and_nothing_changes(trainers, precision):
    trainer, _ = trainers(accumulate=2, batch=1, precision=precision)
    before = values(trainer)
    trainer.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    first, second = trainer.order[0][0], trainer.order[1][0]
    told = rf"step 1: the gradient is (nan|inf) \(photos {first}.png, {second}.png\)"
    with pytest.raises(TrainingError, match=told):
        trainer.advance()
    assert same(values(trainer), before)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_and_adapters_stay_in_fp32(trainers, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    plain, _ = trainers("plain")
    expected = [plain.advance()["loss"] for _ in range(2)]
    judged = plain.evaluate()["train"]
    family = setups.pixels(dtype)
    trainer, _ = trainers("half", family, precision=precision)
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    assert {p.dtype for p in trainer.plain.parameters()} == {torch.float32, dtype}
    found = [trainer.advance()["loss"] for _ in range(2)]
    assert found == pytest.approx(expected, rel=0.05)
    assert trainer.evaluate()["train"] == pytest.approx(judged, rel=0.05)
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    trainer.close()
    assert family.denoiser.forward.__func__ is type(family.denoiser).forward


@pytest.mark.parametrize(
    "options",
    [
        {"ema": 0.9},
        {"optimizer": "prodigy"},
        {"schedule": "cosine"},
        {"design": "film"},
        {"train": "adapter+attention", "prior_weight": 1.0, "ema": 0.9},
    ],
)
def test_a_loaded_checkpoint_goes_on_as_if_nothing_had_been(trainers, options):
    if options.get("optimizer") == "prodigy":
        pytest.importorskip("prodigyopt")
        options = options | {"learning_rate": 1.0}
    unbroken, _ = trainers("unbroken", dropout=0.3, **options)
    entries = [unbroken.advance() for _ in range(4)]
    first, _ = trainers(dropout=0.3, **options)
    for _ in range(2):
        first.advance()
    first.save()
    second, _ = trainers(trained=False, dropout=0.3, **options)
    path, state = checkpoints.latest(second.run.checkpoints)
    second.load(path, state["step"])
    again = [second.advance() for _ in range(2)]
    for ours, theirs in zip(again, entries[2:], strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}
    assert same(values(second), values(unbroken))
    assert second.evaluate() == unbroken.evaluate()


def test_a_checkpoint_of_another_adapter_is_refused(trainers):
    first, _ = trainers()
    first.advance()
    first.save()
    other, _ = trainers(family=setups.Told(), rows=[{"mean": setups.photo(0, channels=4)}])
    before = values(other)
    path = checkpoints.place(first.run.checkpoints, 1)
    with pytest.raises(TrainingError, match="step-000001: expected the parameters of this adapter"):
        other.load(path, 1)
    assert same(values(other), before)


def test_an_evaluation_asks_as_many_training_photos_as_are_held_out(trainers):
    trainer, _ = trainers(photos=9, heldout=(2, 5), bins=3)
    entry = trainer.evaluate()
    assert entry["step"] == 0 and entry["bins"] == monitor.ranges(3)
    assert len(entry["train"]) == len(entry["heldout"]) == 3
    assert entry["train_mean"] == pytest.approx(sum(entry["train"]) / 3)
    asked = [
        monitor.questions(photos, trainer.run.material.digests, 3, 1, 0)
        for photos in trainer.run.train
        for photos in [[photos]]
    ]
    rows, family = trainer.run.material.rows, trainer.run.family
    trainer.plain.eval()
    each = [monitor.losses(family, rows, q, 3, 2, torch.device("cpu")) for q in asked]
    # the mean over two of the training photos
    pairs = [
        (sum(a) + sum(b)) / 6 for i, a in enumerate(each) for b in each[i + 1 :]
    ]  # fmt: skip
    assert any(entry["train_mean"] == pytest.approx(pair, rel=1e-5) for pair in pairs)


def test_where_nothing_is_held_out_the_evaluation_says_so(trainers):
    trainer, _ = trainers()
    entry = trainer.evaluate()
    assert entry["heldout"] is None and entry["heldout_mean"] is None
    assert entry["train_mean"] > 0


def test_an_evaluation_of_a_diverged_model_has_no_mean(trainers):
    trainer, _ = trainers(heldout=(1,))
    trainer.parameters[0].data.fill_(math.nan)
    entry = trainer.evaluate()
    assert entry["heldout_mean"] is None and entry["train_mean"] is None
