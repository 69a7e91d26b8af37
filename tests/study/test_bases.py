from __future__ import annotations

import pytest
import torch

from a3fta_kernels.study import bases
from a3fta_kernels.train.errors import TrainingError
from tests.study import tiny

UNET = bases.architecture(8, (8,), None) | {"attention_head_dim": 4, "norm_num_groups": 2}


def batch(generator):
    x, y = tiny.images()
    index = torch.randint(len(x), (8,), generator=generator)
    return x[index], y[index]


def test_pretraining_lowers_the_loss_and_follows_the_seed(capsys, tmp_path, device):
    def train(steps):
        return bases.pretrain(
            UNET, bases.SCHEDULE, batch, steps, 5e-3, seed=0, log_every=20, device=str(device)
        )

    one = train(40)
    first, last = (
        float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if "loss" in line
    )
    assert last < 0.9 * first
    assert not any(p.requires_grad for p in one.parameters())
    path = tmp_path / "made" / "base.safetensors"
    bases.save(one, path, UNET, bases.SCHEDULE, {"steps": 40})
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    found = bases.load(path).pipeline()
    assert found.unet.config.down_block_types == ["AttnDownBlock2D"]
    assert found.scheduler.config.prediction_type == "v_prediction"
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 800])
    with torch.no_grad():
        same = found.unet.eval()(x, t).sample
        assert torch.allclose(same, one.cpu().eval()(x, t).sample, atol=5e-3)  # of 16 bits
        assert not torch.allclose(same, tiny.pipeline().unet(x, t, torch.tensor([0, 0])).sample)


def test_what_is_no_base_is_told(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "cut").write_bytes(b"\x09")
    with pytest.raises(TrainingError, match=r"cut is damaged: .*remove it to make it anew"):
        bases.load(tmp_path / "cut")
    save_file({"a": torch.zeros(1)}, str(tmp_path / "other"))
    with pytest.raises(TrainingError, match="other is no base"):
        bases.load(tmp_path / "other")
