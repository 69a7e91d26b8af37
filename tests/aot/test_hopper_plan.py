"""How the Hopper products are cut into tiles, without a GPU: csrc/cuda/hopper_plan.h on the host.

The numbers are predictions of the plan's own cost model for an H100 or H200 (132 multiprocessors).
"""

from __future__ import annotations

import json
import subprocess

import pytest

from ..cuda_emulator.build import COMPILER, HERE

pytestmark = [
    pytest.mark.xdist_group("plan"),
    pytest.mark.skipif(COMPILER is None, reason="g++ not found: no plan to look at"),
]
MULTIPROCESSORS = 132

# rows, channels in, columns out, of design.md's workloads, self-attention layers; for each the
# tile width of fused (R = 16 and 64), concat and dgrad; dgrad's output is as wide as channels in
WORKLOADS = {
    "sd15-320": (16384, 320, 320, 160, 160, 160),
    "sd15-640": (4096, 640, 640, 160, 160, 160),
    "sd15-1280": (1024, 1280, 1280, 128, 128, 128),
    "sd15-mid": (256, 1280, 1280, 128, 128, 128),
    "sdxl-640": (16384, 640, 640, 160, 256, 256),
    "sdxl-1280": (4096, 1280, 1280, 160, 160, 160),
    "sd3-image": (16384, 1536, 1536, 192, 256, 256),
    "sd3-text": (1332, 1536, 1536, 128, 128, 128),
    "flux-dual": (4096, 3072, 3072, 192, 256, 256),
    "flux-text": (512, 3072, 3072, 128, 128, 128),
    "flux-single": (4608, 15360, 3072, 192, 256, 256),
    "pixart": (16384, 1152, 1152, 192, 256, 256),
}
# extra matrix instructions of the fused forward, R padded over the tile's width
WASTE = {(128, 16): 0.125, (128, 64): 0.5, (160, 16): 0.1, (160, 64): 0.4, (192, 16): 1 / 12,
         (192, 64): 1 / 3}  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    target = tmp_path_factory.mktemp("plan") / "hopper_plan"
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-Wall", "-Werror", "-fsanitize=undefined",
         "-fno-sanitize-recover=all", str(HERE / "hopper_plan.cpp"), "-o", str(target)],
        check=True,
    )  # fmt: skip
    return target


@pytest.fixture
def plan(program):
    def run(use, m, n, depth, rank, columns=None, multiprocessors=MULTIPROCESSORS, *last):
        start, length = columns or (0, n)
        numbers = (m, n, depth, rank, start, length, multiprocessors)
        done = subprocess.run(
            [str(program), use, *map(str, numbers), *last], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("rank", [16, 64])
def test_workloads(name, rank, plan):
    m, k, n, fused, concat, dgrad = WORKLOADS[name]
    found = plan("fused", m, n, k, rank, (0, n))
    assert found["block_n"] == fused
    assert found["rank_padded"] / fused == pytest.approx(WASTE[fused, rank])
    found = plan("concat", m, n, k, rank)
    assert found["block_n"] == concat and found["rank_padded"] == 0
    assert plan("dgrad", m, k, n, rank, (0, min(k, 3072)))["block_n"] == dgrad


def test_idle_multiprocessors(plan):
    """SDXL's main layer fills two rounds but for 8 tiles; tiles of 128 columns would need three."""
    found = plan("concat", 4096, 1280, 1280, 16)
    assert found["tiles_m"] * found["tiles_n"] == 256 and found["blocks"] == MULTIPROCESSORS


@pytest.mark.parametrize("use", ["fused", "concat", "dgrad"])
@pytest.mark.parametrize("m", [1, 127, 128, 129, 5000])
@pytest.mark.parametrize("n", [8, 136, 1280, 4104])
@pytest.mark.parametrize("multiprocessors", [1, 7, 132])
def test_every_element_has_one_owner(use, m, n, multiprocessors, plan):
    """The program visits all tiles and fails where one is left out or taken twice."""
    plan(use, m, n, 200, 24, None, multiprocessors)
    if use == "dgrad" and n > 128:
        for columns in ((0, 72), (72, n - 72), (64, 64), (8, n - 24)):
            plan(use, m, n, 200, 24, columns, multiprocessors)


@pytest.mark.parametrize(
    "rank, padded", [(8, 16), (16, 16), (24, 32), (32, 32), (40, 64), (64, 64)]
)
def test_padded_rank(rank, padded, plan):
    assert plan("fused", 4096, 1280, 1280, rank)["rank_padded"] == padded


@pytest.mark.parametrize("k", [320, 3072])
def test_rows_beyond_32_bits_of_elements(k, plan):
    """h of more than 2^31 elements: coordinates count rows and columns, so they stay small."""
    m = 2**31 // k + 1
    found = plan("concat", m, k, k, 16, None, MULTIPROCESSORS, "last")
    assert found["row0"] == (m - 1) // 128 * 128 and found["tiles_m"] == -(-m // 128)


def test_the_most_rows(plan):
    """What hopper_takes lets through: the coordinates of the last tile end below 2^31."""
    m = 2**31 - 1 - 256
    found = plan("concat", m, 3072, 64, 8, None, MULTIPROCESSORS, "last")
    assert found["row0"] + 128 <= 2**31 - 1 and found["tiles_m"] * found["tiles_n"] > 2**27
