"""Near-copies and recall on made-up photos, whose copies are known."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from a3fta_kernels.train.closeness import (
    HIGHEST,
    LOWEST,
    Network,
    Pixels,
    closeness,
    extractor,
    nearest,
    recall,
)
from a3fta_kernels.train.errors import TrainingError


def scene(seed: int, side: int = 96) -> Image.Image:
    """A smooth picture with a few objects' worth of structure."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 3, 6, 6, generator=g)
    x = torch.nn.functional.interpolate(x, (side, side), mode="bicubic").clamp(0, 1)
    return image(x[0])


def image(x: torch.Tensor) -> Image.Image:
    bytes_ = (x * 255).round().byte().permute(1, 2, 0).contiguous().numpy().tobytes()
    return Image.frombytes("RGB", (x.shape[2], x.shape[1]), bytes_)


def pixels(x: Image.Image) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8)
    return flat.view(x.height, x.width, 3).permute(2, 0, 1) / 255


def noisy(x: Image.Image, amount: float, seed: int = 0) -> Image.Image:
    noise = torch.randn(3, x.height, x.width, generator=torch.Generator().manual_seed(seed))
    return image((pixels(x) + amount * noise).clamp(0, 1))


def brighter(x: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(x).enhance(0.7)


def blurred(photos: list[Image.Image]) -> Image.Image:
    return image(torch.stack([pixels(x) for x in photos]).mean(0))


features = Pixels()


def found(samples, photos, other=None, **options):
    rest = None if other is None else features(other)
    return closeness(features(samples), features(photos), rest, **options)


@pytest.mark.parametrize("n", [3, 10, 40])
@pytest.mark.parametrize(
    "copied", [lambda x: x, lambda x: noisy(x, 0.1), brighter], ids=["exact", "noisy", "darker"]
)
def test_copies_are_found_and_fresh_pictures_are_not(n, copied):
    photos = [scene(i) for i in range(n)]
    got = found([copied(x) for x in photos], photos, [scene(500)])
    assert got.copies == 1.0
    assert got.nearest == list(range(n))
    fresh = found([scene(1000 + i) for i in range(40)], photos, [scene(500)])
    assert fresh.copies <= 0.05
    assert min(fresh.distance) > max(got.distance)


def test_some_copies_are_a_share():
    photos = [scene(i) for i in range(12)]
    got = found([photos[3], scene(99), scene(98), noisy(photos[7], 0.05)], photos)
    assert got.copies == 0.5
    assert [d < got.threshold for d in got.distance] == [True, False, False, True]
    assert got.nearest[0] == 3 and got.nearest[3] == 7


def test_a_blur_is_close_to_everything_and_no_copy():
    photos = [scene(i) for i in range(12)]
    assert found([blurred(photos)], photos).copies == 0.0


def test_a_burst_hides_no_copy():
    burst = [noisy(scene(0), 0.02, seed) for seed in range(8)]
    photos = burst + [scene(i) for i in range(1, 13)]
    got = found([noisy(x, 0.1, 77) for x in photos], photos)
    # without a floor the burst, whose photos are all but equal, would set the threshold
    assert got.threshold == LOWEST
    assert got.copies == 1.0
    assert found([scene(1000 + i) for i in range(40)], photos).copies <= 0.05


def test_the_threshold_is_the_low_quantile_of_real_photos():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=g)  # few dimensions: distances differ a lot
    distance = torch.cdist(x.double(), x.double())
    scores = []
    for i in range(30):
        others = [float(distance[i, j]) for j in range(30) if j != i]
        scores.append(min(others) / (sum(others) / 29))
    expected = min(max(sorted(scores)[math.floor(0.05 * 29)], LOWEST), HIGHEST)
    got = closeness(x[:5] + 0.001, x[:20], x[20:])
    assert got.threshold == pytest.approx(expected, rel=1e-9)
    score = float(torch.cdist((x[:1] + 0.001).double(), x[:20].double()).min())
    mean = float(torch.cdist((x[:1] + 0.001).double(), x[:20].double()).mean())
    assert got.distance[0] == pytest.approx(score / mean, rel=1e-6)


def test_photos_that_differ_everywhere_are_bounded_from_above():
    x = torch.randn(20, 4000, generator=torch.Generator().manual_seed(0))
    assert closeness(x[:1], x, None).threshold == HIGHEST


def test_photos_held_out_count_towards_the_threshold_alone():
    photos = [scene(i) for i in range(6)]
    heldout = [scene(50), noisy(scene(50), 0.02)]
    assert found(heldout, photos, heldout).copies == 0.0
    assert found(heldout, photos, heldout).threshold < found(heldout, photos).threshold


