"""The model card: README.md of an adapter's folder, which explains itself wherever it is moved.

A card is made to be published. So it names no path of this machine and no photo's file; captions
it does quote, a few.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from . import figures, records
from .run_files import Run, prompts, told
from .verdict import count, measured, percent

CAPTIONS = 3
# settings that say how it was trained; paths and what concerns this machine stay out
TOLD = (
    "resolution", "buckets", "flip", "rank", "activation", "design", "placement", "bias", "dropout",
    "targets", "rank_pattern", "steps", "batch", "accumulate", "optimizer", "learning_rate",
    "weight_decay", "schedule", "warmup", "max_grad_norm", "mixed_precision", "seed", "snr_gamma",
    "noise_offset", "caption_dropout", "ema", "prior_weight", "prior_prompt", "heldout", "quantize",
    "lean",
)  # fmt: skip
RESOLVED = ("placement", "resolution", "learning_rate")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_card(run: Path, adapter: Path) -> None:
    """Writes README.md, curves.png and samples.png to the folder `adapter`, from the run's files.

    What an earlier card drew and this run has nothing for is removed.
    """
    read = Run(run)
    pictures = {"curves.png": figures.curves(read), "samples.png": figures.sample_grid(read)}
    for name, figure in pictures.items():
        if figure is None:
            (adapter / name).unlink(missing_ok=True)
        else:
            records.write(adapter / name, figures.png(figure))
    drawn = {name for name, figure in pictures.items() if figure is not None}
    records.write(adapter / "README.md", str(card(read, drawn)).encode())


def card(run: Run, drawn: set[str]) -> ModelCard:
    data = _metadata(run)
    parts = [
        f"# {_title(run)}",
        _what(run),
        *(["![Samples by step](samples.png)"] if "samples.png" in drawn else []),
        "## Use",
        _use(run),
        "## Data",
        _data(run),
        "## What was measured",
        "\n".join(f"- {_plain(sentence)}" for sentence in measured(run)),
        *(["![Loss over training](curves.png)"] if "curves.png" in drawn else []),
        "## Training",
        _settings(run),
        "## Limits",
        _limits(run),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def base_name(run: Run) -> str | None:
    """The base's name on the hub, from the settings or from the pipeline's own record of it."""
    base = str(run.summary.get("base") or run.settings.get("model") or "")
    if HUB_NAME.fullmatch(base) and not Path(base).exists():
        return base
    try:
        index = json.loads((Path(base) / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    origin = index.get("_name_or_path") if isinstance(index, dict) else None
    return (
        origin
        if isinstance(origin, str) and HUB_NAME.fullmatch(origin) and not Path(origin).exists()
        else None
    )


def _metadata(run: Run) -> ModelCardData:
    text = _speaks(run)
    extra: dict[str, Any] = {}
    if trigger := run.settings.get("trigger"):
        extra["instance_prompt"] = trigger
    if base := base_name(run):
        extra |= {"base_model": base, "base_model_relation": "adapter"}
    tags = ["a3fta", "a3fta-kernels", "adapter", "diffusers"]
    if family := run.summary.get("family"):
        tags.append(str(family).replace("_", "-"))
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image" if text else "unconditional-image-generation",
        tags=tags,
        **extra,
    )


def _speaks(run: Run) -> bool:
    """Whether the model is asked with a text."""
    return run.summary.get("family") != "unconditional"


def _title(run: Run) -> str:
    subject = run.settings.get("trigger") or run.folder.resolve().name
    return f"A3FTA adapter: {_plain(str(subject))}"


def _what(run: Run) -> str:
    parameters = run.summary.get("parameters")
    size = f" {parameters:,} parameters," if parameters else ""
    base = base_name(run)
    name = f"[{base}](https://huggingface.co/{base})" if base else _code(_base_folder(run))
    said = [
        f"Small adapters for the attention layers of {name}:{size} trained with `a3fta finetune` "
        f"on {count(len(run.photos['used']), 'photo')}. The base's own weights are unchanged, and "
        "not included."
    ]
    if trigger := run.settings.get("trigger"):
        said.append(f"Ask for it with {_code(trigger)}.")
    return " ".join(said)


def _base_folder(run: Run) -> str:
    return Path(str(run.summary.get("base") or run.settings.get("model") or "the base")).name


def _use(run: Run) -> str:
    base = base_name(run) or _line(f"path/to/{_base_folder(run)}")
    words = ""
    draw = 'pipe().images[0].save("sample.png")'
    if _speaks(run):
        words = f" --prompt {shlex.quote(_prompt(run))}"
        draw = f'pipe({_prompt(run)!r}).images[0].save("sample.png")'
    elif any(photo.get("label") is not None for photo in run.photos["used"]):
        words = " --prompt 0 --prompt 1"
        draw = "...  # pipe.unet(noisy, timestep, class_labels=labels): the pipeline has no classes"
    return (
        "```python\nfrom diffusers import DiffusionPipeline\nimport a3fta_kernels as a3fta\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({base!r})\n"
        'a3fta.load_adapter(pipe, "path/to/this/folder")\n'
        f"{draw}\n```\n\n"
        "or, for a grid of samples:\n\n"
        f"```\na3fta sample --model {shlex.quote(base)} --adapter path/to/this/folder"
        f"{words}\n```"
    )


def _prompt(run: Run) -> str:
    """A prompt that it was sampled with, or a caption."""
    row = run.sample_row()
    captions = [photo.get("caption") or "" for photo in run.photos["used"]]
    found = [*(prompts(row) if row else []), run.settings.get("trigger") or "", *captions]
    return _line(next((text for text in found if text), "a photo"))


def _data(run: Run) -> str:
    used = run.photos["used"]
    heldout = sum(photo.get("split") == "heldout" for photo in used)
    folds = len({photo["fold"] for photo in used if photo.get("fold") is not None})
    said = [f"- {count(len(used), 'photo')}"]
    if heldout:
        said[0] += f": {len(used) - heldout} to train on, {heldout} held out"
    elif folds:
        said[0] += f", all to train on; held out in {count(folds, 'fold')} of runs beside the last"
    if skipped := len(run.photos["skipped"]):
        said.append(f"- {count(skipped, 'file')} skipped")
    if classes := run.photos.get("classes"):
        said.append(f"- classes: {', '.join(_code(str(name)) for name in classes)}")
    captions = list(dict.fromkeys(photo["caption"] for photo in used if photo.get("caption")))
    if captions:
        shown = ", ".join(_code(text) for text in captions[:CAPTIONS])
        more = f", and {len(captions) - CAPTIONS} more" if len(captions) > CAPTIONS else ""
        said.append(f"- captions: {shown}{more}")
    return "\n".join(said)


def _settings(run: Run) -> str:
    # which they were, also where the settings left them open
    settings = {**run.settings, **{k: run.summary[k] for k in RESOLVED if k in run.summary}}
    rows = [
        f"| {name} | {_code(told(value))} |"
        for name in TOLD
        if (value := settings.get(name)) not in (None, "", [])
    ]
    versions = run.summary.get("versions") or {}
    rows += [f"| {_plain(name)} | {_code(str(value))} |" for name, value in versions.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows]) if rows else "Not recorded."


def _limits(run: Run) -> str:
    said = [
        "It fits the base that it was trained on; loading it into another is refused. It knows "
        f"{count(len(run.photos['used']), 'photo')}: what they do not show, such as other angles, "
        "lights or places, it has to take from the base."
    ]
    row = run.sample_row()
    if row is None or row.get("copies") is None:
        said.append("Whether its samples copy training photos was not measured.")
    elif row["copies"] > 0:
        said.append(
            f"{percent(row['copies'])} of its samples were near-copies of training photos: do not "
            "use it where those must stay private."
        )
    else:
        said.append(
            "No sample was a near-copy of a training photo, as far as whole pictures go; copied "
            "details are not looked for."
        )
    if run.heldout is None:
        said.append("No photo was held out, so whether it overfits was not measured.")
    return " ".join(said)


def _plain(text: str) -> str:
    """One line of text without a meaning in Markdown or HTML."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)


def _line(text: str) -> str:
    """One line of text that ends no code block."""
    return " ".join(text.split()).replace("`", "'")


def _code(text: str) -> str:
    """One line of text as it is, in a code span; also inside a table."""
    return f"`{_line(text).replace('|', '¦')}`"
