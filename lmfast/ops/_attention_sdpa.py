"""Plain attention on a GPU by PyTorch's fused kernels, where they are the fastest there is.

``F.scaled_dot_product_attention`` runs FlashAttention or cuDNN. On an H100, causal, head size 128,
forward, Shah et al. (FlashAttention-3, 2024, arXiv:2407.08608, figure 5) give cuDNN up to 600
TFLOP/s in fp16, FlashAttention-2 up to 400 and Triton's kernel about as much; below a few hundred
queries no kernel is bound by arithmetic, and with few queries on many keys those of PyTorch do not
split the keys. So: prefill of at least ``FEWEST_QUERIES``, without options, in 16 bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfast.ops._attention_reference import Options, reference
from lmfast.ops._autograd import with_reference
from lmfast.ops._library import needs_grad

FEWEST_QUERIES = 512


def fits_sdpa(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> bool:
    """Whether PyTorch's fused kernels compute the same, and are the choice for these sizes."""
    o = Options(*options)
    if any(t is not None for t in (o.offsets, o.lengths, o.mask, o.sinks, o.alibi)):
        return False
    length, keys, width = q.shape[2], k.shape[2], q.shape[3]
    if o.window or o.softcap or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    # Their causal mask starts at the first key, ours ends at the last.
    if o.causal and (length != keys or o.offset not in (None, 0)):
        return False
    return length >= FEWEST_QUERIES and keys > 0 and width % 8 == 0 and 0 < width <= 256


def preferred(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[str, str] | None:
    """The choice of a backend that the general order does not make, and the reason."""
    if q.is_cuda and fits_sdpa(q, k, v, *options):
        return "torch", "scaled_dot_product_attention: long, plain, 16 bit"
    return None


def sdpa(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    """``attention`` by PyTorch's operator, for arguments that fit it."""
    o = Options(*options)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        grouped = q.shape[1] != k.shape[1]
        return (
            F.scaled_dot_product_attention(
                q, k, v, is_causal=o.causal, scale=o.scale, enable_gqa=grouped
            ),
        )

    if needs_grad(q, k, v) and not torch.compiler.is_compiling():
        out = with_reference(run, lambda q, k, v: (reference(q, k, v, *o),), (q, k, v))[0]
    else:
        out = run(q, k, v)[0]
    # In q's order of dimensions; the kernels write theirs, (B, T, H, D).
    if q.transpose(1, 2).is_contiguous():
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous() if q.is_contiguous() else out
