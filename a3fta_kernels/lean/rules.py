"""Which stock modules become lean, at which levels: one row of RULES each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.normalization import RMSNorm
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.transformers.transformer_z_image import FeedForward, ZImageTransformerBlock
from torch import nn

from . import (
    conv,
    flux_block,
    geglu,
    gelu,
    joint_block,
    norm,
    resnet,
    rms_norm,
    silu_gate,
    transformer_block,
    z_image_block,
)
from .swapping import LeanModule, Settings, trains


@dataclass(frozen=True)
class Rule:
    """stock: the class, exactly. acts: at which settings. why_not: what keeps a module stock.

    is_block: its settings are those of all modules inside. in_stages: a block that is computed in
    stages has no use for it, as it computes that module again. is_residual: a unit of its own
    where levels are chosen.
    """

    stock: type[nn.Module]
    lean: type[LeanModule]
    acts: Callable[[Settings], bool]
    why_not: Callable[[Any], str | None]
    is_block: bool = False
    in_stages: bool = False
    is_residual: bool = False


def _always(settings: Settings) -> bool:
    return True


def _narrow_norms(settings: Settings) -> bool:
    return settings.norms != "input"


def _compressed(settings: Settings) -> bool:
    return settings.level == "compressed"


def _by_stages(settings: Settings) -> bool:
    return settings.level in ("recompute", "block")


def _fits(module: nn.Module) -> None:
    return None


RULES = (
    Rule(nn.Conv2d, conv.LeanConv2d, _always, conv.why_not),
    Rule(GEGLU, geglu.LeanGEGLU, _always, _fits),
    Rule(GELU, gelu.LeanGELU, _compressed, _fits),
    Rule(
        ResnetBlock2D, resnet.LeanResnetBlock2D, _always, resnet.why_not, is_residual=True
    ),
    Rule(
        BasicTransformerBlock, transformer_block.LeanTransformerBlock, _by_stages,
        transformer_block.why_not, is_block=True,
    ),
    Rule(
        JointTransformerBlock, joint_block.LeanJointTransformerBlock, _by_stages,
        joint_block.why_not, is_block=True,
    ),
    Rule(
        FluxTransformerBlock, flux_block.LeanFluxTransformerBlock, _by_stages,
        flux_block.why_not, is_block=True,
    ),
    Rule(
        FluxSingleTransformerBlock, flux_block.LeanFluxSingleTransformerBlock, _by_stages,
        flux_block.why_not, is_block=True,
    ),
    Rule(
        ZImageTransformerBlock, z_image_block.LeanZImageTransformerBlock, _by_stages,
        z_image_block.why_not, is_block=True,
    ),
    Rule(FeedForward, silu_gate.LeanFeedForward, _always, _fits, in_stages=True),
    Rule(RMSNorm, rms_norm.LeanRMSNorm, _always, rms_norm.why_not),
    Rule(nn.GroupNorm, norm.LeanGroupNorm, _narrow_norms, _fits),
    Rule(nn.LayerNorm, norm.LeanLayerNorm, _narrow_norms, norm.why_not, in_stages=True),
)  # fmt: skip


def rule_for(module: nn.Module) -> Rule | None:
    """By the class, exactly: a subclass may compute something else."""
    kind = type(module)
    return next((rule for rule in RULES if kind in (rule.stock, rule.lean)), None)


def why_not(rule: Rule, module: nn.Module) -> str | None:
    """Why this module stays as it is; None where the rule applies."""
    return "it trains" if trains(module) else rule.why_not(module)
