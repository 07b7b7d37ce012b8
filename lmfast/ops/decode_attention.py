"""One decoding step's attention: rotates, stores the new keys and values, and attends to all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmfast._dispatch import Op, implementation, register, register_op, select
from lmfast.ops import cached_attention, rope_append
from lmfast.ops._cached_attention_arguments import check as check_cached
from lmfast.ops._cached_attention_reference import TABLE_BLOCK, CacheOptions
from lmfast.ops._decode_attention_samples import samples
from lmfast.ops._library import (
    check_range,
    check_same_device,
    check_tensor,
    define,
    is_readable,
    needs_grad,
)
from lmfast.ops._rotation import check_tables


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    interleaved: bool = True,
    table: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Appends T new tokens of every row to a cache and attends from them to all that it holds.

    ``rope_append`` followed by ``cached_attention``, with places taken from the lengths: token t of
    row b stands at p = lengths[b] - T + t, is rotated for p, and is stored in column p of the row
    (with a table, of storage row table[b, p // 64]). Everything follows from tensors on the
    device, so a step can be captured once as a CUDA graph and replayed while the lengths grow. For
    inference: there is no gradient.

    Args:
        q: (B, H, T, D), float32, bfloat16, float16 or float64; any strides. Not written to.
        k, v: (B, Hkv, T, D), q's dtype; any strides.
        keys, values: (R, Hkv, C, D), the storage, as in ``cached_attention``. Written to.
        lengths: integers of shape () or (B,): keys per row, the T new ones included.
        cos, sin: (L, D_rot / 2) float32 from ``rope_tables``; None: nothing is rotated.
        interleaved: which elements are pairs, as in ``lmfast.ops.rope``.
        table: (B, ceil(C / 64)) int32, as in ``cached_attention``. Blocks that get new tokens must
            belong to one row alone.
        key_scales, value_scales: (R, Hkv, C) float32, for int8 storage. Written to.
        window, softcap, sinks, alibi, scale: as in ``cached_attention``.
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        (B, H, T, D) in q's dtype, with q's order of dimensions in memory.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, scales without int8 or int8 without scales, a tensor
            that requires a gradient or has a tangent; on the CPU, a length below T or beyond the
            capacity or the tables, or a table entry in use that is no storage row. On a GPU such a
            token is not stored, and a row that is too long gives NaN.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cuda (one launch, a second where the keys are split; up to 4 query rows per key head, 8
        where the storage has up to 32 MB; q's dtype, int8 or float8_e4m3fn storage), triton and
        cpu (both as two operators), torch.

    Source:
        Dao et al. 2023, "Flash-Decoding for long-context inference"; Su et al., RoFormer, 2021,
        arXiv:2104.09864.

    Example:
        >>> import lmfast, torch
        >>> keys, values = torch.zeros(2, 1, 2, 100, 16).unbind(0)  # room for 100 tokens
        >>> q, k, v = torch.randn(1, 4, 1, 16), *torch.randn(2, 1, 2, 1, 16).unbind(0)
        >>> cos, sin = lmfast.ops.rope_tables(100, 16)
        >>> out = lmfast.ops.decode_attention(q, k, v, keys, values, torch.tensor([1]), cos, sin)
        >>> torch.allclose(out, v.repeat_interleave(2, 1))  # one key: its value
        True
    """
    args = _check(
        *(q, k, v, keys, values, lengths, cos, sin),
        interleaved=interleaved,
        table=table,
        key_scales=key_scales,
        value_scales=value_scales,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi=alibi,
        scale=scale,
    )
    return select(OP, args, backend).forward(*args)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    interleaved: bool = True,
    **options: Any,
) -> tuple[Any, ...]:
    q, keys, values, lengths, *rest = check_cached(q, keys, values, lengths, **options)
    wanted = (q.shape[0], keys.shape[1], q.shape[2], q.shape[3])
    for name, t in (("k", k), ("v", v)):
        if check_tensor(name, t).dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {t.dtype}")
        if t.shape != wanted:
            raise ValueError(
                f"{name} must have shape (B, Hkv, T, D) {wanted}, got {tuple(t.shape)}"
            )
        check_same_device(name, t, "q", q)
    for name, t in (("keys", keys), ("values", values)):
        if any(size > 1 and step == 0 for size, step in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(
                f"{name} is written to, and must not be expanded: got strides {t.stride()} for "
                f"shape {tuple(t.shape)}; pass {name}.contiguous()"
            )
    if needs_grad(k, v):
        raise ValueError(
            "decode_attention has no gradient, and one of its tensors requires one: call it under "
            "torch.no_grad()"
        )
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must both be given, or neither")
    if q.shape[2] > 0 and is_readable(lengths):  # on a GPU even the difference is a kernel
        known = keys.shape[2] if cos is None else min(keys.shape[2], cos.shape[0])
        try:
            check_range("lengths", lengths - q.shape[2], known - q.shape[2] + 1)
        except ValueError:
            raise ValueError(
                f"lengths must lie in {q.shape[2]}..{known}, the {q.shape[2]} new tokens included, "
                f"got {lengths.tolist()}"
            ) from None
    if cos is not None and sin is not None:
        for name, t in (("cos", cos), ("sin", sin)):
            check_same_device(name, check_tensor(name, t), "q", q)
        dtype = check_tables(cos, sin, q)
        cos, sin = cos.to(dtype), sin.to(dtype)
    return q, k, v, keys, values, lengths, cos, sin, bool(interleaved), *rest


def slots_of(lengths: Tensor, steps: int, keys: Tensor, table: Tensor | None) -> Tensor:
    """(B * T,) int64, where each token goes: storage row * C + column; -1: nowhere."""
    batch, capacity = lengths.shape[0], keys.shape[2]
    column = lengths[:, None] - steps + torch.arange(steps, device=lengths.device)  # [B, T]
    inside = (column >= 0) & (column < capacity)
    if table is None or table.shape[1] == 0:
        row = torch.arange(batch, device=lengths.device)[:, None].expand_as(column)
    else:
        block = (column // TABLE_BLOCK).clamp(0, table.shape[1] - 1)
        row = table.long().gather(1, block)
        inside = inside & (row >= 0) & (row < keys.shape[0])
    return torch.where(inside, row * capacity + column, -1).flatten()


def _two_calls(append: Callable[..., Any], attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator from implementations of ``rope_append`` and ``cached_attention``."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        interleaved: bool,
        *options: Any,
    ) -> Tensor:
        o = CacheOptions(*options)
        steps = q.shape[2]
        slots = slots_of(lengths, steps, keys, o.table)
        starts = None if cos is None else lengths - steps
        if cos is not None:
            q = q.clone(memory_format=torch.preserve_format)
            if q.shape[3] > 1 and q.stride(3) != 1:
                q = q.contiguous()
        scales = (o.key_scales, o.value_scales)
        append(q, k, v, keys, values, *scales, slots, None, cos, sin, starts, 0, interleaved)
        return attend(q, keys, values, lengths, *options)

    return run


def _fake(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(q)


# For implementations in one call; the others are two operators.
_operator = define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor(c!)? key_scales, Tensor(d!)? value_scales, Tensor lengths, Tensor? table, Tensor? cos, "
    "Tensor? sin, bool interleaved, int? window, float? softcap, Tensor? sinks, Tensor? alibi, "
    "float? scale) -> Tensor",
    _fake,
)


def launch(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    """Calls ``lmfast::decode_attention`` with the normalised arguments."""
    lengths, cos, sin, interleaved, *options = rest
    o = CacheOptions(*options)
    return _operator(
        *(_unit(q), _unit(k), _unit(v), keys, values, o.key_scales, o.value_scales),
        lengths.contiguous(),
        *(None if t is None else t.contiguous() for t in (o.table, cos, sin)),
        interleaved,
        o.window or None,
        o.softcap or None,
        *(None if t is None else t.float().contiguous() for t in (o.sinks, o.alibi)),
        o.scale,
    )


def _unit(t: Tensor) -> Tensor:
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


OP = register_op(
    Op(
        name="decode_attention",
        public=decode_attention,
        reference=_two_calls(rope_append.OP.reference, cached_attention.OP.reference),
        check=_check,
        sample_inputs=samples,
        differentiable=(),
        mutates=("keys", "values", "key_scales", "value_scales"),
    )
)


def register_two_calls(backend: str, devices: tuple[str, ...]) -> None:
    """Registers a backend that has both operators."""
    append = implementation("rope_append", backend)
    attend = implementation("cached_attention", backend)

    def supports(*args: Any) -> str | None:
        q, k, v, keys, values, lengths, _cos, _sin, _interleaved, *options = args
        o = CacheOptions(*options)
        stored = (keys, values, o.key_scales, o.value_scales)
        # The queries are copied before they are rotated, and need not be neighbours in memory.
        reason = (
            append.supports(k, k, v, *stored)
            if k.stride(-1) == 1 or k.shape[-1] <= 1
            else (append.supports(k.contiguous(), k, v, *stored))
        )
        return reason or attend.supports(q, keys, values, lengths, *options)

    forward = _two_calls(append.forward, attend.forward)
    register("decode_attention", backend, devices, forward, None, supports)


register_two_calls("cpu", ("cpu",))
