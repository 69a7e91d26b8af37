"""IP-Adapter on an adapted U-Net, whichever comes first: its processors stay, adapters act."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders.ip_adapter import IPAdapterMixin
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.processors import A3FTAAttnProcessor

from .. import models

CONFIG = a3fta.AdapterConfig(rank=4)
IMAGE = 16  # channels of the image's embedding


class Pipeline(IPAdapterMixin):
    """What `unload_ip_adapter` takes of a pipeline."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet


def load_ip_adapter(unet: Any) -> None:
    """With weights as in a file of IP-Adapter: 4 tokens of an image."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    crosses = [name for name, module in unet.named_modules() if name.endswith("attn2")]
    layers = [unet.get_submodule(name) for name in unet_order(unet, crosses)]
    keys = {}
    for i, layer in enumerate(layers):
        for part in "kv":
            keys[f"{2 * i + 1}.to_{part}_ip.weight"] = draw(layer.inner_dim, 32)
    projection = {
        "proj.weight": draw(4 * 32, IMAGE), "proj.bias": draw(4 * 32),
        "norm.weight": 1 + draw(32), "norm.bias": draw(32),
    }  # fmt: skip
    unet._load_ip_adapter_weights(
        [{"image_proj": projection, "ip_adapter": keys}], low_cpu_mem_usage=False
    )


def unet_order(unet: Any, names: list[str]) -> list[str]:
    """Of `attn_processors`, in which files count the layers."""
    return [n for n in (k.removesuffix(".processor") for k in unet.attn_processors) if n in names]


def run(unet: nn.Module, image: bool = True) -> Tensor:
    batch = models.inputs("sd15")
    if image:
        drawn = torch.randn(2, 1, IMAGE, generator=torch.Generator().manual_seed(6))
        batch["added_cond_kwargs"] = {"image_embeds": [drawn]}
    with torch.no_grad():
        return unet(**batch).sample


def kinds(unet: Any, attention: str) -> set[type]:
    found = unet.attn_processors.items()
    return {type(processor) for name, processor in found if f".{attention}." in name}


@pytest.mark.parametrize("first", ["ip-adapter", "inject"])
def test_beside_each_other(first):
    stock, unet = models.build("sd15"), models.build("sd15")
    load_ip_adapter(stock)
    expected = run(stock)
    if first == "ip-adapter":
        load_ip_adapter(unet)
        report = a3fta.inject(unet, CONFIG)
        assert set(report.left_processors.values()) == {"IPAdapterAttnProcessor2_0"}
        assert len(report.left_processors) == len(report.processors) == len(report.layers) / 2
    else:
        a3fta.inject(unet, CONFIG)
        load_ip_adapter(unet)
    assert kinds(unet, "attn1") == {A3FTAAttnProcessor}
    assert kinds(unet, "attn2") == {IPAdapterAttnProcessor2_0}
    torch.testing.assert_close(run(unet), expected)

    models.randomize(unet)
    with torch.no_grad():  # of cross-attention alone, where the stock processor calls the layer
        for name, layer in a3fta.projections(unet).items():
            if ".attn1." in name:
                layer.choose({"default": 0.0})
    changed = run(unet)
    assert not torch.allclose(changed, expected, rtol=1e-2, atol=1e-2)
    with a3fta.disabled(unet):
        torch.testing.assert_close(run(unet), expected)

    a3fta.eject(unet)
    assert kinds(unet, "attn2") == {IPAdapterAttnProcessor2_0}
    assert kinds(unet, "attn1") == {AttnProcessor2_0}
    torch.testing.assert_close(run(unet), expected)


@pytest.mark.parametrize("first", ["ip-adapter", "inject"])
def test_unloaded_the_adapter_acts_on(first):
    unet, plain = models.build("sd15"), models.build("sd15")
    a3fta.inject(plain, CONFIG)
    models.randomize(plain)
    if first == "ip-adapter":
        load_ip_adapter(unet)
    a3fta.inject(unet, CONFIG)
    models.randomize(unet)
    if first == "inject":
        load_ip_adapter(unet)
    Pipeline(unet).unload_ip_adapter()
    assert kinds(unet, "attn2") == {AttnProcessor2_0}
    torch.testing.assert_close(run(unet, image=False), run(plain, image=False))
    a3fta.eject(unet)
    torch.testing.assert_close(run(unet, image=False), run(models.build("sd15"), image=False))
    assert kinds(unet, "attn1") | kinds(unet, "attn2") == {AttnProcessor2_0}
