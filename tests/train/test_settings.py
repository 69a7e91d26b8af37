"""Settings: fields, flags and YAML are one table."""

from __future__ import annotations

import argparse
import dataclasses
import math

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from a3fta_kernels.cli import build_parser
from a3fta_kernels.train.settings import Settings, add_arguments, given, read_yaml

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
PATHS = {"model": "m", "data": "d"}


def make(**changes):
    return Settings(**(PATHS | changes))


def parsed(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return given(parser.parse_args(argv))


def other(name):
    """A value of the field that is not its default, and the flags that say it."""
    field, flag = FIELDS[name], f"--{name.replace('_', '-')}"
    if field.metadata["choices"]:
        rest = [c for c in field.metadata["choices"] if c not in (field.default, "auto")]
        return rest[0], [flag, rest[0]]
    if isinstance(field.default, bool):
        return not field.default, [flag if not field.default else f"--no-{flag[2:]}"]
    if field.default == ():
        value = ("a=1", "b=2") if name == "rank_pattern" else ("a", "b")
        return value, [flag, *value]
    if isinstance(field.default, str):
        return "x", [flag, "x"]
    value = 0.5 if "float" in field.type else 9
    return value, [flag, str(value)]


# what is only allowed beside something else
BESIDE = {
    "budget": {"lean": "auto"},
    "prior_prompt": {"prior_weight": 1.0},
    "prior_data": {"prior_weight": 1.0},
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_flag_and_a_name_in_yaml(name, tmp_path):
    value, flags = other(name)
    assert value != FIELDS[name].default
    assert parsed(*flags) == {name: list(value) if isinstance(value, tuple) else value}
    wanted = make(**BESIDE.get(name, {}) | {name: value})
    by_flag = Settings.from_dict(PATHS | BESIDE.get(name, {}) | parsed(*flags))
    assert by_flag == wanted
    path = tmp_path / "settings.yaml"
    path.write_text(wanted.to_yaml(), encoding="utf-8")
    assert Settings.from_dict(read_yaml(path)) == wanted
    assert f"\n{name}: " in f"\n{wanted.to_yaml()}".replace(f"\n{name}:\n", f"\n{name}: \n")


@pytest.mark.parametrize(
    ("options", "placement"),
    [
        ({}, "parallel"),
        ({"activation": "identity"}, "pre"),
        ({"activation": "identity", "placement": "parallel"}, "parallel"),
        ({"placement": "pre"}, "pre"),
    ],
    ids=str,
)
def test_where_the_adapter_is(options, placement):
    assert Settings(model="m", data="d", **options).adapter().placement == placement


def test_flags_that_are_not_given_are_not_there():
    assert parsed() == {}
    assert parsed("--no-flip", "--flip") == {"flip": True}
    assert parsed("--flip", "--no-flip") == {"flip": False}


def test_help_says_the_defaults():
    text = " ".join(build_parser().format_help().split())
    assert "finetune" in text
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    told = " ".join(parser.format_help().split())
    for name, field in FIELDS.items():
        assert f"--{name.replace('_', '-')}" in told
        assert field.metadata["help"].split()[0] in told
    assert "width of the bottleneck (64)" in told and "SUPPRESS" not in told


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"steps": 2.5}, TypeError, "steps: expected an integer, got 2.5"),
        ({"steps": "9"}, TypeError, "steps: expected an integer, got '9'"),
        ({"steps": True}, TypeError, "steps: expected an integer, got True"),
        ({"steps": None}, TypeError, "steps: expected an integer, got None"),
        ({"ema": True}, TypeError, "ema: expected a number, got True"),
        ({"ema": "much"}, TypeError, "ema: expected a number, got 'much'"),
        ({"flip": "yes"}, TypeError, "flip: expected true or false, got 'yes'"),
        ({"flip": 1}, TypeError, "flip: expected true or false, got 1"),
        ({"trigger": 7}, TypeError, "trigger: expected a text, got 7"),
        ({"trigger": None}, TypeError, "trigger: expected a text, got None"),
        ({"trigger": False}, TypeError, "trigger: expected a text, got False"),
        ({"targets": 3}, TypeError, "targets: expected a list of texts, got 3"),
        ({"targets": [3]}, TypeError, "targets: expected a list of texts"),
        ({"sample_prompts": None}, TypeError, "sample_prompts: expected a list of texts"),
        ({"rank": 0}, ValueError, "rank: expected at least 1, got 0"),
        ({"dropout": 1}, ValueError, "dropout: expected at most 0.99, got 1.0"),
        ({"ema": 1}, ValueError, "ema: expected at most 0.99999"),
        ({"snr_gamma": 0}, ValueError, "snr_gamma: expected at least"),
        ({"seed": 2**32}, ValueError, "seed: expected at most"),
        ({"seed": 10**400}, ValueError, "seed: expected at most"),
        ({"learning_rate": 10**400}, TypeError, "learning_rate: expected a number"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate: expected a finite number"),
        ({"learning_rate": "inf"}, ValueError, "learning_rate: expected a finite number"),
        ({"lean": "most"}, ValueError, "lean: expected one of off, exact, .*, got 'most'"),
        ({"model": ""}, ValueError, "model: expected a path"),
        ({"output": ""}, ValueError, "output: expected a path"),
        ({"lean": "auto"}, ValueError, "budget: expected bytes"),
        (
            {"train": "adapter+attention", "mixed_precision": "bf16"},
            ValueError,
            "mixed_precision: expected no beside",
        ),
        (
            {"quantize": "nf4", "train": "adapter+attention"},
            ValueError,
            "quantize: expected no beside train=adapter.attention, .*got nf4",
        ),
        (
            {"quantize": "nf4", "lean": "auto", "budget": "1GiB"},
            ValueError,
            "lean: expected a level by name beside quantize=nf4, .*got auto",
        ),
        (
            {"cuda_graph": True, "mixed_precision": "fp16"},
            ValueError,
            "mixed_precision: expected no or bf16 beside cuda_graph, .*got fp16",
        ),
        (
            {"cuda_graph": True, "gradient_checkpointing": True},
            ValueError,
            "gradient_checkpointing: expected off beside cuda_graph",
        ),
        (
            {"cuda_graph": True, "prior_weight": 1.0, "train": "adapter+attention"},
            ValueError,
            "train: expected adapter beside cuda_graph and prior_weight.* got adapter.attention",
        ),
        ({"budget": "1GiB"}, ValueError, "lean: expected auto beside a budget, got 'exact'"),
        ({"prior_prompt": "a dog"}, ValueError, "prior_weight: expected more than 0"),
        ({"prior_data": "dogs"}, ValueError, "prior_weight: expected more than 0"),
        ({"rank": 4, "time_rank": 5}, ValueError, "time_rank: .*the rank of 4, got 5"),
        ({"rank_pattern": ["attn1"]}, ValueError, "rank_pattern: .* got 'attn1'"),
        ({"rank_pattern": ["attn1=0"]}, ValueError, "rank_pattern: .* got 'attn1=0'"),
        ({"heldout": "kfold", "heldout_count": 2}, ValueError, "heldout_count: .*kfold, got 2"),
        ({"rank_pattern": ["=4"]}, ValueError, "rank_pattern: .* got '=4'"),
        ({"rank_pattern": ["a=²"]}, ValueError, "rank_pattern: expected REGEX=RANK, got 'a=²'"),
        ({"rank_pattern": ["(=4"]}, ValueError, "rank_pattern: .* got '\\('"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changes, error, told):
    with pytest.raises(error, match=told):
        make(**changes)


def test_what_fits_is_brought_into_its_type():
    found = make(ema=0, learning_rate="1e-4", targets="attn1", rank_pattern=["a=b=4", "c=2"])
    assert found.ema == 0.0 and isinstance(found.ema, float)
    assert found.learning_rate == 1e-4
    assert found.targets == ("attn1",)
    assert found.ranks() == {"a=b": 4, "c": 2}
    assert hash(found) == hash(dataclasses.replace(found))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning-rate: 1e-4", "learning_rate", 1e-4),  # a text, to YAML
        ("mixed_precision: no", "mixed_precision", "no"),  # False
        ("lean: off", "lean", "off"),  # False
        ("heldout: none", "heldout", "none"),  # not null
        ("resolution: null", "resolution", None),
        ("resolution:", "resolution", None),
        ("sample_prompts: a cat", "sample_prompts", ("a cat",)),
        ("sample_prompts: [a cat, 'no']", "sample_prompts", ("a cat", "no")),
        ("prior_weight: 1", "prior_weight", 1.0),
        ("trigger: 'null'", "trigger", "null"),
    ],
)
def test_traps_of_yaml(text, name, value, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    found = getattr(Settings.from_dict(PATHS | read_yaml(path)), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "expected lines of name: value, got None"),
        (b"- steps", "expected lines of name: value, got \\['steps'\\]"),
        (b"steps: [", "expected YAML, got what does not parse"),
        (b"a: \xff", "expected YAML, got what does not parse"),
        (b"? [a]\n: 1", "expected YAML, got what does not parse"),
        (b"!!python/object/apply:os.getcwd []", "expected YAML, got what does not parse"),
    ],
)
def test_a_file_that_is_none_is_named(content, told, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"s.yaml: {told}"):
        read_yaml(path)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="there is no 'step'; did you mean steps"):
        Settings.from_dict(PATHS | {"step": 3})
    with pytest.raises(ValueError, match=r"expected one of accumulate.* got 'xyzzy'"):
        Settings.from_dict(PATHS | {"xyzzy": 3})


