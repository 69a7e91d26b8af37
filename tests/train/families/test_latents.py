"""What holds for every family with a VAE and text encoders, against the stock pipeline."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import a3fta_kernels as a3fta
from a3fta_kernels.train import TrainingError, families
from a3fta_kernels.train.families import Crop, latents, stack
from tests.models import randomize
from tests.train.families import common

NAMES = ["sd", "sdxl", "sd3", "flux", "z_image"]
CROP = Crop((32, 24), (32, 24), 0, 0)


def shift(vae):
    return vae.config.shift_factor or 0.0


@pytest.mark.parametrize("name", NAMES)
def test_photos_are_encoded_as_the_vae_says(load, name):
    family = load(name)
    vae, pixels = family.pipe.vae, common.pixels()
    spread = vae.encode(pixels[None]).latent_dist
    row = family.encode_photo(pixels, CROP)
    scale = vae.config.scaling_factor
    assert row["mean"].shape == (4, 12, 16) and row["mean"].dtype == torch.float32
    torch.testing.assert_close(row["mean"], (spread.mean[0] - shift(vae)) * scale)
    torch.testing.assert_close(row["std"], spread.std[0] * scale)
    drawn = family.clean(stack([row]), torch.Generator().manual_seed(7))
    expected = (spread.sample(torch.Generator().manual_seed(7)) - shift(vae)) * scale
    torch.testing.assert_close(drawn, expected)


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_decoded_as_the_pipeline_does(load, name):
    family = load(name)
    vae, pixels = family.pipe.vae, common.pixels()
    back = vae.decode(vae.encode(pixels[None]).latent_dist.mean).sample.detach()
    mean = family.encode_photo(pixels, CROP)["mean"]
    expected = family.pipe.image_processor.postprocess(back, output_type="pil")
    with torch.no_grad():
        common.assert_close_images(family.decode(mean[None]), expected)


def test_latents_are_decoded_one_by_one(load, monkeypatch):
    """Each takes gigabytes, whatever the batch."""
    family, sizes = load("sdxl"), []
    decode = family.pipe.vae.decode

    def noted(latents):
        sizes.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(family.pipe.vae, "decode", noted)
    mean = family.encode_photo(common.pixels(), CROP)["mean"]
    with torch.no_grad():
        one, other = family.decode(torch.stack([mean, -mean]))
    assert sizes == [1, 1]
    assert one.tobytes() != other.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_encoders_of_photos_and_of_texts_are_not_there_together(load, name, monkeypatch):
    """On a card of 12 GiB SD3's do not fit together."""
    family = load(name)
    monkeypatch.setattr(latents, "_room", lambda device: 1 << 40)
    texts = {p for p in family.text_parts if getattr(family.pipe, p, None) is not None}
    places = {}
    for part in ("vae", *texts):
        module = getattr(family.pipe, part)
        monkeypatch.setattr(module, "to", lambda to, part=part: places.update({part: str(to)}))

    def there():
        return {part for part, place in places.items() if place == "cuda:0"}

    with family.encoding(torch.device("cuda:0")):
        assert not there()  # what is read from the cache needs no encoder
        for what, expected in (("photos", {"vae"}), ("texts", texts), ("photos", {"vae"})):
            family.bring(what)
            assert there() == expected
        places.clear()
        family.bring("photos")
        assert not places  # they are there
    assert not there()


