"""The demo's data, metrics, losses and caption on inputs whose answers are known."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")

from a3fta_kernels.cli.demo import base, compare, data, metrics, report, training
from a3fta_kernels.cli.errors import CommandError
from a3fta_kernels.train import closeness
from benchmarks import measure


@pytest.fixture(scope="module")
def digits() -> data.DemoData:
    return data.load(seed=3)


def _rows(x: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in x}


def test_data_has_two_per_class_and_disjoint_parts(digits):
    assert digits.train.x.shape == (20, 1, 8, 8)
    assert digits.train.y.bincount().tolist() == [2] * 10
    assert digits.selection.y.bincount().tolist() == [10] * 10
    assert digits.heldout.y.bincount().tolist() == [20] * 10
    parts = (digits.train, digits.selection, digits.heldout, digits.reference)
    assert sum(len(part) for part in parts) == 1797
    seen: set[bytes] = set()
    for part in parts:
        assert not seen & _rows(part.x)
        seen |= _rows(part.x)
        assert part.x.min() >= -1 and part.x.max() <= 1


def test_data_follows_the_seed(digits):
    assert torch.equal(data.load(3).train.x, digits.train.x)
    assert not torch.equal(data.load(4).train.x, digits.train.x)


def test_a_copied_image_counts_as_a_copy_and_an_unseen_one_does_not(digits):
    threshold = metrics.copy_threshold(digits.reference.x, digits.train.x)
    noisy = digits.train.x + 0.01 * torch.randn(digits.train.x.shape)
    distance, index = metrics.nearest(digits.train.x, digits.train.x)
    assert distance.max() < 1e-6 and index.tolist() == list(range(20))
    assert metrics.copies(digits.train.x, digits.train.x, threshold).all()
    assert metrics.copies(noisy, digits.train.x, threshold).all()
    assert not metrics.copies(-digits.train.x, digits.train.x, threshold).any()
    share = metrics.copies(digits.reference.x, digits.train.x, threshold).double().mean()
    assert share == pytest.approx(closeness.COPY_QUANTILE, abs=2 / len(digits.reference))


def test_nearest_finds_the_distance():
    train = torch.zeros(2, 1, 8, 8)
    train[1] = 1
    distance, index = metrics.nearest(torch.full((1, 1, 8, 8), 0.75), train)
    assert index.tolist() == [1]
    assert distance.item() == pytest.approx(0.25 * 8)


def test_kid_is_100_for_blank_and_0_for_real_images(digits):
    real = digits.reference.x
    assert metrics.kid(torch.full((50, 1, 8, 8), -1.0), real) == pytest.approx(100, rel=1e-6)
    assert abs(metrics.kid(digits.heldout.x, real)) < 1
    assert metrics.kid(torch.randn(50, 1, 8, 8).clamp(-1, 1), real) > 10


def test_recall_falls_when_samples_repeat(digits):
    real = digits.reference.x
    assert metrics.recall(digits.heldout.x, real) > 0.8
    assert metrics.recall(digits.train.x.repeat(10, 1, 1, 1), real) < 0.05


def test_legible_reads_real_digits_and_not_shuffled_labels(digits):
    real, held = digits.reference, digits.heldout
    assert metrics.legible(held.x, held.y, real.x, real.y) > 0.9
    assert metrics.legible(held.x, (held.y + 1) % 10, real.x, real.y) < 0.1


@pytest.mark.parametrize(
    "count",
    [metrics.saved_for_backward, lambda model, x: measure.saved_bytes(lambda: model(x), [])],
    ids=["demo", "benchmarks"],
)
def test_counting_saved_bytes_keeps_nothing(count):
    """An operator that saves its own output, held by what was saved, would never be freed."""
    graphs = []

    class Exp(nn.Module):
        def forward(self, x):
            token = nn.Module()  # as long-lived as the graph whose hook holds it
            graphs.append(weakref.ref(token))
            y = (x + 0).exp()
            y.register_hook(lambda grad, held=token: grad)
            return y

    x = torch.ones(8, requires_grad=True)
    assert count(Exp(), x) == x.nbytes
    gc.collect()
    assert graphs[0]() is None


def test_saved_bytes_count_each_storage_once_and_no_weights():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ self.weight.T  # saves x, for the weight's gradient, and the weight
            return y.sin() * y.t().t()  # saves y twice, once as a view, and sin(y)

    x = torch.randn(4, 5)
    assert metrics.saved_for_backward(Model(), x) == 4 * (4 * 5 + 4 * 6 + 4 * 6)
    frozen = Model().requires_grad_(False)
    assert metrics.saved_for_backward(frozen, x) == 0


def test_fixed_loss_is_fixed_and_covers_the_schedule(digits):
    start = base.load()
    schedule = start.noise()
    loss = training.FixedLoss(digits.heldout, schedule, seed=1)
    assert loss.t.sort().values.tolist() == list(range(2, 1000, 5))
    model = start.model()
    assert loss(model) == loss(model) == training.FixedLoss(digits.heldout, schedule, seed=1)(model)
    assert 0.1 < loss(model) < 1.0


def test_every_method_sees_the_same_batches(digits):
    schedule, settings = base.load().noise(), training.Settings(batch_size=4)
    first = next(training.batches(digits.train, schedule, settings))
    again = next(training.batches(digits.train, schedule, settings))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_fine_tune_keeps_the_best_and_the_last_state(digits):
    start = base.load()
    method = training.Method("full", "full", 3e-2, training.full_tuning)  # too hot: it gets worse
    settings = training.Settings(steps=4, batch_size=4, eval_every=1, warmup=1)
    run = training.fine_tune(method, start.model(), digits, start.noise(), settings)
    losses = run.losses
    assert losses.steps == [0, 1, 2, 3, 4]
    assert run.best_step == losses.steps[losses.selection.index(min(losses.selection))]
    assert run.trainable == sum(p.numel() for p in run.model.parameters())
    judge = training.FixedLoss(digits.selection, start.noise(), settings.seed + 2, repeats=2)
    assert judge(run.model) == pytest.approx(losses.selection[-1], rel=1e-5)
    assert judge(run.at_best()) == pytest.approx(min(losses.selection), rel=1e-5)
    assert min(losses.selection) < losses.selection[-1]


def test_lora_trains_its_own_parameters_on_every_attention():
    pytest.importorskip("peft")
    model = base.load().model()
    attentions = sum(name.endswith("to_q") for name, _ in model.named_modules())
    parameters = training.lora(4)(model)
    assert len(parameters) == attentions * len(training.LORA_TARGETS) * 2
    assert [p for p in model.parameters() if p.requires_grad] == parameters


def test_the_base_has_attention_at_every_level():
    start = base.load()
    assert all("Attn" in name for name in start.unet["down_block_types"])
    assert all("Attn" in name for name in start.unet["up_block_types"])
    assert base.CHECKPOINT.stat().st_size <= 3_000_000


def test_a_damaged_or_foreign_base_is_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(CommandError, match="missing"):
        base.load(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(base.CHECKPOINT.read_bytes()[:1000])
    with pytest.raises(CommandError, match="damaged"):
        base.load(cut)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CommandError, match="not a demo base"):
        base.load(tmp_path / "foreign.safetensors")


def _table(ours: float, rivals: float, copies: float) -> list[report.Row]:
    def row(key: str, loss: float, share: float, trainable: int | None = 100) -> report.Row:
        return report.Row(
            key, f"the {key}", trainable, heldout_loss=loss, copies=share, kid=loss, recall=0.5
        )

    rows = [row("base", 1.0, 0.0, None), row("a3fta", ours, 0.01)]
    return rows + [row(key, rivals, copies) for key in ("full-best", "full-last", "lora")]


@pytest.mark.parametrize(
    ("ours", "rivals", "copies", "says"),
    [
        (0.3, 0.4, 0.5, "0.400 (higher), 50 % near-copies (more)"),
        (0.4, 0.3, 0.0, "0.300 (lower), 0 % near-copies (not distinguishable)"),
        (0.3, 0.301, 0.02, "0.301 (about the same), 2 % near-copies (not distinguishable)"),
    ],
)
def test_the_caption_says_what_the_numbers_say(ours, rivals, copies, says):
    text = report.caption(_table(ours, rivals, copies), samples=300, seed=7)
    assert text.count(says) == 3
    winner = "the a3fta" if ours < rivals else "the full-best"
    assert f"Lowest held-out loss: {winner}." in text
    assert "seed 7" in text


def test_a_cell_without_a_value_is_a_dash():
    row = report.Row("base", "base", steps_per_second=math.nan, copies=0.256, saved_bytes=3 * 2**19)
    shown = dict(zip(report.COLUMNS, report.cells(row), strict=True))
    assert shown["trainable"] == shown["steps_per_second"] == "-"
    assert shown["copies"] == "26 %" and shown["saved_bytes"] == "1.5 MiB"


def test_the_search_for_learning_rates_follows_its_rule():
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    path = Path(__file__).resolve().parents[2] / "scripts" / "tune_demo.py"
    spec = spec_from_file_location("tune_demo", path)
    tune = module_from_spec(spec)
    spec.loader.exec_module(tune)
    assert set(tune.GRID) == set(compare.LEARNING_RATES)
    assert all(rate in tune.GRID[key] for key, rate in compare.LEARNING_RATES.items())
    # a poor best step loses, then a poor last step; ties go to the highest rate
    ends = {1e-4: (0.35, 0.35), 1e-3: (0.30, 0.31), 3e-3: (0.305, 0.312), 1e-2: (0.30, 0.9)}
    assert tune.choose(ends) == 3e-3
    assert tune.choose({1e-3: (0.3, 0.4), 1e-2: (0.3, 0.5)}) == 1e-3
