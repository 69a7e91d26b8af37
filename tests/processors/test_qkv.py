"""q, k and v together: one dx for all three, and with `fuse_qkv` one product."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils.other import clean_state_dict_for_safetensors
from diffusers.models import attention_processor as stock
from safetensors.torch import load_file
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.processors import qkv

from .. import models
from ..oracle import compare, jitter

CONFIG = a3fta.AdapterConfig(rank=4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layers(count=3, width=24, out=16, bias=True, dtype=torch.float32, device="cpu", seed=0):
    torch.manual_seed(seed)
    found = [nn.Linear(width, out + 8 * i, bias=bias) for i in range(count)]
    return [layer.to(device, dtype).requires_grad_(False) for layer in found]


def one_product(group) -> bool:
    return qkv.joint([layer.weight for layer in group]) is not None


def operators(call) -> list[str]:
    """The products and sums that `call` runs."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = [event.name.removeprefix("aten::") for event in profile.events()]
    return [n for n in names if n in ("linear", "mm", "addmm", "addmm_", "bmm", "add", "add_")]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradient(dtype, count, joined, device):
    group = layers(count, dtype=dtype, device=device)
    if joined:
        qkv.lay_side_by_side(group)
    x = torch.randn(2, 5, 24, device=device).to(dtype).requires_grad_()
    dys = [torch.randn(2, 5, layer.out_features, device=device).to(dtype) for layer in group]

    def eager(x: Tensor, dys: list[Tensor], parts: list[nn.Linear]) -> tuple[list[Tensor], Tensor]:
        ys = [F.linear(x, layer.weight, layer.bias) for layer in parts]
        return ys, torch.autograd.grad(ys, x, dys)[0]

    exact_group = [copy.deepcopy(layer).double() for layer in group]
    wide = x.detach().double().requires_grad_()
    exact, exact_dx = eager(wide, [dy.double() for dy in dys], exact_group)
    found, found_dx = eager(x, dys, group)
    near = [
        eager(jitter(wide, dtype, s), [jitter(dy.double(), dtype, s) for dy in dys], exact_group)
        for s in range(4)
    ]
    ys = qkv.project(group, x)
    (dx,) = torch.autograd.grad(ys, x, dys)
    for i, y in enumerate(ys):
        compare(f"y{i}", y, [found[i], *(n[0][i] for n in near)], exact[i], dtype, 2.0)
        assert y.dtype == dtype
    compare("dx", dx, [found_dx, *(n[1] for n in near)], exact_dx, dtype, 2.0)
    assert dx.dtype == dtype and dx.shape == x.shape


def test_counts():
    group, x = layers(3, out=24), torch.randn(2, 5, 24, requires_grad=True)

    def step(project=qkv.project):
        torch.cat(project(group, x), -1).sum().backward()

    plain = operators(lambda: step(lambda ls, x: [layer(x) for layer in ls]))
    assert plain.count("linear") == 3 and plain.count("add") + plain.count("add_") >= 2
    apart = operators(step)
    assert apart.count("linear") == 3
    qkv.lay_side_by_side(group)
    joined = operators(step)
    assert joined.count("linear") == 1
    for found in (apart, joined):
        # dx: one product and two that add to it
        assert (found.count("mm"), found.count("addmm_")) == (1, 2), found
        # the gradient of x joins what x.grad holds, and no other sum
        assert found.count("add") + found.count("add_") <= 1, found


def test_what_no_gradient_asks_for(device):
    group, x = layers(device=device), torch.randn(1, 3, 24, device=device, requires_grad=True)
    _, y, _ = qkv.project(group, x)  # only one of the three is used
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, group[1].weight.sum(0).expand(1, 3, -1))
    assert not any(y.requires_grad for y in qkv.project(group, x.detach()))
    y, *_ = qkv.project(group, x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)  # a second derivative, as in PyTorch
    assert ddx.abs().sum() > 0


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (4, 24), (2, 3, 5, 24)])
def test_shapes(shape, device):
    group, x = layers(device=device), torch.randn(*shape, device=device, requires_grad=True)
    expected = [layer(x) for layer in group]
    expected_dx = torch.autograd.grad([y.sum() for y in expected], x)[0]
    for lay in (False, True):
        if lay:
            qkv.lay_side_by_side(group)
        ys = qkv.project(group, x)
        torch.testing.assert_close(ys, tuple(expected))
        torch.testing.assert_close(torch.autograd.grad([y.sum() for y in ys], x)[0], expected_dx)