def test_what_a_resumed_run_may_change():
    """Whatever shapes the training stays; what is watched, kept or shown may change."""
    free = {name for name, field in FIELDS.items() if field.metadata["changeable"]}
    assert free == {
        "data", "output", "patience", "sample_every", "sample_prompts", "sample_count",
        "sample_steps",
        "guidance", "features", "checkpoint_every", "checkpoint_limit", "resume", "log_with",
        "push_to_hub", "lean", "norms", "budget", "gradient_checkpointing",
    }  # fmt: skip
    base = make(schedule="cosine")
    for name in FIELDS:
        value, _ = other(name)
        changed = dataclasses.replace(base, **BESIDE.get(name, {}) | {name: value})
        fixed = {n for n in {name, *BESIDE.get(name, {})} if n not in free}
        expected = {n for n in fixed if getattr(base, n) != getattr(changed, n)} - {"placement"}
        if base.adapter().placement != changed.adapter().placement:
            expected.add("placement")
        assert set(base.changes(changed)) == expected
    assert base.changes(make(schedule="cosine", placement="parallel")) == {}
    assert base.changes(make(schedule="cosine", rank=8, seed=3)) == {
        "rank": (64, 8),
        "seed": (0, 3),
    }


def test_more_steps_of_a_constant_rate_are_the_same_run():
    for schedule in ("constant", "constant_with_warmup"):
        assert not make(schedule=schedule).changes(make(schedule=schedule, steps=2000))
    assert make(schedule="linear").changes(make(schedule="linear", steps=2000))


