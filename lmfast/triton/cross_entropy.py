"""Cross-entropy of logits for NVIDIA GPUs: the losses and, where asked for, the gradient.

Floor: bytes. The logits are read once from memory and the gradient written once. A program takes a
row, or a tile of short ones, and walks its columns twice: first every thread keeps the maximum and
the sum of exponentials of its own columns, with one exponential per element, and the threads are
joined once at the end; then the columns are read again and turned into gradients. The second
reading comes from the L2 cache: 16 warps a row leave one or two rows per multiprocessor under way,
34 to 68 MB of a 128 k vocabulary in bf16, where 4 warps a row would keep eight times as many.

The gradient may take the place of the logits: every element is read and written by one thread. Rows
that are ignored are not read. A target that is no class makes its row NaN: the host cannot look at
targets without waiting for them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.ops._linear_cross_entropy_arguments import REDUCTIONS
from lmfast.triton._launch import next_power_of_2, on_device

_WARPS = 16  # of a long row
_TILE = 2048  # elements that short rows share a program for
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _finished_logits(
    row_ptr, bias_ptr, mask, col, classes, readable, softcap, SOFTCAP: tl.constexpr
):
    """Logits in fp32 with bias and cap; -inf behind the classes."""
    x = tl.load(row_ptr + col, mask=mask & (col < readable), other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + col, mask=col < classes, other=0.0)
    if SOFTCAP:
        # The interpreter and the compiler share no tanh.
        e = tl.exp(-2.0 * tl.abs(x) / softcap)
        cap = softcap * (1.0 - e) / (1.0 + e)
        x = tl.where(x < 0.0, -cap, cap)
    return tl.where(col < classes, x, float("-inf"))


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _cross_entropy_kernel(
    logits_ptr,
    grad_ptr,
    bias_ptr,
    targets_ptr,
    losses_ptr,
    factor_ptr,
    rows,
    classes,
    readable,
    logits_stride,
    grad_stride,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FACTOR_PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets_ptr + row, mask=row < rows, other=ignore_index)
    keep = (row < rows) & (target != ignore_index)
    known = keep & (target >= 0) & (target < classes)
    mask = keep[:, None]
    row_ptr = logits_ptr + (row * logits_stride)[:, None]
    chosen = tl.sum(
        _finished_logits(
            row_ptr,
            bias_ptr,
            known[:, None],
            tl.where(known, target, 0)[:, None],
            classes,
            readable,
            softcap,
            SOFTCAP,
        ),
        axis=1,
    )
    top = tl.full([ROWS, BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    plain_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, classes, BLOCK, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK)[None, :]
        x = _finished_logits(row_ptr, bias_ptr, mask, col, classes, readable, softcap, SOFTCAP)
        larger = x > top
        e = tl.exp(-tl.abs(x - top))
        total = tl.where(larger, total * e + 1.0, total + e)
        top = tl.where(larger, x, top)
        if SMOOTHING:
            plain_sum += tl.where(col < classes, x, 0.0)
    highest = tl.max(top, axis=1)
    total = tl.sum(total * tl.exp(top - highest[:, None]), axis=1)
    # From the highest logit on: near it the digits are that a loss is made of.
    log_total = tl.log(total)
    loss = (highest - chosen) + log_total
    if SMOOTHING:
        mean = tl.sum(plain_sum, axis=1) / classes
        # Apart, as one infinite logit minus another would be NaN.
        loss = (1.0 - label_smoothing) * loss + label_smoothing * ((highest - mean) + log_total)
    if Z_LOSS:
        loss += z_loss * (highest + log_total) * (highest + log_total)
    nan = float("nan")
    loss = tl.where(keep, tl.where(known, loss, nan), 0.0)
    tl.store(losses_ptr + row, loss, mask=row < rows)
    if grad_ptr is not None:
        if FACTOR_PER_ROW:
            factor = tl.load(factor_ptr + row, mask=keep, other=0.0)
        else:
            factor = tl.load(factor_ptr)
        factor = tl.where(known, factor, nan)
        scale = 1.0 / total
        if Z_LOSS:
            scale *= 1.0 + 2.0 * z_loss * (highest + log_total)
        spread = label_smoothing / classes
        grad_row = grad_ptr + (row * grad_stride)[:, None]
        for start in tl.range(0, classes, BLOCK, num_stages=STAGES):
            col = start + tl.arange(0, BLOCK)[None, :]
            x = _finished_logits(row_ptr, bias_ptr, mask, col, classes, readable, softcap, SOFTCAP)
            grad = tl.exp(x - highest[:, None]) * scale[:, None]
            if SMOOTHING:
                grad -= spread
            grad -= tl.where(col == target[:, None], 1.0 - label_smoothing, 0.0)
            if SOFTCAP:
                share = tl.where(col < classes, x / softcap, 0.0)
                grad *= 1.0 - share * share
            grad = tl.where(mask, grad * factor[:, None], 0.0)
            where = (row < rows)[:, None] & (col < readable)
            tl.store(grad_row + col, grad.to(grad_ptr.dtype.element_ty), mask=where)


def launch(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    factor: Tensor,
    grad: Tensor | None,
    settings: tuple[int, float, float],
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    readable: int = 0,
) -> None:
    """Losses of rows of logits and their gradient.

    Args:
        logits: (N, V), neighbouring columns neighbours in memory.
        targets: (N,) int64.
        losses: (N,) float32, written to.
        factor: (N,) or (1,) float32, what the gradients are multiplied with.
        grad: (N, V), written to; may be ``logits``; None: no gradient.
        settings: ignore_index, label_smoothing, z_loss.
        bias: (V,) float32, added to the logits.
        softcap: their bound, 0 for none.
        readable: columns of a row that may be read and written although they are no classes, a
            multiple of 16: rows can then be read in whole vectors. 0: only the classes.
    """
    rows, classes = logits.shape
    if rows == 0:
        return
    ignore_index, label_smoothing, z_loss = settings
    # With a bias and everything else a thread has no registers for 16 elements.
    per_thread = 16 if bias is None else 8
    block = min(_WARPS * 32 * per_thread, next_power_of_2(classes))
    tile_rows = max(1, _TILE // block)
    with on_device(logits):
        _cross_entropy_kernel[(triton.cdiv(rows, tile_rows),)](
            *(logits, grad, bias, targets, losses, factor),
            *(rows, classes, max(readable, classes), logits.stride(0)),
            *(0 if grad is None else grad.stride(0), ignore_index),
            *(label_smoothing, z_loss, softcap),
            SMOOTHING=label_smoothing > 0,
            Z_LOSS=z_loss > 0,
            SOFTCAP=softcap > 0,
            FACTOR_PER_ROW=factor.numel() > 1,
            ROWS=tile_rows,
            BLOCK=block,
            STAGES=2,
            num_warps=max(4, tile_rows * block // (32 * per_thread)),
        )


def gradient_factor(
    targets: Tensor, dloss: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """(1,) or (N,) float32: the loss's gradient by each row's loss, times the incoming one."""
    factor = torch.ones(1, dtype=torch.float32, device=targets.device)
    if reduction == "mean":
        factor = factor / (targets != ignore_index).sum().clamp_min(1)
    return factor if dloss is None else factor * dloss.float()


def reduced(losses: Tensor, factor: Tensor, reduction: str) -> Tensor:
    """The loss from every row's; ``factor`` that of a mean, without an incoming gradient."""
    if reduction == "none":
        return losses
    return losses.sum() * factor[0] if reduction == "mean" else losses.sum()


def _run(
    logits: Tensor,
    grad: Tensor | None,
    targets: Tensor,
    dloss: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    kind = REDUCTIONS[reduction]
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    plain = gradient_factor(targets, None, ignore_index, kind)
    factor = plain if dloss is None else plain * dloss.float()
    launch(logits, targets, losses, factor, grad, (ignore_index, label_smoothing, z_loss))
    return reduced(losses, plain, kind)


def cross_entropy(
    logits: Tensor, targets: Tensor, dloss: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    """Launches the kernel; the arguments of ``lmfast::cross_entropy``."""
    *loss_settings, want_dlogits = settings
    dlogits = logits.new_empty(logits.shape if want_dlogits else (0,))
    grad = dlogits if want_dlogits else None
    return _run(logits, grad, targets, dloss, *loss_settings), dlogits


def cross_entropy_(logits: Tensor, targets: Tensor, dloss: Tensor | None, *settings: Any) -> Tensor:
    """Launches the kernel in place; the arguments of ``lmfast::cross_entropy_``."""
    return _run(logits, logits, targets, dloss, *settings)
