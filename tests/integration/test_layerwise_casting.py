"""diffusers' layerwise casting: the trunk rests in float8, the adapters do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import a3fta_kernels as a3fta

from .common import RUNS, adapted_unet, forward, inputs, randomize, set_backend, stock_unet


def cast(model: nn.Module) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def rounded(device: torch.device) -> nn.Module:
    """A plain adapted model whose weights went through float8 where casting would put them."""
    model = adapted_unet(device)
    reference = stock_unet(device)
    cast(reference)
    weights = dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." not in name:
                parameter.copy_(weights[name].float())
    set_backend(model, "reference")
    return model


@pytest.mark.parametrize("order", ["inject first", "cast first"])
@RUNS
def test_adapters_stay_in_float32(backend: str, order: str, device: torch.device):
    if order == "inject first":
        model = adapted_unet(device)
        cast(model)
    else:
        model = stock_unet(device)
        cast(model)
        a3fta.inject(model, a3fta.AdapterConfig(rank=4))
        randomize(model)
    set_backend(model, backend)
    layers = a3fta.projections(model).values()
    batch = inputs(rounded(device))
    expected = forward(rounded(device), batch)
    untouched = [p.detach().clone() for p in a3fta.trainable_parameters(adapted_unet(device))]
    for _ in range(2):
        assert {layer.weight.dtype for layer in layers} == {torch.float8_e4m3fn}
        parameters = list(a3fta.trainable_parameters(model))
        assert {p.dtype for p in parameters} == {torch.float32}
        for parameter, value in zip(parameters, untouched, strict=True):
            assert torch.equal(parameter, value)
        torch.testing.assert_close(forward(model, batch), expected, rtol=1e-3, atol=1e-3)
