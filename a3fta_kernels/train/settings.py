"""Settings of a run: one flat table. A flag, a line of YAML and a field have the same name."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import DESIGNS, AdapterConfig
from ..adapters.config import PLACEMENTS, TRAIN
from ..checks import describe
from ..memory.packed import QUANTIZE
from ..ops.activations import ACTIVATIONS

LEVELS = ("off", "exact", "recompute", "block", "compressed", "auto")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


def setting(
    default: Any,
    group: str,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    changeable: bool = False,
) -> Any:
    """`changeable`: a run may be resumed with another value."""
    return dataclasses.field(
        default=default,
        metadata={
            "group": group, "help": help, "choices": choices, "low": low, "high": high,
            "changeable": changeable,
        },
    )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a run is made of. Raises TypeError or ValueError, naming the field, what was expected
    and what came."""

    model: str = setting("", "base and photos", "the pipeline: a folder, or a name on the hub")
    variant: str = setting(
        "", "base and photos", "of the pipeline's files, such as fp16: half of a download"
    )
    # its photos are compared one by one; the folder may have moved
    data: str = setting(
        "", "base and photos", "folder of photos, or one that `datasets` saved", changeable=True
    )
    output: str = setting("a3fta-run", "base and photos", "folder of the run", changeable=True)
    trigger: str = setting(
        "", "base and photos",
        "caption of photos that have none; put before captions that do not contain it",
    )  # fmt: skip
    resolution: int | None = setting(
        None, "base and photos", "pixels along an edge of a square (the model's own)", low=8
    )
    buckets: bool = setting(True, "base and photos", "keep the photos' aspect ratios")
    flip: bool = setting(False, "base and photos", "mirror half of what is seen")
    min_side: int | None = setting(
        None, "base and photos", "skip photos of a shorter side (half of the resolution)", low=1
    )

    train: str = setting("adapter", "adapter", "attention's own weights too", choices=TRAIN)
    rank: int = setting(64, "adapter", "width of the bottleneck", low=1)
    activation: str = setting("gelu", "adapter", "identity can be merged", choices=ACTIVATIONS)
    design: str = setting("bottleneck", "adapter", "kind of adapter", choices=tuple(DESIGNS))
    placement: str | None = setting(
        None, "adapter",
        "in front of the projection, behind it, or beside attention (parallel; of "
        "activation=identity, which can be merged, pre)", choices=PLACEMENTS,
    )  # fmt: skip
    bias: bool = setting(True, "adapter", "without, and of the identity, it can become a LoRA file")
    dropout: float = setting(0.0, "adapter", "of ranks of the bottleneck", low=0, high=0.99)
    drop_path: float = setting(0.0, "adapter", "of adapters as a whole", low=0, high=0.99)
    layer_norm: bool = setting(False, "adapter", "it reads attention normalised")
    time_rank: int | None = setting(
        None, "adapter", "rank at the noisiest timestep, growing to rank at the cleanest", low=1
    )
    targets: tuple[str, ...] = setting(
        (), "adapter", "parts of the names of attention layers that get one (all)"
    )
    rank_pattern: tuple[str, ...] = setting(
        (), "adapter", "ranks of their own, as REGEX=RANK, for layers whose name matches"
    )

    steps: int = setting(1000, "training", "optimizer steps", low=1)
    batch: int = setting(1, "training", "photos per process and forward", low=1)
    accumulate: int = setting(1, "training", "batches per step", low=1)
    optimizer: str = setting("adamw", "training", "adamw, adamw8bit, prodigy")
    learning_rate: float | None = setting(None, "training", "its top (5e-4; 1 for prodigy)", low=0)
    weight_decay: float = setting(0.01, "training", "of the optimizer", low=0)
    schedule: str = setting("constant_with_warmup", "training", "of the rate", choices=SCHEDULES)
    warmup: int = setting(50, "training", "steps until the rate is at its top", low=0)
    max_grad_norm: float = setting(1.0, "training", "clip gradients to it; 0: do not", low=0)
    mixed_precision: str = setting(
        "no", "training", "dtype of the frozen weights; adapters stay in fp32",
        choices=("no", "fp16", "bf16"),
    )  # fmt: skip
    tf32: bool = setting(False, "training", "TF32 products on Ampere and newer")
    seed: int = setting(0, "training", "of everything that is drawn", low=0, high=2**32 - 1)
    snr_gamma: float | None = setting(None, "training", "min-SNR weighting, usually 5", low=1e-3)
    noise_offset: float = setting(0.0, "training", "shared noise per channel, about 0.05", low=0)
    caption_dropout: float = setting(
        0.0, "training", "share of steps' captions left empty, for guidance", low=0, high=1
    )
    ema: float = setting(
        0.0, "training", "decay of the adapter's average; 0: none", low=0, high=0.99999
    )
    prior_weight: float = setting(
        0.0, "training", "of staying near the model without adapter; 0: off", low=0
    )
    prior_prompt: str = setting("", "training", "caption for it, such as 'a photo of a dog'")
    prior_data: str = setting("", "training", "folder of images for it (the photos themselves)")

    quantize: str = setting(
        "no", "memory", "the frozen model's linear layers in 4 bits (bitsandbytes)",
        choices=QUANTIZE,
    )  # fmt: skip
    lean: str = setting(
        "exact", "memory", "level of the memory-lean trunk", choices=LEVELS, changeable=True
    )
    norms: str = setting(
        "input", "memory", "how it keeps norms' inputs", choices=("input", "int8"), changeable=True
    )
    budget: str = setting(
        "", "memory", "for --lean auto: bytes to keep at most, such as 600MiB", changeable=True
    )
    gradient_checkpointing: bool = setting(
        False, "memory", "diffusers' own, beside --lean", changeable=True
    )

    heldout: str = setting(
        "auto", "watching", "how overfitting is measured",
        choices=("auto", "holdout", "kfold", "leave-one-out", "none"),
    )  # fmt: skip
    heldout_count: int | None = setting(
        None, "watching", "photos held out (an eighth, at least 3)", low=1
    )
    folds: int = setting(3, "watching", "runs of kfold beside the last, on all photos", low=2)
    evaluate_every: int = setting(
        100, "watching", "steps between evaluations; 0: never, and nothing is held out", low=0
    )
    bins: int = setting(5, "watching", "ranges of noise levels, evaluated apart", low=1, high=100)
    draws: int = setting(4, "watching", "noises per photo and range", low=1)
    patience: int = setting(
        0, "watching", "stop after so many evaluations without a better one; 0: never", low=0,
        changeable=True,
    )  # fmt: skip
    choose: str = setting("best", "watching", "the adapter to keep", choices=("best", "last"))
    sample_every: int = setting(
        200, "watching", "steps between sample images; 0: none", low=0, changeable=True
    )
    sample_prompts: tuple[str, ...] = setting(
        (), "watching", "what samples show (captions of the photos)", changeable=True
    )
    sample_count: int = setting(
        8,
        "watching",
        "images per sampling, and one per prompt at least; 8 or more for recall",
        low=1,
        changeable=True,
    )
    sample_steps: int = setting(30, "watching", "denoising steps", low=1, changeable=True)
    guidance: float = setting(5.0, "watching", "classifier-free guidance", low=0, changeable=True)
    features: str = setting(
        "pixels", "watching", "for near-copies: pixels, or a transformers vision model's folder",
        changeable=True,
    )  # fmt: skip

    checkpoint_every: int = setting(
        100, "running", "steps between checkpoints; every evaluation makes one too", low=1,
        changeable=True,
    )  # fmt: skip
    checkpoint_limit: int = setting(
        3, "running", "newest checkpoints kept, beside the best; 0: all", low=0, changeable=True
    )
    cuda_graph: bool = setting(
        False, "running", "record forward and backward once and replay them: one GPU, not fp16"
    )
    resume: bool = setting(False, "running", "go on where the run stopped", changeable=True)
    push_to_hub: str = setting(
        "", "running", "name/of-a-repository to upload the adapter's folder to at the end",
        changeable=True,
    )  # fmt: skip
    log_with: tuple[str, ...] = setting((), "running", "tensorboard, wandb", changeable=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a path, got nothing")
        if self.lean == "auto" and not self.budget:
            raise ValueError("budget: expected bytes such as 600MiB beside lean=auto, got nothing")
        if self.budget and self.lean != "auto":
            raise ValueError(f"lean: expected auto beside a budget, got {self.lean!r}")
        if (self.prior_prompt or self.prior_data) and not self.prior_weight:
            raise ValueError(
                "prior_weight: expected more than 0 beside prior_prompt or prior_data, got 0"
            )
        if self.train != "adapter" and self.mixed_precision != "no":
            raise ValueError(
                f"mixed_precision: expected no beside train={self.train}, whose weights train in "
                f"fp32, got {self.mixed_precision}"
            )
        if self.train != "adapter" and self.quantize != "no":
            raise ValueError(
                f"quantize: expected no beside train={self.train}, as packed weights do not train, "
                f"got {self.quantize}"
            )
        if self.lean == "auto" and self.quantize != "no":
            raise ValueError(
                f"lean: expected a level by name beside quantize={self.quantize}, whose packed "
                f"weights it cannot count, got auto"
            )
        if self.cuda_graph and self.mixed_precision == "fp16":
            raise ValueError(
                "mixed_precision: expected no or bf16 beside cuda_graph, which scales no losses, "
                "got fp16"
            )
        if self.cuda_graph and self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing: expected off beside cuda_graph, as it asks for the state "
                "of random numbers, got on; lean=block goes with it"
            )
        if self.cuda_graph and self.prior_weight and self.train != "adapter":
            raise ValueError(
                f"train: expected adapter beside cuda_graph and prior_weight, whose model without "
                f"adapters is copied from the CPU, got {self.train}"
            )
        if self.heldout_count is not None and self.heldout not in ("auto", "holdout"):
            raise ValueError(
                f"heldout_count: expected none beside heldout={self.heldout}, "
                f"got {self.heldout_count}"
            )
        if self.heldout not in ("auto", "none") and not self.evaluate_every:
            raise ValueError(
                f"evaluate_every: expected more than 0 beside heldout={self.heldout}, got 0"
            )
        self.adapter()

    def adapter(self) -> AdapterConfig:
        """What is put into the model."""
        # what did better where folds stop it; one that is to become a LoRA sits where a LoRA does
        placement = self.placement or ("pre" if self.activation == "identity" else "parallel")
        return AdapterConfig(
            rank=self.rank, activation=self.activation, design=self.design, bias=self.bias,
            dropout=self.dropout, targets=self.targets or None, rank_pattern=self.ranks(),
            train=self.train, drop_path=self.drop_path, layer_norm=self.layer_norm,
            time_rank=self.time_rank, placement=placement,
        )  # fmt: skip

    def ranks(self) -> dict[str, int]:
        """`rank_pattern` as `AdapterConfig` takes it."""
        found = {}
        for entry in self.rank_pattern:
            pattern, _, rank = entry.rpartition("=")
            if not pattern or not rank.isdecimal() or int(rank) < 1:
                raise ValueError(f"rank_pattern: expected REGEX=RANK, got {entry!r}")
            found[pattern] = int(rank)
        return found

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise ValueError(
                    f"settings: there is no {name!r}; did you mean {close[0]}?" if close else
                    f"settings: expected one of {', '.join(sorted(known))}, got {name!r}"
                )  # fmt: skip
        return cls(**values)

    def of(self, group: str) -> dict[str, Any]:
        """The settings of a group that say how, and not where: paths stay out."""
        fields = [f for f in dataclasses.fields(self) if f.metadata["group"] == group]
        return {f.name: getattr(self, f.name) for f in fields if f.name != "prior_data"}

    def changes(self, other: Settings) -> dict[str, tuple[Any, Any]]:
        """What a resumed run may not change: name -> (this, other)."""
        fixed = [f.name for f in dataclasses.fields(self) if not f.metadata["changeable"]]
        if self.schedule.startswith("constant"):
            fixed.remove("steps")  # the rate does not depend on them
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in fixed}
        # where it is, whether or not it was told
        pairs["placement"] = self.adapter().placement, other.adapter().placement
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a file; ValueError where it is no mapping."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        values, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML, got what does not parse: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines of name: value, got {describe(values)}")
    # of two lines of one name YAML would take the last
    names = collections.Counter(str(key.value).replace("-", "_") for key, _ in tree.value)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{path}: expected each name once, got {', '.join(twice)} twice")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag per field. What is not given stays out of the namespace, for a file to say."""
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        about = field.metadata
        if about["group"] not in groups:
            groups[about["group"]] = parser.add_argument_group(about["group"])
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field.name}
        options["help"] = about["help"] + _default(field.default)
        kind, _ = _kind(field)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            options |= {"nargs": "+", "metavar": "TEXT"}
        elif about["choices"]:
            options["choices"] = about["choices"]
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        groups[about["group"]].add_argument(f"--{field.name.replace('_', '-')}", **options)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that the command line names."""
    names = [field.name for field in dataclasses.fields(Settings)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _default(value: Any) -> str:
    if value is True:
        return " (on)"
    return "" if value is None or value is False or value in ("", ()) else f" ({value})"


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Settings)


def _kind(field: dataclasses.Field[Any]) -> tuple[type, bool]:
    """The plain type of a field, and whether None is allowed."""
    hint = _hints()[field.name]
    optional = isinstance(hint, types.UnionType)
    if optional:
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return typing.get_origin(hint) or hint, optional


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """`value` in the field's type, or TypeError or ValueError."""
    kind, optional = _kind(field)
    name, about = field.name, field.metadata
    if value is None and optional:
        return None
    if kind is tuple:
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, (list, tuple)) or not all(isinstance(x, str) for x in entries):
            raise TypeError(f"{name}: expected a list of texts, got {describe(value)}")
        return tuple(entries)
    # YAML reads 1e-4 as a text
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except (ValueError, OverflowError):
            raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        # and `no` and `off` as False
        if value is False and (meant := {"no", "off"} & set(about["choices"])):
            return meant.pop()
        words = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
        raise TypeError(f"{name}: expected {words[kind]}, got {describe(value)}")
    if about["choices"] and value not in about["choices"]:
        raise ValueError(f"{name}: expected one of {', '.join(about['choices'])}, got {value!r}")
    if isinstance(value, (int, float)) and kind is not bool:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
        if not about["low"] <= value <= about["high"]:
            limit = (
                f"at least {about['low']:g}"
                if value < about["low"]
                else f"at most {about['high']:g}"
            )
            raise ValueError(f"{name}: expected {limit}, got {value}")
    return value
