"""One step of training, against its definition written out."""

from __future__ import annotations

import math

import pytest
import torch

from a3fta_kernels.train.errors import TrainingError
from tests import graphs
from tests.train import setups
from tests.train.setups import gradients, held, norm, same, values


def photo_loss(trainer, noised, row, gamma=None):
    """The loss of a batch by DDPM's closed form; `noised` is what was drawn for it."""
    family, (x, e, level) = trainer.run.family, noised
    t = (level * 1000).long().clamp(max=999)
    a = family.noise.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    inputs = family.inputs(a.sqrt() * x + (1 - a).sqrt() * e, t, row)
    errors = ((trainer.plain(**inputs).sample - e) ** 2).mean((1, 2, 3))
    snr = (a / (1 - a)).flatten()
    return (errors if gamma is None else errors * torch.clamp(gamma / snr, max=1)).mean()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 3, "batch": 1},
        {"accumulate": 2, "batch": 3},
        {"snr_gamma": 0.01, "batch": 4},
        {"noise_offset": 2.0},
    ],
    ids=str,
)
def test_a_step_follows_the_gradient_of_the_mean_over_its_batches(trainers, changes):
    trainer, seen = trainers(max_grad_norm=0.0, **changes)
    entry = held(trainer).advance()
    found = gradients(trainer)
    count = changes.get("accumulate", 1)
    assert len(seen.noised) == count
    for parameter in trainer.parameters:
        parameter.grad = None
    gamma = changes.get("snr_gamma")
    losses = [photo_loss(trainer, noised, {}, gamma) for noised in seen.noised]
    if gamma:
        assert losses[0] < 0.9 * photo_loss(trainer, seen.noised[0], {})
    expected = sum(losses) / count
    expected.backward()
    assert entry["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(found, gradients(trainer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert norm(found) > 0 and entry["grad_norm"] == pytest.approx(norm(found), rel=1e-5)


def test_batches_are_drawn_by_number_however_a_step_is_made_up(trainers):
    """Three steps of one batch see what one step of three batches sees."""
    one, three = trainers(accumulate=3, batch=1), trainers(accumulate=1, batch=1)
    held(one[0]).advance()
    for _ in range(3):
        held(three[0]).advance()
    for ours, theirs in zip(one[1].noised, three[1].noised, strict=True):
        assert same(ours, theirs)


def test_processes_share_the_batches_of_a_step(trainers):
    """Two processes together see what one sees in two turns, each half of it."""
    alone, expected = trainers(accumulate=2, batch=1)
    for _ in range(2):
        held(alone).advance()
    halves = []
    for rank in (0, 1):
        trainer, seen = trainers(batch=1)
        trainer.accelerator = Share(trainer.accelerator, rank)
        for _ in range(2):
            held(trainer).advance()
        halves.append(seen.noised)
    dealt = [batch for both in zip(*halves, strict=True) for batch in both]
    for ours, theirs in zip(dealt, expected.noised, strict=True):
        assert same(ours, theirs)


class Share:
    """An accelerator that says it is one of two."""

    num_processes = 2

    def __init__(self, accelerator, rank):
        self.accelerator, self.process_index = accelerator, rank

    def __getattr__(self, name):
        return getattr(self.accelerator, name)

    def reduce(self, tensor, kind):
        return tensor


def test_a_step_does_not_depend_on_what_was_drawn_before(trainers):
    runs = []
    for seed in (1, 2):
        trainer, _ = trainers(dropout=0.5)
        torch.manual_seed(seed)
        entries = [trainer.advance()["loss"] for _ in range(2)]
        runs.append((entries, values(trainer)))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    other, _ = trainers(dropout=0.5, seed=1)
    assert other.advance()["loss"] != runs[0][0][0]


def test_dropout_draws_anew_in_every_step_and_process(trainers):
    seeds = set()
    for rank in (0, 1):
        trainer, _ = trainers(dropout=0.5)
        trainer.accelerator = Share(trainer.accelerator, rank)
        for _ in range(3):
            trainer.advance()
            seeds.add(torch.initial_seed())
    assert len(seeds) == 6


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 3, "batch": 1}, {"dropout": 0.5}, {"prior_weight": 0.5}, {"ema": 0.9}],
    ids=str,
)
def test_replayed_steps_are_those_of_eager_code(trainers, monkeypatch, changes):
    pools = graphs.stand_in(monkeypatch)
    (eager, _), (replayed, seen) = trainers(**changes), trainers(cuda_graph=True, **changes)
    for _ in range(3):
        expected, entry = eager.advance(), replayed.advance()
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert entry["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for ours, theirs in zip(values(replayed), values(eager), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    # a recording of each loss, and every batch was seen
    assert len(pools) == 1 + ("prior_weight" in changes)
    assert len(seen.noised) == 3 * changes.get("accumulate", 1) * len(pools)


def test_a_loss_that_cannot_be_recorded_ends_the_run_with_a_reason(trainers, monkeypatch):
    graphs.stand_in(monkeypatch)
    trainer, _ = trainers(cuda_graph=True)

    def fails(*_):
        raise RuntimeError("loss: expected what a CUDA graph can hold, got: a sync")

    monkeypatch.setattr(trainer.captured, "_record", fails)
    before = values(trainer)
    with pytest.raises(TrainingError, match="cuda_graph: loss: expected what a CUDA graph can"):
        trainer.advance()
    assert same(values(trainer), before) and trainer.done == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
    ],
    ids=str,
)
def test_too_little_memory_is_no_fault_of_a_recording(trainers, monkeypatch, error):
    graphs.stand_in(monkeypatch)
    trainer, _ = trainers(cuda_graph=True)

    def fails(*_):
        raise error

    monkeypatch.setattr(trainer.captured, "_record", fails)
    with pytest.raises(type(error), match=r"out of memory|ALLOC_FAILED") as told:
        trainer.advance()
    assert told.value is error


