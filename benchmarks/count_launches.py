"""What an attention layer starts, and its host time: `python -m benchmarks.count_launches`.

A self- and a cross-attention layer of SD1.5 and of SDXL in bf16, frozen or adapted, forward and
forward with backward. On a GPU: kernels, and the time of a Python loop until the last kernel is
done. On the CPU: operators that move data, and the CPU time of layers with as many heads but next
to no work, which leaves the time of Python and of the dispatcher; it is taken in float32, because
the CPU's bf16 products cost more than all else here. Writes results/launches_<device>.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.backends import why_not

from . import measure

RESULTS = Path(__file__).parent / "results"


class Layer(NamedTuple):
    name: str
    channels: int
    heads: int
    tokens: int
    text: int | None  # width of the text that cross-attention reads


LAYERS = (
    Layer("SD1.5 self", 320, 8, 4096, None),
    Layer("SD1.5 cross", 320, 8, 4096, 768),
    Layer("SDXL self", 640, 10, 4096, None),
    Layer("SDXL cross", 640, 10, 4096, 2048),
)
TEXT_TOKENS = 77


def small(layer: Layer) -> Layer:
    """As many heads, of 4 channels each; a text as narrow; 4 tokens."""
    text = None if layer.text is None else 32
    return layer._replace(channels=4 * layer.heads, tokens=4, text=text)


def attention(layer: Layer, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen layer as a transformer block holds it, in training mode."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    torch.manual_seed(0)
    attn = Attention(
        query_dim=layer.channels, cross_attention_dim=layer.text, heads=layer.heads,
        dim_head=layer.channels // layer.heads, processor=AttnProcessor2_0(),
    )  # fmt: skip
    return nn.ModuleDict({"attn": attn.to(device, dtype).requires_grad_(False).train()})


def variants(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[nn.Module], Any]]:
    """What is done to the frozen layer, by name."""

    def lora(holder: nn.Module) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        names = ["to_q", "to_k", "to_v", "to_out.0"]
        inject_adapter_in_model(LoraConfig(r=16, target_modules=names), holder)

    def ours(
        backend: str, placement: str = "pre", fused: bool = False
    ) -> Callable[[nn.Module], Any]:
        def adapt(holder: nn.Module) -> None:
            config = a3fta.AdapterConfig(rank=16, placement=placement)
            a3fta.inject(holder, config, backend=backend)
            if fused:
                a3fta.fuse_qkv(holder)

        return adapt

    found: dict[str, Callable[[nn.Module], Any]] = {
        "frozen": lambda holder: None, "PEFT LoRA": lora, "reference": ours("reference")
    }  # fmt: skip
    for backend in ("native", "triton"):
        if why_not(backend, device, dtype) is None:
            found[backend] = ours(backend)
            found[f"{backend}, parallel"] = ours(backend, "parallel")
            if hasattr(a3fta, "fuse_qkv"):
                found[f"{backend}, fuse_qkv"] = ours(backend, fused=True)
    return found


def calls(holder: nn.Module, layer: Layer, device: torch.device, dtype: torch.dtype) -> dict:
    """Forward, and forward with backward, of the layer."""
    batch = 4 if device.type == "cuda" else 1
    h = torch.randn(
        batch, layer.tokens, layer.channels, device=device, dtype=dtype
    ).requires_grad_()
    text = None
    if layer.text is not None:
        text = torch.randn(batch, TEXT_TOKENS, layer.text, device=device, dtype=dtype)
    dy = torch.randn_like(h)
    trained = [p for p in holder.parameters() if p.requires_grad]

    def forward(_: int = 0) -> Tensor:
        return holder["attn"](h, encoder_hidden_states=text)

    def step(_: int = 0) -> None:
        torch.autograd.grad(forward(), [h, *trained], dy)

    return {"forward": forward, "forward+backward": step}


def count(layer: Layer, device: torch.device, seconds: float) -> dict:
    """Rows by variant and direction: what is started, and the microseconds of a call."""
    layer = layer if device.type == "cuda" else small(layer)
    found: dict[str, dict[str, Any]] = {}
    clocks: dict[str, measure.Clock] = {}
    for name, direction, call in every_call(layer, device, torch.bfloat16):
        found.setdefault(name, {})[direction] = measure.count(call, device)
    timed = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, direction, call in every_call(layer, device, timed):
        clocks[f"{name}|{direction}"] = clock(call, device)
    for key, values in measure.interleave(clocks, seconds).items():
        name, direction = key.split("|")
        found[name][direction]["host_us"] = round(statistics.median(values) * 1e6, 1)
    return found


def every_call(
    layer: Layer, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, str, measure.Call]]:
    """Variant, direction, and what runs it."""
    stock = attention(layer, device, dtype)
    for name, adapt in variants(device, dtype).items():
        holder = copy.deepcopy(stock)
        adapt(holder)
        for direction, call in calls(holder, layer, device, dtype).items():
            yield name, direction, call


def clock(call: measure.Call, device: torch.device) -> measure.Clock:
    """Seconds of a call: on the CPU those of this process, whatever else runs there."""
    if device.type == "cuda":
        return lambda: measure.host_seconds(call, 1, device)

    def sample() -> float:
        start = time.process_time()
        for _ in range(50):
            call(0)
        return (time.process_time() - start) / 50

    return sample


def main() -> int:
    parser = argparse.ArgumentParser(description="kernels, operators and host time of a layer")
    parser.add_argument("--out", type=Path, help="default: results/launches_<device>.json")
    parser.add_argument("--seconds", type=float, default=10.0, help="of sampling for each layer")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    found = {}
    for layer in LAYERS:
        found[layer.name] = count(layer, device, options.seconds)
        print(layer.name)
        for name, rows in found[layer.name].items():
            print(f"  {name:18} {rows}")
    record = {
        "script": "python -m benchmarks.count_launches",
        "rank": 16,
        "environment": measure.environment(device),
        "layers": found,
    }
    out = options.out or RESULTS / f"launches_{measure.file_stem(device)}.json"
    out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
