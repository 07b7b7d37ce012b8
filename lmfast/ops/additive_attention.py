"""Additive (Bahdanau) attention: score, masked softmax and context in one pass, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfast._dispatch import Op, implementation, register, register_op, select
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import (
    accumulation_dtype,
    check_same_device,
    check_tensor,
    define,
    needs_grad,
    unsupported_by_cpu_kernels,
    with_unit_last_stride,
)
from lmfast.testing import Sample


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    w_query: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends to a sequence by the scores of a one-layer network.

    ``score_s = v . tanh(W_query query + keys_s)``, ``weights = softmax(score)`` over the keys that
    the mask leaves, ``context = sum_s weights_s values_s``. The keys are projected already: once
    per source sequence, not once per step. Biases of both projections belong to the keys.

    Args:
        query: (B, Q) for one step, or (B, T, Q) for all steps at once.
        keys: (B, S, A), projected; query's dtype, any strides.
        values: (B, S, D); query's dtype, any strides.
        w_query: (A, Q), query's dtype.
        v: (A,), query's dtype.
        mask: (B, S) bool, True where a key may be attended to; None: everywhere. What is hidden is
            never read. Where nothing is left, weights and context are zeros.
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        (context, weights): (B, D) and (B, S) for one step, (B, T, D) and (B, T, S) for all, in
        query's dtype.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes or devices that do not fit.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++) and triton (not float64), torch. Gradients on all, of context and weights;
        gradients of gradients through PyTorch.

    Source:
        Bahdanau, Cho and Bengio, Neural Machine Translation by Jointly Learning to Align and
        Translate, 2015, arXiv:1409.0473.

    Example:
        >>> import lmfast, torch
        >>> keys = torch.tensor([[[0.0], [1.0]]])
        >>> context, weights = lmfast.ops.additive_attention(
        ...     torch.ones(1, 3), keys, keys, torch.zeros(1, 3), torch.ones(1)
        ... )
        >>> weights
        tensor([[0.3183, 0.6817]])
    """
    args = _check(query, keys, values, w_query, v, mask=mask)
    return select(OP, args, backend).forward(*args)


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    w_query: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
) -> tuple[Any, ...]:
    query = check_tensor("query", query)
    if query.dim() not in (2, 3):
        raise ValueError(f"query must be (B, Q) or (B, T, Q), got {tuple(query.shape)}")
    given = {"keys": (keys, 3), "values": (values, 3), "w_query": (w_query, 2), "v": (v, 1)}
    for name, (t, dims) in given.items():
        if check_tensor(name, t).dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got {tuple(t.shape)}")
        if t.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {t.dtype}")
        check_same_device(name, t, "query", query)
    batch, length, width = keys.shape
    shapes = {
        "keys": (keys, (query.shape[0], length, width)),
        "values": (values, (batch, length, values.shape[2])),
        "w_query": (w_query, (width, query.shape[-1])),
        "v": (v, (width,)),
    }
    for name, (t, shape) in shapes.items():
        if t.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask))}")
        if mask.shape != (batch, length):
            raise ValueError(f"mask must have shape {(batch, length)}, got {tuple(mask.shape)}")
        check_same_device("mask", mask, "query", query)
    return query, keys, values, w_query, v, mask