def test_a_mirrored_copy_is_found_where_training_flips():
    photos = [scene(i) for i in range(10)]
    flipped = [ImageOps.mirror(x) for x in photos]
    assert found(flipped, photos).copies == 0.0
    got = found(flipped, photos, mirrored=features(flipped))
    assert got.copies == 1.0 and got.nearest == list(range(10))
    assert found(photos, photos, mirrored=features(flipped)).copies == 1.0


def test_what_cannot_be_told_is_none():
    photos = [scene(i) for i in range(4)]
    none = found([], photos)
    assert none.copies is None and none.recall is None and none.distance == []
    single = found([scene(0)], photos[:1])
    assert single.copies is None and single.nearest == [0]
    pair = found([scene(0), scene(9)], photos[:2])
    assert pair.copies == 0.5 and pair.threshold == HIGHEST
    with pytest.raises(ValueError, match="at least one photo"):
        found([scene(0)], [])


def test_equal_photos_are_no_division_by_zero():
    got = found([scene(0), scene(1)], [scene(0)] * 3)
    assert got.distance[0] == 0.0 and math.isfinite(got.distance[1])
    assert math.isfinite(got.threshold)


def test_recall_needs_samples_and_falls_when_they_repeat():
    photos = [scene(i) for i in range(20)]
    assert found(photos[:7], photos).recall is None
    assert found(photos, photos).recall == 1.0
    repeated = [noisy(photos[0], 0.01, seed) for seed in range(20)]
    assert found(repeated, photos).recall == pytest.approx(1 / 20)


def test_recall_by_hand():
    samples = torch.tensor([[0.0], [1.0], [10.0]])
    reference = torch.tensor([[-1.0], [-1.5], [1.5], [19.0], [19.5]])
    # nearest other sample: 1, 1 and 9 away
    assert recall(samples, reference, neighbours=1) == pytest.approx(3 / 5)
    distance, index = nearest(samples, reference)
    assert distance.tolist() == [1.0, 0.5, 8.5] and index.tolist() == [0, 2, 2]


def test_pixels_ignore_size_and_brightness_and_survive_blank_pictures():
    photo = scene(0)
    one = features([photo, photo.resize((300, 200)), brighter(photo), photo.convert("L")])
    assert one.shape == (4, 3 * 32 * 32) and one.dtype == torch.float32
    assert torch.dist(one[0], one[1]) < 0.2 * one[0].norm()
    assert torch.dist(one[0], one[2]) < 0.05 * one[0].norm()
    blank = features([Image.new("RGB", (8, 8), "white"), Image.new("RGBA", (9, 9))])
    assert blank.isfinite().all() and blank.norm() == 0
    assert features([]).shape == (0, 3072)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny image models: DINOv2, CLIP with its text side, and a text model."""
    t = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    sizes = {"size": {"height": 28, "width": 28}, "crop_size": {"height": 28, "width": 28}}
    dino = t.Dinov2Model(t.Dinov2Config(**small, patch_size=14, mlp_ratio=2))
    words = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    clip = t.CLIPModel(
        t.CLIPConfig(text_config=words, vision_config={**small, "patch_size": 14}, projection_dim=8)
    )
    for name, model in (("dino", dino), ("clip", clip)):
        model.save_pretrained(folder / name)
        t.CLIPImageProcessor(**sizes).save_pretrained(folder / name)
    t.BertModel(t.BertConfig(**words, intermediate_size=8)).save_pretrained(folder / "text")
    return folder


@pytest.mark.parametrize("name", ["dino", "clip"])
def test_a_networks_features(models, name):
    network = extractor(str(models / name))
    assert isinstance(network, Network)
    photos = [scene(i) for i in range(20)]
    got = network([*photos, photos[0].convert("L")])  # more than a batch
    assert got.shape == (21, 16) and torch.allclose(got.norm(dim=1), torch.ones(21))
    assert torch.allclose(got[:20], torch.cat([network([x]) for x in photos]), atol=1e-5)
    assert found_with(network, photos[:3], photos) == [0, 1, 2]
    assert network([]).shape[0] == 0


def found_with(network, samples, photos):
    return closeness(network(samples), network(photos), None).nearest


def test_what_is_no_image_model_is_refused(models, tmp_path):
    assert isinstance(extractor("pixels"), Pixels)
    with pytest.raises(TrainingError, match=r"features must be \"pixels\" or a folder"):
        extractor(str(tmp_path))
    with pytest.raises(TrainingError, match="no image model"):
        extractor(str(models / "text"))