def trained(group):
    group[1].weight.requires_grad_(True)


def trained_bias(group):
    group[1].bias.requires_grad_(True)


def hooked(group):
    group[0].register_forward_hook(lambda module, args, y: y + 1)


def replaced(group):
    forward = group[0].forward
    group[0].forward = lambda x: forward(x) + 1


def parametrized(group):
    torch.nn.utils.parametrizations.spectral_norm(group[2])


@pytest.mark.parametrize("change", [trained, trained_bias, hooked, replaced, parametrized])
def test_what_is_not_plain_and_frozen_runs_as_modules(change):
    group, x = layers(), torch.randn(2, 3, 24, requires_grad=True)
    qkv.lay_side_by_side(group)
    change(group)
    for layer in group:
        layer.eval()
    ys = qkv.project(group, x)
    assert all(torch.equal(y, layer(x)) for y, layer in zip(ys, group, strict=True))
    parameters = [p for layer in group for p in layer.parameters() if p.requires_grad]
    if parameters:
        grads = torch.autograd.grad([y.sum() for y in ys], parameters)
        assert all(grad.abs().sum() > 0 for grad in grads)


def test_a_hook_on_all_modules_is_called():
    group, x = layers(), torch.randn(2, 3, 24)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        qkv.project(group, x)
    finally:
        handle.remove()
    assert seen == group


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_autocast(weights, inputs):
    group = layers(dtype=weights)
    qkv.lay_side_by_side(group)
    x = torch.randn(2, 3, 24).to(inputs).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = qkv.project(group, x)
        expected = [layer(x) for layer in group]
    (dx,) = torch.autograd.grad([y.float().sum() for y in ys], x)
    (expected_dx,) = torch.autograd.grad([y.float().sum() for y in expected], x)
    for y, e in zip(ys, expected, strict=True):
        assert y.dtype == torch.bfloat16 and torch.equal(y, e)
    assert dx.dtype == inputs
    torch.testing.assert_close(dx, expected_dx, rtol=0.02, atol=0.02)


class TestJoint:
    def test_only_what_lies_side_by_side(self):
        whole = torch.arange(48.0).view(12, 4)
        a, b, c = whole.split(4)
        assert torch.equal(qkv.joint([a, b, c]), whole)
        assert torch.equal(qkv.joint([b, c]), whole[4:])
        for parts in ([b, a, c], [a, c], [a, a], [a, b.clone()], [a, whole.T[:4, 4:8]], [a, None]):
            assert qkv.joint(parts) is None
        assert qkv.joint([a.clone()]) is None
        assert qkv.joint([a[:, :3], b[:, :3]]) is None

    def test_neighbours_in_other_storages_are_no_part(self):
        """Addresses alone prove nothing: the memory has to belong to the first one's storage."""
        whole = torch.arange(48.0)
        a, b = (torch.from_dlpack(part) for part in whole.view(12, 4).split(6))
        assert b.data_ptr() == a.data_ptr() + a.nbytes and qkv.joint([a, b]) is None

    def test_values_are_read_in_every_call(self):
        group, x = layers(bias=False), torch.randn(1, 3, 24)
        qkv.lay_side_by_side(group)
        for change in (
            lambda p: p.data.mul_(2),
            lambda p: p.copy_(torch.randn_like(p)),
            lambda p: torch._foreach_add_([p], 1.0),
            lambda p: setattr(p, "data", torch.randn_like(p)),
        ):
            for layer in group:
                with torch.no_grad():
                    change(layer.weight)
            for y, layer in zip(qkv.project(group, x), group, strict=True):
                torch.testing.assert_close(y, layer(x))


