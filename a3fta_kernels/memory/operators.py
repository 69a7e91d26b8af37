"""Names of what saves: the operator behind an autograd node, and the role of what it keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..ops.adapter import contract as adapter
from ..ops.adapter_linear import contract as adapter_linear
from ..ops.cross_attention_adapter import contract as cross_attention_adapter

UNKNOWN = "unknown"  # kept, but by no node of the graph of the outputs, and no Function
CHECKPOINT = "checkpoint"  # what a checkpointed region starts from

# start of an autograd node's name: the operator; the first that fits
_OPERATORS = {
    "NativeGroupNorm": "group_norm",
    "NativeLayerNorm": "layer_norm",
    "FusedRmsNorm": "rms_norm",
    "NativeBatchNorm": "batch_norm",
    "ScaledDotProduct": "attention",
    "Convolution": "conv",
    "Silu": "silu",
    "Gelu": "gelu",
    "Softmax": "softmax",
    "NativeDropout": "dropout",
    "Addmm": "linear",
    "Linear": "linear",
    "Mm": "linear",
    "Addmv": "linear",
    "Mv": "linear",
    "Baddbmm": "matmul",
    "Bmm": "matmul",
    "CheckpointFunction": CHECKPOINT,
}
# autograd's name of a role, where an operator has a plainer one
_ROLES = {
    "linear": {"self": "input", "mat1": "input", "mat2": "weight"},
    "silu": {"self": "input"},
    "gelu": {"self": "input"},
    "group_norm": {"result1": "mean", "result2": "rstd"},
    "layer_norm": {"result1": "mean", "result2": "rstd"},
}
_OURS = {
    "adapter": adapter.SAVED,
    "adapter_linear": adapter_linear.SAVED,
    "cross_attention_adapter": cross_attention_adapter.SAVED,
}
_REGISTERED = re.compile(r"GeneratedBackwardFor_(\w+?)_(\w+)_defaultBackward")


def operator_of(node: Any) -> str:
    """`group_norm`, `conv`, `mul`, ...; an op of ours by its name, a Function by its
    `operator`, where it has one, or its class name."""
    name = node.name()
    registered = _REGISTERED.fullmatch(name)
    if registered:
        return registered[2] if registered[1] == "a3fta" else f"{registered[1]}::{registered[2]}"
    if hasattr(node, "_forward_cls"):
        label = getattr(node._forward_cls, "operator", None)
        if isinstance(label, str):
            return label
        name = node._forward_cls.__name__
        return _known(name) or name
    bare = re.sub(r"Backward\d*$", "", name)
    return _known(bare) or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", bare).lower().lstrip("_")


def _known(name: str) -> str | None:
    return next((op for start, op in _OPERATORS.items() if name.startswith(start)), None)


_attributes: dict[type, list[str]] = {}


def saved_by(node: Any) -> Iterator[tuple[str, Any]]:
    """(role, what the pack hook returned) for every tensor that the node keeps under a hook.

    Reads what is stored: nothing is unpacked, so that no checkpoint computes anything again.
    A Function names its tensors by a tuple `saved_names`, its own or its context's, in the order
    it saves them.
    """
    kind = type(node)
    if kind not in _attributes:
        _attributes[kind] = [n for n in dir(kind) if n.startswith("_raw_saved_")]
    for attribute in _attributes[kind]:
        value = getattr(node, attribute)
        role = attribute.removeprefix("_raw_saved_")
        if not isinstance(value, (tuple, list)):
            value, names = [value], [_ROLES.get(operator_of(node), {}).get(role, role)]
        elif role == "tensors":
            names = list(_names(node))
        else:
            names = []
        for i, saved in enumerate(value):
            if saved is not None and saved.unpack_hook is not None:
                yield names[i] if i < len(names) else f"{role}[{i}]", saved.data


def _names(node: Any) -> tuple[str, ...]:
    names = getattr(node, "saved_names", None)  # of this call, where the rule says so
    names = names or getattr(getattr(node, "_forward_cls", None), "saved_names", None)
    return names if names is not None else _OURS.get(operator_of(node), ())
