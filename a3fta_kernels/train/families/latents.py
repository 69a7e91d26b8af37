"""What families with a VAE and text encoders share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ...ops.rule import without_autocast
from ..errors import TrainingError
from ..noise import Flow
from .family import Crop, Family, Row, stack, to_images

# of a pipeline with a transformer and two texts
TRANSFORMER_PARTS = (
    "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer", "scheduler",
)  # fmt: skip


_TEXTS = 512 << 20  # bytes beside the weights for a text on its way through


class LatentFamily(Family):
    """A pipeline whose denoiser works on a VAE's latents and is told a text.

    parts: what the pipeline must have; one may be saved, or loaded, without.
    """

    parts: ClassVar[tuple[str, ...]]
    text_parts: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        for part in self.parts:
            if getattr(pipe, part, None) is None:
                raise TrainingError(
                    f"the model: expected a {type(pipe).__name__} with {', '.join(self.parts)}, "
                    f"got one without {part}"
                )
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.float()  # SDXL's overflows in fp16, and it runs once per photo
        for part in ("vae", *self.text_parts):
            if getattr(pipe, part, None) is not None:
                getattr(pipe, part).requires_grad_(False).eval()
        self._encodes_on: torch.device | None = None
        self._encodes = ""  # what could be encoded now: photos or texts
        self.factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        self.multiple = 2 * self.factor

    @torch.no_grad()
    def encode_photo(self, pixels: Tensor, crop: Crop) -> Row:
        vae = self.pipe.vae
        found = vae.encode(pixels[None].to(vae.device, torch.float32)).latent_dist
        return {"mean": self.scaled(found.mean)[0].cpu(), "std": self.stretched(found.std)[0].cpu()}

    def stretched(self, latents: Tensor) -> Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def scaled(self, latents: Tensor) -> Tensor:
        """The VAE's latents in the denoiser's units."""
        return self.stretched(latents - (getattr(self.pipe.vae.config, "shift_factor", None) or 0))

    def decode(self, latents: Tensor) -> list[Any]:
        """Images of latents in the denoiser's units."""
        config = self.pipe.vae.config
        raw = latents.to(self.pipe.vae.device, torch.float32) / config.scaling_factor
        raw = raw + (getattr(config, "shift_factor", None) or 0)
        # the precision of a run does not reach here: SDXL's decoder overflows in fp16. One by one:
        # at 1024 x 1024 each takes gigabytes
        with without_autocast(raw):
            return [to_images(self.pipe.vae.decode(one).sample)[0] for one in raw.split(1)]

    @contextlib.contextmanager
    def encoding(
        self, device: torch.device, say: Callable[[str], None] = lambda text: None
    ) -> Iterator[None]:
        """The denoiser need not be there yet: text encoders may be as large as it is."""
        self._encodes_on, self._encodes, self._say = device, "", say
        yield
        self._encodes_on = None
        for part in self.text_parts:
            if getattr(self.pipe, part, None) is not None:
                setattr(self.pipe, part, None)
        self.pipe.vae.to("cpu")

    def bring(self, what: str) -> None:
        """The encoders of `photos` or of `texts` to the device, the others from it: together they
        may not fit. Nor may those of texts alone, which then stay on the CPU."""
        if self._encodes_on is None or what == self._encodes:
            return
        parts: list[Any] = [getattr(self.pipe, part, None) for part in self.text_parts]
        texts = [module for module in parts if module is not None]
        here, away = ([self.pipe.vae], texts) if what == "photos" else (texts, [self.pipe.vae])
        for module in away:
            module.to("cpu")
        device, room = self._encodes_on, _room(self._encodes_on)
        needed = sum(p.nbytes for module in here for p in module.parameters())
        if what == "texts" and room is not None and needed + _TEXTS > room:
            device = torch.device("cpu")
            self._say(
                f"Texts are encoded on the CPU: their encoders take {needed >> 20:,} MiB, of which "
                f"the GPU has {room >> 20:,} left"
            )
        for module in here:
            module.to(device)
        self._encodes = what

    @contextlib.contextmanager
    def drawing(self, device: torch.device) -> Iterator[None]:
        self.pipe.vae.to(device)
        try:
            yield
        finally:
            self.pipe.vae.to("cpu")

    @torch.no_grad()
    def draw(
        self, texts: Sequence[Row], empty: Row, size: tuple[int, int], steps: int,
        guidance: float, seeds: Sequence[int],
    ) -> list[Image.Image]:  # fmt: skip
        told = self.told(texts)
        untold = {f"negative_{k}": empty[k].to(v.device).expand_as(v) for k, v in told.items()}
        return self.decode(self.call(told | untold, size, steps, guidance, seeds))

    def told(self, texts: Sequence[Row]) -> Row:
        """The texts as the pipeline takes them, a batch on the denoiser's device."""
        device = next(self.denoiser.parameters()).device
        return {k: v.to(device) for k, v in stack(texts).items() if k.endswith("embeds")}

    def call(
        self, told: Mapping[str, Any], size: tuple[int, int], steps: int, guidance: float,
        seeds: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """The latents that the pipeline draws, as it has them at the end."""
        return self.pipe(
            **told, width=size[0], height=size[1], num_inference_steps=steps,
            guidance_scale=guidance, output_type="latent",
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images  # fmt: skip


def _room(device: torch.device) -> int | None:
    """Bytes that could be allocated on a GPU; None: of another device."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def flow(scheduler: Any, scale: float) -> Flow:
    """The noise of a pipeline of flow matching."""
    kind = type(scheduler).__name__
    if not kind.startswith("FlowMatch"):
        # others keep their shift under other names, or are not of flow matching at all
        raise TrainingError(
            f"the model's scheduler: expected FlowMatchEulerDiscreteScheduler or a kin, got {kind}"
        )
    return Flow(scheduler.config, scale)
