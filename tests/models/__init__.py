"""Small models of every family, with the inputs they take. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

from . import flux1, small, stable_diffusion_3, unet
from .unet import kandinsky, sd2, sd15, sdxl, unet2d


def flux(**options: Any) -> nn.Module:
    """Like Flux-dev: dual blocks, then single ones, whose projection reads more than attention."""
    return flux1.flux(**(dict(num_layers=2, num_single_layers=2) | options))


def sd3(**options: Any) -> nn.Module:
    """Like SD3: text and image attend together, by the stock processors."""
    return small.filled(lambda: stable_diffusion_3.sd3(**options))


def sd3_inputs() -> dict[str, Any]:
    return stable_diffusion_3.MODELS["sd3"].batch()


MODELS = {
    "sd15": sd15, "sd2": sd2, "sdxl": sdxl, "kandinsky": kandinsky, "unet2d": unet2d, "flux": flux
}  # fmt: skip
INPUTS = {"sdxl": unet.sdxl_inputs, "unet2d": unet.unet2d_inputs, "flux": flux1.inputs}


def build(
    name: str,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    """A model of the table, always with the same weights, in eval mode."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = MODELS[name](**options)
    torch.set_rng_state(state)
    if dtype != torch.float32:  # diffusers comments on every cast
        model.to(dtype)
    return model.to(device).eval()


def inputs(
    name: str,
    batch: int = 2,
    seed: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    masked: bool = False,
) -> dict[str, Any]:
    """Keyword arguments for `model(**inputs(name))`; `masked` hides some of the text."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    found = INPUTS.get(name, unet.inputs)(draw, batch)
    if masked:
        mask = torch.ones(batch, 7, device=device, dtype=torch.bool)
        mask[:, 4:] = False
        found["encoder_attention_mask"] = mask
    return found


def randomize(model: nn.Module, name: str = "default", std: float = 0.1, seed: int = 2) -> None:
    """Fills the named adapter as training would, so that it changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".adapters.{name}." in key:
                noise = torch.randn(parameter.shape, generator=generator) * std
                parameter.copy_(noise.to(parameter))


def run(model: nn.Module, name: str, **options: Any) -> Tensor:
    return model(**inputs(name, **options)).sample


def attention_processors(model: nn.Module) -> dict[str, Any]:
    """The processor of every attention layer, also where diffusers has no such property."""
    kinds = (Attention, FluxAttention)
    return {n: m.get_processor() for n, m in model.named_modules() if isinstance(m, kinds)}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything an injection could change, by value."""
    return dict(
        state={k: v.clone() for k, v in model.state_dict().items()},
        processors=attention_processors(model),
        classes={n: type(m) for n, m in model.named_modules()},
        requires_grad={n: p.requires_grad for n, p in model.named_parameters()},
        attributes={n: set(vars(m)) for n, m in model.named_modules()},
        training={n: m.training for n, m in model.named_modules()},
    )


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state, kept = after.pop("state"), before["state"]
    assert list(state) == list(kept)
    assert all(torch.equal(state[k], kept[k]) for k in state)
    for key, value in after.items():
        assert value == before[key], key
