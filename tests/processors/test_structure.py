"""Models outside the table of families: what is found, what is in doubt, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.processors import FAMILIES, family_of, structure
from a3fta_kernels.tree import plain_name

from .. import models
from ..models.zoo import ZOO

CONFIG = a3fta.AdapterConfig(rank=4)
C, HEADS = 16, 4


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int = HEADS, kv_heads: int = HEADS) -> Tensor:
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = (x.unflatten(-1, (kv_heads, -1)).transpose(1, 2) for x in (k, v))
    h = F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads)
    return h.transpose(1, 2).flatten(2)


class Packed(nn.Module):
    """timm's ViT: qkv, proj."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1)))


class Grouped(nn.Module):
    """LLaMA: two queries share a head, which is wider than C / heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(*shape) for shape in ((C, 48), (C, 24), (C, 24), (48, C))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), 4, 2))


class Narrow(nn.Module):
    """Values narrower than keys; key and value in one layer would be Paired."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(C, 32), nn.Linear(C, 32), nn.Linear(C, 8)
        self.out = nn.Sequential(nn.Linear(8, C), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attend(self.q(x), self.k(x), self.v(x)))


class Paired(nn.Module):
    """lucidrains: to_q, to_kv, to_out."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv, self.to_out = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(attend(self.to_q(x), *self.to_kv(x).chunk(2, dim=-1)))


class Parallel(nn.Module):
    """Attention and feed-forward side by side: one layer consumes both."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.out = nn.Linear(C, 3 * C), nn.Linear(C, 2 * C), nn.Linear(3 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        h = attend(*self.qkv(x).chunk(3, dim=-1))
        return self.out(torch.cat((h, F.gelu(self.up(x))), dim=-1))


class Twice(nn.Module):
    """Two layers that both could be behind attention: `proj` is, `out` comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.proj(attend(*self.qkv(x).chunk(3, dim=-1)))))


class OwnNamesAttention(nn.Module):
    """By its class an attention layer; names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.mix = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(attend(self.a(x), self.b(x), self.c(x)))


class Torchs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(C, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


class Diffusers(nn.Module):
    """A block of one's own around diffusers' layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(C, heads=HEADS, dim_head=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


class Net(nn.Module):
    """Blocks of one kind, each with a feed-forward, whose names are as usual as attention's."""

    def __init__(self, *kinds: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for kind in kinds)
        self.mlps = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(C, C), "proj_out": nn.Linear(C, C)}) for _ in kinds
        )

    def forward(self, x: Tensor) -> Tensor:
        for block, mlp in zip(self.blocks, self.mlps, strict=True):
            x = x + block(x)
            x = x + mlp["proj_out"](F.gelu(mlp["up"](x)))
        return x


def net(*kinds: type[nn.Module]) -> Net:
    torch.manual_seed(0)
    return Net(*kinds).eval()


def data() -> Tensor:
    return torch.randn(2, 5, C, generator=torch.Generator().manual_seed(1))


SURE = {Packed: "proj", Grouped: "o_proj", Narrow: "out.0", Paired: "to_out",
        Diffusers: "attn.to_out.0"}  # fmt: skip
UNSURE = {
    Parallel: ("out", "it reads 48 channels where attention gives 16, something else beside it"),
    Twice: ("proj", "several layers may be behind attention: proj, out"),
    OwnNamesAttention: ("mix", "no query, key and value layers under the usual names"),
}


@pytest.mark.parametrize("kind", SURE)
def test_sure(kind):
    """Found, identical at the start, trains, adapts attention's output and nothing else, goes."""
    model, x = net(kind, kind), data()
    before = models.snapshot(model)
    with torch.no_grad():
        expected = model(x)
        report = a3fta.inject(model, CONFIG, backend="reference")
        assert torch.equal(model(x), expected)
    assert list(report.layers) == [f"blocks.{i}.{SURE[kind]}" for i in range(2)]
    assert report.families == {"structure": 2} and not report.unadapted
    assert "a Net is outside the table of families" in report.notes[0] in str(report)
    assert "doubt" not in report.notes[0]
    models.randomize(model)
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert trained == (".adapters.default." in name), name
    a3fta.eject(model)
    models.assert_unchanged(model, before)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", UNSURE)
def test_unsure_is_left_until_it_is_named(kind):
    name, doubt = UNSURE[kind]
    model, x = net(Packed, kind), data()
    full = f"blocks.1.{name}"
    report = a3fta.inject(model, CONFIG)
    assert list(report.layers) == ["blocks.0.proj"]
    assert doubt in report.unadapted[full]
    assert full in report.notes[0] and "name it in full in AdapterConfig.targets" in report.notes[0]
    a3fta.eject(model)
    # part of a name, or a pattern, is no name
    with pytest.raises(ValueError, match=r"targets: .*'blocks.1', which matches none but blocks.1"):
        a3fta.inject(model, a3fta.AdapterConfig(rank=4, targets=["blocks.0", "blocks.1"]))
    report = a3fta.inject(model, a3fta.AdapterConfig(rank=4, targets=["blocks.0", full]))
    assert list(report.layers) == ["blocks.0.proj", full]
    assert not {full, "blocks.1"} & set(report.unadapted)
    models.randomize(model)
    model(x).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in a3fta.trainable_parameters(model))


