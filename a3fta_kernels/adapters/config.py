"""The settings of an adapter: what `inject` takes and what an adapter file holds."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..checks import check_choice, describe
from ..ops.activations import ACTIVATIONS

PLACEMENTS = ("pre", "post", "parallel")
TRAIN = ("adapter", "adapter+attention")
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is and where it goes.

    Args:
        rank: R, the width of the bottleneck.
        activation: identity, relu, gelu, gelu_tanh or silu.
        scale: factor on the adapter's output.
        design: a name from `adapters.DESIGNS`: bottleneck; gated, half_open, scaled,
            rescaled (learned factors); film, time_scaled (time-aware).
        bias: whether the adapter has b_down and b_up.
        dropout: probability, in training, of masking a rank of the bottleneck for a sample.
        targets: which attention layers get an adapter: None (all), a regular expression searched
            in the projection's name, or names, each a whole dotted part of it ("attn2",
            "mid_block", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0").
        rank_pattern: regular expression -> rank, for layers whose rank differs; the first that
            matches counts.
        dtype: dtype of the adapter's parameters; None: the layer's own, but float32 beside
            weights of 16 bits and less.
        train: "adapter", or "adapter+attention": the linear layers of attention (q, k, v, out)
            that have an adapter train too.
        layer_norm: whether the adapter reads h normalised over its channels. A gain and a shift
            of the norm would be the same as other w_down and b_down: it has none. Not fused.
        drop_path: probability, in training, of leaving the whole adapter out for a sample.
        time_window: (first, last) timestep, of 0 to 1000, at which the adapter acts; None: all.
        time_rank: the rank at timestep 1000, growing to all of R at 0; None: R throughout.
        placement: "pre": in front of the projection. "parallel": beside attention, from its input
            to the projection's output. For comparison "post": behind the projection, on its output.

    With drop_path or time_window there is no b_up, which would act where the adapter does not.

    Raises:
        TypeError, ValueError: a field does not fit; the message names it.
    """

    rank: int = 64
    activation: str = "gelu"
    scale: float = 1.0
    design: str = "bottleneck"
    bias: bool = True
    dropout: float = 0.0
    targets: str | tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    train: str = "adapter"
    layer_norm: bool = False
    drop_path: float = 0.0
    time_window: tuple[float, float] | None = None
    time_rank: int | None = None
    placement: str = "pre"

    def __post_init__(self) -> None:
        from . import DESIGNS

        _check_rank("rank", self.rank)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("design", self.design, DESIGNS)
        check_choice("train", self.train, TRAIN)
        check_choice("placement", self.placement, PLACEMENTS)
        object.__setattr__(self, "scale", _number("scale", self.scale))
        for name in ("dropout", "drop_path"):
            value = _number(name, getattr(self, name))
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected 0 <= p < 1, got {value!r}")
            object.__setattr__(self, name, value)
        for name in ("bias", "layer_norm"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"{name}: expected True or False, got {describe(getattr(self, name))}"
                )
        object.__setattr__(self, "time_window", _window(self.time_window))
        if self.time_rank is not None:
            _check_rank("time_rank", self.time_rank)
            if self.time_rank > self.rank:
                raise ValueError(
                    f"time_rank: expected at most the rank of {self.rank}, got {self.time_rank}"
                )
        object.__setattr__(self, "targets", _targets(self.targets))
        if not isinstance(self.rank_pattern, Mapping):
            raise TypeError(
                f"rank_pattern: expected a dict of regular expression to rank, "
                f"got {describe(self.rank_pattern)}"
            )
        for pattern, rank in self.rank_pattern.items():
            check_regex("rank_pattern", pattern)
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        if self.dtype is not None and self.dtype not in DTYPES.values():
            raise TypeError(
                f"dtype: expected None or one of {', '.join(DTYPES)}, got {describe(self.dtype)}"
            )

    @property
    def timed(self) -> bool:
        """Whether the adapter depends on the timestep."""
        from . import DESIGNS

        own = self.time_window is not None or self.time_rank is not None
        return own or DESIGNS[self.design].timed

    def rank_for(self, layer: str) -> int:
        """The rank of the adapter on `layer`."""
        for pattern, rank in self.rank_pattern.items():
            if re.search(pattern, layer):
                return rank
        return self.rank

    def to_dict(self) -> dict[str, Any]:
        """The settings in JSON's types; `from_dict` reads them back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["rank_pattern"] = dict(self.rank_pattern)
        if isinstance(self.targets, tuple):
            values["targets"] = list(self.targets)
        if self.time_window is not None:
            values["time_window"] = list(self.time_window)
        if self.dtype is not None:
            values["dtype"] = str(self.dtype).removeprefix("torch.")
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """The config that `to_dict` wrote. Unknown keys and bad values raise."""
        if not isinstance(values, Mapping):
            raise TypeError(f"config: expected a dict, got {describe(values)}")
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(
                f"config: expected keys of {', '.join(known)}, got {', '.join(unknown)}"
            )
        values = dict(values)
        dtype = values.get("dtype")
        if isinstance(dtype, str):
            check_choice("dtype", dtype, DTYPES)
            values["dtype"] = DTYPES[dtype]
        return cls(**values)


def _check_rank(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _window(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(f"time_window: expected None or (first, last), got {describe(value)}")
    first, last = (_number("time_window", x) for x in value)
    if not first <= last:
        raise ValueError(f"time_window: expected first <= last, got {(first, last)}")
    return first, last


def check_regex(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{name}: expected a regular expression, got {describe(pattern)}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{name}: expected a regular expression, got {pattern!r} ({error})"
        ) from error


def _targets(value: Any) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        check_regex("targets", value)
        return value
    names = tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise TypeError(
            f"targets: expected None, a regular expression or a list of names, "
            f"got {describe(value)}"
        )
    return names
