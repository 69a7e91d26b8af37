"""Real architectures by name, without weights, and the inputs that they take.

A model is one entry of ARCHITECTURES, its diffusers class one entry of INPUTS. Everything is on the
meta device: `ledger` and `step_peak` run it all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VAE = 8  # pixels per latent, along an edge


@dataclass(frozen=True)
class Architecture:
    """A published model: its diffusers class and configuration, the resolution it was made for."""

    title: str
    cls: str
    resolution: int
    config: dict[str, Any]


ARCHITECTURES = {
    "sd15": Architecture("Stable Diffusion 1.5", "UNet2DConditionModel", 512, {
        "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
        "cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64,
    }),
    "sd21": Architecture("Stable Diffusion 2.1", "UNet2DConditionModel", 768, {
        "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
        "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True, "upcast_attention": True, "sample_size": 96,
    }),
    "sdxl": Architecture("Stable Diffusion XL", "UNet2DConditionModel", 1024, {
        "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816, "sample_size": 128,
    }),
    "sd3-medium": Architecture("Stable Diffusion 3 medium", "SD3Transformer2DModel", 1024, {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
        "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
    }),
    "flux-dev": Architecture("FLUX.1 dev", "FluxTransformer2DModel", 1024, {
        "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
        "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
    }),
    "pixart": Architecture("PixArt-alpha XL-2 1024", "PixArtTransformer2DModel", 1024, {
        "sample_size": 128, "patch_size": 2, "in_channels": 4, "out_channels": 8,
        "num_layers": 28, "attention_head_dim": 72, "num_attention_heads": 16,
        "cross_attention_dim": 1152, "caption_channels": 4096, "interpolation_scale": 2,
    }),
    "z-image": Architecture("Z-Image", "ZImageTransformer2DModel", 1024, {
        "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30,
        "cap_feat_dim": 2560, "in_channels": 16, "axes_lens": (1536, 512, 512),
    }),
}  # fmt: skip


class UnknownModelError(ValueError):
    """No such architecture, and no folder with a model's config.json."""


