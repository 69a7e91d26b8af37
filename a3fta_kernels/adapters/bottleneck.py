"""The bottleneck: down to R, an activation, up again, beside the identity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import reruns
from .config import AdapterConfig
from .timestep import Moment, for_samples, required


class Tensors(NamedTuple):
    """The tensors of an adapter, as a forward uses them."""

    w_down: Tensor
    w_up: Tensor
    b_down: Tensor | None
    b_up: Tensor | None
    gamma: Tensor | None = None  # (B, R): z is act(a) * (1 + gamma) + beta
    beta: Tensor | None = None

    def times(self, factor: Tensor) -> Tensors:
        """With a factor (1,) or (C,) on the adapter's output."""
        b_up = None if self.b_up is None else self.b_up * factor
        return self._replace(w_up=self.w_up * factor[:, None], b_up=b_up)

    def biases(self) -> tuple[Tensor, Tensor]:
        """b_down and b_up, zeros where there are none."""
        b_down, b_up = self.b_down, self.b_up
        return (
            self.w_down.new_zeros(len(self.w_down)) if b_down is None else b_down,
            self.w_up.new_zeros(len(self.w_up)) if b_up is None else b_up,
        )

    def each(self, fn: Callable[[Tensor], Tensor]) -> Tensors:
        """What `fn` makes of them."""
        return Tensors(*(None if t is None else fn(t) for t in self))  # type: ignore[arg-type]


class BottleneckAdapter(nn.Module):
    """The parameters of  h' = h + scale * (act(h @ w_down.T + b_down) @ w_up.T + b_up).

    w_down (R, C), b_down (R,), w_up (C, R), b_up (C,); the biases are None with bias=False, b_up
    also where the adapter is left out for a sample. w_up and b_up start at zero, so that a new
    adapter changes nothing. The projection that owns the adapter computes the formula. C is
    `channels`; of w_up and b_up `outputs`, where the adapter reads and adds elsewhere (placement).

    A design whose formula differs in w_up and b_up alone makes its parameters in `extend` and
    overrides `forward`: everything that computes with an adapter takes its tensors from there. One
    that depends on the timestep sets `timed` and makes gamma and beta of it in `at_time`.

    `.to(dtype)`, `.half()` and layerwise casting never narrow the parameters; moves to another
    device and wider dtypes are followed.
    """

    timed = False  # whether it depends on the timestep
    # parameters that grow with the rank: along which axis, in how many parts one after the other
    rank_axes: ClassVar[dict[str, tuple[int, int]]] = {
        "w_down": (0, 1), "b_down": (0, 1), "w_up": (1, 1),
    }  # fmt: skip

    def __init__(
        self,
        channels: int,
        rank: int,
        config: AdapterConfig,
        *,
        outputs: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config  # as given, for the adapter file
        self.rank = rank
        self.activation = config.activation
        self.scale = config.scale
        self.dropout = config.dropout
        self.drop_path = config.drop_path
        self.timed = config.timed
        # where a sample may go without the adapter, it goes without a shift as well
        shifts = config.bias and not config.drop_path and config.time_window is None
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w_down = nn.Parameter(drawn(rank, channels).to(**options))
        outputs = outputs or channels
        self.w_up = nn.Parameter(torch.zeros(outputs, rank, **options))
        self.b_down = nn.Parameter(torch.zeros(rank, **options)) if config.bias else None
        self.b_up = nn.Parameter(torch.zeros(outputs, **options)) if shifts else None
        self.extend(options)

    def extend(self, options: dict[str, Any]) -> None:
        """Makes what a design adds; `options`: device and dtype of its parameters."""

    def forward(self, h: Tensor | None = None) -> Tensors:
        """The tensors: by a call, so that hooks that fetch offloaded parameters run.

        With h (B, ...), gamma and beta are for its samples.
        """
        gamma, beta = (None, None) if h is None else self.modulation(h.shape[0], h.device)
        return Tensors(self.w_down, self.w_up, self.b_down, self.b_up, gamma, beta)

    def at_time(self, moment: Moment) -> tuple[Tensor | None, Tensor | None]:
        """gamma and beta (n, R) of a timed design for n timesteps; zero at the start."""
        return None, None

    def modulation(self, samples: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """gamma and beta (samples, R): of the timestep, with dropped ranks in them."""
        gamma = beta = None
        keep = self.kept(samples, device)
        if self.timed:
            moment = required()
            # autocast has no say: these are as exact as the parameters, and tiny
            with torch.autocast(device.type, enabled=False):
                found = self.at_time(moment)
            gamma, beta = (None if x is None else for_samples(x, samples) for x in found)
            at_work = self._at_work(moment)
            if at_work is not None:
                at_work = for_samples(at_work, samples).to(device)
                keep = at_work if keep is None else keep * at_work
        if keep is None:
            return gamma, beta
        # (act(a) * (1 + gamma) + beta) * keep
        gamma = keep - 1 if gamma is None else (1 + gamma) * keep - 1
        return gamma, None if beta is None else beta * keep

    def _at_work(self, moment: Moment) -> Tensor | None:
        """(n, R) of 0 and 1: the window, and the rank that shrinks with the timestep.

        r(t) = floor((R - time_rank) * (1000 - t) / 1000) + time_rank, as in Soboleva et al.,
        "T-LoRA: Single Image Diffusion Model Customization Without Overfitting" (2025): noise
        overfits first, and gets the fewest ranks.
        """
        window, least = self.config.time_window, self.config.time_rank
        found = None
        if least is not None:
            least = min(least, self.rank)
            share = (1 - moment.t / 1000).clamp(0, 1)
            count = ((self.rank - least) * share).floor() + least
            ranks = torch.arange(self.rank, device=moment.t.device)
            found = (ranks < count[:, None]).float()
        if window is not None:
            inside = ((moment.t >= window[0]) & (moment.t <= window[1])).float()[:, None]
            found = inside.expand(-1, self.rank) if found is None else found * inside
        return found

    def kept(self, samples: int, device: torch.device) -> Tensor | None:
        """(samples, R): 0 for what this forward leaves out, more than 1 for the rest; None where
        nothing is left out."""
        found = reruns.found(self, lambda: self._draw(samples, device))
        return None if found is None else found.expand(-1, self.rank)

    def _draw(self, samples: int, device: torch.device) -> Tensor | None:
        found = None
        if not self.training:
            return found
        for rate, width in ((self.dropout, self.rank), (self.drop_path, 1)):
            if rate > 0:
                drawn = torch.rand(samples, width, device=device).lt(1 - rate).float() / (1 - rate)
                found = drawn if found is None else found * drawn
        return found

    def extra_repr(self) -> str:
        rank, channels = self.w_down.shape
        return f"channels={channels}, rank={rank}, activation={self.activation!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BottleneckAdapter:
        def never_narrow(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or _holds(moved.dtype, tensor.dtype):
                return moved
            return tensor.to(moved.device)

        return super()._apply(never_narrow, recurse)


def drawn(outputs: int, inputs: int) -> Tensor:
    """The weight of a new linear layer: on the CPU in float32, so that a seed means the same on
    every device."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(outputs, inputs, dtype=torch.float32).uniform_(-bound, bound)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    if not wide.is_floating_point:
        return False
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.max >= b.max and a.eps <= b.eps and a.tiny <= b.tiny
