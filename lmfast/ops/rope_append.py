"""Rotary embedding of new queries and keys, and storing keys and values in a cache, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmfast._dispatch import Op, register, register_op, select
from lmfast.ops._library import (
    REFUSALS,
    check_range,
    check_same_device,
    check_tensor,
    define,
    may_run_at_once,
    needs_grad,
    on_cpu,
    unsupported_by_cpu_kernels,
    with_unit_last_stride,
)
from lmfast.ops._rope_append_samples import samples
from lmfast.ops._rotation import angles, check_positions, check_tables, rotate
from lmfast.ops._storage import FLOAT8, STORAGE_DTYPES, STORAGE_NAMES, rounded

# Vectors smaller than this are stored as zeros in int8: their inverse could overflow.
SMALLEST = 1e-30
# int8 storage needs a whole vector on the stack before the first element is written.
_MAX_QUANTISED_HEAD_DIM = 1024


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    positions: int | Tensor | None = None,
    interleaved: bool = True,
    tokens: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rotates q in place, and stores k, rotated, and v in a cache.

    ``keys[row, :, column] = rope(k)[b, :, t]`` and ``values[row, :, column] = v[b, :, t]`` where
    ``row, column = divmod(slots[b T + t], C)``. The rotation is ``lmfast.ops.rope``'s; k is rounded
    once, to the storage dtype, and is itself left as it is. int8 storage has one scale per vector:
    ``scale = max|x| / 127``, ``code = round(x / scale)``; a vector with NaN or infinity reads as
    NaN. float8_e4m3fn storage has none: numbers are rounded to the nearest, those beyond 448 to
    448, infinity to NaN. For inference: there is no gradient.

    Args:
        q: (B, H, T, D), float32, bfloat16, float16 or float64; any strides. Overwritten. H may
            be 0.
        k, v: (B, Hkv, T, D), q's dtype; any strides.
        keys, values: (R, Hkv, C, D), the storage, of one dtype: any of q's dtypes, int8 with
            scales, or float8_e4m3fn. Written to.
        slots: (N,) int64, where each token goes: row * C + column, no two alike.
        cos, sin: (L, D_rot / 2) float32 from ``rope_tables``; None: nothing is rotated.
        positions, interleaved: as in ``lmfast.ops.rope``.
        tokens: (N,) int64, which tokens are stored, counted as b * T + t; the others, padding, are
            not. Default: all B * T, in order.
        key_scales, value_scales: (R, Hkv, C) float32, for int8 storage. Written to.
        backend: overrides the choice of implementation.

    Returns:
        q.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit, scales without int8 or int8 without scales, positions
            past the tables, a tensor that requires a gradient or has a tangent, one to be written
            whose elements share memory; on the CPU, slots outside the storage or tokens that are
            not there. Nothing is written then.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++; stores no float8_e4m3fn), triton, torch.

    Source:
        Su et al., RoFormer, 2021, arXiv:2104.09864; the mapping of tokens to slots: Kwon et al.,
        PagedAttention, 2023, arXiv:2309.06180.

    Example:
        >>> import lmfast, torch
        >>> keys, values = torch.zeros(2, 1, 2, 100, 8).unbind(0)  # room for 100 tokens
        >>> cos, sin = lmfast.ops.rope_tables(100, 8)
        >>> q, k, v = torch.ones(3, 1, 2, 1, 8).unbind(0)
        >>> q = lmfast.ops.rope_append(
        ...     q, k, v, keys, values, torch.tensor([7]), cos, sin, positions=7
        ... )
        >>> torch.equal(keys[:, :, 7:8], q), keys[:, :, 8:].any().item()
        (True, False)
    """
    if may_run_at_once("rope_append", backend) and not isinstance(positions, bool):
        starts = positions if isinstance(positions, Tensor) else None
        offset = 0 if starts is not None else positions or 0
        scales = (key_scales, value_scales)
        try:
            data = (q, k, v, keys, values)
            indices = (slots, tokens)
            if on_cpu(*data, *scales, *indices, cos, sin, starts) and not needs_grad(*data):
                _op(*data, *scales, *indices, cos, sin, starts, offset, interleaved)
                return q
        except REFUSALS:
            pass
    args = _check(
        q,
        k,
        v,
        keys,
        values,
        slots,
        cos,
        sin,
        positions=positions,
        interleaved=interleaved,
        tokens=tokens,
        key_scales=key_scales,
        value_scales=value_scales,
    )
    select(OP, args, backend).forward(*args)
    return q


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    positions: int | Tensor | None = None,
    interleaved: bool = True,
    tokens: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> tuple[Any, ...]:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if check_tensor(name, t).dim() != 4:
            raise ValueError(f"{name} must have shape (B, heads, T, D), got {tuple(t.shape)}")
        if t.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {t.dtype}")
        check_same_device(name, t, "q", q)
    if (k.shape[0], k.shape[2], k.shape[3]) != (q.shape[0], q.shape[2], q.shape[3]):
        raise ValueError(
            f"k must agree with q in B, T and D, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    _check_storage(k, keys, values, key_scales, value_scales)
    count = k.shape[0] * k.shape[2]
    slots = _check_indices("slots", slots, k, None if tokens is not None else count)
    if tokens is not None:
        tokens = _check_indices("tokens", tokens, k, slots.shape[0])
    check_range("slots", slots, keys.shape[0] * keys.shape[2])
    if tokens is not None:
        check_range("tokens", tokens, count)
    rotated = () if cos is None else (("q", q),)
    for name, t in (*rotated, ("keys", keys), ("values", values)):
        if any(size > 1 and step == 0 for size, step in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(
                f"{name} is written to, and must not be expanded: got strides {t.stride()} for "
                f"shape {tuple(t.shape)}; pass {name}.contiguous()"
            )
    if needs_grad(q, k, v, keys, values):
        raise ValueError(
            "rope_append has no gradient, and one of its tensors requires one: call it under "
            "torch.no_grad()"
        )
    starts, offset = None, 0
    if cos is not None and sin is not None:
        for name, t in (("cos", cos), ("sin", sin)):
            check_same_device(name, check_tensor(name, t), "q", q)
        table = check_tables(cos, sin, q)
        cos, sin = cos.to(table), sin.to(table)
        starts, offset = check_positions(positions, q, cos.shape[0])
    elif cos is not None or sin is not None:
        raise ValueError("cos and sin must both be given, or neither")
    scales = (key_scales, value_scales)
    indices = (slots, tokens)
    return q, k, v, keys, values, *scales, *indices, cos, sin, starts, offset, bool(interleaved)


def _check_storage(
    k: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    for name, t in (("keys", keys), ("values", values)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in STORAGE_DTYPES:
            raise TypeError(f"{name} must be {STORAGE_NAMES}, got {t.dtype}")
        check_same_device(name, t, "k", k)
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"keys and values must have one shape and dtype, got {tuple(keys.shape)} {keys.dtype} "
            f"and {tuple(values.shape)} {values.dtype}"
        )
    if keys.dim() != 4 or (keys.shape[1], keys.shape[3]) != (k.shape[1], k.shape[3]):
        raise ValueError(
            f"keys must have shape (R, {k.shape[1]}, C, {k.shape[3]}) for k {tuple(k.shape)}, "
            f"got {tuple(keys.shape)}"
        )
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        if (scales is not None) != (keys.dtype == torch.int8):
            raise ValueError(
                f"{name} is for int8 storage, and needed there; keys and values are {keys.dtype}"
            )
        if scales is None:
            continue
        if check_tensor(name, scales).dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {scales.dtype}")
        if scales.shape != keys.shape[:3]:
            raise ValueError(
                f"{name} must have shape (R, Hkv, C) = {tuple(keys.shape[:3])}, "
                f"got {tuple(scales.shape)}"
            )
        check_same_device(name, scales, "keys", keys)


def _check_indices(name: str, value: object, k: Tensor, count: int | None) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {kind}")
    if value.dim() != 1 or (count is not None and value.shape[0] != count):
        wanted = "(N,)" if count is None else f"({count},), one per token"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    check_same_device(name, value, "k", k)
    return value


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8, scales float32 (...,)) of the vectors in the last dimension of ``x``."""
    x = x.float()
    top = x.abs().amax(-1)
    empty = top < SMALLEST
    inverse = torch.where(empty, torch.zeros_like(top), 127.0 / top)
    finite = top.isfinite()
    codes = torch.where(finite[..., None], x * inverse[..., None], torch.zeros_like(x)).round()
    scales = torch.where(empty, torch.zeros_like(top), top / 127.0)
    return codes.to(torch.int8), torch.where(finite, scales, torch.full_like(top, torch.nan))


def _store(
    x: Tensor, storage: Tensor, scales: Tensor | None, slots: Tensor, tokens: Tensor | None
) -> None:
    batch, heads, steps, dim = x.shape
    vectors = x.transpose(1, 2).reshape(batch * steps, heads, dim)
    if tokens is not None:
        vectors = vectors[tokens]  # [N, Hkv, D]
    rows, columns = slots // storage.shape[2], slots % storage.shape[2]
    if scales is None:
        storage[rows, :, columns] = rounded(vectors, storage.dtype)
    else:
        storage[rows, :, columns], scales[rows, :, columns] = quantised(vectors)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    slots: Tensor,
    tokens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
) -> None:
    if cos is not None and sin is not None:
        c, s = angles(cos, sin, positions, offset, k.shape[2])
        q.copy_(rotate(q, c, s, interleaved))
        k = rotate(k.to(c.dtype), c, s, interleaved)
    _store(k, keys, key_scales, slots, tokens)
    _store(v, values, value_scales, slots, tokens)


def _fake(*args: Any) -> None:
    return None


_op = define(
    "rope_append(Tensor(a!) q, Tensor k, Tensor v, Tensor(b!) keys, Tensor(c!) values, "
    "Tensor(d!)? key_scales, Tensor(e!)? value_scales, Tensor slots, Tensor? tokens, Tensor? cos, "
    "Tensor? sin, Tensor? positions, SymInt offset, bool interleaved) -> ()",
    _fake,
)


def launcher(op: Any) -> Callable[..., None]:
    """The forward of an implementation by an operator with the schema above."""

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
        keys, values, key_scales, value_scales, *indices, offset, interleaved = rest
        k, v = with_unit_last_stride(k), with_unit_last_stride(v)
        given = (None if t is None else t.contiguous() for t in indices)
        op(q, k, v, keys, values, key_scales, value_scales, *given, offset, interleaved)

    return run


def unsupported_by_kernels(
    check: Callable[..., str | None], *, float8: bool = False
) -> Callable[..., str | None]:
    """The ``supports`` of an implementation whose kernels take what ``check`` lets pass.

    Args:
        check: called with q, k and v.
        float8: the kernels store such numbers.
    """

    def supports(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, *rest: Any) -> str | None:
        if (keys.dtype == torch.float64) != (q.dtype == torch.float64):
            return f"no kernel that stores {q.dtype} as {keys.dtype}"
        if keys.dtype == FLOAT8 and not float8:
            return f"no kernel that stores {keys.dtype}"
        if keys.dtype == torch.int8 and keys.shape[3] > _MAX_QUANTISED_HEAD_DIM:
            return (
                f"int8 storage takes head sizes to {_MAX_QUANTISED_HEAD_DIM}, got {keys.shape[3]}"
            )
        values = rest[0]
        if any(t.stride(3) != 1 for t in (q, keys, values) if t.shape[3] > 1 and t.numel()):
            return "q, keys and values need head dimensions that are neighbours in memory"
        return check(q, k, v)

    return supports


OP = register_op(
    Op(
        name="rope_append",
        public=rope_append,
        reference=_reference,
        check=_check,
        sample_inputs=samples,
        differentiable=(),
        mutates=("q", "keys", "values", "key_scales", "value_scales"),
    )
)

register(
    "rope_append",
    "cpu",
    ("cpu",),
    launcher(_op),
    None,
    unsupported_by_kernels(unsupported_by_cpu_kernels),
)
