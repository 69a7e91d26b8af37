"""report.html: what a run came to, in one file that opens anywhere, also of a run cut short.

It loads nothing: pictures are inside. Whatever comes from photos and settings is escaped.
"""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from . import figures, records
from .run_files import Row, Run, thumbnail, told
from .verdict import count, verdict

THUMBNAIL = 112  # pixels; shown at half of that on sharp screens
MOST_PHOTOS = 300

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --muted: #59636e; --paper: #ffffff;
  --panel: #f6f8fa; --edge: #d1d5da; --mark: #b35900; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --muted: #9198a1; --paper: #0d1117;
  --panel: #161b22; --edge: #3d444d; --mark: #f0883e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 780px; padding: 24px 20px 64px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 26px; line-height: 1.25; margin: 8px 0 2px; }
h2 { font-size: 19px; margin: 40px 0 10px; }
h3 { font-size: 16px; margin: 20px 0 6px; }
.muted { color: var(--muted); font-size: 14px; margin: 0 0 8px; }
.verdict { background: var(--panel); border: 1px solid var(--edge); border-radius: 8px;
  padding: 14px 18px; margin: 18px 0; }
.verdict p { margin: 6px 0; }
.verdict p:first-child { font-size: 19px; font-weight: 600; line-height: 1.35; }
img.figure { display: block; width: 100%; height: auto; background: #ffffff; border-radius: 8px;
  border: 1px solid var(--edge); margin: 0 0 16px; }
.photos { display: flex; flex-wrap: wrap; gap: 14px; }
.photos figure { margin: 0; width: 136px; font-size: 13px; line-height: 1.35; }
.photos img { display: block; max-width: 112px; max-height: 112px; border-radius: 4px;
  margin-bottom: 4px; }
.photos .gone { width: 112px; height: 76px; border: 1px dashed var(--edge); border-radius: 4px;
  color: var(--muted); display: grid; place-items: center; margin-bottom: 4px; }
.photos span { display: block; }
.photos .muted { font-size: 13px; margin: 0; }
.photos .part { color: var(--mark); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 4px 14px 4px 0;
  border-bottom: 1px solid var(--edge); }
th { font-weight: 500; color: var(--muted); width: 38%; }
"""


def write_report(run: Path) -> Path:
    """Writes `run`/report.html from what the folder holds, and returns its path."""
    path = run / "report.html"
    records.write(path, page(Run(run)).encode())
    return path


def page(run: Run) -> str:
    name = run.folder.resolve().name
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="muted">{escape(_subtitle(run))}</p>',
        f'<div class="verdict">{"".join(f"<p>{escape(s)}</p>" for s in verdict(run))}</div>',
        *_section("Curves", _curves(run)),
        *_section("Samples", _samples(run)),
        *_section("Photos", _photos(run)),
        *_section("Settings", [_table(run.settings.items())]),
        *_section("The run", [_table(facts(run))]),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}: fine-tuning report</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def facts(run: Run) -> list[tuple[str, Any]]:
    """How long, how large, with what: (name, value)."""
    summary = run.summary
    found: list[tuple[str, Any]] = [("steps done", f"{summary.get('steps_done', run.last_step):,}")]
    if summary.get("why"):
        found.append(("why this step", summary["why"]))
    if summary.get("parameters"):
        found.append(("trained parameters", f"{summary['parameters']:,}"))
    if summary.get("seconds") is not None:
        found.append(("time of all steps", duration(summary["seconds"])))
    if times := [row["seconds"] for row in run.log if row.get("seconds") is not None]:
        found.append(("median step", f"{statistics.median(times):.3g} s"))
    if peaks := [row["memory"] for row in run.log if row.get("memory")]:
        found.append(("peak memory", f"{max(peaks) / 2**30:.2f} GiB"))
    for key in ("device", "base", "family"):
        if summary.get(key):
            found.append((key, summary[key]))
    return found + list((summary.get("versions") or {}).items())


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _subtitle(run: Run) -> str:
    used, skipped = run.photos["used"], run.photos["skipped"]
    said = [count(len(used), "photo") + (f" ({len(skipped)} skipped)" if skipped else "")]
    if base := run.summary.get("base", run.settings.get("model")):
        said.append(f"base {Path(str(base)).name}")
    if seconds := run.summary.get("seconds"):
        said.append(duration(seconds))
    return " · ".join(said)


def _section(title: str, parts: list[str]) -> list[str]:
    return [f"<h2>{escape(title)}</h2>", *parts] if any(parts) else []


def _curves(run: Run) -> list[str]:
    drawn = [
        _figure(figures.curves(run), "Loss over training steps"),
        _figure(figures.noise_levels(run), "Held-out loss and its gap per noise level, over steps"),
        _figure(figures.copies(run), "Near-copies and recall over steps"),
    ]
    if not any(drawn):
        return [_note("Nothing was recorded.")]
    if not run.heldout:
        drawn.insert(1, _note("Nothing was held out: there is no held-out loss to draw."))
    return drawn


def _samples(run: Run) -> list[str]:
    if not run.samples:
        return [_note("No samples were drawn.")]
    return [
        _figure(figures.sample_grid(run), "Samples: a row per step, a column per prompt"),
        _figure(figures.nearest_pairs(run), "Samples beside their nearest training photos"),
    ]


def _note(text: str) -> str:
    return f'<p class="muted">{escape(text)}</p>'


def _figure(figure: Figure | None, words: str) -> str:
    if figure is None:
        return ""
    return f'<img class="figure" alt="{escape(words)}" src="{_inline(figures.png(figure), "png")}">'


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _photos(run: Run) -> list[str]:
    used, skipped = run.photos["used"], run.photos["skipped"]
    parts = []
    if used:
        shown = "".join(_photo(photo) for photo in used[:MOST_PHOTOS])
        parts.append(f'<div class="photos">{shown}</div>')
    if len(used) > MOST_PHOTOS:
        parts.append(_note(f"and {len(used) - MOST_PHOTOS:,} more"))
    if skipped:
        parts.append(f"<h3>{count(len(skipped), 'file')} skipped</h3>")
        parts.append(_table((row.get("name", ""), row.get("reason", "")) for row in skipped))
    return parts


def _photo(photo: Row) -> str:
    image = thumbnail(Path(photo["file"]) if photo.get("file") else None, THUMBNAIL)
    if image is None:
        shown = '<span class="gone">not found</span>'
    else:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=80)
        shown = f'<img alt="" src="{_inline(stream.getvalue(), "jpeg")}">'
    lines = [f"<span>{escape(str(photo.get('name', '')))}</span>"]
    if part := _part(photo):
        lines.append(f'<span class="part">{part}</span>')
    said = [photo.get("caption"), *(photo.get("notes") or [])]
    lines += [f'<span class="muted">{escape(str(text))}</span>' for text in said if text]
    return f"<figure>{shown}<figcaption>{''.join(lines)}</figcaption></figure>"


def _part(photo: Row) -> str:
    """What the photo was for, where that is not training alone."""
    if photo.get("split") == "heldout":
        return "held out"
    return "" if photo.get("fold") is None else f"fold {photo['fold']}"


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"<tr><th>{escape(str(k))}</th><td>{escape(told(v))}</td></tr>" for k, v in rows]
    return f"<table>{''.join(lines)}</table>" if lines else ""