# PyYAML does not keep every line end
TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Zl", "Zp"], exclude_characters="\x85"), min_size=1
)


@drawn(
    st.fixed_dictionaries(
        {"model": TEXT, "data": TEXT},
        optional={
            "trigger": TEXT, "sample_prompts": st.lists(TEXT).map(tuple),
            "learning_rate": st.none() | st.floats(0, 1), "noise_offset": st.floats(0, 1e300),
            "seed": st.integers(0, 2**32 - 1), "flip": st.booleans(),
            "resolution": st.none() | st.integers(8, 10**6),
        },
    )
)  # fmt: skip
def test_yaml_reads_back(tmp_path_factory, values):
    wanted = Settings(**values)
    path = tmp_path_factory.getbasetemp() / "drawn.yaml"
    path.write_text(wanted.to_yaml(), encoding="utf-8")
    assert Settings.from_dict(read_yaml(path)) == wanted


@pytest.mark.parametrize("lines", ["steps: 3\nsteps: 5\n", "min-side: 9\nmin_side: 8\n"])
def test_a_name_that_is_there_twice(tmp_path, lines):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\ndata: d\n{lines}")
    with pytest.raises(
        ValueError, match=r"run\.yaml: expected each name once, got (steps|min_side)"
    ):
        read_yaml(path)
