"""Attention of new queries on a preallocated cache of keys and values, for generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmfast._dispatch import Op, register, register_op, select
from lmfast.ops._cached_attention_arguments import check
from lmfast.ops._cached_attention_reference import CacheOptions, peer, reference
from lmfast.ops._cached_attention_samples import samples
from lmfast.ops._library import (
    REFUSALS,
    define,
    may_run_at_once,
    needs_grad,
    on_cpu,
    unsupported_by_cpu_kernels,
    with_unit_last_stride,
)


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
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
    """Attends the newest T tokens of every row to all keys that the row has in a cache.

    ``out = softmax(scale q k^T + alibi) v``. Query i of row b stands at position
    p = lengths[b] - T + i and sees the keys j <= p, with a window those after p - window. A query
    that sees no key gives zeros. Time grows with the lengths, not with the capacity, and nothing at
    or behind a row's length is read. Sums are kept in fp32. For inference: there is no gradient.

    Args:
        q: (B, H, T, D), float32, bfloat16, float16 or float64; any strides.
        keys, values: (R, Hkv, C, D), the storage, of one dtype: float32, bfloat16, float16 (q's
            dtype or not), float64, float8_e4m3fn, or int8 with scales; H a multiple of Hkv, head h
            reads head h // (H / Hkv). Without a table R = B. Read in place.
        lengths: integers of shape () or (B,): keys valid per row, the T new ones included.
        table: (B, ceil(C / 64)) int32: the keys of row b at positions [64 j, 64 j + 64) lie in
            storage row table[b, j], at the same positions there. So rows that begin alike (beams,
            a common prompt) share storage. Entries behind a row's length are not read. Default:
            storage row b.
        key_scales, value_scales: (R, Hkv, C) float32, for int8 storage: a key is its numbers times
            its scale.
        window: sliding window, in keys: a query sees itself and the window - 1 before it.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: (H,) logits of one more key per head, which has no value.
        alibi: (H,) slopes: ``slope * (j - p)`` is added to the scores.
        scale: of the products; default 1 / sqrt(D).
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        (B, H, T, D) in q's dtype, with q's order of dimensions in memory.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, scales without int8 or int8 without scales, a window
            that is not positive, a softcap outside 1e-30..1e30, a tensor that requires a gradient
            or has a tangent; on the CPU, a length beyond the capacity or a table entry in use that
            is no storage row.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cuda (up to 4 query rows per key head) and triton (neither for float64), cpu (C++; neither
        float64 nor float8_e4m3fn), torch.

    Source:
        Dao et al. 2022, arXiv:2205.14135 (online softmax); keys split over threads: Dao et al.
        2023, "Flash-Decoding for long-context inference".

    Example:
        >>> import lmfast, torch
        >>> keys, values = torch.randn(2, 1, 2, 100, 16).unbind(0)  # room for 100 keys
        >>> q = torch.randn(1, 4, 1, 16)
        >>> out = lmfast.ops.cached_attention(q, keys, values, torch.tensor([30]))
        >>> dense = lmfast.ops.attention(q, keys[:, :, :30], values[:, :, :30])
        >>> torch.allclose(out, dense, atol=1e-6)
        True
    """
    plain = bool not in (type(window), type(softcap), type(scale))
    if plain and may_run_at_once("cached_attention", backend):
        try:
            given = (q, keys, values, key_scales, value_scales, sinks, alibi)
            if on_cpu(*given, lengths, table) and not needs_grad(*given):
                return _operator(
                    q,
                    keys,
                    values,
                    lengths,
                    table,
                    key_scales,
                    value_scales,
                    window,
                    softcap,
                    sinks,
                    alibi,
                    scale,
                )
        except REFUSALS:
            pass
    args = check(
        q,
        keys,
        values,
        lengths,
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


def _fake(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(q)


_operator = define(
    "cached_attention(Tensor q, Tensor keys, Tensor values, Tensor lengths, Tensor? table, "
    "Tensor? key_scales, Tensor? value_scales, int? window, float? softcap, Tensor? sinks, "
    "Tensor? alibi, float? scale) -> Tensor",
    _fake,
)


def unsupported_by_kernels(
    check: Callable[..., str | None],
) -> Callable[..., str | None]:
    """The ``supports`` of an implementation whose kernels take what ``check`` lets pass."""

    def supports(
        q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *options: Any
    ) -> str | None:
        o = CacheOptions(*options)
        for t in (q, keys, o.key_scales, o.value_scales):
            if t is not None and t.dtype == torch.float64:
                return "no kernel for torch.float64"
        if q.shape[3] > 256:
            return f"the kernel takes head sizes to 256, got {q.shape[3]}"
        stored = () if keys.dtype == torch.int8 else (keys,)
        return check(q, *stored, o.sinks, o.alibi)

    return supports


_unsupported = unsupported_by_kernels(unsupported_by_cpu_kernels)


def launcher(op: Any) -> Callable[..., Tensor]:
    """The forward of an implementation by an operator with the schema above."""

    def run(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *options: Any) -> Tensor:
        o = CacheOptions(*options)
        return op(
            with_unit_last_stride(q),
            with_unit_last_stride(keys),
            with_unit_last_stride(values),
            lengths.contiguous(),
            None if o.table is None else o.table.contiguous(),
            None if o.key_scales is None else with_unit_last_stride(o.key_scales),
            None if o.value_scales is None else with_unit_last_stride(o.value_scales),
            o.window or None,
            o.softcap or None,
            None if o.sinks is None else o.sinks.float().contiguous(),
            None if o.alibi is None else o.alibi.float().contiguous(),
            o.scale,
        )

    return run


OP = register_op(
    Op(
        name="cached_attention",
        public=cached_attention,
        reference=reference,
        check=check,
        sample_inputs=samples,
        differentiable=(),
        peer=peer,
    )
)

register("cached_attention", "cpu", ("cpu",), launcher(_operator), None, _unsupported)
