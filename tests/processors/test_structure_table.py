"""What structure finds in every transformer and U-Net class of diffusers, and what it doubts."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models import transformers, unets
from diffusers.models.modeling_utils import ModelMixin

from a3fta_kernels.processors import structure

# where the defaults make no model
OPTIONS: dict[str, dict[str, Any]] = {
    "DreamLiteTransformer2DModel": dict(in_channels=32),
    "EasyAnimateTransformer3DModel": dict(in_channels=4, out_channels=4, patch_size=2),
    "HiDreamImageTransformer2DModel": dict(
        patch_size=2, caption_channels=(8, 8), llama_layers=(0, 1)
    ),
    "HunyuanDiT2DModel": dict(in_channels=4, patch_size=2),
    "LatteTransformer3DModel": dict(in_channels=4, sample_size=8, patch_size=2, caption_channels=8),
    "LuminaNextDiT2DModel": dict(num_kv_heads=8),
    "OmniGenTransformer2DModel": dict(
        rope_scaling={"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}
    ),
    "StableCascadeUNet": dict(down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1)),
    "Transformer2DModel": dict(in_channels=32),
    "TransformerTemporalModel": dict(in_channels=32),
    "WanVACETransformer3DModel": dict(vace_layers=[0]),
}


# what is found: classes; ? before what is in doubt, ! for attention that nothing may be behind
FINDS = {
    "2 to_out.0": """
        AceStepTransformer1DModel AllegroTransformer3DModel AnyFlowFARTransformer3DModel
        AnyFlowTransformer3DModel ChronoEditTransformer3DModel CosmosTransformer3DModel
        HeliosTransformer3DModel LTXVideoTransformer3DModel LatteTransformer3DModel
        LongCatAudioDiTTransformer MiniMaxH3Transformer3DModel PixArtTransformer2DModel
        SanaTransformer2DModel SanaVideoTransformer3DModel SkyReelsV2Transformer3DModel
        StableAudioDiTModel T5FilmDecoder TransformerTemporalModel
        WanAnimate2Transformer3DModel WanTransformer3DModel
    """,
    "1 to_out.0": """
        CogVideoXTransformer3DModel CogView3PlusTransformer2DModel
        CogView4Transformer2DModel ConsisIDTransformer3DModel DiTTransformer2DModel
        DreamLiteTransformer2DModel ErnieImageTransformer2DModel GlmImageTransformer2DModel
        Ideogram4Transformer2DModel MiniMaxMusic3Transformer1DModel
        NucleusMoEImageTransformer2DModel OmniGenTransformer2DModel PriorTransformer
        QwenImage21Transformer2DModel SD3Transformer2DModel Transformer2DModel
    """,
    "1 to_out.0, 1 to_add_out, 1 ?proj_out": """
        BriaFiboTransformer2DModel BriaTransformer2DModel ChromaTransformer2DModel
        FluxTransformer2DModel LongCatImageTransformer2DModel MotifVideoTransformer3DModel
        OvisImageTransformer2DModel
    """,
    "4 to_out.0": """
        BriaFibo2Transformer2DModel Flux3Transformer2DModel StableCascadeUNet
        WanVACETransformer3DModel
    """,
    "2 to_out.0, 1 to_add_out, 1 ?proj_out": """
        HunyuanImageTransformer2DModel HunyuanVideoFramepackTransformer3DModel
        HunyuanVideoTransformer3DModel
    """,
    "3 to_out.0": """
        Krea2Transformer2DModel Lumina2Transformer2DModel ZImageTransformer2DModel
    """,
    "6 to_out.0": """
        LTX2VideoTransformer3DModel SanaWMLTX2RefinerTransformer3DModel UVit2DModel
    """,
    "1 ?img_attn_proj, 1 ?txt_attn_proj": """
        JoyImageEditPlusTransformer3DModel JoyImageEditTransformer3DModel
    """,
    "1 to_out": "MiniMaxMusic3RVQDepthDecoder RFD4ProteinaTransformer",
    "1 to_out.0, 1 to_add_out": "EasyAnimateTransformer3DModel QwenImageTransformer2DModel",
    "2 to_out.0, 1 to_add_out": "AuraFlowTransformer2DModel HunyuanVideo15Transformer3DModel",
    "1 !, 1 to_out.0": "LuminaNextDiT2DModel",
    "1 !, 2 to_out.0": "HunyuanDiT2DModel",
    "1 ?to_out.0": "PRXTransformer2DModel",
    "1 out_layer": "Kandinsky6SRTransformer3DModel",
    "1 to_out, 1 to_add_out": "Cosmos3OmniTransformer",
    "1 to_out, 1 to_out.0": "MochiTransformer3DModel",
    "1 to_out.0, 1 to_add_out, 1 ?to_out": "Flux2Transformer2DModel",
    "10 to_out.0": "UNet2DModel",
    "12 proj_attn": "UNet1DModel",
    "12 to_out.0": "DreamLiteUNetModel",
    "13 to_out.0": "Kandinsky3UNet",
    "2 ?to_out": "StableAudio3DiTModel",
    "2 proj": "SanaWMTransformer3DModel",
    "2 to_out, 1 to_out_t": "HiDreamImageTransformer2DModel",
    "2 to_out.0, 1 to_out": "WanAnimateTransformer3DModel",
    "20 to_out.0": "UNet2DConditionModel",
    "26 to_out.0": "MotionAdapter",
    "3 out_layer": "Kandinsky5Transformer3DModel",
    "40 to_out.0": "UNetSpatioTemporalConditionModel",
    "42 to_out.0": "UNet3DConditionModel",
    "43 to_out.0": "I2VGenXLUNet",
    "46 to_out.0": "UNetMotionModel",
    "8 out_layer": "Kandinsky6Transformer3DModel",
}
COUNTS = ("layers", "blocks", "depth", "layers_per_block")


def classes() -> Iterator[type[ModelMixin]]:
    for package in (transformers, unets):
        for found in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
            module = importlib.import_module(f"{package.__name__}.{found}")
            for value in list(vars(module).values()):
                own = inspect.isclass(value) and value.__module__ == module.__name__
                if own and issubclass(value, ModelMixin):
                    yield value


def found(cls: type[ModelMixin]) -> str:
    """How many layers of each name, on the meta device, with one block of each kind where the
    class counts them; ? before those in doubt."""
    arguments = inspect.signature(cls.__init__).parameters.values()
    counts = {
        a.name: 1 for a in arguments if isinstance(a.default, int) and a.name.endswith(COUNTS)
    }
    with torch.device("meta"):
        model = cls(**counts | OPTIONS.get(cls.__name__, {}))
    names: Counter[str] = Counter()
    for site in structure.sites(model):
        names.update(n.removeprefix(f"{site.name}.") for n in site.projections)
        around = site.name.rpartition(".")[0]
        inner = (n.removeprefix(f"{site.name}.").removeprefix(f"{around}.") for n in site.unsure)
        names.update(f"?{n}" for n in inner)
        if not site.projections and not site.unsure:
            names["!"] += 1
    return ", ".join(f"{count} {name}" for name, count in names.items())


CLASSES = {cls.__name__: cls for cls in classes()}
EXPECTED = {name: what for what, names in FINDS.items() for name in names.split()}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_found(name):
    assert found(CLASSES[name]) == EXPECTED[name]


def test_a_class_that_the_table_does_not_know_is_not_passed_over():
    """One of a later diffusers: something is found, or a doubt that says where to look."""
    assert len(EXPECTED) == sum(len(names.split()) for names in FINDS.values())
    assert not [name for name in CLASSES.keys() - EXPECTED.keys() if not found(CLASSES[name])]
