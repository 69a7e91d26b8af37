"""Layers of 4 bits as memory is counted: bitsandbytes' bytes, without bitsandbytes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import a3fta_kernels as a3fta
from a3fta_kernels import cli
from a3fta_kernels.memory import peak
from a3fta_kernels.memory.packed import PackedLinear, pack
from a3fta_kernels.memory.plan import Job, make_plan, run

from .. import models


@pytest.mark.parametrize(("outputs", "inputs"), [(640, 320), (4096, 4096)])
def test_a_layer_holds_what_bitsandbytes_holds(outputs, inputs):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(outputs, inputs)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    theirs = [packed, state.absmax, state.state2.absmax]
    layer = PackedLinear(nn.Linear(inputs, outputs))
    ours = [layer.weight, layer.scales, layer.scales_of_scales]
    assert [x.nbytes for x in ours] == [x.nbytes for x in theirs]


@pytest.mark.parametrize("level", ["stock", "block"])
def test_a_step_keeps_and_takes_what_bitsandbytes_makes_it(level):
    """Their step on the CPU, counted on real tensors; W is unpacked inside of their operators."""
    pytest.importorskip("bitsandbytes")
    from a3fta_kernels.train import packing

    found = []
    for how in (lambda model: packing.pack(model, "nf4", torch.device("cpu")),
                lambda model: pack(model, "nf4")):  # fmt: skip
        model = models.build("sd15").requires_grad_(False)
        how(model)
        a3fta.inject(model, a3fta.AdapterConfig(rank=4, placement="parallel"), backend="reference")
        a3fta.lean(model.train(), "off" if level == "stock" else level)
        found.append(peak.measure(model, (), models.inputs("sd15")))
    theirs, ours = found
    assert ours.after_forward == theirs.after_forward
    assert ours.gradients == theirs.gradients and ours.trainable == theirs.trainable
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    largest = max(4 * m.in_features * m.out_features for m in layers)
    assert theirs.bytes <= ours.bytes <= theirs.bytes + largest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    models.build(
        "sd15", block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
    ).save_config(path)  # fmt: skip
    return str(path)


@pytest.mark.parametrize("method", ["a3fta", "parallel", "lora", "lora-fp32"])
def test_a_packed_trunk_is_smaller_and_trains_as_much(folder, method):
    job = Job(folder, 64, method, 4, "stock", "fp32", 1)
    whole, packed = run(job), run(replace(job, quantize="nf4"))
    linear = sum(m.weight.numel() for m in models_of(folder).modules() if isinstance(m, nn.Linear))
    # 4 bits, 8 of every 64 and 32 of every 64 x 256, each layer's rounded up
    held = linear * (1 / 2 + 1 / 64 + 4 / 64 / 256)
    assert whole.parameters - packed.parameters == pytest.approx(4 * linear - held, rel=1e-3)
    assert packed.trainable == whole.trainable and packed.gradients == whole.gradients


def models_of(folder: str) -> nn.Module:
    from a3fta_kernels.memory.models import build

    return build(folder, torch.float32)


def test_the_plan_has_a_packed_trunk(folder, capsys):
    options = ["--model", folder, "--rank", "4", "--workers", "1", "--memory", "800MiB"]
    one = ["--allowance", "700MiB", "--precision", "bf16", "--level", "stock", "--resolution", "64"]
    found = {}
    for quantize in ("no", "nf4"):
        assert cli.main(["plan", *options, *one, "--quantize", quantize, "--json"]) == 0
        found[quantize] = json.loads(capsys.readouterr().out)
        assert found[quantize]["quantize"] == quantize
    assert found["nf4"]["rows"][0]["weights"] < found["no"]["rows"][0]["weights"]
    assert cli.main(["plan", *options, *one, "--quantize", "nf4"]) == 0
    assert "linear layers in nf4" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["plan", *options, *one, "--quantize", "nf4", "--method", "full"]) == 1
    assert "quantize: expected no beside method full" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"quantize: expected one of .*got 'int3'"):
        make_plan(folder, 1 << 30, quantize="int3")
