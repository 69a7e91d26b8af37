"""export_lora: an adapter without a non-linearity, written as a LoRA that other programs load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import adapter_file
from .adapters.config import DTYPES
from .checks import check_choice, describe
from .projection import AdaptedProjectionMixin, span
from .tree import adapted, check_kinds, check_known, check_unmerged, denoiser
from .whereabouts import check_in_memory

# layout: its file's name; "diffusers": the one that load_lora_weights looks for first
LAYOUTS = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "kohya_lora.safetensors"}


def export_lora(
    model: Any,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    layout: str = "diffusers",
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes one adapter of activation="identity" as a LoRA on its projections.

    Without an activation and biases the adapted layer is one linear map,

        y = h @ (weight + scale * weight_s @ w_up @ w_down).T + bias

    so that, with weight_s the columns of weight that read attention (all, but in Flux' single
    blocks), the LoRA  weight + B @ A  has

        A = w_down                       (R, K)   zero outside those columns
        B = scale * weight_s @ w_up      (N, R)
        alpha = R                                 the loader's factor alpha / R is 1

    computed in float64 and rounded once. B holds the weights of this base: on another base the
    LoRA is not this adapter. Of several adapters the named one alone is written, active or not,
    and without its mixing weight of `set_adapters`, which goes to the loader instead
    (`pipe.set_adapters`). The model is left as it is.

    Args:
        model: a diffusers model, PEFT-wrapped or not, or a pipeline, whose denoiser is taken.
        folder: is made where it is missing; other files in it stay.
        name: of the adapter on the model.
        layout: "diffusers": pytorch_lora_weights.safetensors with `unet.<layer>.lora_A.weight`
            and `.lora_B.weight`, or `transformer.<layer>...`, as `pipe.load_lora_weights` and
            PEFT read them; alpha is not written, R is the default. "kohya", for
            UNet2DConditionModel: kohya_lora.safetensors with
            `lora_unet_<layer, "_" for ".">.lora_down.weight`, `.lora_up.weight` and `.alpha`
            (float32), which other programs and `pipe.load_lora_weights` read. As those take one
            alpha for all layers, it is the largest R in all of them, and B is scaled by R / alpha
            where R is smaller.
        dtype: of the file's A and B; None: that of each layer's weight.

    Returns the path of the file, which is replaced atomically.

    Raises:
        TypeError: `dtype` is not a floating dtype of 16 bits or more, or the model is none.
        ValueError: no adapter of that name, one that is no LoRA (an activation, biases that are
            not zero), merged layers, a weight that is not a plain tensor at hand (quantized,
            offloaded), adapter parameters on the meta device, values beyond the range of the
            dtype, or a layout that the model has not.
        OSError: from writing; the file that was there stays.
    """
    root = denoiser(model)
    layers = adapted(root)
    check_known("name", [name], layers.values())
    check_choice("layout", layout, LAYOUTS)
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(
            f"dtype: expected None or one of {', '.join(DTYPES)}, got {describe(dtype)}"
        )
    prefix = _prefix(root, layout)
    check_unmerged(layers, "export")
    check_in_memory(root, "export")
    layers = {key: layer for key, layer in layers.items() if name in layer.adapters}
    for key, layer in layers.items():
        _check(key, layer, name)
    factors = {key: _factors(key, layer, name, dtype) for key, layer in layers.items()}
    tensors = _kohya(factors) if layout == "kohya" else _diffusers(factors, prefix)
    return _write(Path(folder) / LAYOUTS[layout], tensors)


def _prefix(root: nn.Module, layout: str) -> str:
    """What the loaders of pipelines call the model."""
    classes = [cls.__name__ for cls in type(root).__mro__]
    if "ModelMixin" not in classes:
        raise ValueError(
            f"model: expected a whole diffusers model, whose layers the file names, "
            f"got a {classes[0]}"
        )
    if layout == "kohya" and "UNet2DConditionModel" not in classes:
        raise ValueError(
            f"layout: expected 'diffusers' for a {classes[0]}, got 'kohya', which is for "
            f"UNet2DConditionModel"
        )
    return "unet" if any(cls.startswith("UNet") for cls in classes) else "transformer"


