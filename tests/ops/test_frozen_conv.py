"""`frozen_conv`: PyTorch's convolution and its gradient for x, of which x keeps nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from a3fta_kernels import ops

CASES = [
    dict(),
    dict(padding=1),
    dict(stride=2, padding=(0, 1)),
    dict(dilation=2, padding=2),
    dict(groups=2, padding=1),
    dict(stride=(1, 2), padding=(2, 0), groups=4),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def tensors(
    device: torch.device, dtype: torch.dtype = torch.float64, groups: int = 1, last: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias; `last` names those of x and w whose channels come last."""
    x = torch.randn(2, 8, 9, 7, device=device, dtype=dtype)
    weight = torch.randn(12, 8 // groups, 3, 3, device=device, dtype=dtype)
    if "x" in last:
        x = x.contiguous(memory_format=torch.channels_last)
    if "w" in last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(), weight, torch.randn(12, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("last", ["", "x", "w", "xw"])
def test_the_same_as_pytorch(options, last, dtype, device, poisoned):
    x, weight, bias = tensors(device, dtype, options.get("groups", 1), last)
    y = ops.frozen_conv(x, weight, bias, **options)
    expected = F.conv2d(x, weight, bias, **options)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    dy = torch.randn_like(y)
    for grad in (dy, dy.transpose(2, 3).contiguous().transpose(2, 3), dy[:1].expand_as(dy)):
        (dx,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        (want,) = torch.autograd.grad(expected, x, grad, retain_graph=True)
        tolerance = {} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(dx, want, **tolerance)


@pytest.mark.parametrize("last", ["x", "xw"])
def test_the_gradient_keeps_channels_last(last, device):
    x, weight, bias = tensors(device, torch.float32, last=last)
    y = ops.frozen_conv(x, weight, bias, padding=1)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_gradcheck():
    x, weight, bias = tensors(torch.device("cpu"))
    x = x[:1, :, :5, :5].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.frozen_conv(x, weight, bias, padding=1), x)


def test_opcheck():
    x, weight, bias = tensors(torch.device("cpu"), torch.float32)
    arguments = (x, weight, bias, [2, 1], [1, 0], [1, 1], 1)
    torch.library.opcheck(torch.ops.a3fta.frozen_conv, arguments)


def test_compiled():
    x, weight, bias = tensors(torch.device("cpu"), torch.float32)

    def step(x: Tensor) -> Tensor:
        return ops.frozen_conv(x * 2, weight, bias, stride=2, padding=1).square().sum()

    (expected,) = torch.autograd.grad(step(x), x)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


def test_keeps_the_weight_alone():
    x, weight, bias = tensors(torch.device("cpu"), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.frozen_conv(x, weight, bias)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


def test_a_weight_that_trains_gets_its_gradient():
    x, weight, bias = tensors(torch.device("cpu"))
    for tensor in (weight, bias):
        tensor.requires_grad_()
    grads = torch.autograd.grad(ops.frozen_conv(x, weight, bias).square().sum(), (x, weight, bias))
    wanted = torch.autograd.grad(F.conv2d(x, weight, bias).square().sum(), (x, weight, bias))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


def test_empty_batch_and_autocast():
    _, weight, bias = tensors(torch.device("cpu"), torch.float32)
    empty = torch.randn(0, 8, 9, 7, requires_grad=True)
    y = ops.frozen_conv(empty, weight, bias, padding=1)
    y.sum().backward()
    assert y.shape == (0, 12, 9, 7) and empty.grad.shape == empty.shape
    x = torch.randn(1, 8, 9, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.frozen_conv(x, weight, bias)
        expected = F.conv2d(x, weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_no_second_derivative():
    x, weight, bias = tensors(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(ops.frozen_conv(x, weight, bias).square().sum(), x, create_graph=True)


X, W = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((X[0], W), {}, ValueError, "x: expected four dimensions"),
        ((X, W[0]), {}, ValueError, "weight: expected four dimensions"),
        (("x", W), {}, TypeError, "x: expected a torch.Tensor"),
        ((X[:, :3], W), {}, ValueError, r"x: expected 4 channels \(weight's 4 in 1 groups\)"),
        ((X, W, torch.ones(5)), {}, ValueError, r"bias: expected shape \(6,\)"),
        ((X, W.double()), {}, TypeError, "weight: expected dtype torch.float32"),
        ((X, W), dict(stride=0), ValueError, "stride: expected one number, or two, of at least 1"),
        ((X, W), dict(padding=(1, 2, 3)), ValueError, "padding: expected one number, or two"),
    ],
)
def test_refusals(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.frozen_conv(*arguments, **options)
