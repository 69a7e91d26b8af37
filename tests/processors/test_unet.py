"""The U-Net family's processors: what they compute, beside the stock ones."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from torch import nn

import a3fta_kernels as a3fta
from a3fta_kernels.backends import BackendUnavailableError
from a3fta_kernels.processors import (
    A3FTAAttnAddedKVProcessor,
    A3FTAAttnProcessor,
    A3FTAFusedAttnProcessor,
    family_of,
    unet,
)

from .. import models

CONFIG = a3fta.AdapterConfig(rank=4)


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in that checks what xformers' operator asks of its arguments, and computes it."""
    calls = []

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, op=None):
        assert query.dtype == key.dtype == value.dtype and p == 0.0
        squeeze = query.ndim == 3  # (B * H, L, D), as diffusers calls it
        if squeeze:
            query, key, value = (x.unsqueeze(2) for x in (query, key, value))
            attn_bias = None if attn_bias is None else attn_bias.unsqueeze(1)
        assert query.ndim == 4 and key.shape == value.shape
        assert query.shape[0] == key.shape[0] and query.shape[2:] == key.shape[2:]
        assert all(x.stride(-1) == 1 for x in (query, key, value))
        if attn_bias is not None:
            batch, tokens, heads, _ = query.shape
            assert attn_bias.shape == (batch, heads, tokens, key.shape[1])
            assert attn_bias.dtype == query.dtype
            if not squeeze:  # stock diffusers leaves the alignment to its caller
                assert all(s % 8 == 0 for s in attn_bias.stride()[:-1])
        calls.append(types.SimpleNamespace(layout=3 if squeeze else 4, bias=attn_bias, op=op))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        h = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias, scale=scale)
        h = h.transpose(1, 2)
        return h.squeeze(2) if squeeze else h

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops = ops
    ops.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(stock, "xformers", package)
    return calls


def attention(added=False, seed=0, **options):
    """One `Attention` layer, with random biases and norms so that nothing cancels."""
    torch.manual_seed(seed)
    defaults = dict(query_dim=32, heads=4, dim_head=8, bias=True)
    if added:
        defaults |= dict(
            added_kv_proj_dim=24, norm_num_groups=8, only_cross_attention=False,
            residual_connection=True,
        )  # fmt: skip
    layer = Attention(**(defaults | options)).eval().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return layer


def check_pair(layer, theirs, ours, *args, exact=True, **kwargs):
    """The same numbers from both, without an adapter, with an untrained, and with a trained one."""
    layer.set_processor(theirs)
    expected = layer(*args, **kwargs)
    layer.set_processor(ours)
    compare = torch.equal if exact else (lambda x, y: torch.allclose(x, y, atol=1e-5))
    assert compare(layer(*args, **kwargs), expected)
    holder = nn.ModuleDict({"attn": layer})
    a3fta.inject(holder, CONFIG, backend="reference")
    assert layer.processor is ours
    assert compare(layer(*args, **kwargs), expected)
    models.randomize(holder, std=0.3)
    changed = layer(*args, **kwargs)
    assert not torch.allclose(changed, expected, atol=1e-3)
    layer.set_processor(theirs)
    assert compare(layer(*args, **kwargs), changed)


LAYERS = {
    "self": (dict(), dict()),
    "cross": (dict(cross_attention_dim=24), dict(text=True)),
    "no bias": (dict(bias=False, out_bias=False), dict()),
    "mask": (dict(cross_attention_dim=24), dict(text=True, mask=True)),
    "self mask": (dict(), dict(mask=True)),
    "residual": (dict(residual_connection=True), dict()),
    "rescale": (dict(residual_connection=True, rescale_output_factor=1.7), dict()),
    "4-D": (dict(norm_num_groups=8, residual_connection=True, rescale_output_factor=1.3),
            dict(image=True)),
    "4-D, no residual": (dict(norm_num_groups=8), dict(image=True)),
    "group norm": (dict(norm_num_groups=8), dict()),
    "spatial norm": (dict(spatial_norm_dim=8, norm_num_groups=None, residual_connection=True),
                     dict(image=True, temb=True)),
    "norm cross": (dict(cross_attention_dim=24, cross_attention_norm="layer_norm"),
                   dict(text=True)),
    "group norm cross": (
        dict(cross_attention_dim=24, cross_attention_norm="group_norm",
             cross_attention_norm_num_groups=4), dict(text=True)),
    "qk norm": (dict(qk_norm="layer_norm"), dict()),
    "dropout": (dict(dropout=0.5, residual_connection=True), dict()),
    "upcast": (dict(upcast_attention=True, upcast_softmax=True), dict()),
    "unscaled": (dict(scale_qk=False), dict()),
}  # fmt: skip


