"""Mutated adapter files: each loads identically, or is refused with the model untouched."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import a3fta_kernels as a3fta
from a3fta_kernels.adapter_file import CONFIG_NAME, WEIGHTS_NAME

from . import models
from .adapter_files import snapshot

FILES = int(os.environ.get("A3FTA_FUZZ_FILES", "500"))
BATCHES = 10

Mutation = Callable[[random.Random, bytearray], None]
_JSON_BYTES = b'{}[]":,.-+0123456789eEuntfrl\\ \n\t'


def flip_bit(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_bits(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.randrange(2, 20)):
        flip_bit(rng, data)


def flip_bit_of_the_text(rng: random.Random, data: bytearray) -> None:
    """In the header, or early in the config: where most of the meaning is."""
    data[rng.randrange(min(len(data), text_end(data)))] ^= 1 << rng.randrange(8)


def truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def append(rng: random.Random, data: bytearray) -> None:
    data += rng.randbytes(rng.randrange(1, 64))


def edit_text(rng: random.Random, data: bytearray) -> None:
    """A character that means something in JSON, put in, over or out."""
    place = rng.randrange(text_end(data))
    char = rng.choice(_JSON_BYTES)
    kind = rng.randrange(3)
    data[place : place + (kind > 0)] = b"" if kind == 2 else bytes([char])


def edit_header_in_length(rng: random.Random, data: bytearray) -> None:
    """As `edit_text`, the length prefix put right, so that the edit itself is judged."""
    length = int.from_bytes(data[:8], "little")
    before = len(data)
    edit_text(rng, data)
    data[:8] = max(0, length + len(data) - before).to_bytes(8, "little")


def length_prefix(rng: random.Random, data: bytearray) -> None:
    length = int.from_bytes(data[:8], "little")
    values = [0, 1, 2, 7, length - 8, length - 1, length + 1, length + 8, len(data) - 8,
              len(data), 2**31, 2**63 - 1, 2**63, 2**64 - 1, rng.randrange(2**64)]  # fmt: skip
    data[:8] = rng.choice(values).to_bytes(8, "little")


def duplicate_key(rng: random.Random, data: bytearray) -> None:
    """A key that is there already, in front of the object, with another value."""
    start = data.index(b"{") + 1
    end = text_end(data)
    quotes = [i for i in range(start, end) if data[i : i + 1] == b'"']
    first = rng.choice(quotes[::2])
    key = bytes(data[first : data.index(b'"', first + 1) + 1])
    value = rng.choice([b"1", b'"F32"', b"null", b"{}", b'{"a":[0,4]}'])
    insert(data, start, key + b":" + value + b",")


def add_key(rng: random.Random, data: bytearray) -> None:
    name = f"key{rng.randrange(1000)}".encode()
    value = rng.choice(
        [b"1", b'"x"', b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}', b"[[[]]]"]
    )
    insert(data, data.index(b"{") + 1, b'"' + name + b'":' + value + b",")


def white_space(rng: random.Random, data: bytearray) -> None:
    """Means nothing between tokens, and the file may load."""
    insert(data, data.index(b"{") + 1, rng.choice([b" ", b"\n", b"        ", b"\t"]))


def move_block(rng: random.Random, data: bytearray) -> None:
    size = rng.randrange(1, 200)
    source, target = (rng.randrange(len(data)) for _ in range(2))
    block = data[source : source + size]
    data[target : target + len(block)] = block


def swap_words(rng: random.Random, data: bytearray) -> None:
    """Names, dtypes or numbers of the same length change places."""
    end = text_end(data)
    size = rng.choice([1, 2, 3, 6])
    a, b = (rng.randrange(8, max(9, end - size)) for _ in range(2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def zeros(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.randrange(1, 5000))
    data[start:stop] = bytes(stop - start)


MUTATIONS: dict[str, list[Mutation]] = {
    WEIGHTS_NAME: [
        flip_bit, flip_bits, flip_bit_of_the_text, truncate, append, edit_text,
        edit_header_in_length, length_prefix, duplicate_key, add_key, white_space, move_block,
        swap_words, zeros,
    ],
    CONFIG_NAME: [
        flip_bit, flip_bits, flip_bit_of_the_text, truncate, append, edit_text, duplicate_key,
        add_key, white_space, move_block, swap_words, zeros,
    ],
}  # fmt: skip


def text_end(data: bytearray) -> int:
    """Where the JSON of either file ends."""
    if data[:1] == b"{":
        return len(data)
    return min(len(data), 8 + int.from_bytes(data[:8], "little"))


def insert(data: bytearray, place: int, text: bytes) -> None:
    data[place:place] = text
    if data[:1] != b"{":
        length = int.from_bytes(data[:8], "little") + len(text)
        data[:8] = length.to_bytes(8, "little")


def tiny() -> nn.Module:
    """A U-Net of one attention layer: 20000 loads end in minutes."""
    return models.build(
        "unet2d",
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )


def adapted(seed: int) -> nn.Module:
    model = tiny()
    a3fta.inject(model, a3fta.AdapterConfig(rank=2, rank_pattern={"mid": 3, "to_out": 1}))
    models.randomize(model, seed=seed)
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters." in n}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a3fta.save_adapter(adapted(seed=2), tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("batch", range(BATCHES))
def test_mutated_files(batch: int, good: Path, tmp_path: Path):
    rng = random.Random(batch)
    expected = values(adapted(seed=2))
    stock, other = tiny(), adapted(seed=3)
    own = values(other)
    untouched = {id(model): snapshot(model) for model in (stock, other)}
    counts = {"loaded": 0, "refused": 0}
    folder = tmp_path / "adapter"
    for number in range(-(-FILES // BATCHES)):
        shutil.copytree(good, folder, dirs_exist_ok=True)
        name = rng.choice([WEIGHTS_NAME, WEIGHTS_NAME, CONFIG_NAME])
        mutation = rng.choice(MUTATIONS[name])
        data = bytearray((folder / name).read_bytes())
        mutation(rng, data)
        (folder / name).write_bytes(data)
        case = f"batch {batch}, file {number}: {mutation.__name__} on {name}"
        model = rng.choice([stock, other])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a twin of other weights warns
                a3fta.load_adapter(model, folder)
        except a3fta.AdapterFileError:
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
        else:
            counts["loaded"] += 1
            found = values(model)
            assert found.keys() == expected.keys(), case
            assert all(torch.equal(found[key], expected[key]) for key in expected), case
            if model is stock:
                a3fta.eject(stock)
            else:
                with torch.no_grad():
                    for key, value in own.items():
                        other.get_parameter(key).copy_(value)
        assert snapshot(model) == untouched[id(model)], case
    assert counts["refused"] > 0.5 * sum(counts.values()), counts


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_changes_the_file(name: str, good: Path):
    for mutation in MUTATIONS[name]:
        rng = random.Random(1)
        original = (good / name).read_bytes()
        changed = 0
        for _ in range(20):
            data = bytearray(original)
            mutation(rng, data)
            changed += bytes(data) != original
        assert changed >= 10, mutation.__name__


def test_every_single_bit_of_the_settings_counts(good: Path, tmp_path: Path):
    """All bits of the metadata's version, config and checksum, one by one."""
    original = (good / WEIGHTS_NAME).read_bytes()
    model = tiny()
    before = snapshot(model)
    (tmp_path / CONFIG_NAME).write_bytes((good / CONFIG_NAME).read_bytes())
    keys = (b'"a3fta_format"', b'"sha256"', b'"config"')
    starts = [original.index(key) for key in keys]
    for place in (place for start in starts for place in range(start, start + 50)):
        data = bytearray(original)
        data[place] ^= 1 << (place % 8)
        (tmp_path / WEIGHTS_NAME).write_bytes(data)
        with pytest.raises(a3fta.AdapterFileError):
            a3fta.load_adapter(model, tmp_path)
    assert snapshot(model) == before
