"""The model card: front matter that the hub reads, code that runs, nothing of this machine."""

from __future__ import annotations

import ast
import json
import re
import shlex

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from a3fta_kernels import cli
from a3fta_kernels.train.card import base_name, write_card
from a3fta_kernels.train.run_files import Run

from .runs import lines, run_folder


def written(folder) -> str:
    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    write_card(folder, adapter)
    return (adapter / "README.md").read_text(encoding="utf-8")


def front(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])


def summarise(folder, **values) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def pipeline(folder, origin: str | None):
    folder.mkdir()
    index = {"_class_name": "StableDiffusionPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index | {"_name_or_path": origin}))
    return folder


def test_the_front_matter_says_what_it_is(tmp_path):
    folder = run_folder(tmp_path)
    summarise(folder, base="someone/some-model-1.5")
    text = written(folder)
    assert front(text) == {
        "base_model": "someone/some-model-1.5",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["a3fta", "a3fta-kernels", "adapter", "diffusers", "stable-diffusion"],
        "instance_prompt": "sks dog",
    }
    loaded = ModelCard.load(folder / "adapter" / "README.md")
    assert loaded.data.base_model == "someone/some-model-1.5"
    assert "[someone/some-model-1.5](https://huggingface.co/someone/some-model-1.5)" in text


def test_a_base_on_disk_is_named_by_its_origin_or_not_at_all(tmp_path):
    folder = run_folder(tmp_path)
    for name, origin, expected in (
        ("a", "someone/model", "someone/model"), ("b", "/home/me/model", None), ("c", None, None),
    ):  # fmt: skip
        summarise(folder, base=str(pipeline(tmp_path / name, origin)))
        assert base_name(Run(folder)) == expected
    assert "base_model" not in front(written(folder)) and "path/to/c" in written(folder)


def test_a_folder_that_looks_like_a_name_on_the_hub_is_a_folder(tmp_path, monkeypatch):
    folder = run_folder(tmp_path)
    summarise(folder, base="models/mine")
    assert base_name(Run(folder)) == "models/mine"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_name(Run(folder)) is None


def test_nothing_of_this_machine_is_published(tmp_path):
    folder = run_folder(tmp_path)
    summarise(folder, warnings=[f"{tmp_path}/photos/photo-001.jpg is small"])
    text = written(folder)
    assert str(tmp_path) not in text and "/somewhere" not in text
    assert not re.search(r"photo-\d", text)


def test_the_python_runs_as_far_as_syntax_goes(tmp_path):
    nasty = 'it\'s a "dog" ```\n# not a heading \\ `x`'
    folder = run_folder(tmp_path, prompts=(nasty,))
    summarise(folder, base=str(tmp_path / "my 'base'"))
    text = written(folder)
    (code,) = re.findall(r"```python\n(.*?)\n```", text, re.S)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    prompt = next(c.args[0].value for c in calls if getattr(c.func, "id", "") == "pipe")
    assert prompt == "it's a \"dog\" ''' # not a heading \\ 'x'"
    assert {"from_pretrained", "load_adapter", "save"} <= {
        c.func.attr for c in calls if isinstance(c.func, ast.Attribute)
    }
    assert "a3fta sample --model " in text and text.count("```") == 4


def test_the_data_and_the_settings_are_told(tmp_path):
    folder = run_folder(tmp_path, settings={"flip": True, "snr_gamma": None})
    photos = json.loads((folder / "photos.json").read_text())
    for i, photo in enumerate(photos["used"]):
        photo["caption"] = f"dog {i % 5} | a `b`"
    (folder / "photos.json").write_text(json.dumps(photos))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"placement": "parallel"}))
    text = written(folder)
    assert "- 8 photos: 6 to train on, 2 held out" in text and "- 1 file skipped" in text
    assert "`dog 0 ¦ a 'b'`, `dog 1 ¦ a 'b'`, `dog 2 ¦ a 'b'`, and 2 more" in text
    for row in ("| rank | `16` |", "| flip | `yes` |", "| learning_rate | `0.0005` |",
                "| torch | `2.13.0` |", "| placement | `parallel` |"):  # fmt: skip
        assert row in text
    assert "snr_gamma" not in text and "| data |" not in text and "| model |" not in text
    assert "trained with `a3fta finetune` on 8 photos" in text and "123,456 parameters" in text


