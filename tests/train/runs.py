"""Run folders made up for the tests of figures, report and card."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

BINS = [[i / 5, (i + 1) / 5] for i in range(5)]
BASE = [0.9, 0.4, 0.15, 0.06, 0.02]  # loss per bin before training


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluation(step: int, best: int, heldout: bool = True) -> dict[str, Any]:
    """Training loss falls; the held-out loss has its lowest at `best`, sharpest in bin 1."""
    fall = 1 - 0.3 * (1 - math.exp(-step / max(best, 1)))
    deep = (0.04, 0.2, 0.1, 0.07, 0.02)
    curve = [1 - d * (1 - ((step - best) / max(best, 1)) ** 2) for d in deep]
    train = [b * fall for b in BASE]
    held = [1.1 * b * c for b, c in zip(BASE, curve, strict=True)]
    return {
        "step": step, "bins": BINS, "train": train, "train_mean": sum(train) / 5,
        "heldout": held if heldout else None, "heldout_mean": sum(held) / 5 if heldout else None,
    }  # fmt: skip


def picture(path: Path, seed: int, size: tuple[int, int] = (48, 48)) -> None:
    draw = random.Random(seed)
    small = Image.new("RGB", (4, 4))
    small.putdata([tuple(draw.randrange(256) for _ in range(3)) for _ in range(16)])
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize(size, Image.Resampling.BICUBIC).save(path)


def run_folder(
    folder: Path, *, photos: int = 8, heldout: int = 2, steps: int = 600, every: int = 100,
    best: int = 300, prompts: tuple[str, ...] = ("a photo of sks dog", "sks dog on a beach"),
    samples_every: int = 200, folds: int = 0, finished: bool = True,
    caption: str = "a photo of sks dog", settings: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A run whose held-out loss is lowest at `best`."""
    run = folder / "run"
    run.mkdir(parents=True)
    values = {
        "model": "/somewhere/stable-diffusion", "data": str(folder / "photos"),
        "trigger": "sks dog",
        "rank": 16, "steps": steps, "batch": 1, "learning_rate": 5e-4, "seed": 0,
        "heldout": "auto", "choose": "best", **(settings or {}),
    }  # fmt: skip
    (run / "settings.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    used = []
    for i in range(photos):
        file = folder / "photos" / f"photo-{i:03d}.jpg"
        picture(file, i, (60, 40) if i % 2 else (40, 60))
        used.append({
            "name": file.name, "file": str(file), "caption": caption, "label": None,
            "size": [60, 40], "bucket": [64, 48], "notes": ["rotated upright"] if i == 1 else [],
            "split": "heldout" if i >= photos - heldout else "train",
            "fold": i % folds if folds else None,
        })  # fmt: skip
    skipped = [{"name": "broken.jpg", "reason": "no readable image"}]
    (run / "photos.json").write_text(json.dumps({"used": used, "skipped": skipped, "classes": []}))
    noise = random.Random(1)
    lines(run / "log.jsonl", [
        {"step": s, "loss": 0.3 * math.exp(-s / steps) * noise.lognormvariate(0, 0.5), "lr": 5e-4,
         "grad_norm": 0.1, "seconds": 0.5, "memory": None}
        for s in range(1, steps + 1)
    ])  # fmt: skip
    at = list(range(0, steps + 1, every))
    lines(run / "evaluations.jsonl", [evaluation(s, best, heldout > 0) for s in at])
    if samples_every:
        rows = []
        for s in range(samples_every, steps + 1, samples_every):
            files = [f"samples/step-{s:06d}/{i}.png" for i in range(len(prompts))]
            for i, file in enumerate(files):
                picture(run / file, 1000 + s + i)
            distance = [max(0.9 - s / steps + 0.2 * i, 0.01) for i in range(len(files))]
            rows.append({
                "step": s, "prompts": list(prompts), "files": files, "distance": distance,
                "nearest": [used[i % len(used)]["name"] for i in range(len(files))],
                "threshold": 0.4, "copies": sum(d < 0.4 for d in distance) / len(files),
                "recall": 0.5 * s / steps,
            })  # fmt: skip
        lines(run / "samples.jsonl", rows)
    curves = []
    for i in range(folds):
        fold = [evaluation(s, best) for s in at]
        for entry in fold:
            entry["heldout"] = [x * (1 + 0.1 * i) for x in entry["heldout"]]
            entry["heldout_mean"] = sum(entry["heldout"]) / 5
        means = [entry["heldout_mean"] for entry in fold]
        lines(run / "folds" / str(i) / "evaluations.jsonl", fold)
        curves.append({"fold": i, "steps": at, "heldout_mean": means})
    if finished:
        rule = "kfold" if folds else "holdout" if heldout else "none"
        (run / "summary.json").write_text(json.dumps({
            "chosen_step": best if heldout or folds else steps, "why": "lowest held-out loss",
            "steps_done": steps, "stopped_early": False, "rule": rule, "fold_curves": curves,
            "parameters": 123456, "seconds": 754.0, "device": "cpu",
            "versions": {"torch": "2.13.0"}, "base": "/somewhere/stable-diffusion",
            "family": "stable_diffusion", "warnings": [],
        }))  # fmt: skip
    return run