class TestFuseQKV:
    @pytest.fixture
    def model(self):
        model = models.build("sd15")
        a3fta.inject(model, CONFIG, backend="reference")
        models.randomize(model)
        return model

    def groups(self, model):
        for name, module in model.named_modules():
            if isinstance(module, stock.Attention):
                whole = (module.to_q, module.to_k, module.to_v)
                yield whole if name.endswith("attn1") else whole[1:]

    def joined(self, model) -> set[bool]:
        return {one_product(group) for group in self.groups(model)}

    def test_the_same_model(self, model):
        """The bits of these sizes do not depend on the width of a product on the CPU."""
        with torch.no_grad():
            expected = models.run(model, "sd15", masked=True)
            before = models.snapshot(model)
            assert self.joined(model) == {False}
            found = a3fta.fuse_qkv(model)
            assert set(found.values()) == {""} and self.joined(model) == {True}
            state = model.state_dict()
            assert state.keys() == before["state"].keys()
            assert all(torch.equal(state[name], x) for name, x in before["state"].items())
            torch.testing.assert_close(models.run(model, "sd15", masked=True), expected)
            a3fta.fuse_qkv(model)  # again changes nothing
            a3fta.unfuse_qkv(model)
            assert self.joined(model) == {False}
            models.assert_unchanged(model, before)

    def test_kandinsky(self):
        model = models.build("kandinsky")
        a3fta.inject(model, CONFIG, backend="reference")
        with torch.no_grad():
            expected = models.run(model, "kandinsky")
            assert set(a3fta.fuse_qkv(model).values()) == {""}
            torch.testing.assert_close(models.run(model, "kandinsky"), expected)
        layer = next(m for m in model.modules() if isinstance(m, stock.Attention))
        assert one_product((layer.add_k_proj, layer.add_v_proj))

    def test_gradients(self, model):
        grads = []
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            models.run(model, "sd15").square().mean().backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            a3fta.fuse_qkv(model)
        assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 8
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-6)

    def test_eject_leaves_nothing(self, model):
        a3fta.fuse_qkv(model)
        a3fta.eject(model)
        assert self.joined(model) == {False}
        for group in self.groups(model):
            for layer in group:
                assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes

    def test_moves_and_copies_part_them(self, model):
        a3fta.fuse_qkv(model)
        with torch.no_grad():
            expected = models.run(model, "sd15")
            other = copy.deepcopy(model)
            assert self.joined(other) == {False} and self.joined(model) == {True}
            assert torch.equal(models.run(other, "sd15"), expected)
            assert set(a3fta.fuse_qkv(other).values()) == {""} and self.joined(other) == {True}
            model.double()
            assert self.joined(model) == {False}
            found = models.run(model, "sd15", dtype=torch.float64)
            torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-4)

    def test_state_dicts(self, model, tmp_path):
        """Whoever saves: all weights, each once, under their names."""
        expected = {k: v.clone() for k, v in model.state_dict().items()}
        a3fta.fuse_qkv(model)
        PartialState()  # for the log of accelerate
        kept = clean_state_dict_for_safetensors(model.state_dict())
        assert kept.keys() == expected.keys()
        model.save_pretrained(tmp_path)
        (file,) = tmp_path.glob("*.safetensors")
        stream = io.BytesIO()
        torch.save(model.state_dict(), stream)
        stream.seek(0)
        for saved in (kept, load_file(file), torch.load(stream)):
            assert saved.keys() == expected.keys()
            assert all(torch.equal(saved[k], v) for k, v in expected.items())
        doubled = {k: 2 * v for k, v in expected.items()}
        model.load_state_dict(doubled)
        assert self.joined(model) == {True}
        assert all(torch.equal(v, doubled[k]) for k, v in model.state_dict().items())
        model.load_state_dict(expected, assign=True)
        assert self.joined(model) == {False}

    def test_the_memory_lives_as_long_as_one_of_them(self):
        group = layers(out=16)
        values = [layer.weight.clone() for layer in group]
        qkv.lay_side_by_side(group)
        last = group[2].weight
        group.clear()
        gc.collect()
        filler = [torch.full((48 + 16 * i, 24), 7.0) for i in range(8)]
        assert torch.equal(last, values[2]) and filler[0][0, 0] == 7

    def test_attention_that_trains(self, model):
        a3fta.fuse_qkv(model)
        layer = model.mid_block.attentions[0].transformer_blocks[0].attn1
        layer.requires_grad_(True)
        before = [p.detach().clone() for p in layer.parameters()]
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, foreach=True)
        models.run(model, "sd15").square().mean().backward()
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
        layer.requires_grad_(False)
        with torch.no_grad():  # and one product of the new weights again
            assert one_product((layer.to_q, layer.to_k, layer.to_v))
            found = models.run(model, "sd15")
            a3fta.unfuse_qkv(model)
            torch.testing.assert_close(models.run(model, "sd15"), found)

    def test_reasons(self, model):
        blocks = [m for m in model.modules() if isinstance(m, stock.Attention)]
        names = [n for n, m in model.named_modules() if isinstance(m, stock.Attention)]
        blocks[0].to_q.register_forward_pre_hook(lambda *_: None)
        blocks[1].set_processor(stock.AttnProcessor())
        blocks[2].to_v.weight = blocks[2].to_k.weight
        found = [a3fta.fuse_qkv(model)[name] for name in names]
        assert found[0] == "a layer carries hooks"
        assert found[1] == "its processor is of class AttnProcessor"
        assert found[2] == "two layers have one weight"
        assert not any(found[3:])

    def test_diffusers_own_way(self, model):
        with torch.no_grad():
            model.fuse_qkv_projections()
            a3fta.set_attention(model, "sdpa")
            reason = "its processor is of class A3FTAFusedAttnProcessor"
            assert set(a3fta.fuse_qkv(model).values()) == {reason}

    def test_without_adapters(self):
        with pytest.raises(ValueError, match="model: expected a model with adapters"):
            a3fta.fuse_qkv(models.build("sd15"))