def test_what_was_measured_is_told(tmp_path):
    folder = run_folder(tmp_path)
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    text = written(folder)
    assert f"{rows[3]['heldout_mean']:.4g}" in text and f"({rows[0]['heldout_mean']:.4g})" in text
    assert "0 are near-copies" in text and "The samples reach 17 %" in text
    assert "No sample was a near-copy" in text


def test_the_limits_follow_the_numbers(tmp_path):
    copied = run_folder(tmp_path / "a", best=600)
    assert "100 % of its samples were near-copies of training photos" in written(copied)
    blind = written(run_folder(tmp_path / "b", samples_every=0, heldout=0))
    assert "Whether its samples copy training photos was not measured." in blind
    assert "whether it overfits was not measured" in blind
    assert "held out in 4 folds" in written(run_folder(tmp_path / "c", heldout=0, folds=4))


def test_pictures_lie_beside_the_card_and_old_ones_go(tmp_path):
    folder = run_folder(tmp_path)
    text = written(folder)
    for name in ("curves.png", "samples.png"):
        assert f"]({name})" in text
        image = Image.open(folder / "adapter" / name)
        image.load()
        assert len(image.convert("RGB").getcolors(2**24)) > 50
    (folder / "samples.jsonl").unlink()
    text = written(folder)
    assert "samples.png" not in text and not (folder / "adapter" / "samples.png").exists()
    assert (folder / "adapter" / "curves.png").exists()


def test_captions_and_names_are_no_markup(tmp_path):
    evil = "<script>x</script> [a](b) # *c*"
    folder = run_folder(tmp_path, caption=evil, settings={"trigger": evil})
    text = written(folder)
    body = re.sub(r"```.*?```", "", text.split("---\n", 2)[2], flags=re.S)
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", body)
    assert front(text)["instance_prompt"] == evil
    assert "# A3FTA adapter: \\<script\\>" in body


def test_a_model_without_text_and_an_empty_run(tmp_path):
    folder = run_folder(tmp_path, prompts=("",), caption="", settings={"trigger": ""})
    summarise(folder, family="unconditional")
    text = written(folder)
    assert front(text)["pipeline_tag"] == "unconditional-image-generation"
    assert "pipe().images[0]" in text and "captions" not in text
    assert "instance_prompt" not in front(text)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "recorded no step" in written(empty)


@pytest.mark.parametrize(
    ("captions", "label", "words"),
    [("a photo of it's dog", None, "--prompt"), ("", 3, "--prompt 0"), ("", None, "")],
)
def test_the_command_on_the_card_is_one(tmp_path, captions, label, words):
    """For texts, classes and neither, it parses as it stands."""
    folder = run_folder(tmp_path)
    photos = json.loads((folder / "photos.json").read_text())
    for photo in photos["used"]:
        photo |= {"caption": captions, "label": label}
    (folder / "photos.json").write_text(json.dumps(photos))
    samples = [json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines()]
    told = [{**row, "prompts": [captions] * len(row["files"])} for row in samples]
    lines(folder / "samples.jsonl", told)
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    (folder / "settings.yaml").write_text(yaml.safe_dump({**settings, "trigger": ""}))
    summary = json.loads((folder / "summary.json").read_text())
    summary["family"] = "stable_diffusion" if captions else "unconditional"
    (folder / "summary.json").write_text(json.dumps(summary))
    command = re.search(r"^a3fta sample .*$", written(folder), re.M)[0]
    assert words in command and ("--prompt" in command) == bool(words)
    args = cli.build_parser().parse_args(shlex.split(command)[1:])
    assert args.prompt == ([captions] if captions else ["0", "1"] if label else [])
