"""First-order linear recurrences over time for NVIDIA GPUs, forward and backward.

Floor: bytes. Forward reads a and b and writes y; backward reads dy, a and y and writes both
gradients. A program owns some columns of one row of the batch and walks over time in tiles of
steps: a tile is scanned in parallel, after which only one number per column goes on to the next,
so that the loads of later tiles do not wait for it. The backward is the same scan from the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.triton._launch import next_power_of_2, on_device

_STEPS = 64
_COLUMNS = 32  # 128 bytes of fp32 per step


@triton.jit
def _then(a1, b1, a2, b2):
    """h -> a1 h + b1, then h -> a2 h + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _linear_recurrence_fwd_kernel(
    a_ptr, b_ptr, state_ptr, y_ptr, steps, width, STEPS: tl.constexpr, COLUMNS: tl.constexpr
):
    blocks = tl.cdiv(width, COLUMNS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    h = tl.zeros([COLUMNS], tl.float32)
    if state_ptr is not None:
        h = tl.load(state_ptr + batch * width + col, mask=col < width, other=0.0).to(tl.float32)
    last = (tl.arange(0, STEPS) == STEPS - 1)[:, None]
    for start in tl.range(0, steps, STEPS, num_stages=2):
        t = start + tl.arange(0, STEPS)
        at = (batch * steps + t)[:, None] * width + col[None, :]
        mask = (t < steps)[:, None] & (col < width)[None, :]
        # Steps behind the end leave the state as it is.
        a = tl.load(a_ptr + at, mask=mask, other=1.0).to(tl.float32)
        b = tl.load(b_ptr + at, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.associative_scan((a, b), 0, _then)
        y = a * h[None, :] + b
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
        h = tl.sum(tl.where(last, y, 0.0), axis=0)


@triton.jit
def _linear_recurrence_bwd_kernel(
    dy_ptr,
    a_ptr,
    y_ptr,
    state_ptr,
    da_ptr,
    db_ptr,
    dstate_ptr,
    steps,
    width,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """With g_t = dy_t + a_{t+1} g_{t+1}: db_t = g_t, da_t = g_t y_{t-1}, dstate = a_0 g_0."""
    blocks = tl.cdiv(width, COLUMNS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (col < width)[None, :]
    g = tl.zeros([COLUMNS], tl.float32)
    last = (tl.arange(0, STEPS) == STEPS - 1)[:, None]
    for start in tl.range(0, steps, STEPS, num_stages=2):
        t = steps - 1 - start - tl.arange(0, STEPS)
        at = (batch * steps + t)[:, None] * width + col[None, :]
        mask = (t >= 0)[:, None] & inside
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        after = mask & (t < steps - 1)[:, None]
        a_after = tl.load(a_ptr + at + width, mask=after, other=0.0).to(tl.float32)
        a_after = tl.where((t < 0)[:, None], 1.0, a_after)
        before = tl.load(y_ptr + at - width, mask=mask & (t > 0)[:, None], other=0.0)
        before = before.to(tl.float32)
        if state_ptr is not None:
            state = tl.load(state_ptr + batch * width + col, mask=col < width, other=0.0)
            before = tl.where((t == 0)[:, None], state.to(tl.float32)[None, :], before)
        factor, own = tl.associative_scan((a_after, dy), 0, _then)
        grad = factor * g[None, :] + own
        tl.store(db_ptr + at, grad.to(db_ptr.dtype.element_ty), mask=mask)
        tl.store(da_ptr + at, (grad * before).to(da_ptr.dtype.element_ty), mask=mask)
        g = tl.sum(tl.where(last, grad, 0.0), axis=0)
    if state_ptr is not None:
        # Steps before the first leave the gradient as it is, so g is that of step 0.
        at = batch * width + col
        first = batch * steps * width + col
        there = col < tl.where(steps > 0, width, 0)
        a = tl.load(a_ptr + first, mask=there, other=0.0).to(tl.float32)
        tl.store(dstate_ptr + at, (g * a).to(dstate_ptr.dtype.element_ty), mask=col < width)


def _grid(a: Tensor) -> tuple[tuple[int], dict[str, int]]:
    batch, steps, width = a.shape
    shape = {"STEPS": min(_STEPS, next_power_of_2(steps)), "COLUMNS": _COLUMNS, "num_warps": 4}
    return (triton.cdiv(width, _COLUMNS) * batch,), shape


def linear_recurrence(a: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    """Launches the forward kernel; the arguments of ``lmfast::linear_recurrence``."""
    y = a.new_empty(a.shape)
    if a.numel() == 0:
        return y
    grid, shape = _grid(a)
    with on_device(a):
        _linear_recurrence_fwd_kernel[grid](a, b, state, y, *a.shape[1:], **shape)
    return y


def linear_recurrence_backward(
    dy: Tensor, a: Tensor, y: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward kernel; the arguments of ``lmfast::linear_recurrence_backward``."""
    da, db = a.new_empty(a.shape), a.new_empty(a.shape)
    dstate = torch.zeros_like(a[:0, 0] if state is None else state)
    if a.numel() == 0:
        return da, db, dstate
    grid, shape = _grid(a)
    with on_device(a):
        _linear_recurrence_bwd_kernel[grid](dy, a, y, state, da, db, dstate, *a.shape[1:], **shape)
    return da, db, dstate
