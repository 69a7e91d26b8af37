"""Pre-trains the demo's base model: a small class-conditional U-Net that draws printed digits.

    python scripts/pretrain_demo_base.py    # writes a3fta_kernels/data/demo_base.safetensors

The data are the digits 0-9 of the text fonts that matplotlib ships, drawn the way the target
(scikit-learn's handwritten digits) was scanned: a 32 x 32 bitmap that the digit fills from top
to bottom, counted in blocks of 4 x 4, so 8 x 8 pixels of 0 to 16. Shift, scale, shear, rotation
and stroke width vary; no target image is used. Weights are an exponential average, stored in
float16 with the model's and the scheduler's configuration in the file's metadata.

Needs the "demo" extra, and ten to fifteen minutes of one core. The same seed on the same machine
gives the same weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "a3fta_kernels" / "data" / "demo_base.safetensors"

# text fonts only: matplotlib's symbol fonts hold other shapes under the digits' codes
FONTS = (
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-Oblique.ttf", "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf",
    "STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf",
    "cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmtt10.ttf", "cmti10.ttf", "cmmi10.ttf",
)  # fmt: skip
CANVAS, SCAN, BLOCK = 96, 32, 4  # the glyph's canvas, the bitmap, the block that is counted
FRAME = 64  # height of a glyph on its canvas; the rest is margin for shear and rotation

MODEL = {
    "sample_size": SCAN // BLOCK,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (48, 80),
    "layers_per_block": 1,
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    "attention_head_dim": 16,
    "norm_num_groups": 16,
    "num_class_embeds": 10,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": True,
}


def glyphs() -> tuple[Tensor, Tensor]:
    """Every digit of every font, cropped and scaled to the frame's height.

    Returns:
        (len(FONTS) * 10, 1, CANVAS, CANVAS) in 0..1, and their classes.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images, labels = [], []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / name), 160)
        for digit in range(10):
            page = Image.new("L", (320, 320), 0)
            ImageDraw.Draw(page).text((80, 60), str(digit), font=font, fill=255)
            glyph = page.crop(page.getbbox())
            width = max(1, round(glyph.width * FRAME / glyph.height))
            glyph = glyph.resize((width, FRAME), Image.Resampling.LANCZOS)
            canvas = Image.new("L", (CANVAS, CANVAS), 0)
            canvas.paste(glyph, ((CANVAS - width) // 2, (CANVAS - FRAME) // 2))
            images.append(np.asarray(canvas, dtype=np.float32) / 255)
            labels.append(digit)
    return torch.from_numpy(np.stack(images))[:, None], torch.tensor(labels)


def batch(
    images: Tensor, labels: Tensor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`size` augmented digits: x (size, 1, 8, 8) in -1..1 on the target's 17 grey levels."""

    def draw(low: float, high: float) -> Tensor:
        return torch.empty(size).uniform_(low, high, generator=generator)

    index = torch.randint(len(images), (size,), generator=generator)
    angle, shear = draw(-0.12, 0.12), draw(-0.2, 0.2)
    wide, tall = draw(0.75, 1.1), draw(0.96, 1.04)
    # theta maps the bitmap's coordinates to the canvas's: the inverse of what the glyph does
    zoom = FRAME / CANVAS
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([cos * zoom / wide, (shear + sin) * zoom, draw(-0.06, 0.06)], 1),
            torch.stack([-sin * zoom, cos * zoom / tall, draw(-0.03, 0.03)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [size, 1, SCAN, SCAN], align_corners=False)
    # a threshold on a blurred glyph thins or thickens its strokes
    soft = F.avg_pool2d(images[index], 5, stride=1, padding=2)
    bitmap = F.grid_sample(soft, grid, align_corners=False) > draw(0.2, 0.5).view(-1, 1, 1, 1)
    return F.avg_pool2d(bitmap.float(), BLOCK) * 2 - 1, labels[index]


def train(steps: int, batch_size: int, lr: float, seed: int, log_every: int) -> torch.nn.Module:
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = glyphs()
    model = UNet2DModel(**MODEL)
    average = copy.deepcopy(model).requires_grad_(False)
    scheduler = DDPMScheduler(**SCHEDULER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    warmup = min(200, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(i / steps, 1.0)))),
    )
    start, recent = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        x, y = batch(images, labels, batch_size, generator)
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(SCHEDULER["num_train_timesteps"], (len(x),), generator=generator)
        prediction = model(scheduler.add_noise(x, noise, t), t, class_labels=y).sample
        loss = F.mse_loss(prediction, scheduler.get_velocity(x, noise, t))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, step / (step + 10))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        recent += loss.item()
        if step % log_every == 0 or step == steps:
            done = (step - 1) % log_every + 1
            elapsed = time.monotonic() - start
            print(f"step {step}/{steps}  loss {recent / done:.4f}  {elapsed:.0f} s", flush=True)
            recent = 0.0
    return average


def save(model: torch.nn.Module, path: Path, note: dict[str, int | float]) -> None:
    from safetensors.torch import save_file

    tensors = {k: v.to(torch.float16).contiguous() for k, v in model.state_dict().items()}
    metadata = {
        "unet": json.dumps(MODEL),
        "scheduler": json.dumps(SCHEDULER),
        "training": json.dumps(note),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path), metadata=metadata)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = train(args.steps, args.batch_size, args.lr, args.seed, args.log_every)
    note = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    save(model, args.output, note)


if __name__ == "__main__":
    main()