def test_forgotten_recordings_are_made_again(trainers, monkeypatch):
    pools = graphs.stand_in(monkeypatch)
    (eager, _), (replayed, _) = trainers(), trainers(cuda_graph=True)
    eager.forget_recordings()  # has none
    for number in (1, 1, 2):
        if number == 2:
            replayed.forget_recordings()
        expected = eager.advance()["loss"]
        assert replayed.advance()["loss"] == pytest.approx(expected, rel=1e-6)
        assert len(pools) == number


def test_clipping_clips(trainers):
    free, _ = trainers(max_grad_norm=0.0)
    entry = held(free).advance()
    whole = gradients(free)
    limit = entry["grad_norm"] / 4
    clipped, _ = trainers(max_grad_norm=limit)
    assert held(clipped).advance()["grad_norm"] == pytest.approx(entry["grad_norm"])
    found = gradients(clipped)
    assert norm(found) == pytest.approx(limit, rel=1e-4)
    for ours, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(ours, theirs / 4, rtol=1e-4, atol=1e-9)
    loose, _ = trainers(max_grad_norm=4 * entry["grad_norm"])
    held(loose).advance()
    assert same(gradients(loose), whole)


def told(trainers, photos=8, **changes):
    """A run with texts: photo i is told i + 1, nobody 0, the prior -1."""
    family = setups.Told()

    def text(value):
        return {"prompt_embeds": torch.full((3, setups.WIDTH), float(value))}

    rows = [
        {"mean": setups.photo(i, channels=4), "std": torch.zeros(4, 8, 8), **text(i + 1)}
        for i in range(photos)
    ]
    facts = {"empty": text(0), "prior_text": text(-1)} | changes.pop("facts", {})
    trainer, seen = trainers(family=family, rows=rows, facts=facts, **changes)
    return trainer, seen, rows


def words(prediction):
    return prediction.row["prompt_embeds"][:, 0, 0].tolist()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_are_left_empty_as_often_as_asked(trainers, share):
    trainer, seen, rows = told(trainers, batch=8, caption_dropout=share)
    for _ in range(25):
        held(trainer).advance()
    silent = shown = 0
    for prediction, (x, _, _) in zip(seen.predicted, seen.noised, strict=True):
        for word, image in zip(words(prediction), x, strict=True):
            photo = next(i for i, row in enumerate(rows) if torch.equal(row["mean"], image))
            assert word in (0, photo + 1)  # its own, or none
            silent += word == 0
            shown += 1
    assert shown == 200
    assert abs(silent / shown - share) <= 5 * math.sqrt(share * (1 - share) / shown)


