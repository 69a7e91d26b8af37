"""sample: a grid of images from a base and its adapters, each from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ..inject import disabled, set_adapters
from ..storage import AdapterFileError, load_adapter
from . import packing
from .closing import ADAPTER
from .drawing import DTYPES, Prompt, draw
from .errors import TrainingError
from .families import Family, load
from .listener import Listener, Share

_MARGIN, _TITLE = 8, 22


def sample(
    model: str,
    adapters: Sequence[tuple[str, float]],
    prompts: Sequence[str],
    *,
    count: int = 4,
    steps: int = 30,
    guidance: float = 5.0,
    seed: int = 0,
    resolution: int | None = None,
    precision: str = "no",
    quantize: str = "no",
    variant: str = "",
    batch: int = 1,
    allow_other_base: bool = False,
    listener: Listener | None = None,
) -> Image.Image:
    """A row of images for the base, one for each adapter (folder, weight), and where there are
    several one for all of them together; `count` columns, with the prompts in turn, or as many
    as there are prompts.

    Prompts of a model with classes are their numbers; one without either takes none. `listener`
    hears how many images are drawn. Raises
    TrainingError for a pipeline, adapter or prompt that does not fit.
    """
    from accelerate import PartialState

    device = PartialState(cpu=not torch.cuda.is_available()).device
    packing.check(quantize)
    family = load(model, DTYPES[precision], variant)
    side = resolution or family.resolution
    if side % family.multiple:
        raise TrainingError(
            f"resolution: expected a multiple of {family.multiple} for this model, got {side}"
        )
    packing.pack(family.denoiser, quantize, device)
    names = []
    try:
        for number, (folder, _) in enumerate(adapters):
            names.append(f"adapter-{number}")
            load_adapter(family.denoiser, folder, names[-1], allow_other_base=allow_other_base)
    except (AdapterFileError, ValueError, TypeError) as error:
        raise TrainingError(str(error)) from error
    listener = listener or Listener()
    with family.encoding(device, listener.say):
        family.bring("texts")
        prompted, empty = _prompts(family, prompts, count), family.encode_text("")
    family.denoiser.to(device).eval()
    rows = 1 + len(names) + (len(names) > 1)
    told = Share(listener, "images", rows * len(prompted)).more

    def row() -> list[Image.Image]:
        try:
            return draw(
                family, prompted, empty, (side, side), steps=steps, guidance=guidance, seed=seed,
                batch=batch, device=device, told=told,
            )  # fmt: skip
        except ValueError as error:
            raise TrainingError(f"the pipeline does not draw this: {error}") from error

    with disabled(family.denoiser):
        drawn = [("base", row())]
    for name, (folder, weight) in zip(names, adapters, strict=True):
        set_adapters(family.denoiser, name, weight)
        drawn.append((f"{_name(folder)} x {weight:g}", row()))
    if len(names) > 1:
        set_adapters(family.denoiser, names, [weight for _, weight in adapters])
        drawn.append(("together", row()))
    return grid(drawn, [p.title for p in prompted])


def _name(folder: str) -> str:
    """Its last part; of one that a run left, which are all called `adapter`, the run's too."""
    path = Path(folder).resolve()
    return f"{path.parent.name}/{path.name}" if path.name == ADAPTER else path.name


def _prompts(family: Family, prompts: Sequence[str], count: int) -> list[Prompt]:
    if family.captions:
        if not prompts:
            raise TrainingError("prompt: expected at least one for this model, got none")
        rows = [Prompt(text, family.encode_text(text)) for text in prompts]
    elif family.classes:
        rows = []
        for text in prompts or [str(i) for i in range(family.classes)]:
            if not text.isdecimal() or int(text) >= family.classes:
                raise TrainingError(
                    f"prompt: expected classes 0..{family.classes - 1} for this model, got {text!r}"
                )
            rows.append(Prompt(text, {"label": torch.tensor(int(text))}))
    else:
        if prompts:
            raise TrainingError("prompt: expected none, as this model takes none, got some")
        rows = [Prompt("", {})]
    return [rows[i % len(rows)] for i in range(max(count, len(prompts)))]


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], titles: Sequence[str]) -> Image.Image:
    """The images with a title over every row, and the prompts over the columns."""
    width, height = rows[0][1][0].size
    columns = len(titles)
    page = Image.new(
        "RGB",
        (
            _MARGIN + columns * (width + _MARGIN),
            _MARGIN + _TITLE + len(rows) * (height + _TITLE + _MARGIN),
        ),
        "white",
    )
    pen = ImageDraw.Draw(page)
    for i, title in enumerate(titles):
        x = _MARGIN + i * (width + _MARGIN)
        pen.text((x, _MARGIN), _short(pen, title, width), fill="black", font_size=14)
    y = _MARGIN + _TITLE
    for title, images in rows:
        pen.text((_MARGIN, y), title, fill="black", font_size=14)
        for i, image in enumerate(images):
            page.paste(image.convert("RGB"), (_MARGIN + i * (width + _MARGIN), y + _TITLE))
        y += height + _TITLE + _MARGIN
    return page


def _short(pen: ImageDraw.ImageDraw, text: str, width: int) -> str:
    text = " ".join(text.split())  # PIL measures single lines alone
    while text and pen.textlength(text, font_size=14) > width:
        text = f"{text[:-2]}…" if len(text) > 2 else ""
    return text