@pytest.mark.parametrize("name", NAMES)
def test_encoders_of_texts_that_do_not_fit_stay_on_the_cpu(load, name, monkeypatch):
    family, said = load(name), []
    expected = family.encode_text("a dog")
    monkeypatch.setattr(latents, "_room", lambda device: 100 << 20)
    moved = []
    for part in ("vae", *family.text_parts):
        if (module := getattr(family.pipe, part, None)) is not None:
            monkeypatch.setattr(module, "to", lambda to, part=part: moved.append((part, str(to))))
    with family.encoding(torch.device("cuda:0"), said.append):
        family.bring("photos")
        assert ("vae", "cuda:0") in moved and not said
        family.bring("texts")
        found = family.encode_text("a dog")
    assert not any(place == "cuda:0" for part, place in moved if part != "vae")
    assert said == [
        "Texts are encoded on the CPU: their encoders take 0 MiB, of which the GPU has 100 left"
    ]
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", [*NAMES, "sd3_without_t5", "flux_schnell"])
def test_an_untrained_adapter_draws_what_the_pipeline_does(load, name, guidance, monkeypatch):
    family = load(name)
    width, height = common.SIZE
    stock = family.pipe(
        list(common.PROMPTS), width=width, height=height, num_inference_steps=3,
        guidance_scale=guidance, generator=common.generators([5, 6]), output_type="latent",
    ).images  # fmt: skip
    if stock.ndim == 3:
        stock = family.pipe._unpack_latents(stock, height, width, family.pipe.vae_scale_factor)
    with family.encoding(torch.device("cpu")):  # as a run does
        texts, empty = [family.encode_text(p) for p in common.PROMPTS], family.encode_text("")
    left = [name for name, part in family.pipe.components.items() if part is not None]
    assert not any(name.startswith("text_encoder") for name in left)
    a3fta.inject(family.denoiser, a3fta.AdapterConfig(rank=4))
    decode, drawn = family.decode, []

    def noted(found):
        drawn.append(found)
        return decode(found)

    monkeypatch.setattr(family, "decode", noted)

    def draw(texts, seeds):
        with family.drawing(torch.device("cpu")):
            images = family.draw(texts, empty, common.SIZE, 3, guidance, seeds)
        assert [image.size for image in images] == [common.SIZE] * len(texts)
        return drawn[-1]

    torch.testing.assert_close(draw(texts, [5, 6]), stock, rtol=1e-4, atol=1e-4)
    # each image is its own text's and its own seed's
    torch.testing.assert_close(draw(texts[1:], [6]), stock[1:], rtol=1e-4, atol=1e-4)
    randomize(family.denoiser, std=1.0)
    assert not torch.allclose(draw(texts, [5, 6]), stock, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_samples(load, name):
    family = load(name)
    rows = common.rows(family)
    noisy = torch.randn(2, *rows[0]["mean"].shape, generator=torch.Generator().manual_seed(0))
    time = family.noise.time(torch.tensor([0.2, 0.7]))
    with torch.no_grad():
        together = family.predict(family.denoiser, noisy, time, stack(rows))
        alone = [
            family.predict(family.denoiser, noisy[i : i + 1], time[i : i + 1], stack([rows[i]]))
            for i in range(2)
        ]
        others = family.predict(family.denoiser, noisy, time.flip(0), stack(rows))
    assert together.shape == noisy.shape
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, others, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_sides_of_the_multiple_are_enough(load, name):
    """The smallest photo that the denoiser takes, and a long one."""
    family = load(name)
    # the VAE halves, then the U-Net or the patches of the transformer do
    assert family.multiple == 4
    text = family.encode_text("a dog")
    for size in ((family.multiple, family.multiple), (5 * family.multiple, 3 * family.multiple)):
        row = family.encode_photo(common.pixels(*size), Crop(size, size, 0, 0)) | text
        noisy = row["mean"][None]
        with torch.no_grad():
            time = family.noise.time(torch.tensor([0.5]))
            found = family.predict(family.denoiser, noisy, time, stack([row]))
        assert found.shape == noisy.shape


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_of_the_frozen_weights_but_the_vae(load, name):
    family, precise = load(name, torch.bfloat16), load(name)
    assert family.pipe.vae.dtype == torch.float32
    rows = common.rows(family)
    assert all(r["mean"].dtype == torch.float32 for r in rows)
    assert all(r["prompt_embeds"].dtype == torch.bfloat16 for r in rows)
    noisy = torch.randn(2, *rows[0]["mean"].shape, generator=torch.Generator().manual_seed(0))
    time = family.noise.time(torch.tensor([0.2, 0.7]))
    with torch.no_grad():
        rough = family.predict(family.denoiser, noisy, time, stack(rows))
        exact = precise.predict(precise.denoiser, noisy, time, stack(common.rows(precise)))
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).square().mean() < 0.01 * exact.square().mean()


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_without_a_part_is_refused(pipeline, name, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline(name), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"tokenizer": [None, None]}))
    with pytest.raises(TrainingError, match=r"expected a \w+ with .*, got one without tokenizer"):
        families.load(str(folder), torch.float32)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_pictures_are_decoded_in_full_precision_whatever_the_run_s(load, name):
    family = load(name)
    latents = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    (expected,) = family.decode(latents)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = family.decode(latents)
    assert found.tobytes() == expected.tobytes()