def test_half_of_what_is_seen_is_mirrored(trainers):
    rows = [{"mean": setups.photo(i)} for i in range(4)]
    turned = [{"mean": row["mean"].flip(-1)} for row in rows]
    trainer, seen = trainers(rows=rows, facts={"mirrored": turned}, batch=4)
    for _ in range(25):
        held(trainer).advance()
    images = torch.cat([x for x, _, _ in seen.noised])
    straight = sum(any(torch.equal(x, row["mean"]) for row in rows) for x in images)
    mirrored = sum(any(torch.equal(x, row["mean"]) for row in turned) for x in images)
    assert straight + mirrored == 100 and abs(mirrored - 50) < 25


@pytest.mark.parametrize("offset", [0.0, 0.5, 3.0])
def test_the_noise_offset_is_shared_by_a_channel(trainers, offset):
    trainer, seen = trainers(batch=4, noise_offset=offset)
    for _ in range(40):
        held(trainer).advance()
    noise = torch.cat([e for _, e, _ in seen.noised]).flatten(2)  # (160, 3, 64)
    assert noise.mean(2).var().item() == pytest.approx(offset**2 + 1 / 64, rel=0.3)
    assert noise.var(2).mean().item() == pytest.approx(1, rel=0.05)


def test_photos_latents_are_drawn_anew_for_every_batch(trainers):
    trainer, seen, rows = told(trainers, photos=1, batch=1)
    rows[0]["std"] = torch.ones(4, 8, 8)
    for _ in range(2):
        held(trainer).advance()
    spreads = [x[0] - rows[0]["mean"] for x, _, _ in seen.noised]
    assert not torch.equal(*spreads)
    assert all(abs(s.std() - 1) < 0.3 and abs(s.mean()) < 0.3 for s in spreads)


def test_the_prior_weighs_nothing_at_the_start(trainers):
    without, _, _ = told(trainers, trained=False)
    with_prior, seen, _ = told(trainers, trained=False, prior_weight=100.0)
    assert held(with_prior).advance() | {"seconds": 0} == held(without).advance() | {"seconds": 0}
    teacher, student = seen.predicted[1:]
    assert torch.equal(teacher.found, student.found)


def test_the_prior_is_the_distance_from_the_model_without_adapters(trainers):
    trainer, seen, rows = told(trainers, prior_weight=500.0, max_grad_norm=0.0)
    entry = held(trainer).advance()
    photos, teacher, student = seen.predicted
    assert torch.equal(teacher.x, student.x) and words(teacher) == words(student) == [-1, -1]
    assert not teacher.found.requires_grad and student.found.requires_grad
    # the photos themselves, at noise of their own
    images = [row["mean"] for row in rows]
    assert all(any(torch.equal(x, image) for image in images) for x in seen.noised[1][0])
    assert not torch.equal(seen.noised[0][1], seen.noised[1][1])
    stock = setups.Told().denoiser
    bare = stock(teacher.x, teacher.time, teacher.row["prompt_embeds"]).sample
    torch.testing.assert_close(teacher.found, bare, rtol=1e-4, atol=1e-5)
    own = (photos.found - seen.noised[0][1]).square().mean()
    expected = own + 500.0 * (student.found - bare).square().mean()
    assert entry["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert entry["loss"] > own.item() * 1.1
    # and adapters act again
    assert all(module.enabled for module in trainer.plain.modules() if hasattr(module, "adapters"))


def test_images_of_the_prior_take_the_photos_place(trainers):
    prior = [
        {"mean": torch.full((4, 8, 8), 9.0 + i), "std": torch.zeros(4, 8, 8)} for i in range(3)
    ]
    trainer, seen, _ = told(trainers, batch=3, prior_weight=1.0, facts={"prior": prior})
    held(trainer).advance()
    assert sorted(seen.noised[1][0][:, 0, 0, 0].tolist()) == [9, 10, 11]
    assert words(seen.predicted[1]) == [-1, -1, -1]


def test_the_prior_pulls_back(trainers):
    trainer, seen, _ = told(trainers, prior_weight=1e4, learning_rate=0.02)

    def distance():
        trainer.plain.eval()
        x, time, row = seen.predicted[1].x, seen.predicted[1].time, seen.predicted[1].row
        with torch.no_grad():
            ours = trainer.plain(x, time, row["prompt_embeds"]).sample
            return (ours - seen.predicted[1].found).square().mean().item()

    trainer.advance()
    before = distance()
    for _ in range(12):
        trainer.advance()
    assert distance() < before / 3
