"""The recurrent layers on an NVIDIA GPU by the persistent kernels of the CUDA extension.

The products over all steps are cuBLAS's, in the dtype of x; the loop over time is one kernel each
way that keeps the weights on the chip: on Hopper within clusters where up to 16 multiprocessors
hold them, else across the whole GPU. The way there is the CPU kernels': the same operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmfast import _extension
from lmfast.ops._autograd import apply
from lmfast.ops._library import define, needs_grad
from lmfast.ops._recurrent import LayerFunction
from lmfast.ops._recurrent_reference import CELLS, Layer, Loop

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_fits = define(
    "recurrent_fits(Tensor like, int hidden, int batch, int cell, bool backward) -> bool",
    lambda *args: True,
)


def unsupported_by_persistent_kernels(x: Tensor, *rest: Any) -> str | None:
    """Why the persistent kernels cannot take these arguments, or None."""
    layer, cell = Layer(*rest[:6]), rest[7]
    if not _extension.cuda.loaded:
        return _extension.cuda.reason
    if cell == "gru_textbook":
        return "no GPU kernel for a GRU that resets before the product"
    if x.dtype not in _DTYPES:
        return f"no CUDA kernel for {x.dtype}"
    if torch.is_autocast_enabled("cuda"):
        return "under autocast cuDNN's layers are taken"
    if torch.compiler.is_compiling():
        return "whether the weights fit on the chip is not asked inside a compiled graph"
    backward = needs_grad(x, *layer)
    hidden = layer.w_hh.shape[1]
    if x.dtype != torch.float32 and hidden % 8:
        return f"in 16 bits the kernel takes hidden sizes that are multiples of 8, got {hidden}"
    if not _fits(x, hidden, x.shape[0], CELLS.index(cell), backward):
        return f"the weights of {hidden} hidden units do not fit on this GPU's multiprocessors"
    return None


def persistent_layer(x: Tensor, layer: Layer, loop: Loop) -> tuple[Tensor, Tensor, Tensor]:
    """``reference_layer`` by the persistent kernels; differentiable."""
    keep = needs_grad(x, *layer)
    run: Any = (lambda *args: apply(LayerFunction, *args)) if keep else LayerFunction.forward
    y, h_n, c_n, *_ = run(x, *layer, *loop, keep)
    return y, h_n, c_n
