"""report.html: whole, self-contained, escaped, and there for runs of any state."""

from __future__ import annotations

import base64
import io
import json
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image

from a3fta_kernels.train import report
from a3fta_kernels.train.report import duration, write_report
from a3fta_kernels.train.run_files import Run
from a3fta_kernels.train.verdict import verdict

from .runs import run_folder

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps what a browser would show or load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data.strip())

    def images(self) -> list[str]:
        return [attrs["src"] for tag, attrs in self.tags if tag == "img"]


def written(folder) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_loads_nothing_and_its_pictures_decode(tmp_path):
    folder = run_folder(tmp_path)
    page = written(folder)
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        for name, value in attrs.items():
            assert not name.startswith("on") and name not in {"href", "srcset"}
            assert name != "src" or value.startswith("data:image/")
    text = (folder / "report.html").read_text()
    assert "url(" not in text and "@import" not in text and "prefers-color-scheme: dark" in text
    assert len(page.images()) == 5 + 8
    for source in page.images():
        image = Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1], validate=True)))
        low, high = image.convert("L").getextrema()
        assert high - low > 20  # not blank
    assert all(attrs.get("alt") is not None for tag, attrs in page.tags if tag == "img")


def test_it_opens_with_the_verdict(tmp_path):
    folder = run_folder(tmp_path)
    texts = written(folder).texts
    said = verdict(Run(folder))
    place = texts.index(said[0])
    assert texts[place : place + len(said)] == said
    assert place < texts.index("Curves") < texts.index("Samples") < texts.index("Photos")
    assert texts.index("Photos") < texts.index("Settings") < texts.index("The run")


def test_photos_settings_versions_and_time_are_told(tmp_path):
    texts = written(run_folder(tmp_path)).texts
    assert texts.count("held out") == 2
    for expected in ("photo-003.jpg", "rotated upright", "1 file skipped", "broken.jpg",
                     "no readable image", "learning_rate", "0.0005", "2.13.0", "123,456",
                     "12 min 34 s", "0.5 s", "lowest held-out loss"):  # fmt: skip
        assert expected in texts, expected
    assert "8 photos (1 skipped) · base stable-diffusion · 12 min 34 s" in texts


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert('x')</script> & \"quotes\" <img src=x onerror=y>"
    folder = run_folder(
        tmp_path, caption=evil, prompts=(evil,), settings={"trigger": evil, "note<b>": [evil, "b"]}
    )
    photos = json.loads((folder / "photos.json").read_text())
    photos["used"][0] |= {"name": evil, "notes": [evil]}
    photos["skipped"] = [{"name": evil, "reason": evil}]
    (folder / "photos.json").write_text(json.dumps(photos))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"warnings": [evil], "why": evil, "versions": {evil: evil}, "base": evil}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = written(folder)
    assert not any(tag in {"script", "b"} for tag, _ in page.tags)
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert page.texts.count(evil) >= 8 + 1 + 3  # captions, a name, a note, the skipped
    assert f"Warning: {evil}" in page.texts


def test_a_run_cut_short_has_a_report(tmp_path):
    folder = run_folder(tmp_path, steps=3, samples_every=0, finished=False)
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 4, "lo')
    texts = written(folder).texts
    assert any("has not finished: step 3 of 3" in text for text in texts)
    assert "No samples were drawn." in texts


@pytest.mark.parametrize(
    "missing", ["settings.yaml", "photos.json", "log.jsonl", "evaluations.jsonl", "samples.jsonl",
                "samples", "summary.json"],
)  # fmt: skip
def test_any_file_may_be_missing(tmp_path, missing):
    folder = run_folder(tmp_path)
    gone = folder / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert written(folder).texts


def test_an_empty_folder_has_a_report(tmp_path):
    texts = written(tmp_path).texts
    assert "This run has recorded no step yet." in texts and "Nothing was recorded." in texts


def test_without_held_out_photos_it_says_so(tmp_path):
    texts = written(run_folder(tmp_path, heldout=0)).texts
    assert "Nothing was held out: there is no held-out loss to draw." in texts
    assert "held out" not in texts


def test_folds_are_named_at_their_photos(tmp_path):
    texts = written(run_folder(tmp_path, heldout=0, folds=4)).texts
    assert [texts.count(f"fold {i}") for i in range(4)] == [2, 2, 2, 2]


def test_photos_that_are_gone_keep_their_names(tmp_path):
    folder = run_folder(tmp_path)
    shutil.rmtree(tmp_path / "photos")
    page = written(folder)
    assert page.texts.count("not found") == 8 and "photo-003.jpg" in page.texts
    assert len(page.images()) == 5


def test_a_thousand_photos_do_not_swell_it(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_PHOTOS", 5)
    page = written(run_folder(tmp_path))
    assert "and 3 more" in page.texts and "photo-005.jpg" not in page.texts


def test_the_old_report_stays_when_the_new_one_fails(tmp_path, monkeypatch):
    folder = run_folder(tmp_path, samples_every=0)
    path = write_report(folder)
    before = path.read_bytes()
    monkeypatch.setattr(report, "page", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(folder)
    assert path.read_bytes() == before


def test_durations():
    assert [duration(s) for s in (5.4, 60, 754, 3600, 7384)] == [
        "5 s", "1 min 0 s", "12 min 34 s", "1 h 0 min", "2 h 3 min",
    ]  # fmt: skip
