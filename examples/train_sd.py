"""Fine-tune Stable Diffusion (1.x, 2.x, XL) on a folder of photos with A3FTA adapters.

    accelerate launch examples/train_sd.py --model ./stable-diffusion-v1-5 --photos ./photos \
        --prompt "a photo of sks dog" --out ./dog --mixed-precision bf16

--model is a pipeline on disk, as `pipe.save_pretrained` writes it. The caption of photos/a.jpg is
photos/a.txt, or --prompt where there is none. Latents and texts are encoded once, at the start.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor

import a3fta_kernels as a3fta

PHOTOS = (".jpg", ".jpeg", ".png", ".webp")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulate
    )
    set_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = load(args).to(accelerator.device)
    pipe.vae.to(torch.float32)  # SDXL's overflows in fp16
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    data = encode_photos(pipe, args)
    prompt = encode_text(pipe, args.sample_prompt)
    pipe.text_encoder = pipe.text_encoder_2 = None  # their work is done

    unet = pipe.unet
    accelerator.print(a3fta.inject(unet, a3fta.AdapterConfig(args.rank, args.activation)))
    if args.lean != "off":
        accelerator.print(a3fta.lean(unet, args.lean, norms=args.norms))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    parameters = list(a3fta.trainable_parameters(unet))  # a list: clipping reads it every step
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=args.warm_up)
    model, optimizer = accelerator.prepare(unet.train(), optimizer)

    # every process draws its own photos and noise
    generator = torch.Generator().manual_seed(args.seed + accelerator.process_index)
    step, losses = 0, []
    while step < args.steps:
        with accelerator.accumulate(model):
            loss = denoising_loss(model, scheduler, data, args.batch, generator)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if not accelerator.sync_gradients:
            continue
        warm_up.step()
        step += 1
        if accelerator.is_main_process and (step % args.sample_every == 0 or step == args.steps):
            print(f"step {step}: mean loss {mean(losses):.4f}", flush=True)
            losses.clear()
            a3fta.save_adapter(unet, args.out)
            with accelerator.autocast():
                latents = generate(pipe, prompt, args, output_type="latent")
            with torch.no_grad():
                pixels = pipe.vae.decode(latents.float() / pipe.vae.config.scaling_factor).sample
            pipe.image_processor.postprocess(pixels)[0].save(args.out / f"step-{step:05d}.png")
    accelerator.end_training()

    if accelerator.is_main_process:  # what a user of the adapter does
        del pipe, unet, model, optimizer, parameters, warm_up
        pipe = load(args)
        a3fta.load_adapter(pipe, args.out)
        pipe.to(accelerator.device)
        prompt = encode_text(pipe, args.sample_prompt)
        generate(pipe, prompt, args)[0].save(args.out / "final.png")


def load(args: argparse.Namespace) -> DiffusionPipeline:
    dtype = DTYPES[args.mixed_precision]
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def encode_photos(pipe: DiffusionPipeline, args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Per photo, on the CPU: its latent's mean and deviation, its text, SDXL's sizes."""
    paths = sorted(p for p in args.photos.iterdir() if p.suffix.lower() in PHOTOS)
    if not paths:
        raise SystemExit(f"--photos: no {', '.join(PHOTOS)} in {args.photos}")
    data = []
    for path in paths:
        caption = path.with_suffix(".txt")
        text = caption.read_text().strip() if caption.exists() else args.prompt
        if not text:
            raise SystemExit(f"{path.name}: write {caption.name}, or give --prompt")
        try:
            photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except OSError as error:
            raise SystemExit(f"--photos: {path.name} is no readable image ({error})") from error
        side = args.resolution
        scale = side / min(photo.size)
        top, left = (round((x * scale - side) / 2) for x in (photo.height, photo.width))
        pixels = pipe.image_processor.preprocess(ImageOps.fit(photo, (side, side)))
        latent = pipe.vae.encode(pixels.to(pipe.vae.device)).latent_dist
        factor = pipe.vae.config.scaling_factor
        row = {
            "mean": latent.mean[0] * factor,
            "std": latent.std[0] * factor,
            "time_ids": torch.tensor([photo.height, photo.width, top, left, side, side]),
            **{k: v[0] for k, v in encode_text(pipe, text, guidance=False).items()},
        }
        data.append({k: v.cpu() for k, v in row.items()})
    return data


