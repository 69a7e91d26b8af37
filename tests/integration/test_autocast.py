"""Autocast over a float32 trunk, on every backend that runs here."""

from __future__ import annotations

import torch

import a3fta_kernels as a3fta

from .common import RUNS, adapted_unet, adapter_grads, inputs, loss, set_backend


@RUNS
def test_bf16_autocast_stays_close_to_float32(backend: str, device: torch.device):
    model = adapted_unet(device=device)
    model.train()
    batch = inputs(model)
    exact = loss(model, batch)
    exact.backward()
    expected = adapter_grads(model)
    model.zero_grad(set_to_none=True)

    set_backend(model, backend)
    seen = []
    for projection in a3fta.projections(model).values():
        projection.register_forward_hook(lambda _m, _i, y: seen.append(y.dtype))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        value = loss(model, batch)
    value.backward()

    assert seen and set(seen) == {torch.bfloat16}
    torch.testing.assert_close(value, exact, rtol=0.03, atol=0)
    for name, grad in adapter_grads(model).items():
        assert grad.dtype == torch.float32, name
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error < 0.1, f"{name}: relative error {error:.3f}"


@RUNS
def test_autocast_computes_what_a_bf16_layer_computes(backend: str, device: torch.device):
    """One layer alone: a few bf16 roundings apart, because autocast sees float32 weights."""
    model = adapted_unet(device=device)
    set_backend(model, backend)
    projection = next(iter(a3fta.projections(model).values()))
    h = torch.randn(2, 24, projection.in_features, device=device)
    with torch.no_grad():
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = projection(h)
        expected = projection.to(torch.bfloat16)(h.bfloat16())
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))