@pytest.mark.parametrize("kind", UNSURE)
def test_nothing_sure_is_an_error_that_lists_candidates(kind):
    name, doubt = UNSURE[kind]
    model = net(kind)
    before = models.snapshot(model)
    with pytest.raises(ValueError, match=r"model: expected attention.*none for sure") as caught:
        a3fta.inject(model, CONFIG)
    models.assert_unchanged(model, before)
    said = str(caught.value)
    first = "a" if kind is OwnNamesAttention else name
    assert f"blocks.0.{first}: " in said
    assert doubt in said and "in full: AdapterConfig(targets=['blocks.0.attn.out'" in said


def test_any_linear_layer_may_be_named():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.mix = (nn.Linear(C, C) for _ in range(4))

        forward = OwnNamesAttention.forward

    model = net(Bare)
    with pytest.raises(ValueError, match=r"model: .* got a Net with none\. Name the linear layers"):
        a3fta.inject(model, CONFIG)
    with pytest.raises(ValueError, match="got a Net with none"):
        a3fta.inject(model, a3fta.AdapterConfig(rank=4, targets=["blocks.0"]))
    report = a3fta.inject(model, a3fta.AdapterConfig(rank=4, targets=["blocks.0.mix"]))
    assert list(report.layers) == ["blocks.0.mix"]


def test_torchs_attention_is_refused():
    """It reads out_proj.weight past the layer's forward: an adapter would never act."""
    report = a3fta.inject(net(Packed, Torchs), CONFIG)
    assert list(report.layers) == ["blocks.0.proj"]
    assert "reads the output layer's weight" in report.unadapted["blocks.1.mha"]
    model = net(Packed, Torchs)
    before = models.snapshot(model)
    with pytest.raises(ValueError, match=r"targets: .*'blocks.1.mha.out_proj': torch's multi"):
        a3fta.inject(model, a3fta.AdapterConfig(targets=["blocks.1.mha.out_proj"]))
    models.assert_unchanged(model, before)
    with pytest.raises(ValueError, match="torch's multi_head_attention_forward reads"):
        a3fta.inject(net(Torchs), CONFIG)


def test_file_of_a_named_layer(tmp_path):
    model, other, x = net(Packed, Twice), net(Packed, Twice), data()
    a3fta.inject(model, a3fta.AdapterConfig(rank=4, targets=["blocks.1.proj"]))
    models.randomize(model)
    a3fta.save_adapter(model, tmp_path)
    a3fta.load_adapter(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    # beside it a second adapter, which leaves what is in doubt alone
    report = a3fta.inject(other, CONFIG, name="second")
    assert list(report.layers) == ["blocks.0.proj"] and "blocks.1.proj" in report.unadapted


def test_processors_of_diffusers_layers_become_ours():
    model, x = net(Diffusers, Packed, Twice), data()
    config = a3fta.AdapterConfig(rank=4, targets=["blocks.0", "blocks.1", "blocks.2.proj"])
    report = a3fta.inject(model, config)
    engines = {"blocks.0.attn": "auto", "blocks.1": "Packed", "blocks.2": "Twice"}
    assert report.attention == engines
    assert set(report.processors) == {"blocks.0.attn"} and not report.left_processors
    with torch.no_grad():
        expected = model(x)
        assert a3fta.set_attention(model, "math") == engines | {"blocks.0.attn": "math"}
        assert a3fta.fuse_qkv(model) == {
            "blocks.0.attn": "",
            "blocks.1": "its processor is of class Packed",
            "blocks.2": "its processor is of class Twice",
        }
        torch.testing.assert_close(model(x), expected)


def test_peft_around_the_layer():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(net(Packed), peft.LoraConfig(target_modules=["proj", "qkv"]))
    report = a3fta.inject(wrapped, CONFIG)
    assert list(report.layers) == ["blocks.0.proj"]


def test_layers_of_transformers():
    """CLIP's and T5's layers are as usual; BERT's output layer is outside its attention layer."""
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=C, num_hidden_layers=2, num_attention_heads=2)
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(intermediate_size=C, **small))
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(d_model=C, d_kv=4, d_ff=C, num_layers=2, num_heads=6)
    )
    bert = transformers.BertModel(transformers.BertConfig(intermediate_size=C, **small))
    assert len(a3fta.inject(clip, CONFIG).layers) == len(a3fta.inject(t5, CONFIG).layers) == 2
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.attention\.output\.dense: .*beside"):
        a3fta.inject(bert, CONFIG)


# attention that pools the text for the timestep's embedding
BEYOND = {"mochi": {"time_embed.pooler.to_out"}}


@pytest.mark.parametrize("name", ZOO)
def test_against_the_table(name):
    """What is sure by structure is what the family's row says; what else it says is in doubt."""
    model = ZOO[name].build()
    rows = [site for site in family_of(model).sites(model) if site.projections]
    told = {plain_name(n): site.columns for site in rows for n in site.projections}
    found = list(structure.sites(model))
    sure = {plain_name(n) for site in found for n in site.projections}
    unsure = {plain_name(n) for site in found for n in site.unsure}
    assert sure - set(told) == BEYOND.get(name, set())
    assert set(told) - sure == unsure
    assert {n for n, columns in told.items() if columns} <= unsure


def test_the_last_row_takes_any():
    assert list(FAMILIES)[-1] == "structure" and FAMILIES["structure"].by_structure
    assert family_of(nn.Linear(2, 2)).name == "structure"
    assert sum(family.by_structure for family in FAMILIES.values()) == 1
