"""The ledger against PyTorch's own hooks on real tensors: equal to the byte."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import a3fta_kernels as a3fta
from a3fta_kernels.memory import Entry, Ledger, ledger
from a3fta_kernels.memory.operators import UNKNOWN
from a3fta_kernels.memory.saved import record

from .. import models
from . import setups

MIB = 2**20


def hooked(model: nn.Module, inputs: dict) -> int:
    """Bytes of every storage that autograd hands to a hook, weights aside: the plainest count."""
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x.detach()

    with saved_tensors_hooks(pack, lambda x: x):
        model(**inputs)
    weights = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def there(name: str, way: str) -> None:
    """Skips what cannot run here."""
    if way == "native" and not a3fta.backends()["native"].available:
        pytest.skip("the compiled library is not here")


CASES = [(n, w, torch.bfloat16) for n in setups.NAMES for w in setups.WAYS]
CASES += [(n, "full", torch.float32) for n in setups.NAMES]


@pytest.mark.parametrize(("name", "way", "dtype"), CASES)
def test_fakes_save_what_real_tensors_save(name, way, dtype):
    there(name, way)
    model, inputs = setups.build(name, dtype)
    setups.set_up(model, way)
    found = ledger(model, **inputs)
    assert found.total + found.released == hooked(model, inputs) > 0
    assert found.entries == record(model, (), inputs).entries
    assert UNKNOWN not in found.by_operator()
    assert ("checkpoint" in found.by_operator()) == ("checkpointed" in way)
    assert found.total == sum(e.bytes for e in found.entries)
    assert all(e.module == "(model)" or model.get_submodule(e.module) for e in found.entries)


def test_every_operator_of_a_small_layer():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 8, 3, padding=1)
            self.out = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            y = nn.functional.silu(self.norm(x))
            y = self.conv(y).flatten(2).transpose(1, 2).contiguous()
            return y * torch.sigmoid(self.out(y))

    x = torch.randn(2, 4, 6, 6)
    found = ledger(Layer(), x)
    size = x.nbytes
    assert [(e.module, e.operator, e.tensor, e.bytes) for e in found.entries] == [
        ("norm", "group_norm", "input", size),
        ("norm", "group_norm", "mean", 16),
        ("norm", "group_norm", "rstd", 16),
        ("(model)", "silu", "input", size),
        ("conv", "conv", "input", size),
        ("out", "linear", "input", 2 * size),
        ("(model)", "sigmoid", "result", 2 * size),
    ]
    # the product keeps both of its factors, which others saved before
    assert found.entries[5].also == ("(model): mul.self",)
    assert found.entries[6].also == ("(model): mul.other",)
    assert found.entries[0].shape == (2, 4, 6, 6) and found.entries[0].dtype == "float32"
    assert found.by_operator() == {
        "linear": 2 * size, "sigmoid": 2 * size, "group_norm": size + 32, "silu": size,
        "conv": size,
    }  # fmt: skip
    assert found.parameters == found.trainable == sum(p.nbytes for p in Layer().parameters())


class Square(torch.autograd.Function):
    operator, saved_names = "square", ("x", "y")

    @staticmethod
    def forward(ctx, x, w):
        y = x * x
        ctx.save_for_backward(x, y, w)
        return y.sum() * w

    @staticmethod
    def backward(ctx, dy):
        x, _, w = ctx.saved_tensors
        return 2 * x * dy * w, dy


class Inner(torch.autograd.Function):
    """Runs a graph of its own under hooks of its own, and keeps its tensors itself."""

    @staticmethod
    def forward(ctx, x, w):
        kept = []

        def pack(t):
            kept.append(t.detach())
            return len(kept) - 1

        with torch.enable_grad(), saved_tensors_hooks(pack, lambda i: kept[i]):
            leaf = x.detach().requires_grad_()
            y = leaf.exp().sin()
        ctx.graph = torch.autograd.graph.get_gradient_edge(y)
        ctx.save_for_backward(*kept, w)
        return y.detach() * w

    @staticmethod
    def backward(ctx, dy):
        raise NotImplementedError


def test_functions_name_what_they_keep():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return Square.apply(x, self.w) + Inner.apply(x, self.w)

    x = torch.randn(5)
    found = ledger(Twice(), x)
    assert [(e.operator, e.tensor, e.bytes) for e in found.entries] == [
        ("square", "x", 20), ("square", "y", 20), ("Inner", "tensors[0]", 20)
    ]  # fmt: skip
    assert found.total == hooked(Twice(), {"x": x})


@pytest.mark.parametrize("name", ["adapter_linear", "adapter"])
def test_our_ops_name_their_tensors_alike_by_both_entries(name):
    if not a3fta.backends()["native"].available:
        pytest.skip("the compiled library is not here")

    class Op(nn.Module):
        def __init__(self):
            super().__init__()
            self.w_down, self.w_up = (nn.Parameter(torch.randn(*s)) for s in ((4, 8), (8, 4)))
            self.register_buffer("weight", torch.randn(6, 8))

        def forward(self, h):
            extra = (self.weight,) if name == "adapter_linear" else ()
            op = getattr(a3fta.ops, name)
            return op(h, self.w_down, self.w_up, *extra, backend="native")

    model, h = Op(), torch.randn(3, 8)
    for found in (ledger(model, h), record(model, (h,), {})):
        named = {e.tensor: e.bytes for e in found.entries}
        assert found.by_operator().keys() == {name}
        assert named["a"] == 48 and named["h"] == 96
        assert set(named) <= {"a", "v", "h"}


def test_what_is_dropped_again_is_not_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(x):
        model[1](x).exp()  # its graph dies with it
        return model[0](x)

    model.forward = forward
    found = ledger(model, torch.randn(3, 4))
    assert (found.total, found.released) == (48, 48)


def test_a_storage_counts_once_and_with_all_its_bytes():
    class Chunks(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(8))

        def forward(self, x):
            a, b = (x * self.w).chunk(2)
            return a * b

    x = torch.randn(16)[8:]
    found = ledger(Chunks(), x)
    assert [(e.operator, e.bytes) for e in found.entries] == [("mul", 64), ("mul", 32)]
    assert found.total == hooked(Chunks(), {"x": x})


def test_the_model_is_what_it_was():
    model = models.build("sdxl").train()
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    model.register_buffer("extra", torch.ones(3))
    model.loose, model.listed = torch.ones(2), [torch.ones(2)]
    before = models.snapshot(model)
    tensors = {n: id(x) for n, x in (*model.named_parameters(), *model.named_buffers())}
    members = {n: (id(m._parameters), list(m._parameters)) for n, m in model.named_modules()}
    state = torch.get_rng_state()
    ledger(model, **models.inputs("sdxl"))
    models.assert_unchanged(model, before)
    assert tensors == {n: id(x) for n, x in (*model.named_parameters(), *model.named_buffers())}
    assert members == {
        n: (id(m._parameters), list(m._parameters)) for n, m in model.named_modules()
    }
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model.loose) is torch.Tensor and type(model.listed[0]) is torch.Tensor
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert model(**models.inputs("sdxl")).sample.isfinite().all()


@pytest.mark.parametrize("moment", ["first", "later"])
def test_an_error_changes_nothing(moment):
    model = models.build("sd15").train()
    before = models.snapshot(model)
    inputs = models.inputs("sd15")
    if moment == "first":
        inputs["sample"] = torch.randn(1, 3, 5, 5)
    else:
        model.conv_out.forward = lambda x: x.sum().item()
    had = {n: set(vars(m)) for n, m in model.named_modules()}
    with pytest.raises(Exception):  # noqa: B017
        ledger(model, **inputs)
    assert had == {n: set(vars(m)) for n, m in model.named_modules()}
    if moment == "later":
        del model.conv_out.forward
    models.assert_unchanged(model, before)
    assert not torch.nn.modules.module._global_forward_hooks


def test_meta_models_and_tied_weights_and_copies():
    real, inputs = setups.build("sd15")
    with torch.device("meta"):
        meta = models.build("sd15", device="meta").train()
    assert ledger(meta, **inputs).entries == ledger(copy.deepcopy(real), **inputs).entries
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    found = ledger(tied, torch.randn(2, 4))
    assert found.parameters == 64 and found.total == hooked(tied, {"input": torch.randn(2, 4)})


def test_pipelines_wrappers_and_frozen_models():
    model, inputs = setups.build("sd15")

    class Pipeline:
        unet = model
        components = None

    expected = ledger(model, **inputs)
    assert ledger(Pipeline(), **inputs) == expected
    assert ledger(torch.compile(model), **inputs) == expected
    assert ledger(model.requires_grad_(False), **inputs).total == 0


def test_grad_modes_outside_do_not_matter():
    model, inputs = setups.build("sd15")
    expected = ledger(model, **inputs)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert ledger(model, **inputs) == expected


def test_the_autocast_of_a_gpu_is_followed():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(64, 8)
    plain = ledger(model, x).total
    with torch.autocast("cuda", dtype=torch.bfloat16):
        if not torch.is_autocast_enabled("cuda"):
            pytest.skip("this PyTorch switches the autocast of CUDA off where there is none")
        assert ledger(model, x).total < plain


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(TypeError, match="model: expected"):
        ledger(lambda x: x, torch.ones(1))
    model = nn.Linear(4, 4)
    with pytest.raises(TypeError, match=r"args: expected a plain dense tensor.*sparse"):
        ledger(model, torch.eye(4).to_sparse())

    class Odd(torch.Tensor):
        pass

    model.weight = nn.Parameter(torch.ones(4, 4).as_subclass(Odd))
    with pytest.raises(TypeError, match=r"model: weight: expected a plain dense tensor, got a"):
        ledger(model, torch.ones(1, 4))


def entry(module: str, operator: str, size: int) -> Entry:
    return Entry(module, operator, "input", (size,), "int8", size)


def test_sums_tables_and_json():
    entries = (
        entry("blocks.0.norm", "norm", 3 * MIB), entry("blocks.1.norm", "norm", 5 * MIB),
        entry("blocks.1.ff", "mul", 9 * MIB), entry("head", "mul", MIB),
    )  # fmt: skip
    found = Ledger(entries, parameters=100 * MIB, trainable=MIB, notes=("a note",))
    assert found.total == 18 * MIB
    assert list(found.by_operator().items()) == [("mul", 10 * MIB), ("norm", 8 * MIB)]
    assert list(found.by_module(1).items()) == [("blocks", 17 * MIB), ("head", MIB)]
    assert next(iter(found.by_module(2))) == "blocks.1" and len(found.by_module()) == 4
    assert found.by_tensor() == {"mul.input": 10 * MIB, "norm.input": 8 * MIB}
    assert found.table(2) == [
        ("blocks.*.ff", "mul", "input", 1, 9 * MIB), ("blocks.*.norm", "norm", "input", 2, 8 * MIB)
    ]  # fmt: skip
    read = json.loads(found.to_json())
    assert read["total"] == 18 * MIB and len(read["entries"]) == 4
    assert Entry(**{**read["entries"][0], "shape": (3 * MIB,), "also": ()}) == entries[0]
    said = str(found)
    assert "18 MiB saved" in said and "55.6 %  mul" in said and "note: a note" in said
    with pytest.raises(ValueError, match="depth: expected"):
        found.by_module(0)
