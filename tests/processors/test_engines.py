"""The attention engines: each by name, what it refuses, and that nothing is copied on the way."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor as stock
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

import a3fta_kernels as a3fta
from a3fta_kernels.backends import BackendUnavailableError
from a3fta_kernels.processors import A3FTAAttnProcessor, engines

from .. import models
from .test_unet import arguments, attention, xformers  # noqa: F401

CONFIG = a3fta.AdapterConfig(rank=4)
KERNELS = ("flash", "cudnn", "efficient")


@pytest.fixture
def flash3(monkeypatch):
    """A stand-in with the signature and the demands of FlashAttention 3's `flash_attn_func`."""
    calls = []

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, **options):
        assert not causal and not options
        assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
        assert q.ndim == 4 and k.shape == v.shape and q.shape[2:] == k.shape[2:]
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        calls.append(q.shape)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)

    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_func = flash_attn_func
    package.calls = calls
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    return package


def runs(engine: str, device: torch.device) -> bool:
    return device.type in a3fta.backends()[engine].devices


def run(layer: nn.Module, engine: str, inputs: dict[str, Any]) -> torch.Tensor:
    layer.set_processor(A3FTAAttnProcessor(engine))
    with torch.no_grad():
        return layer(**inputs)


def half_inputs(device: torch.device, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    return {k: v.to(device, dtype) for k, v in arguments(**options).items()}


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("engine", KERNELS)
def test_a_kernel_of_pytorch_by_name(engine, text, device):
    if not runs(engine, device):
        pytest.skip(f"{engine} on {device}: {a3fta.backends()[engine].reason}")
    layer = attention(cross_attention_dim=24 if text else None).to(device, torch.bfloat16)
    inputs = half_inputs(device, torch.bfloat16, text=text)
    expected = run(layer, "math", inputs)
    torch.testing.assert_close(run(layer, engine, inputs), expected, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:.*attention kernel not used")
@pytest.mark.parametrize("engine", KERNELS)
def test_a_kernel_that_cannot_run_says_why(engine, device):
    layer = attention().to(device)  # in float32 only "efficient" runs, and on the GPU alone
    inputs = half_inputs(device, torch.float32, mask=True)
    inputs["attention_mask"].requires_grad_()  # of which PyTorch's CPU kernel knows nothing
    if engine == "efficient" and device.type == "cuda":
        pytest.skip("it runs this call")
    layer.set_processor(A3FTAAttnProcessor(engine))
    with pytest.raises(BackendUnavailableError, match=rf"attention '{engine}': .+ query \(2, 4, 1"):
        layer(**inputs)
    assert torch.backends.cuda.math_sdp_enabled()


def test_an_error_of_the_call_stays_what_it_is():
    layer = attention()
    query = torch.randn(2, 16, 32)
    with pytest.raises(RuntimeError, match="same dtype") as error:
        engines.sdpa_by("flash", layer, query, query.double(), query, None)
    assert not isinstance(error.value, BackendUnavailableError)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_flash3(text, old, flash3, monkeypatch):
    if old:
        current = flash3.flash_attn_func
        monkeypatch.setattr(flash3, "flash_attn_func", lambda *a: (current(*a), None))
    layer = attention(cross_attention_dim=24 if text else None, qk_norm="layer_norm").bfloat16()
    inputs = half_inputs(torch.device("cpu"), torch.bfloat16, text=text)
    assert torch.equal(run(layer, "flash3", inputs), run(layer, "sdpa", inputs))
    assert flash3.calls == [(2, 16, 4, 8)]


def test_flash3_refuses_what_it_cannot_do(flash3):
    layer = attention()
    with pytest.raises(BackendUnavailableError, match=r"'flash3': it computes in .* torch.float32"):
        run(layer, "flash3", arguments())
    with pytest.raises(BackendUnavailableError, match="'flash3': it takes no mask"):
        run(layer, "flash3", arguments(mask=True))
    assert not flash3.calls


def test_missing_flash3_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(BackendUnavailableError, match="attention 'flash3'") as error:
        A3FTAAttnProcessor("flash3")
    assert a3fta.backends()["flash3"].reason in str(error.value)


class TestAuto:
    @pytest.fixture
    def orders(self, monkeypatch):
        """The kernels that `auto` asks for, in order."""
        seen, original = [], engines.sdpa_kernel

        def spy(kernels, **options):
            seen.append((kernels, options))
            return original(kernels, **options)

        monkeypatch.setattr(engines, "sdpa_kernel", spy)
        return seen

    def test_without_a_measurement_it_is_sdpa(self, orders):
        layer, inputs = attention(), arguments(mask=True)
        assert torch.equal(run(layer, "auto", inputs), run(layer, "sdpa", inputs))
        assert not orders

    def test_a_measured_kernel_is_asked_first(self, orders, monkeypatch):
        monkeypatch.setitem(engines.MEASURED, ("cpu", 8), "flash")
        monkeypatch.setitem(engines.MEASURED, ("cpu", 16), "cudnn")
        layer, inputs = attention(), arguments(mask=True)
        expected = run(layer, "sdpa", inputs)
        assert torch.equal(run(layer, "auto", inputs), expected)
        (kernels, options), *others = orders
        assert kernels[0] == SDPBackend.FLASH_ATTENTION and SDPBackend.MATH in kernels
        assert options == {"set_priority": True} and not others

    def test_a_kernel_that_the_user_turned_off_stays_off(self, orders, monkeypatch):
        monkeypatch.setitem(engines.MEASURED, ("cpu", 8), "flash")
        torch.backends.cuda.enable_flash_sdp(False)
        try:
            run(attention(), "auto", arguments())
        finally:
            torch.backends.cuda.enable_flash_sdp(True)
        assert SDPBackend.FLASH_ATTENTION not in orders[0][0]

    def test_every_entry_names_a_kernel(self):
        assert set(engines.MEASURED.values()) <= set(KERNELS)


class TestSetAttention:
    @pytest.fixture
    def model(self):
        model = models.build("sd15")
        a3fta.inject(model, CONFIG, backend="reference")
        models.randomize(model)
        return model

    def engines(self, model):
        return {
            getattr(p, "attention", type(p)) for p in models.attention_processors(model).values()
        }

    def test_the_report_names_the_engine(self):
        model = models.build("sd15")
        report = a3fta.inject(model, CONFIG)
        count = len(models.attention_processors(model))
        assert set(report.attention) == set(models.attention_processors(model))
        assert set(report.attention.values()) == {"auto"}
        assert f"{count} x attention by auto" in str(report)
        found = a3fta.set_attention(model, "math")
        assert set(found) == set(report.attention) and set(found.values()) == {"math"}

    def test_it_computes_the_same(self, model):
        expected = models.run(model, "sd15")
        for engine in ("math", "flash", "auto", "sdpa"):
            a3fta.set_attention(model, engine)
            assert self.engines(model) == {engine}
            torch.testing.assert_close(models.run(model, "sd15"), expected, rtol=1e-4, atol=1e-4)

    def test_after_others_replaced_the_processors(self, model, xformers):  # noqa: F811
        for replace in (
            lambda: model.set_attn_processor(stock.XFormersAttnProcessor()),
            lambda: model.set_attention_slice("max"),
            lambda: model.set_attn_processor(stock.AttnProcessor()),
        ):
            replace()
            a3fta.set_attention(model, "flash")
            assert self.engines(model) == {"flash"}

    def test_eject_brings_back_what_was_there(self):
        model = models.build("sd15")
        model.set_attn_processor(stock.AttnProcessor())
        before = models.snapshot(model)
        a3fta.inject(model, CONFIG)
        a3fta.set_attention(model, "sdpa")
        model.set_attn_processor(stock.SlicedAttnProcessor(1))
        a3fta.set_attention(model, "flash")
        a3fta.eject(model)
        models.assert_unchanged(model, before)

    def test_a_processor_that_was_not_known_stays_until_it_is(self):
        class Own(stock.AttnProcessor2_0):
            pass

        model = models.build("sd15")
        model.set_attn_processor(Own())
        report = a3fta.inject(model, CONFIG)
        assert set(report.attention.values()) == {"Own"}
        assert set(a3fta.set_attention(model, "sdpa").values()) == {"Own"}
        known = stock.AttnProcessor2_0()
        model.set_attn_processor(known)
        assert set(a3fta.set_attention(model, "sdpa").values()) == {"sdpa"}
        a3fta.eject(model)
        assert set(models.attention_processors(model).values()) == {known}

    def test_layers_without_an_adapter_are_left_alone(self):
        model = models.build("sd15")
        stocks = models.attention_processors(model)
        a3fta.inject(model, a3fta.AdapterConfig(rank=4, targets=("attn1",)))
        found = a3fta.set_attention(model, "math")
        assert found and all(name.endswith("attn1") for name in found)
        for name, processor in models.attention_processors(model).items():
            assert name in found or processor is stocks[name]

    @pytest.mark.parametrize(
        ("engine", "error", "says"),
        [
            ("fastest", ValueError, "engine: expected one of auto, sdpa"),
            ("sliced", ValueError, "engine: expected one of auto, sdpa"),
            ("efficient", BackendUnavailableError, "attention 'efficient' on cpu: no GPU"),
            ("flash3", BackendUnavailableError, "attention 'flash3': "),
        ],
    )
    def test_refusals_change_nothing(self, engine, error, says, model):
        if engine == "efficient" and torch.cuda.is_available():
            says = "attention 'efficient' on cpu: "
        with pytest.raises(error, match=says):
            a3fta.set_attention(model, engine)
        assert self.engines(model) == {"auto"}

    def test_a_model_without_adapters(self):
        with pytest.raises(ValueError, match="model: expected a model with adapters"):
            a3fta.set_attention(models.build("sd15"), "sdpa")


class Recorder(TorchDispatchMode):
    """Every operator of one thread, with the storages of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[int], list[int]]] = []

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, (tuple, list)) else (out,)
        self.calls.append((str(func), self.storages(args), self.storages(found)))
        return out

    def storages(self, values) -> list[int]:
        return [v.untyped_storage().data_ptr() for v in values if isinstance(v, torch.Tensor)]

    def find(self, part: str) -> int:
        (at,) = [i for i, call in enumerate(self.calls) if part in call[0]]
        return at


# what moves bytes without computing
COPIES = ("clone", "copy", "contiguous", "cat", "fill", "zero")
FORWARD = ("_scaled_dot_product", "a3fta.adapter_linear.")
BACKWARD = ("a3fta.adapter_linear_backward", "_backward.default")


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(
    "engine", ["auto", "sdpa", "flash", "cudnn", "efficient", "flash3", "xformers"]
)
def test_no_copy_between_attention_and_adapter(
    engine,
    text,
    device,
    flash3,
    xformers,  # noqa: F811
):
    """h goes from the attention into the op, and dh back, in the memory they were written to."""
    if engine in KERNELS and not runs(engine, device):
        pytest.skip(f"{engine} on {device}: {a3fta.backends()[engine].reason}")
    layer = attention(cross_attention_dim=24 if text else None).to(device, torch.bfloat16)
    holder = nn.ModuleDict({"attn": layer})
    a3fta.inject(holder, CONFIG, backend="native")
    models.randomize(holder, std=0.3)
    layer.set_processor(A3FTAAttnProcessor(engine))
    inputs = half_inputs(device, torch.bfloat16, text=text)
    inputs["hidden_states"].requires_grad_()
    with Recorder() as forward:
        y = layer(**inputs)
    with Recorder() as backward:
        y.backward(torch.randn_like(y))
    assert inputs["hidden_states"].grad.isfinite().all()

    start, end = (forward.find(part) for part in FORWARD)
    between = [name for name, _, _ in forward.calls[start + 1 : end]]
    assert not [name for name in between if any(c in name for c in COPIES)], between
    h, made = forward.calls[end][1][0], forward.calls[start][2]
    assert h == made[0]

    start = backward.find("a3fta.adapter_linear_backward")
    end = backward.find("_scaled_dot_product")
    between = [name for name, _, _ in backward.calls[start + 1 : end]]
    assert not [name for name in between if any(c in name for c in COPIES)], between
    dh, taken = backward.calls[start][2][0], backward.calls[end][1]
    assert dh == taken[0]


def test_the_copies_that_math_makes_are_found():
    """The test above can fail: heads that move into the batch do so by copies."""
    layer = attention()
    x = torch.randn(2, 16, 32)
    with Recorder() as forward:
        engines.math(layer, x, x, x, None)
    names = [name for name, _, _ in forward.calls]
    assert sum("clone" in name for name in names) == 4, names


def test_a_processor_of_the_user_is_not_changed():
    """diffusers shares one instance over all layers; those without an adapter keep it as it is."""
    model = models.build("sd15")
    own = A3FTAAttnProcessor("math")
    model.set_attn_processor(own)
    a3fta.inject(model, a3fta.AdapterConfig(rank=4, targets="mid_block"))
    chosen = a3fta.set_attention(model, "flash")
    assert own.attention == "math" and set(chosen.values()) == {"flash"}
    assert own in model.attn_processors.values()
    a3fta.eject(model)
    assert all(processor is own for processor in model.attn_processors.values())
