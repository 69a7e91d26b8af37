"""The public `geglu`: checks and the choice of backend."""

from __future__ import annotations

from torch import Tensor

from ...backends import resolve
from ...checks import check_choice
from ..activations import ACTIVATIONS
from ..validate import KEEPS, check_input
from . import contract
from .reference import geglu as reference


def geglu(
    p: Tensor, *, activation: str = "gelu", keep: str = "input", backend: str = "auto"
) -> Tensor:
    """A gated linear unit that keeps only its input for the backward.

        hidden, gate = p.chunk(2, -1)
        y = hidden * act(gate)

    Args:
        p: (..., 2F), the output of the projection of diffusers' GEGLU (or SwiGLU); any strides;
            fp32, fp16 or bf16 (fp64 too on `reference` and on `native` on the CPU). May be empty.
        activation: identity, relu, gelu (GEGLU), gelu_tanh or silu (SwiGLU).
        keep: what the backward starts from: "input" keeps p, "int8" its 8-bit copy by
            `ops.quantize`, which leaves y as it is and changes the gradient by as much as moving
            p by half / 254 does. `reference` keeps what PyTorch keeps, p and act(gate); `auto`
            keeps as said, also where it finds no kernels.
        backend: auto, reference, triton or native.

    Returns:
        y (..., F), of p's dtype, contiguous (of PyTorch's choice on `reference`).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailableError: the named backend cannot run here.

    Differentiable once; on `reference` as often as asked.
    """
    check_input(p, "p")
    width = p.shape[-1]
    if width % 2 != 0:
        raise ValueError(
            f"p: expected shape (..., 2F), [hidden | gate], an even last dimension, got "
            f"{tuple(p.shape)}"
        )
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("keep", keep, KEEPS)
    chosen = resolve(backend, p.device, p.dtype)
    if backend == "reference":
        return reference(p, activation=activation)
    y = contract.apply(p.reshape(-1, width), activation, keep, chosen)
    return y.view(*p.shape[:-1], width // 2)
