"""A3FTAConfig: an `AdapterConfig` in PEFT's terms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType

from ..adapters import AdapterConfig
from ..adapters.config import DTYPES, check_regex
from ..backends import BACKENDS
from ..checks import check_choice, describe
from ..peft_file import NAME, SAME
from ..planning import plan_injection
from ..tree import denoiser


@dataclass
class A3FTAConfig(PeftConfig):
    """The adapter, and where PEFT puts it.

    Args:
        rank, activation, scale, design, dropout, layer_norm, drop_path, time_window, time_rank,
            placement: as in `AdapterConfig`; "parallel" only of layers that consume attention.
        use_bias: `AdapterConfig.bias`; in PEFT, `bias` is about the base's own.
        target_modules: the linear layers that get an adapter, by PEFT's rule: names or
            ends of names, or a regular expression of the whole name. None: the layers that consume
            attention, in a model of a known family. Where such a layer reads more than attention
            (Flux's single blocks) the adapter has attention's columns, however it was named.
        rank_pattern: rank of layers, by PEFT's rule: a regular expression of the end of the name,
            from a dot on; the first that matches counts.
        dtype: of the parameters: float16, bfloat16, float32, float64, or None as in
            `AdapterConfig`.
        backend: auto, reference, triton or native; not saved.

    Raises:
        TypeError, ValueError: a field does not fit; the message names it.
    """

    rank: int = 64
    activation: str = "gelu"
    scale: float = 1.0
    design: str = "bottleneck"
    use_bias: bool = True
    dropout: float = 0.0
    target_modules: Any = None
    rank_pattern: Any = field(default_factory=dict)
    dtype: Any = None
    layer_norm: bool = False
    drop_path: float = 0.0
    time_window: Any = None
    time_rank: Any = None
    placement: str = "pre"
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME)
        if not isinstance(self.use_bias, bool):
            raise TypeError(f"use_bias: expected True or False, got {describe(self.use_bias)}")
        if isinstance(self.dtype, torch.dtype):
            self.dtype = str(self.dtype).removeprefix("torch.")
        if self.dtype is not None:
            check_choice("dtype", self.dtype, DTYPES)
        check_choice("backend", self.backend, ("auto", *BACKENDS))
        self.target_modules = _target_modules(self.target_modules)
        self.scale = self.to_adapter_config().scale

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["backend"]
        return values

    def to_adapter_config(self) -> AdapterConfig:
        """The same adapter for `inject`. Of `target_modules`, what is no layer that consumes
        attention has no counterpart there."""
        pattern = self.rank_pattern
        if not isinstance(pattern, Mapping):
            raise TypeError(f"rank_pattern: expected a dict, got {describe(pattern)}")
        for key in pattern:
            check_regex("rank_pattern", key)
        return AdapterConfig(
            bias=self.use_bias,
            targets=_searched(self.target_modules),
            rank_pattern={_ending(f"(?:{key})"): rank for key, rank in pattern.items()},
            dtype=None if self.dtype is None else DTYPES[self.dtype],
            **{name: getattr(self, name) for name in SAME},
        )

    @classmethod
    def from_adapter_config(
        cls, config: AdapterConfig, model: Any = None, **options: Any
    ) -> A3FTAConfig:
        """`config` for PEFT; `options`: further fields of this class.

        model: where `config.targets` chooses layers, the model that it chooses them of.
        """
        if not isinstance(config, AdapterConfig):
            raise TypeError(f"config: expected an AdapterConfig, got {describe(config)}")
        if config.train != "adapter":
            raise ValueError(f"config: expected train='adapter', as in PEFT, got {config.train!r}")
        if config.targets is not None:
            if model is None:
                raise ValueError(
                    f"model: expected the model whose layers config.targets={config.targets!r} "
                    f"chooses, got None"
                )
            plan = plan_injection(denoiser(model), config, "of-peft", "auto")
            options = {"target_modules": list(plan.targets), **options}
        return cls(
            use_bias=config.bias,
            rank_pattern={f".*(?:{key}).*": rank for key, rank in config.rank_pattern.items()},
            dtype=config.dtype,
            **{name: getattr(config, name) for name in SAME},
            **options,
        )


def _target_modules(value: Any) -> str | list[str] | None:
    if value is None:
        return None
    if isinstance(value, str):
        check_regex("target_modules", value)
        return value
    names = list(value) if isinstance(value, (list, tuple, set, frozenset)) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise TypeError(
            f"target_modules: expected None, a regular expression or a list of names, "
            f"got {describe(value)}"
        )
    return names


def _searched(target_modules: str | Iterable[str] | None) -> str | None:
    """PEFT's rule as a regular expression that is searched, which is `AdapterConfig`'s."""
    if target_modules is None:
        return None
    if isinstance(target_modules, str):
        return f"^(?:{target_modules})$"
    return _ending(f"(?:{'|'.join(map(re.escape, target_modules))})")


def _ending(pattern: str) -> str:
    return rf"^(?:.*\.)?{pattern}$"