def build(model: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The named architecture, or the model of a folder, on the meta device in training mode.

    Args:
        model: a key of ARCHITECTURES; or a folder that diffusers saved a model or a pipeline in,
            of which config.json is read alone.
        dtype: of the weights.

    Raises UnknownModelError where it is neither, or of a class that INPUTS does not list.
    """
    import diffusers
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it comments on every cast
    try:
        with torch.device("meta"):
            if model in ARCHITECTURES:
                known = ARCHITECTURES[model]
                made = getattr(diffusers, known.cls)(**known.config)
            else:
                config = _read(model)
                made = getattr(diffusers, config["_class_name"]).from_config(config)
            return made.to(dtype).train()
    finally:
        logging.set_verbosity(verbosity)


def _read(model: str) -> dict[str, Any]:
    known = ", ".join(ARCHITECTURES)
    for part in ("", "unet", "transformer"):
        path = Path(model) / part / "config.json"
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text())
            name = config["_class_name"]
        except (ValueError, KeyError, TypeError) as error:
            raise UnknownModelError(
                f"{path}: expected the configuration of a diffusers model, got {error!r}"
            ) from None
        if name not in INPUTS:
            raise UnknownModelError(
                f"{path}: expected a model of class {', '.join(INPUTS)}, got {name!r}"
            )
        return config
    raise UnknownModelError(
        f"model: expected one of {known}, or a folder with a diffusers model's config.json, "
        f"got {model!r}"
    )


def resolution_of(model: str) -> int:
    """The resolution the architecture was made for; of a folder that of its sample_size."""
    if model in ARCHITECTURES:
        return ARCHITECTURES[model].resolution
    size = _read(model).get("sample_size")
    return size * VAE if isinstance(size, int) else 1024


def inputs(
    model: nn.Module, resolution: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """What a training step passes to the forward, for square images: latents and texts, no masks.

    Keyword arguments on the meta device. Raises ValueError, naming the multiple that is needed,
    for a resolution that the model cannot take.
    """
    config: Any = model.config
    multiple = multiple_of(model)
    if resolution < multiple or resolution % multiple:
        raise ValueError(
            f"resolution: expected a multiple of {multiple} for a {type(model).__name__}, "
            f"got {resolution}"
        )
    limit = config.get("pos_embed_max_size")
    if limit is not None and resolution > limit * multiple:
        raise ValueError(
            f"resolution: expected at most {limit * multiple}, as far as the positions of this "
            f"{type(model).__name__} go, got {resolution}"
        )

    def of(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=dtype, device="meta")

    return INPUTS[type(model).__name__](config, resolution // VAE, of)


_PACKED = ("FluxTransformer2DModel", "ZImageTransformer2DModel")


def multiple_of(model: nn.Module) -> int:
    """The resolution has to be a multiple of this."""
    config: Any = model.config
    if "block_out_channels" in config:
        pixels = 1 if config.get("cross_attention_dim") is None else VAE
        return pixels * 2 ** (len(config["block_out_channels"]) - 1)
    # Flux packs 2 x 2 latents into a token before the model, Z-Image names a choice of one
    return VAE * (config["patch_size"] if type(model).__name__ not in _PACKED else 2)


Make = Callable[..., Tensor]  # a tensor (batch, *shape)


def _steps(of: Make) -> Tensor:
    return torch.empty(of().shape, dtype=torch.int64, device="meta")


def _unet(config: Any, size: int, of: Make) -> dict[str, Any]:
    found: dict[str, Any] = {
        "sample": of(config["in_channels"], size, size),
        "timestep": _steps(of),
        "encoder_hidden_states": of(77, config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        width = config["projection_class_embeddings_input_dim"]
        text = width - 6 * config["addition_time_embed_dim"]
        found["added_cond_kwargs"] = {"text_embeds": of(text), "time_ids": of(6)}
    return found


def _pixels(config: Any, size: int, of: Make) -> dict[str, Any]:
    edge = size * VAE
    found = {"sample": of(config["in_channels"], edge, edge), "timestep": _steps(of)}
    if config.get("num_class_embeds") is not None:
        found["class_labels"] = _steps(of)
    return found


def _sd3(config: Any, size: int, of: Make) -> dict[str, Any]:
    return {
        "hidden_states": of(config["in_channels"], size, size),
        "encoder_hidden_states": of(77 + 256, config["joint_attention_dim"]),
        "pooled_projections": of(config["pooled_projection_dim"]),
        "timestep": _steps(of),
    }


def _flux(config: Any, size: int, of: Make) -> dict[str, Any]:
    tokens, text = (size // 2) ** 2, 512
    found = {
        "hidden_states": of(tokens, config["in_channels"]),
        "encoder_hidden_states": of(text, config["joint_attention_dim"]),
        "pooled_projections": of(config["pooled_projection_dim"]),
        "timestep": of(),
        "img_ids": of(tokens, 3)[0],
        "txt_ids": of(text, 3)[0],
    }
    if config["guidance_embeds"]:
        found["guidance"] = of()
    return found


def _pixart(config: Any, size: int, of: Make) -> dict[str, Any]:
    conditions = config.get("use_additional_conditions")
    if conditions is None:  # diffusers' rule: the models made for 1024 have them
        conditions = config["sample_size"] == 128
    return {
        "hidden_states": of(config["in_channels"], size, size),
        "encoder_hidden_states": of(120, config["caption_channels"]),
        "timestep": _steps(of),
        "added_cond_kwargs": {
            "resolution": of(2) if conditions else None,
            "aspect_ratio": of(1) if conditions else None,
        },
    }


def _z_image(config: Any, size: int, of: Make) -> dict[str, Any]:
    return {
        "x": list(of(config["in_channels"], 1, size, size)),
        "t": of(),
        "cap_feats": list(of(512, config["cap_feat_dim"])),
    }


INPUTS: dict[str, Callable[[Any, int, Make], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "UNet2DModel": _pixels,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "ZImageTransformer2DModel": _z_image,
}
