"""Models outside the table: the layers behind attention, found by their names and shapes.

An attention layer is one of diffusers' two kinds, or a module of any library that holds query, key
and value layers under the usual names. With Q, K and V their outputs, heads * head_dim of the value
projection is  V * Q / K  (1): query and key share head_dim, key and value the number of heads, also
where several queries share a head. The layer that consumes attention is sure where it has one of
the usual names and (1) inputs. Everything else is doubt: said, with the reason, and adapted only
where `AdapterConfig.targets` names it in full.

Layers of diffusers' `Attention` whose processor is one of the U-Nets' get ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from ..forwards import inside
from ..tree import plain_name
from . import unet
from .clock import steps
from .family import Family, Site, is_attention

_APART = (
    ("to_q", "to_k", "to_v"),
    ("to_q", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_query", "to_key", "to_value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
)
# key and value as halves of one layer, beside the query; all three as thirds of one
_PAIRED = (("to_q", "to_kv"), ("q_proj", "kv_proj"), ("q", "kv"), ("q_linear", "kv_linear"))
_PACKED = ("to_qkv", "qkv_proj", "qkv", "Wqkv", "wqkv", "in_proj", "c_attn", "query_key_value")
# behind attention: for the layer's own tokens, and for those that attend together with them
_OUTPUTS = (
    "to_out", "out_proj", "o_proj", "proj_out", "out_layer", "proj", "proj_attn", "c_proj", "wo",
    "o", "out", "out_lin", "dense",
)  # fmt: skip
_OTHERS = ("to_add_out", "to_out_t")
# of the module around an attention layer that has none of these
_OUTSIDE = ("proj_out", "linear2", "out_proj", "output.dense")

# neither q nor k nor v
_BY_NAME = re.compile(r"^(?!.*[qkv]).*(out|proj)")
_PAST = "torch's multi_head_attention_forward reads the output layer's weight without calling it"


def sites(model: nn.Module) -> Iterator[Site]:
    """Every attention layer, with the layers that are surely behind it and those that may be."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if _reads_past(module):
            yield Site(name, module, {}, reason=_PAST)
        elif is_attention(module) or width(module) is not None:
            yield _site(name, module, modules.get(name.rpartition(".")[0]))
        elif type(module).__name__.lower().endswith(("attention", "attn")):
            doubt = "its attention layer has no query, key and value layers under the usual names"
            found = {n for n, x in module.named_children() if isinstance(inside(x), nn.Linear)}
            if found:
                unsure = {_join(name, n): doubt for n in sorted(found)}
                yield Site(name, module, {}, unsure=unsure)


def named(model: nn.Module, names: Iterable[str], known: Iterable[Site]) -> Iterator[Site]:
    """The linear layers of these full names that are not at the `known` sites."""
    seen = {plain_name(n) for site in known for n in (*site.projections, *site.unsure)}
    modules = dict(model.named_modules())
    layers = {plain_name(n): (n, x) for n, x in modules.items() if "adapters" not in n.split(".")}
    for name in names:
        full, layer = layers.get(name, ("", None))
        if name in seen or layer is None or not isinstance(inside(layer), nn.Linear):
            continue
        around = full.rpartition(".")[0]
        if _reads_past(modules[around]):
            raise ValueError(f"targets: expected layers that are called, got {name!r}: {_PAST}")
        yield Site(around, modules[around], {full: layer})


def _site(name: str, module: nn.Module, parent: nn.Module | None) -> Site:
    projections: dict[str, nn.Module] = {}
    unsure: dict[str, str] = {}
    gives = width(module)
    own = _fitting(dict(_outputs(module, _OUTPUTS)), gives)
    for attribute, layer in (*own.items(), *_outputs(module, _OTHERS)):
        full = _join(name, attribute)
        doubt = _doubt(layer, gives)
        if not doubt and attribute in own and len(own) > 1:
            doubt = f"several layers may be behind attention: {', '.join(own)}"
        if doubt:
            unsure[full] = doubt
        else:
            projections[full] = layer
    if not projections and not unsure and parent is not None:
        around = name.rpartition(".")[0]
        for attribute, layer in _outputs(parent, _OUTSIDE):
            doubt = "the attention layer has none of its own; " + (
                _doubt(layer, gives) or "this one, beside it, has the right number of inputs"
            )
            unsure[_join(around, attribute)] = doubt
    if not projections and not unsure:
        for attribute, layer in module.named_children():
            if _BY_NAME.search(attribute) and isinstance(inside(layer), nn.Linear):
                unsure[_join(name, attribute)] = "it may be behind attention, by its unusual name"
    reason = "no linear layer of its own under a usual name consumes it"
    return Site(name, module, projections, reason=reason, unsure=unsure)


def _reads_past(module: nn.Module) -> bool:
    """Whether it is nn.MultiheadAttention, or calls what that calls."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "multi_head_attention_forward" in code.co_names


def width(module: nn.Module) -> int | None:
    """The channels of attention's output, heads side by side; None where names do not tell."""
    for names in _APART:
        q, k, v = (_rows(module, n) for n in names)
        if q and k and v:
            return v * q // k if v * q % k == 0 else None
    for query, pair in _PAIRED:
        q, kv = _rows(module, query), _rows(module, pair)
        if q and kv and kv % 2 == 0:
            return q
    for name in _PACKED:
        qkv = _rows(module, name)
        if qkv and qkv % 3 == 0:
            return qkv // 3
    return None


def _rows(module: nn.Module, name: str) -> int | None:
    """Outputs of the layer of that name."""
    layer = getattr(module, name, None)
    if not isinstance(layer, nn.Module):
        return None
    layer = inside(layer)
    found = getattr(layer, "out_features", None) or getattr(layer, "out_channels", None)
    return found if isinstance(found, int) else None


def _outputs(module: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """The layers of these names; of a list (linear layer, dropout) the first."""
    for name in names:
        layer: Any = module
        for part in name.split("."):
            layer = getattr(layer, part, None)
        if isinstance(layer, (nn.ModuleList, nn.Sequential)) and len(layer) > 0:
            yield f"{name}.0", layer[0]
        elif isinstance(layer, nn.Module) and not isinstance(layer, (nn.ModuleList, nn.Identity)):
            yield name, layer


def _fitting(layers: dict[str, nn.Module], gives: int | None) -> dict[str, nn.Module]:
    """Those that leave no doubt, where there are any; else all."""
    return {n: x for n, x in layers.items() if not _doubt(x, gives)} or layers


def _doubt(layer: nn.Module, gives: int | None) -> str:
    """Why the layer may not be the one that consumes attention, and nothing else; "" if it is."""
    layer = inside(layer)
    if not isinstance(layer, nn.Linear):
        return f"its projection is a {type(layer).__name__}"
    if gives is None:
        return "no query, key and value layers under the usual names tell attention's width"
    if layer.in_features == gives:
        return ""
    more = ", something else beside it" if layer.in_features > gives else ""
    return f"it reads {layer.in_features} channels where attention gives {gives}{more}"


def _join(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute


def joinable(attention: Any) -> list[tuple[nn.Module, ...]]:
    return unet.joinable(attention) if isinstance(attention, Attention) else []


FAMILY = Family(
    "structure", (), steps, sites, unet.processor_for, unet.owns, joinable, by_structure=True
)  # fmt: skip