def arguments(image=False, text=False, mask=False, temb=False):
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tokens = 7 if text else 16
    found = dict(hidden_states=draw(2, 32, 4, 4) if image else draw(2, 16, 32))
    if text:
        found["encoder_hidden_states"] = draw(2, 7, 24)
    if mask:
        bias = torch.zeros(2, 1, tokens)
        bias[0, :, 3:] = -10000.0
        found["attention_mask"] = bias
    if temb:
        found["temb"] = draw(2, 8, 4, 4)
    return found


PAIRS = {
    "sdpa": (stock.AttnProcessor2_0, dict(attention="sdpa"), True),
    "math": (stock.AttnProcessor, dict(attention="math"), True),
    "sliced": (lambda: stock.SlicedAttnProcessor(3), dict(attention="sliced", slice_size=3), True),
    "xformers": (stock.XFormersAttnProcessor, dict(attention="xformers"), False),
}


# what the stock processor of an engine leaves out
LEFT_OUT = {
    ("sliced", "spatial norm"), ("math", "qk norm"), ("sliced", "qk norm"), ("xformers", "qk norm")
}  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "case"), [(e, c) for e in PAIRS for c in LAYERS if (e, c) not in LEFT_OUT]
)
def test_equals_the_stock_processor(case, engine, xformers):
    theirs, options, exact = PAIRS[engine]
    build, call = LAYERS[case]
    check_pair(
        attention(**build),
        theirs(),
        A3FTAAttnProcessor(**options),
        exact=exact,
        **arguments(**call),
    )


ADDED = {
    "sdpa": (stock.AttnAddedKVProcessor2_0, dict(), True),
    "math": (stock.AttnAddedKVProcessor, dict(attention="math"), True),
    "sliced": (
        lambda: stock.SlicedAttnAddedKVProcessor(3), dict(attention="sliced", slice_size=3), True
    ),
    "xformers": (stock.XFormersAttnAddedKVProcessor, dict(attention="xformers"), False),
}  # fmt: skip


@pytest.mark.parametrize("engine", ADDED)
@pytest.mark.parametrize("only_cross", [False, True])
@pytest.mark.parametrize("norm", [None, "layer_norm"])
def test_added_kv_equals_the_stock_processor(engine, only_cross, norm, xformers):
    theirs, options, exact = ADDED[engine]
    inputs = arguments(image=True, text=True)
    build = dict(only_cross_attention=only_cross)
    if norm is not None:  # the norm is as wide as the image's keys, so the text has to be
        build |= dict(cross_attention_norm=norm, added_kv_proj_dim=32)
        inputs["encoder_hidden_states"] = F.pad(inputs["encoder_hidden_states"], (0, 8), value=0.3)
    layer = attention(added=True, **build)
    check_pair(layer, theirs(), A3FTAAttnAddedKVProcessor(**options), exact=exact, **inputs)


@pytest.mark.parametrize("engine", ["sdpa", "math", "sliced"])
def test_added_kv_with_a_mask(engine):
    theirs, options, exact = ADDED[engine]
    inputs = arguments(image=True, text=True, mask=True)
    ours = A3FTAAttnAddedKVProcessor(**options)
    check_pair(attention(added=True), theirs(), ours, exact=exact, **inputs)


