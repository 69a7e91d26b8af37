"""Small models of every family, with the inputs they take. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

from .unet import kandinsky, sd2, sd15, sdxl, unet2d


def flux(**options: Any) -> nn.Module:
    """Like Flux-dev: dual blocks, then single ones, whose projection reads more than attention."""
    config = dict(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxTransformer2DModel(**(config | options))


def sd3(**options: Any) -> nn.Module:
    """Like SD3: text and image attend together, by the stock processors."""
    torch.manual_seed(0)
    config = dict(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    model = diffusers.SD3Transformer2DModel(**(config | options))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def sd3_inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    return dict(
        hidden_states=torch.randn(2, 4, 16, 16),
        encoder_hidden_states=torch.randn(2, 7, 32),
        pooled_projections=torch.randn(2, 16),
        timestep=torch.tensor([7, 7]),
    )


MODELS = {
    "sd15": sd15, "sd2": sd2, "sdxl": sdxl, "kandinsky": kandinsky, "unet2d": unet2d, "flux": flux
}  # fmt: skip


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

    if name == "flux":
        return dict(
            hidden_states=draw(batch, 16, 4), encoder_hidden_states=draw(batch, 7, 32),
            pooled_projections=draw(batch, 32), img_ids=draw(16, 3), txt_ids=draw(7, 3) * 0,
            timestep=draw(batch).sigmoid(), guidance=draw(batch) * 0 + 3.5,
        )  # fmt: skip
    found: dict[str, Any] = dict(sample=draw(batch, 4, 16, 16), timestep=7)
    if name != "unet2d":
        found["encoder_hidden_states"] = draw(batch, 7, 32)
    if name == "sdxl":
        found["added_cond_kwargs"] = dict(
            text_embeds=draw(batch, 32), time_ids=torch.ones(batch, 6, device=device, dtype=dtype)
        )
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
