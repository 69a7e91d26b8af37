"""How the timestep reaches time-aware adapters: hooks on the denoiser, and through checkpoints.

`model(sample, timestep, ...)` alone is enough: a hook before the forward reads its timestep, one
after it ends it (`adapters.timestep`). A backward that runs parts of a forward again finds no
forward: so every function that diffusers checkpoints takes the timestep along, and the lean
levels do (`lean.rebuild`). A checkpoint around the whole model runs the hooks again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import BottleneckAdapter
from .adapters.timestep import Moment, at, begin, end, moment_of, now
from .forwards import Argument, arguments

# what denoisers call the argument
_NAMES = ("timestep", "timesteps", "t")
_CHECKPOINT = "_gradient_checkpointing_func"


def check_timed(model: nn.Module) -> Argument:
    """The forward's timestep; ValueError where it has none."""
    parameters = arguments(model)
    found = next((parameters[name] for name in _NAMES if name in parameters), None)
    if found is None:
        raise ValueError(
            f"model: expected a denoiser, whose forward has a timestep, for time-aware adapters; "
            f"got a {type(model).__name__}, whose forward has {', '.join(parameters)}"
        )
    return found


def follow(model: nn.Module, clock: Callable[[Tensor, nn.Module], Tensor]) -> None:
    """From now on the model's forward tells its adapters the timestep, as `clock` reads it."""
    if any(isinstance(hook, _Begin) for hook in model._forward_pre_hooks.values()):
        return
    model.register_forward_pre_hook(_Begin(model, clock), with_kwargs=True)
    model.register_forward_hook(_end, always_call=True)


def unfollow(model: nn.Module) -> None:
    """Removes what `follow` added, unless an adapter is left that needs it."""
    if any(isinstance(m, BottleneckAdapter) and m.timed for m in model.modules()):
        return
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _Begin):
            hook.release()
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key)
    for key, found in list(model._forward_hooks.items()):
        if found is _end:
            del model._forward_hooks[key]
            model._forward_hooks_always_called.pop(key)


class _Begin:
    """The hook before a forward."""

    def __init__(self, model: nn.Module, clock: Callable[[Tensor, nn.Module], Tensor]) -> None:
        self.timestep = check_timed(model)
        self.clock = clock
        # looked for once: a walk through a large model takes a millisecond
        self.checkpointing = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            for function, module in self._functions():
                if not isinstance(function, _Carrying):
                    setattr(module, _CHECKPOINT, _Carrying(function))
        given = self.timestep.given(args, kwargs)
        if given is None:
            begin(None, self)
            return
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x is not given]
        device = tensors[0].device if tensors else None
        t = torch.as_tensor(given, device=device).to(torch.float32)
        begin(moment_of(self.clock(t, model)), self)

    def release(self) -> None:
        for function, module in self._functions():
            if isinstance(function, _Carrying):
                setattr(module, _CHECKPOINT, function.inner)

    def _functions(self) -> Iterator[tuple[Any, nn.Module]]:
        for module in self.checkpointing:
            if _CHECKPOINT in module.__dict__:
                yield module.__dict__[_CHECKPOINT], module


def _end(model: nn.Module, args: tuple, output: Any) -> None:
    end()


class _Carrying:
    """A function for gradient checkpointing that takes the timestep along."""

    def __init__(self, inner: Callable) -> None:
        self.inner = inner

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        moment = now()
        # the compiler reads the timestep as it reads any tensor, and computes again by itself
        if moment is not None and not torch.compiler.is_compiling():
            function = _At(function, moment)
        return self.inner(function, *args, **kwargs)


class _At:
    """A function that runs at a given timestep, whenever it runs."""

    def __init__(self, function: Callable, moment: Moment) -> None:
        self.function = function
        self.moment = moment

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with at(self.moment):
            return self.function(*args, **kwargs)
