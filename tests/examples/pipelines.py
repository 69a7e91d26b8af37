"""Tiny random pipelines on disk, tokenizers included: what a downloaded one looks like."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from tests import models

_WIDTH = 32
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def write_sd(folder: Path, prediction_type: str = "epsilon") -> None:
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()),
        tokenizer=_tokenizer(folder / "words"),
        unet=models.sd15(cross_attention_dim=_WIDTH),
        scheduler=DDIMScheduler(
            **_BETAS, clip_sample=False, steps_offset=1, prediction_type=prediction_type
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")


def write_sdxl(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = _tokenizer(folder / "words")
    StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(projection_dim=_WIDTH)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        # 6 time ids of 8 and the pooled text
        unet=models.sdxl(
            cross_attention_dim=2 * _WIDTH, projection_class_embeddings_input_dim=48 + _WIDTH
        ),
        scheduler=EulerDiscreteScheduler(**_BETAS),
        add_watermarker=False,
    ).save_pretrained(folder / "pipeline")


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
    )


def _text_config(**options: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(_tokens()),
        hidden_size=_WIDTH,
        intermediate_size=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=len(_tokens()) - 2,
        eos_token_id=len(_tokens()) - 1,
        pad_token_id=len(_tokens()) - 1,
        **options,
    )


def _tokens() -> list[str]:
    letters = string.ascii_lowercase + string.digits
    return [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """One token for each letter: no merges."""
    folder.mkdir()
    vocabulary = {token: i for i, token in enumerate(_tokens())}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)