@pytest.mark.parametrize("case", ["self", "cross", "mask", "4-D", "norm cross", "qk norm"])
def test_fused_projections(case):
    build, call = LAYERS[case]
    layer = attention(**build)
    layer.fuse_projections()
    inputs = arguments(**call)
    check_pair(layer, stock.FusedAttnProcessor2_0(), A3FTAFusedAttnProcessor(), **inputs)


def test_dropout_after_the_projection_is_applied():
    layer = attention(dropout=0.5, residual_connection=True).train()
    inputs = arguments()
    results = []
    for processor in (stock.AttnProcessor2_0(), A3FTAAttnProcessor()):
        layer.set_processor(processor)
        torch.manual_seed(0)
        results.append(layer(**inputs))
    assert torch.equal(*results)
    assert (results[0] == inputs["hidden_states"]).float().mean() > 0.3


def test_residual_goes_into_the_projection_on_3d_input():
    layer = attention(residual_connection=True)
    holder = nn.ModuleDict({"attn": layer})
    a3fta.inject(holder, CONFIG)
    seen = []
    layer.to_out[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("residual")), with_kwargs=True
    )
    inputs = arguments()
    layer(**inputs)
    assert seen[0] is inputs["hidden_states"]


@pytest.mark.parametrize("text", [True, False])
def test_xformers_layout_and_mask(text, xformers):
    layer = attention(cross_attention_dim=24 if text else None)
    layer.set_processor(A3FTAAttnProcessor("xformers", attention_op="chosen"))
    layer(**arguments(text=text, mask=True))
    (call,) = xformers
    assert call.layout == 4 and call.op == "chosen"
    assert call.bias.shape == (2, 4, 16, 7 if text else 16)


def test_missing_xformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(BackendUnavailableError, match="attention 'xformers'") as error:
        A3FTAAttnProcessor("xformers")
    assert a3fta.backends()["xformers"].reason in str(error.value)


def test_xformers_without_an_operator_for_the_device(monkeypatch, xformers):
    def refuse(*args, **kwargs):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\n...")

    processor = A3FTAAttnProcessor("xformers")
    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", refuse)
    layer = attention()
    layer.set_processor(processor)
    with pytest.raises(BackendUnavailableError, match="attention 'xformers': No operator found"):
        layer(**arguments())


@pytest.mark.parametrize("cls", [A3FTAAttnProcessor, A3FTAAttnAddedKVProcessor])
@pytest.mark.parametrize(
    "arguments", [((), dict(hidden_size=320, rank=4)), ((320,), {}), ((), dict(lora_scale=1.0))]
)
def test_constructor_points_to_inject(cls, arguments):
    positional, keywords = arguments
    with pytest.raises(TypeError, match=r"owns no parameters: call a3fta_kernels\.inject") as error:
        cls(*positional, **keywords)
    assert "attn_processors" in str(error.value)


def test_bad_buildare_refused():
    with pytest.raises(ValueError, match="attention: expected one of auto, sdpa, flash, cudnn"):
        A3FTAAttnProcessor("fastest")
    for size in (None, 0, "auto"):
        with pytest.raises(ValueError, match="slice_size: expected a number of heads"):
            A3FTAAttnProcessor("sliced", slice_size=size)


def test_every_replacement_keeps_its_options(xformers):
    for kind, make in unet.REPLACEMENTS.items():
        sliced = "Sliced" in kind.__name__
        processor = kind(2) if sliced else kind()
        ours = make(processor)
        assert ("Added" in kind.__name__) == ("Added" in type(ours).__name__)
        assert isinstance(ours, A3FTAFusedAttnProcessor) == ("Fused" in kind.__name__)
        assert ours.slice_size == (2 if sliced else None)
        assert (ours.attention == "xformers") == ("XFormers" in kind.__name__)
    operator = object()
    assert make(kind(attention_op=operator)).attention_op is operator


def test_families():
    assert family_of(models.build("sd15")).name == "unet_condition"
    assert family_of(models.build("unet2d")).name == "unet"
    assert family_of(nn.ModuleList([attention()])).name == "structure"