def _project(query: Tensor, w_query: Tensor) -> Tensor:
    """(B, T, A), in the dtype sums are kept in."""
    wide = accumulation_dtype(query.dtype)
    q = F.linear(query.to(wide), w_query.to(wide))
    return q if query.dim() == 3 else q[:, None]


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Context (B, T, D) in values' dtype and weights (B, T, S) in q's, from projected queries."""
    wide = q.dtype
    k, x = keys.to(wide), values.to(wide)
    if mask is not None:  # before anything else, so that NaN in padding goes nowhere
        k, x = k.masked_fill(~mask[..., None], 0), x.masked_fill(~mask[..., None], 0)
    scores = torch.tanh(q[:, :, None] + k[:, None]) @ v.to(wide)  # [B, T, S]
    if mask is None:
        weights = scores.softmax(-1)
    else:
        hidden = ~mask[:, None]
        # A row without a key gets any finite scores, for a softmax that can be differentiated.
        empty = hidden.all(-1, keepdim=True)
        weights = scores.masked_fill(hidden & ~empty, float("-inf")).softmax(-1)
        weights = weights.masked_fill(hidden, 0)
    return (weights @ x).to(values.dtype), weights


def _reference(
    query: Tensor, keys: Tensor, values: Tensor, w_query: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    q = _project(query, w_query)
    context, weights = _attend(q.to(accumulation_dtype(query.dtype)), keys, values, v, mask)
    return _shaped(query, context, weights)


def _shaped(query: Tensor, context: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    context, weights = context.to(query.dtype), weights.to(query.dtype)
    return (context, weights) if query.dim() == 3 else (context[:, 0], weights[:, 0])


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator(device).manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def sample(name: str, batch: int, steps: int, length: int, a: int, d: int, **kw: Any) -> Sample:
        query = normal(batch, 5) if steps == 0 else normal(batch, steps, 5)
        keys, values = normal(batch, length, a), normal(batch, length, d)
        # v such that many keys have weight: one that takes all is one number, which tells little.
        return Sample(name, (query, keys, values, normal(a, 5) / 2, normal(a) / a**0.5), kw)

    lengths = torch.tensor([7, 0, 1], device=device)
    mask = torch.arange(7, device=device) < lengths[:, None]
    yield sample("one step", 2, 0, 5, 7, 3)
    yield sample("masked", 3, 2, 7, 4, 5, mask=mask)
    yield sample("masked one step", 3, 0, 7, 19, 17, mask=mask)
    yield sample("all steps", 2, 11, 13, 33, 35)
    yield sample(
        "holes", 1, 9, 70, 40, 67, mask=torch.rand(1, 70, generator=generator, device=device) < 0.5
    )
    yield sample("one key", 1, 3, 1, 1, 1)
    yield sample("long", 1, 3, 259, 16, 8)
    yield sample("no keys", 2, 3, 0, 4, 5)
    yield sample("no rows", 0, 3, 4, 4, 5)
    yield sample("no steps", 2, 3, 4, 4, 5).map(lambda t: t[:, :0] if t.shape == (2, 3, 5) else t)
    query, keys, values, w_query, v = sample("", 3, 4, 6, 18, 20).args
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    values = values.transpose(0, 1).contiguous().transpose(0, 1)
    yield Sample("strided", (query, keys, values, w_query.t().contiguous().t(), v))
    yield Sample("saturated", (query * 100, keys * 30, values, w_query, v))


def _forward_fake(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, steps, _ = query.shape
    return (
        keys.new_empty(batch, steps, values.shape[2]),
        query.new_empty(batch, steps, keys.shape[1]),
    )


def _backward_fake(
    dcontext: Tensor,
    dweights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        keys.new_empty(keys.shape),
        keys.new_empty(values.shape),
        query.new_empty(v.shape),
    )


_ARGUMENTS = "Tensor query, Tensor keys, Tensor values, Tensor v, Tensor? mask"
# query (B, T, A), v and weights in float32; keys, values and context in one storage dtype.
_forward_op = define(f"additive_attention({_ARGUMENTS}) -> (Tensor, Tensor)", _forward_fake)
_backward_op = define(
    f"additive_attention_backward(Tensor dcontext, Tensor? dweights, {_ARGUMENTS}, "
    "Tensor weights) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)


class _AdditiveAttention(torch.autograd.Function):
    """From projected queries to context and float32 weights, which are kept for the backward."""

    @staticmethod
    def forward(
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        v: Tensor,
        mask: Tensor | None,
        op: Any,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return op(q, with_unit_last_stride(keys), with_unit_last_stride(values), v, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, _, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, dcontext: Tensor | None, dweights: Tensor | None) -> tuple[Any, ...]:
        q, keys, values, v, mask, weights = ctx.saved_tensors
        if dcontext is None and dweights is None:
            return (None,) * 7
        if recording_backward():
            grads = differentiate(
                lambda *t: _attend(t[0], t[1], t[2], t[3], mask),
                (q, keys, values, v),
                (dcontext, dweights),
            )
            return *grads, None, None, None
        backward = implementation("additive_attention", ctx.backend).backward
        assert backward is not None
        if dcontext is None:
            dcontext = values.new_zeros(q.shape[0], q.shape[1], values.shape[2])
        grads = backward(dcontext, dweights, q, keys, values, v, mask, weights)
        return *grads, None, None, None


def launchers(
    forward_op: Any, backward_op: Any, backend: str
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, ...]]]:
    """(forward, backward) of an implementation by operators with the schemas above."""

    def forward(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        w_query: Tensor,
        v: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        # Differentiable by itself: the product with W_query is PyTorch's.
        with torch.autocast(query.device.type, enabled=False):
            q = _project(query, w_query).contiguous()
        tensors = (q, keys, values, v.float().contiguous())
        mask = None if mask is None else mask.contiguous()
        if needs_grad(*tensors):
            context, weights = apply(_AdditiveAttention, *tensors, mask, forward_op, backend)
        else:
            call = _AdditiveAttention.forward
            context, weights = call(*tensors, mask, forward_op, backend)
        return _shaped(query, context, weights)

    def backward(
        dcontext: Tensor,
        dweights: Tensor | None,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        v: Tensor,
        mask: Tensor | None,
        weights: Tensor,
    ) -> tuple[Tensor, ...]:
        return backward_op(
            with_unit_last_stride(dcontext),
            None if dweights is None else dweights.contiguous(),
            q,
            with_unit_last_stride(keys),
            with_unit_last_stride(values),
            v,
            mask,
            weights,
        )

    return forward, backward


def unsupported_by_kernels(check: Callable[..., str | None]) -> Callable[..., str | None]:
    """The ``supports`` of an implementation whose kernels take what ``check`` lets pass."""

    def supports(query: Tensor, *others: Tensor | None) -> str | None:
        if query.dtype == torch.float64:
            return "no kernel for torch.float64"
        return check(query, *others[:-1])

    return supports


OP = register_op(
    Op(
        name="additive_attention",
        public=additive_attention,
        reference=_reference,
        check=_check,
        sample_inputs=_samples,
        differentiable=("query", "keys", "values", "w_query", "v"),
    )
)

register(
    "additive_attention",
    "cpu",
    ("cpu",),
    *launchers(_forward_op, _backward_op, "cpu"),
    unsupported_by_kernels(unsupported_by_cpu_kernels),
)
