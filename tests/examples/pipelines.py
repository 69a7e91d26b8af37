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
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
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


def write_sd3(folder: Path, t5: bool = True) -> None:
    """`t5`: with the third text encoder, which is often left out."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(folder / "words")
    StableDiffusion3Pipeline(
        vae=_vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(_text_config(projection_dim=_WIDTH)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(projection_dim=_WIDTH)),
        text_encoder_3=T5EncoderModel(_t5_config(2 * _WIDTH)) if t5 else None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=_t5_tokenizer() if t5 else None,
        # the two CLIPs side by side are as wide as T5
        transformer=models.sd3(
            joint_attention_dim=2 * _WIDTH, pooled_projection_dim=2 * _WIDTH, pos_embed_max_size=16
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder / "pipeline")


def write_flux(folder: Path, distilled: bool = True) -> None:
    """`distilled`: like dev, else like schnell."""
    torch.manual_seed(0)
    FluxPipeline(
        vae=_vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=T5EncoderModel(_t5_config(_WIDTH)),
        tokenizer=_tokenizer(folder / "words"),
        tokenizer_2=_t5_tokenizer(),
        transformer=models.flux(in_channels=16, guidance_embeds=distilled),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if distilled else 1.0, use_dynamic_shifting=distilled
        ),
    ).save_pretrained(folder / "pipeline")


def write_z_image(folder: Path) -> None:
    torch.manual_seed(0)
    ZImagePipeline(
        vae=_vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(_chat_tokens()), hidden_size=16, intermediate_size=16,
                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            )
        ),
        tokenizer=_chat_tokenizer(),
        # places for the longest text and the sides of an image
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            cap_feat_dim=16, axes_dims=[4, 4, 8], axes_lens=[1024, 32, 32],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder / "pipeline")  # fmt: skip


def _vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        **options,
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


def _t5_config(width: int) -> T5Config:
    return T5Config(
        vocab_size=len(_t5_tokens()), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=4
    )


def _t5_tokens() -> list[str]:
    return ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase, *string.digits]


def _t5_tokenizer() -> T5TokenizerFast:
    """One token for each letter, and the end."""
    return T5TokenizerFast(vocab=[(token, 0.0) for token in _t5_tokens()], extra_ids=0)


_CHAT = "<|im_start|>", "<|im_end|>"


def _chat_tokens() -> list[str]:
    return [*string.ascii_lowercase, *string.digits, "Ġ", "Ċ", "<|endoftext|>", *_CHAT]


def _chat_tokenizer() -> Qwen2TokenizerFast:
    """One token for each letter and each mark of a chat."""
    found = Qwen2TokenizerFast(
        vocab={token: i for i, token in enumerate(_chat_tokens())}, merges=[],
        unk_token="<|endoftext|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(_CHAT),
    )  # fmt: skip
    begin, end = _CHAT
    found.chat_template = (
        "{% for m in messages %}" f"{begin}" "{{ m['role'] }}\n{{ m['content'] }}" f"{end}\n"
        "{% endfor %}" f"{begin}assistant\n"
    )  # fmt: skip
    return found
