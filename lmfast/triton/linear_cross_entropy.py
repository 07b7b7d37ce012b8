"""The output layer and its loss for NVIDIA GPUs: cuBLAS's products around one softmax kernel.

Floor: 6 N E V operations on the matrix units, forward and both gradients. A fully fused kernel
keeps no logits but has to multiply them out again for the backward, 8 N E V, and Triton's products
stay below cuBLAS's: so a chunk of rows is multiplied by cuBLAS, turned into its own gradient in
place by one kernel, and multiplied away by cuBLAS before the next chunk. For E = 4096 and V = 128 k
a row's products take 4 us at 790 TFLOP/s and its three passes over 256 KB of logits 0.18 us at
4.3 TB/s, 5 %.

The chunk: each one reads and writes the fp32 sums of the weight gradient, 8 E V bytes, and reads
the weight twice: with M rows that is 370 / M of the time of the products. 2048 rows of a 128 k
vocabulary, 8192 of 32 k: 512 MB in 16 bit. Rows of logits are padded to whole vectors, so that
50,257 classes are read like 50,304.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lmfast.ops._linear_cross_entropy_arguments import REDUCTIONS
from lmfast.triton.cross_entropy import gradient_factor, launch, reduced

LOGITS_PER_CHUNK = 2**28
_PADDED_TO = 64  # columns


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b``, or ``=`` for the first; sums are kept in total's dtype."""
    if a.dtype == total.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif not a.is_cuda:  # the interpreter: products of two dtypes are cuBLAS's
        _add_product(total, a.to(total.dtype), b.to(total.dtype), first)
    elif first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


@torch.no_grad()
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    dloss: Tensor | None,
    mean: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    bf16: bool,
    want_dhidden: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches products and kernels; the arguments of ``lmfast::linear_cross_entropy``."""
    (rows, width), classes = hidden.shape, weight.shape[0]
    dtype = torch.bfloat16 if bf16 else torch.promote_types(hidden.dtype, weight.dtype)
    h, w = hidden.to(dtype), weight.to(dtype)
    kind = REDUCTIONS[reduction]
    plain = gradient_factor(targets, None, ignore_index, kind)
    factor = plain if dloss is None else plain * dloss
    readable = triton.cdiv(classes, _PADDED_TO) * _PADDED_TO
    step = max(1, min(rows, LOGITS_PER_CHUNK // readable))
    one_chunk = step == rows
    losses = hidden.new_empty(rows, dtype=torch.float32)
    dhidden = hidden.new_empty((rows if want_dhidden else 0, width))
    total = weight.new_empty(0)
    if want_dweight:
        exact = one_chunk and weight.dtype in (dtype, torch.float32)
        total = torch.empty_like(weight, dtype=weight.dtype if exact else torch.float32)
        if rows == 0:
            total.zero_()
    dbias = hidden.new_zeros(classes if want_dbias else 0, dtype=torch.float32)
    buffer = h.new_empty(step if rows else 0, readable)
    wanted = want_dhidden or want_dweight or want_dbias
    for start in range(0, rows, step):
        end = min(rows, start + step)
        logits = buffer[: end - start, :classes]
        torch.mm(h[start:end], w.t(), out=logits)
        launch(
            logits,
            targets[start:end],
            losses[start:end],
            factor if factor.numel() == 1 else factor[start:end],
            logits if wanted else None,
            (ignore_index, label_smoothing, z_loss),
            bias=bias,
            softcap=softcap,
            readable=readable,
        )
        if want_dhidden:
            if dhidden.dtype == dtype:
                torch.mm(logits, w, out=dhidden[start:end])
            else:
                dhidden[start:end] = logits @ w
        if want_dweight:
            _add_product(total, logits.t(), h[start:end], first=start == 0)
        if want_dbias:
            dbias += logits.sum(0, dtype=torch.float32)
    return reduced(losses, plain, kind), dhidden, total.to(weight.dtype), dbias
