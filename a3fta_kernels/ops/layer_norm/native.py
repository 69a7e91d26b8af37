"""`layer_norm` in the compiled library, on the CPU and on CUDA. The protocol is in contract.py."""

from __future__ import annotations

import torch

from ...backends import load_native

load_native()

# (x, weight, bias, eps) -> (y (M, C), mean (M,), rstd (M,))
forward = torch.ops.a3fta_native.layer_norm_forward.default
# (dy, x, mean, rstd, weight) -> dx (M, C)
backward = torch.ops.a3fta_native.layer_norm_backward.default
