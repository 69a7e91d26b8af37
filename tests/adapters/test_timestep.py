"""The timestep of a forward: its embedding, its place per thread, and how it meets a batch."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from a3fta_kernels.adapters.timestep import (
    WIDTH,
    at,
    begin,
    end,
    for_samples,
    moment_of,
    now,
    required,
)


def test_the_embedding_is_of_cosines_and_sines():
    moment = moment_of(torch.tensor([0.0, 501.0]))
    assert moment.t.tolist() == [0.0, 501.0]
    assert moment.embedding.shape == (2, WIDTH)
    half = WIDTH // 2
    for j in range(half):
        angle = 501 * 10_000 ** (-j / half)
        assert moment.embedding[1, j].item() == pytest.approx(math.cos(angle), abs=1e-4)
        assert moment.embedding[1, half + j].item() == pytest.approx(math.sin(angle), abs=1e-4)
    assert moment.embedding[0].tolist() == [1.0] * half + [0.0] * half


@pytest.mark.parametrize(
    ("given", "t"),
    [
        (7.0, [7]),
        ([7.0, 8.0], [7, 8]),
        ([[0.0, 7.0, 3.0], [9.0, 0.0, 9.0]], [7, 9]),  # of a sample's the noisiest
        ([[[[[5.0]], [[6.0]]]]], [6]),
    ],
)
def test_any_form_of_timesteps(given, t):
    moment, expected = moment_of(torch.tensor(given)), moment_of(torch.tensor(t).float())
    assert torch.equal(moment.t, expected.t) and moment.t.tolist() == t
    assert torch.equal(moment.embedding, expected.embedding)


def test_begin_at_and_end():
    assert now() is None
    first, second = moment_of(torch.ones(1)), moment_of(torch.ones(1) * 2)
    begin(first)
    with at(second):
        assert now() is second
        with pytest.raises(KeyError), at(None):
            assert now() is None
            raise KeyError
        assert now() is second
    assert now().t is first.t and now() is required()
    begin(second, whose="another")
    assert now().t is second.t
    end()
    assert now().t is first.t
    begin(None, whose="of no timestep")
    assert now() is None
    end()
    assert now().t is first.t
    end()
    assert now() is None
    begin(first, whose="cut off")
    begin(second, whose="cut off")
    end()
    assert now() is None


def test_every_thread_has_its_own():
    seen = []
    with at(moment_of(torch.ones(1))):
        thread = threading.Thread(target=lambda: seen.append(now()))
        thread.start()
        thread.join()
        assert seen == [None] and now() is not None


def test_one_for_all_one_each_or_one_for_neighbours():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert for_samples(x, 2) is x
    assert for_samples(x[:1], 3).tolist() == [[1.0, 2.0]] * 3
    assert for_samples(x, 4).tolist() == [[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]
    with pytest.raises(ValueError, match=r"timestep: expected one, or .* batch of 3, got 2"):
        for_samples(x, 3)


def test_none_where_one_is_required():
    with pytest.raises(RuntimeError, match="timestep: expected a forward of the whole denoiser"):
        required()
