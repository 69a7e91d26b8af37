from __future__ import annotations

import pytest
import torch

from a3fta_kernels.ops import rule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_kernels_cast_as_one_each_would(dtype):
    """Of any strides, shapes and dtypes; each begins where kernels read 16 bytes at a time."""
    sources = [
        torch.randn(3, 33), torch.randn(33, 3).T, torch.randn(7)[::2], torch.tensor(0.5),
        torch.randn(1).expand(5), torch.randn(0, 4), torch.randn(64, dtype=torch.float64),
    ]  # fmt: skip
    for source, found in zip(sources, rule.cast_by_two_kernels(sources, dtype), strict=True):
        assert found.is_contiguous() and torch.equal(found, source.to(dtype))
        assert found.storage_offset() * found.itemsize % 128 == 0


def test_what_has_the_dtype_stays_itself():
    same, other = torch.randn(2, dtype=torch.bfloat16), torch.randn(2)
    found = rule.cast_together((same, None, other), torch.bfloat16)
    assert found[0] is same and found[1] is None and torch.equal(found[2], other.bfloat16())


def test_record_is_apply():
    """Also under a transform of torch.func, which apply has a way of its own for."""
    record = rule.record

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(x, factor):
            return x * factor

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.factor = inputs[1]

        @staticmethod
        def backward(ctx, *grads):
            return grads[0] * ctx.factor, None

    x = torch.randn(3, requires_grad=True)
    y = record(Twice, x, 2)
    assert torch.equal(y, 2 * x) and type(y.grad_fn).__name__ == "TwiceBackward"
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.full_like(x, 2))
    found = torch.func.grad(lambda x: record(Twice, x, 2).sum())(x.detach())
    assert torch.equal(found, torch.full_like(x, 2))