def test_functional_transforms_and_forward_mode():
    """The stock model's derivatives of every kind, on the reference."""
    model = models.build("sd15")
    a3fta.inject(model, a3fta.AdapterConfig(rank=4), backend="reference")
    a3fta.set_attention(model, "math")
    text, sample = torch.randn(1, 7, 32), torch.randn(1, 4, 16, 16)

    def loss(x):
        return model(x, 7, text).sample.square().mean()

    expected = torch.autograd.grad(loss(leaf := sample.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(sample), expected)
    tangent = torch.randn_like(sample)
    _, slope = torch.func.jvp(loss, (sample,), (tangent,))
    torch.testing.assert_close(slope.detach(), (expected * tangent).sum())


def test_fusing_in_inference_mode_leaves_a_model_that_trains():
    model = models.build("sd15")
    with torch.inference_mode():
        a3fta.inject(model, a3fta.AdapterConfig(rank=4))
        a3fta.fuse_qkv(model)
    model(**models.inputs("sd15")).sample.sum().backward()
    with torch.inference_mode():
        a3fta.eject(model)
    assert not any(p.is_inference() for p in model.parameters())


def parted_by_peft(model):
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
    return model


def parted_by_a_parameter(model):
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1.to_v
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    return model


def parted_by_saving(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("part", [parted_by_peft, parted_by_a_parameter, parted_by_saving])
def test_what_parts_the_layers_leaves_no_memory_behind(part):
    model = models.build("sd15")
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    a3fta.fuse_qkv(model)
    model = part(model)
    a3fta.unfuse_qkv(model)
    attention = [m for name, m in model.named_modules() if name.endswith(("attn1", "attn2"))]
    weights = [p for m in attention for p in m.parameters()]
    assert weights and all(p.untyped_storage().nbytes() == p.nbytes for p in weights)


def test_a_weight_that_is_no_parameter():
    model = models.build("sd15")
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    before = model(**models.inputs("sd15")).sample
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.weight = weight
    assert torch.equal(model(**models.inputs("sd15")).sample, before)