def _adapter(layer: AdaptedProjectionMixin, name: str) -> Any:
    return layer.adapters[name]


def _check(key: str, layer: AdaptedProjectionMixin, name: str) -> None:
    """Raises where the adapter on this layer cannot be written as a LoRA."""
    adapter = _adapter(layer, name)
    if adapter.config.train != "adapter":
        raise ValueError(
            f"name: expected an adapter alone to write as a LoRA, got {name!r} with attention that "
            f"was trained beside it; save_adapter stores both"
        )
    check_kinds(
        "name", "write as a LoRA", key, name, adapter, "linear", "in front", "timeless",
        "of h itself",
    )  # fmt: skip
    for parameter, tensor in adapter.named_parameters():
        if tensor.device.type == "meta":
            raise ValueError(
                f"model: expected adapter parameters at hand, got {key}'s {parameter} on the "
                f"meta device; export before the model is offloaded"
            )
    own = adapter()
    for parameter in ("b_down", "b_up"):
        bias = getattr(own, parameter)
        if bias is not None and bias.count_nonzero():
            largest = float(bias.detach().abs().max())
            raise ValueError(
                f"name: expected an adapter whose biases are zero, as a LoRA has none, got "
                f"{name!r} with {parameter} of up to {largest:.3g} at {key}; "
                f"train with AdapterConfig(bias=False), or merge and save the model"
            )
    reason = layer.unreadable_reason()
    if reason is not None:
        raise ValueError(f"model: expected plain weights to export, got {key}: {reason}")


def _factors(
    key: str, layer: AdaptedProjectionMixin, name: str, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, torch.dtype]:
    """A (R, K) and B (N, R) in float64 on the CPU, and the dtype that they are for."""
    adapter = _adapter(layer, name)
    start, length = span(layer, layer.columns)
    with torch.no_grad():
        own = adapter()
        weight, w_down, w_up = (
            x.detach().to("cpu", torch.float64)
            for x in (layer.weight.narrow(1, start, length), own.w_down, own.w_up)
        )
        a = w_down.new_zeros(adapter.rank, layer.in_features)
        a.narrow(1, start, length).copy_(w_down)
        b = adapter.scale * (weight @ w_up)
    return a, b, dtype or layer.weight.dtype


def _diffusers(
    factors: Mapping[str, tuple[Tensor, Tensor, torch.dtype]], prefix: str
) -> dict[str, Tensor]:
    tensors = {}
    for key, (a, b, dtype) in factors.items():
        for part, value in (("lora_A", a), ("lora_B", b)):
            tensors[f"{prefix}.{key}.{part}.weight"] = _rounded(f"{key}'s {part}", value, dtype)
    return tensors


def _kohya(factors: Mapping[str, tuple[Tensor, Tensor, torch.dtype]]) -> dict[str, Tensor]:
    # diffusers' converter loses the alphas' layers, which only shows where they differ
    alpha = max(len(a) for a, _, _ in factors.values())
    tensors = {}
    for key, (a, b, dtype) in factors.items():
        layer = f"lora_unet_{key.replace('.', '_')}"
        for part, value in (("lora_down", a), ("lora_up", b * (len(a) / alpha))):
            tensors[f"{layer}.{part}.weight"] = _rounded(f"{key}'s {part}", value, dtype)
        tensors[f"{layer}.alpha"] = torch.tensor(float(alpha), dtype=torch.float32)
    return tensors


def _rounded(what: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = value.to(dtype)
    if not torch.equal(rounded.isfinite(), value.isfinite()):
        raise ValueError(
            f"dtype: expected one with the range of {what}, which reaches "
            f"{float(value.abs().max()):.3g}, got {dtype}"
        )
    return rounded


def _write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    blob = adapter_file.serialize(tensors, {"format": "pt"})
    path.parent.mkdir(parents=True, exist_ok=True)
    adapter_file.replace({path: blob})
    return path
