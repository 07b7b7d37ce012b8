"""Additive attention for NVIDIA GPUs: the scores and their gradients.

Floor: B T S A hyperbolic tangents, two operations each of the units for transcendental functions;
the softmax and the products with the values are PyTorch's, on (B, T, S) numbers that take a
hundredth of that. A program scores a tile of queries x keys; the (B, T, S, A) tensor that the
formula stores exists only in its registers. Backward, one kernel serves queries and keys in turn:

    dx_i = v * sum_j ds_ij (1 - tanh^2(x_i + y_j))

so every sum has one owner, and the bits are the same every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmfast.triton._launch import next_power_of_2, on_device

_OTHERS = 16  # rows of a tile that are walked over
_ELEMENTS = 4096  # of a tile in registers


@triton.jit
def _tanh(x):
    """tanh and its slope, both without cancellation: the interpreter and the compiler share none.

    Near zero, where 1 - e would lose digits, the odd polynomial of the Cephes library.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    far = (1.0 - e) * inverse
    z = x * x
    near = -5.70498872745e-3
    near = near * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    h = tl.where(z < 0.390625, x + x * z * near, tl.where(x < 0.0, -far, far))
    return h, 4.0 * e * inverse * inverse


@triton.jit
def _additive_scores_kernel(
    q_ptr,
    keys_ptr,
    v_ptr,
    scores_ptr,
    steps,
    length,
    width,
    k0,
    k1,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(length, KEYS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    s = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    q_row = (batch * steps + t) * width
    key_row = batch * k0 + s.to(tl.int64) * k1
    total = tl.zeros([QUERIES, KEYS], tl.float32)
    for start in range(0, width, BLOCK):
        a = start + tl.arange(0, BLOCK)
        there = a < width
        mask = (t < steps)[:, None] & there[None, :]
        q = tl.load(q_ptr + q_row[:, None] + a[None, :], mask=mask, other=0.0)
        mask = (s < length)[:, None] & there[None, :]
        k = tl.load(keys_ptr + key_row[:, None] + a[None, :], mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + a, mask=there, other=0.0)
        h, _ = _tanh(q[:, None, :] + k[None, :, :])
        total += tl.sum(h * v[None, None, :], axis=2)
    at = (batch * steps + t)[:, None] * length + s[None, :]
    tl.store(scores_ptr + at, total, mask=(t < steps)[:, None] & (s < length)[None, :])


@triton.jit
def _additive_grad_kernel(
    x_ptr,
    y_ptr,
    ds_ptr,
    v_ptr,
    dx_ptr,
    dv_ptr,
    rows,
    others,
    width,
    x0,
    x1,
    y0,
    y1,
    ds0,
    ds1,
    ds2,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(rows, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    a = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = a < width
    mask = (i < rows)[:, None] & there[None, :]
    at = batch * x0 + i.to(tl.int64) * x1
    x = tl.load(x_ptr + at[:, None] + a[None, :], mask=mask, other=0.0).to(tl.float32)
    dx = tl.zeros([ROWS, BLOCK], tl.float32)
    dv = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, others, OTHERS):
        j = start + tl.arange(0, OTHERS)
        y_mask = (j < others)[:, None] & there[None, :]
        y_at = batch * y0 + j.to(tl.int64) * y1
        y = tl.load(y_ptr + y_at[:, None] + a[None, :], mask=y_mask, other=0.0).to(tl.float32)
        ds_at = batch * ds0 + i.to(tl.int64)[:, None] * ds1 + j.to(tl.int64)[None, :] * ds2
        both = (i < rows)[:, None] & (j < others)[None, :]
        ds = tl.load(ds_ptr + ds_at, mask=both, other=0.0)
        ds = ds[:, :, None]
        h, slope = _tanh(x[:, None, :] + y[None, :, :])
        # A hidden key has ds = 0 and may be NaN itself.
        dx += tl.sum(tl.where(ds != 0.0, ds * slope, 0.0), axis=1)
        if dv_ptr is not None:
            dv += tl.sum(tl.where(ds != 0.0, ds * h, 0.0), axis=1)
    v = tl.load(v_ptr + a, mask=there, other=0.0)
    at = (batch * rows + i)[:, None] * width + a[None, :]
    tl.store(dx_ptr + at, (dx * v[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)
    if dv_ptr is not None:
        at = tl.program_id(0).to(tl.int64) * width + a
        tl.store(dv_ptr + at, tl.sum(dv, axis=0), mask=there)


def _without_hidden(t: Tensor, mask: Tensor | None) -> Tensor:
    """(B, S, D) in fp32 with zeros for hidden keys, whatever they hold."""
    t = t.float()
    return t if mask is None else t.masked_fill(~mask[..., None], 0.0)


def additive_attention(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launches the kernel and PyTorch's; the arguments of ``lmfast::additive_attention``."""
    batch, steps, width = query.shape
    length = keys.shape[1]
    scores = query.new_zeros(batch, steps, length)
    if scores.numel() and width:
        of_queries = min(4, next_power_of_2(steps))
        of_keys = 16
        block = min(next_power_of_2(width), _ELEMENTS // (of_queries * of_keys))
        grid = (triton.cdiv(length, of_keys) * batch, triton.cdiv(steps, of_queries))
        with on_device(query):
            _additive_scores_kernel[grid](
                *(query, keys, v, scores, steps, length, width, *keys.stride()[:2]),
                QUERIES=of_queries,
                KEYS=of_keys,
                BLOCK=block,
                num_warps=4,
            )
    hidden = None if mask is None else ~mask[:, None]
    weights = (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).softmax(-1)
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0.0)  # a row without a key as well
    context = torch.bmm(weights, _without_hidden(values, mask))
    return context.to(keys.dtype), weights


def _gradient(
    x: Tensor, y: Tensor, ds: Tensor, v: Tensor, want_dv: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x (B, I, A) and v, for ds (B, I, J) and y (B, J, A)."""
    batch, rows, width = x.shape
    dx = x.new_empty(x.shape)
    of_rows = 4
    block = min(next_power_of_2(width), _ELEMENTS // (of_rows * _OTHERS))
    grid = (triton.cdiv(rows, of_rows) * batch, triton.cdiv(width, block))
    dv = v.new_empty(grid[0], width) if want_dv else None
    with on_device(x):
        _additive_grad_kernel[grid](
            *(x, y, ds, v, dx, dv, rows, y.shape[1], width),
            *(*x.stride()[:2], *y.stride()[:2], *ds.stride()),
            ROWS=of_rows,
            OTHERS=_OTHERS,
            BLOCK=block,
            num_warps=4,
        )
    return dx, None if dv is None else dv.sum(0)


def additive_attention_backward(
    dcontext: Tensor,
    dweights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches kernels and PyTorch's; the arguments of ``lmfast::additive_attention_backward``."""
    upstream = torch.bmm(dcontext.float(), _without_hidden(values, mask).transpose(1, 2))
    if dweights is not None:
        upstream = upstream + dweights
    ds = weights * (upstream - (weights * upstream).sum(-1, keepdim=True))
    dvalues = torch.bmm(weights.transpose(1, 2), dcontext.float()).to(values.dtype)
    if ds.numel() == 0 or query.shape[2] == 0:
        return query.new_zeros(query.shape), keys.new_zeros(keys.shape), dvalues, v * 0.0
    dquery, dv = _gradient(query, keys, ds, v, want_dv=True)
    dkeys, _ = _gradient(keys, query, ds.transpose(1, 2), v, want_dv=False)
    assert dv is not None
    return dquery, dkeys, dvalues, dv