class TestStockProcessorsOnAnInjectedModel:
    """Whoever replaces the processors: the adapter stays."""

    @pytest.fixture
    def model(self):
        model = models.build("sd15")
        a3fta.inject(model, CONFIG, backend="reference")
        models.randomize(model)
        with torch.no_grad():
            yield model

    def same(self, model, expected):
        got = models.run(model, "sd15", masked=True)
        assert torch.allclose(got, expected, atol=1e-5)

    def test_each_stock_processor(self, model, xformers):
        expected = models.run(model, "sd15", masked=True)
        for make in (
            stock.AttnProcessor, stock.AttnProcessor2_0, stock.XFormersAttnProcessor,
            lambda: stock.SlicedAttnProcessor(2),
        ):  # fmt: skip
            model.set_attn_processor(make())
            self.same(model, expected)
        assert xformers

    def test_slicing(self, model):
        expected = models.run(model, "sd15", masked=True)
        model.set_attention_slice("max")
        kinds = {type(p) for p in model.attn_processors.values()}
        assert kinds == {stock.SlicedAttnProcessor}
        self.same(model, expected)
        model.set_attention_slice(None)
        self.same(model, expected)

    def test_fuse_and_unfuse(self, model):
        expected = models.run(model, "sd15", masked=True)
        model.fuse_qkv_projections()
        self.same(model, expected)
        model.unfuse_qkv_projections()
        assert all(isinstance(p, A3FTAAttnProcessor) for p in model.attn_processors.values())
        self.same(model, expected)

    def test_injection_into_a_fused_model(self):
        model = models.build("sd15")
        with torch.no_grad():
            model.fuse_qkv_projections()
            expected = models.run(model, "sd15")
            a3fta.inject(model, CONFIG, backend="reference")
            kinds = {type(p) for p in model.attn_processors.values()}
            assert kinds == {A3FTAFusedAttnProcessor}
            assert torch.equal(models.run(model, "sd15"), expected)

    def test_disable_xformers(self, model):
        expected = models.run(model, "sd15", masked=True)
        model.disable_xformers_memory_efficient_attention()
        kinds = {type(p) for p in model.attn_processors.values()}
        assert kinds == {stock.AttnProcessor2_0}
        self.same(model, expected)

    def test_enable_xformers_keeps_the_added_kv_kind(self, monkeypatch, xformers):
        model = models.build("kandinsky")
        a3fta.inject(model, CONFIG)
        monkeypatch.setattr(stock, "is_xformers_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        randn = torch.randn
        monkeypatch.setattr(torch, "randn", lambda *a, device=None, **k: randn(*a, **k))
        model.enable_xformers_memory_efficient_attention()
        kinds = {type(p) for p in model.attn_processors.values()}
        assert kinds == {stock.XFormersAttnAddedKVProcessor}

    def test_set_default_attn_processor_says_eject(self, model):
        with pytest.raises(ValueError, match=r"a3fta_kernels\.eject\(model\)"):
            model.set_default_attn_processor()
        a3fta.eject(model)
        model.set_default_attn_processor()
        assert {type(p) for p in model.attn_processors.values()} == {stock.AttnProcessor}

    def test_added_kv_models_refuse_fused_qkv_as_before(self):
        model = models.build("kandinsky")
        a3fta.inject(model, CONFIG)
        with pytest.raises(ValueError, match="not supported for models having added KV"):
            model.fuse_qkv_projections()

    def test_perturbed_attention(self):
        """Its processor calls `to_out` twice in one forward."""
        layer = attention()
        holder = nn.ModuleDict({"attn": layer})
        layer.set_processor(stock.PAGIdentitySelfAttnProcessor2_0())
        h = torch.randn(4, 16, 32)
        expected = layer(h)
        report = a3fta.inject(holder, CONFIG, backend="reference")
        assert list(report.left_processors.values()) == ["PAGIdentitySelfAttnProcessor2_0"]
        assert torch.equal(layer(h), expected)
        models.randomize(holder, std=0.3)
        changed = layer(h)
        for half in (slice(0, 2), slice(2, 4)):
            assert not torch.allclose(changed[half], expected[half], atol=1e-3)
        layer.set_processor(A3FTAAttnProcessor())
        assert torch.equal(changed[:2], layer(h[:2]))