@torch.no_grad()
def encode_text(pipe: DiffusionPipeline, text: str, guidance: bool = True) -> dict[str, Tensor]:
    """The text as the arguments that the pipeline takes in place of a prompt."""
    names = ["prompt_embeds", "negative_prompt_embeds"]
    if "text_encoder_2" in pipe.components:
        names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": guidance}
    found = pipe.encode_prompt(text, device=pipe.unet.device, **options)
    return {k: v for k, v in zip(names, found, strict=True) if v is not None}


def denoising_loss(
    model: Any, scheduler: DDPMScheduler, data: list, count: int, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the predicted noise, or velocity, for random photos and times."""
    chosen = torch.randint(len(data), (count,), generator=generator).tolist()
    batch = {k: torch.stack([data[i][k] for i in chosen]) for k in data[0]}
    noise, spread = torch.randn(2, *batch["mean"].shape, generator=generator)
    latents = batch["mean"] + batch["std"] * spread
    times = torch.randint(len(scheduler.betas), (len(latents),), generator=generator)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise SystemExit(f"prediction_type: expected epsilon or v_prediction, got {kind!r}")
    target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, times)

    text = batch["prompt_embeds"]
    inputs: list[Tensor] = [scheduler.add_noise(latents, noise, times).to(text.dtype), times, text]
    device = next(model.parameters()).device
    added = None
    if "pooled_prompt_embeds" in batch:  # SDXL
        pooled = batch["pooled_prompt_embeds"].to(device)
        added = {"text_embeds": pooled, "time_ids": batch["time_ids"].to(pooled)}
    prediction = model(*(x.to(device) for x in inputs), added_cond_kwargs=added).sample
    return F.mse_loss(prediction.float(), target.to(device))


@torch.no_grad()
def generate(pipe: DiffusionPipeline, prompt: dict, args: argparse.Namespace, **options) -> Any:
    trained = pipe.unet.training
    pipe.unet.eval()
    options |= {"height": args.resolution, "width": args.resolution}
    options |= {"num_inference_steps": args.sample_steps}
    images = pipe(**prompt, generator=torch.Generator().manual_seed(args.seed), **options).images
    pipe.unet.train(trained)
    return images


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the pipeline")
    add("--photos", type=Path, required=True, help="folder of photos, with .txt captions or not")
    add("--prompt", default="", help="caption of the photos without a .txt")
    add("--sample-prompt", default="", help="what the samples show (default: --prompt)")
    add("--out", type=Path, default=Path("adapter"), help="adapter and samples go here")
    add("--resolution", type=int, default=512, help="1024 for SDXL")
    add("--rank", type=int, default=64)
    add("--activation", default="gelu", help="identity can be merged")
    add("--learning-rate", type=float, default=1e-3)
    add("--warm-up", type=int, default=50, help="steps")
    add("--max-grad-norm", type=float, default=1.0)
    add("--steps", type=int, default=1000)
    add("--batch", type=int, default=1)
    add("--accumulate", type=int, default=1, help="batches in a step")
    add("--lean", choices=("off", "exact", "recompute", "block", "compressed"), default="exact")
    add("--norms", choices=("input", "int8"), default="input", help="how --lean keeps their inputs")
    add("--gradient-checkpointing", action="store_true")
    add("--mixed-precision", default="no", choices=tuple(DTYPES))
    add("--sample-every", type=int, default=200)
    add("--sample-steps", type=int, default=30)
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    for name in ("model", "photos"):
        if not getattr(args, name).is_dir():
            parser.error(f"--{name}: expected a folder, got {getattr(args, name)}")
    for name in ("steps", "batch", "accumulate", "sample_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    args.sample_prompt = args.sample_prompt or args.prompt
    return args


if __name__ == "__main__":
    main()
