from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.ft2font import FT2Font

from a3fta_kernels.study.glyphs import SCRIPTS, Frame, Script, batch, render, soften, vary

SMALL = Frame(8, 2, 48, 32)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_font_has_every_character(name):
    script, folder = SCRIPTS[name], Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    assert len(set(script.characters)) == len(script.characters)
    for font in script.fonts:
        known = FT2Font(str(folder / font)).get_charmap()
        missing = [c for c in script.characters if ord(c) not in known]
        assert not missing, (font, missing)


def test_targets_share_no_letter_with_the_source():
    for name, script in SCRIPTS.items():
        if name != "latin":
            assert not set(script.characters) & set(SCRIPTS["latin"].characters), name


def test_glyphs_fill_the_frame_by_their_longer_side():
    images, labels = render(Script("Wl", SCRIPTS["latin"].fonts[:3]), SMALL)
    assert images.shape == (6, 1, 48, 48) and labels.tolist() == [0, 1] * 3
    margin = (SMALL.canvas - SMALL.height) // 2
    for image in images[:, 0]:
        rows, columns = (image > 0.2).any(1), (image > 0.2).any(0)
        assert not rows[:margin].any() and not columns[:margin].any()
        assert max(rows.sum(), columns.sum()) >= SMALL.height - 2


def test_variations_differ_and_follow_the_seed():
    drawn, labels = render(Script("ab", SCRIPTS["latin"].fonts[:2]), SMALL)
    images = soften(drawn, SMALL)
    # ink spreads, and none is lost
    assert images.sum() == pytest.approx(drawn.sum().item(), rel=1e-4)
    assert (images > 0).sum() > (drawn > 0).sum()

    def draw(seed):
        return batch(images, labels, 12, SMALL, torch.Generator().manual_seed(seed))

    x, y = draw(0)
    assert x.shape == (12, 1, 8, 8) and set(y.tolist()) == {0, 1}
    assert torch.equal(x, draw(0)[0]) and not torch.equal(x, draw(1)[0])
    levels = (x + 1) * 2
    assert torch.equal(levels, levels.round()) and levels.max() == 4
    same = vary(images[:1].repeat(5, 1, 1, 1), SMALL, torch.Generator().manual_seed(2))
    assert len({v.numpy().tobytes() for v in same}) == 5
