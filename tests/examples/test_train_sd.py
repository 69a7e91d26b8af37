"""examples/train_sd.py from beginning to end, on tiny pipelines that lie on disk."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import a3fta_kernels as a3fta

Image = pytest.importorskip("PIL.Image")
diffusers = pytest.importorskip("diffusers")
pipelines = pytest.importorskip("tests.examples.pipelines")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def train() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "train_sd.py"
    spec = importlib.util.spec_from_file_location("train_sd", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i, (width, height) in enumerate([(40, 48), (64, 32), (32, 32)]):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "1.txt").write_text("a dog on grass\n")
    (folder / "notes.md").write_text("no photo")
    return folder


def arguments(tmp_path: Path, *more: str) -> list[str]:
    return [
        "--model", str(tmp_path / "pipeline"), "--photos", str(tmp_path / "photos"),
        "--out", str(tmp_path / "out"), "--prompt", "a photo of sks dog", "--resolution", "32",
        "--rank", "4", "--warm-up", "1", "--learning-rate", "0.05", "--steps", "3", "--batch", "2",
        "--sample-every", "2", "--sample-steps", "2", *more,
    ]  # fmt: skip


def base_picture(train: ModuleType, args: list[str]) -> np.ndarray:
    """What the script's last lines draw, without an adapter."""
    options = train.parse(args)
    pipe = train.load(options)
    prompt = train.encode_text(pipe, options.sample_prompt)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    prompt = {k: v.to(pipe.unet.device) for k, v in prompt.items()}
    return np.asarray(train.generate(pipe, prompt, options)[0])


def check_results(tmp_path: Path, said: str) -> None:
    out = tmp_path / "out"
    losses = [float(x) for x in re.findall(r"mean loss (\S+)", said)]
    assert len(losses) == 2 and all(math.isfinite(x) and x > 0 for x in losses)
    assert {p.name for p in out.glob("*.png")} == {
        "step-00002.png", "step-00003.png", "final.png"
    }  # fmt: skip
    weights = load_file(out / "adapter_model.safetensors")
    moved = [k for k, v in weights.items() if k.endswith("w_up") and v.abs().max() > 0]
    assert len(moved) == sum(k.endswith("w_up") for k in weights) > 0


@pytest.mark.parametrize(
    ("write", "more"),
    [
        (pipelines.write_sd, ("--accumulate", "2", "--gradient-checkpointing")),
        (lambda folder: pipelines.write_sd(folder, "v_prediction"), ("--mixed-precision", "bf16")),
        (pipelines.write_sdxl, ()),
        (pipelines.write_sdxl, ("--mixed-precision", "bf16", "--activation", "identity")),
    ],
    ids=["sd-accumulate-checkpointing", "sd-v-bf16", "sdxl", "sdxl-bf16-identity"],
)
def test_from_a_folder_of_photos_to_a_picture(tmp_path, photos, train, capsys, write, more):
    write(tmp_path)
    args = arguments(tmp_path, *more)
    train.main(args)
    check_results(tmp_path, capsys.readouterr().out)
    final = np.asarray(Image.open(tmp_path / "out" / "final.png"))
    assert final.shape == (32, 32, 3)
    base = base_picture(train, args)
    assert (base == base_picture(train, args)).all() and (final != base).any()

    # the folder of the pipeline is as it was, and the adapter goes onto it
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert not [k for k in pipe.unet.state_dict() if "adapters" in k]
    a3fta.load_adapter(pipe, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    loaded = [v for k, v in pipe.unet.state_dict().items() if k.endswith("adapters.default.w_up")]
    assert sum(k.endswith("w_up") for k in saved) == len(loaded)
    assert all(v.abs().max() > 0 for v in loaded)


def test_the_clipping_clips(tmp_path, photos, train, monkeypatch):
    pipelines.write_sd(tmp_path)
    norms = []
    clip = train.Accelerator.clip_grad_norm_

    def spy(self, parameters, limit):
        before = clip(self, parameters, limit)
        after = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        norms.append((float(before), float(after)))
        return before

    monkeypatch.setattr(train.Accelerator, "clip_grad_norm_", spy)
    train.main(arguments(tmp_path, "--max-grad-norm", "1e-4"))
    assert len(norms) == 3
    for before, after in norms:
        assert before > 1e-3 and after == pytest.approx(1e-4, rel=1e-2)


def test_captions_lie_beside_the_photos(tmp_path, photos, train, monkeypatch):
    pipelines.write_sd(tmp_path)
    seen = []
    encode = train.encode_text

    def spy(pipe, text, guidance=True):
        seen.append(text)
        return encode(pipe, text, guidance)

    monkeypatch.setattr(train, "encode_text", spy)
    options = train.parse(arguments(tmp_path))
    data = train.encode_photos(train.load(options), options)
    assert seen == ["a photo of sks dog", "a dog on grass", "a photo of sks dog"]
    # height, width, top, left, target: 40x48 is cut above and below, 64x32 left and right
    assert [row["time_ids"].tolist() for row in data] == [
        [48, 40, 3, 0, 32, 32], [32, 64, 0, 16, 32, 32], [32, 32, 0, 0, 32, 32]
    ]  # fmt: skip
    assert all(row["mean"].shape == (4, 16, 16) for row in data)


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (lambda folder: [p.unlink() for p in folder.glob("*.png")], (), "--photos: no .jpg"),
        (lambda folder: None, ("--prompt", ""), "0.png: write 0.txt, or give --prompt"),
    ],
    ids=["no-photos", "no-caption"],
)
def test_what_is_missing_is_named(tmp_path, photos, train, spoil, more, message):
    pipelines.write_sd(tmp_path)
    spoil(photos)
    with pytest.raises(SystemExit, match=re.escape(message)):
        train.main(arguments(tmp_path, *more))


def test_another_prediction_type_is_refused(tmp_path, photos, train):
    pipelines.write_sd(tmp_path, "sample")
    with pytest.raises(SystemExit, match="prediction_type: expected epsilon or v_prediction"):
        train.main(arguments(tmp_path))
