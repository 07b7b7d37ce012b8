"""Scaled dot-product attention for decoders: forward, backward, and decoding on a long cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lmfast._dispatch import (
    Op,
    implementation,
    register,
    register_op,
    select,
)
from lmfast._sharding import in_order
from lmfast.ops._attention_arguments import check
from lmfast.ops._attention_reference import Options, peer, reference
from lmfast.ops._attention_samples import samples
from lmfast.ops._attention_sdpa import preferred, sdpa
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import (
    REFUSALS,
    define,
    may_run_at_once,
    needs_grad,
    on_cpu,
    unsupported_by_cpu_kernels,
    with_unit_last_stride,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    q_offset: int | Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attends every query to the keys it may see; no (T, S) matrix is stored.

    ``out = softmax(scale q k^T + alibi + mask) v``. Query i stands at position p = q_offset + i
    and sees key j when j < lengths[b], j <= p (``causal``), |p - j| < window, and the mask allows
    it. A query that sees no key gives zeros, and no gradient. Sums are kept in fp32.

    Args:
        q: (B, H, T, D), float32, bfloat16, float16 or float64; any strides.
        k, v: (B, Hkv, S, D), q's dtype; H a multiple of Hkv, head h reads head h // (H / Hkv). A
            view of a larger cache is read in place, and nothing behind ``lengths`` is touched.
        causal: hide keys behind the query's position.
        q_offset: position of query 0: int, or integers of shape () or (B,). Default: the queries
            are the last ones, S - T, or lengths - T.
        mask: broadcastable to (B, H, T, S); bool (True: seen) or added to the scores (-inf, or the
            lowest number of its dtype: not seen).
        lengths: integers of shape () or (B,), 0 to S: the keys of row b are the first lengths[b].
        window: sliding window, in keys: a query sees itself and the window - 1 before it (and
            after it, unless causal).
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: (H,) logits of one more key per head, which has no value.
        alibi: (H,) slopes: ``slope * (j - p)`` is added to the scores.
        scale: of the products; default 1 / sqrt(D).
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        (B, H, T, D) in q's dtype, with q's order of dimensions in memory.

    Raises:
        TypeError: an argument of another kind, or dtypes that differ.
        ValueError: shapes that do not fit; a window that is not positive, a softcap outside
            1e-30..1e30, a q_offset beyond 2**61; on the CPU, lengths outside 0..S.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++) and triton (float32, bfloat16, float16), torch; on a GPU that is
        ``F.scaled_dot_product_attention``, and the first choice, for long plain attention in 16
        bit. Gradients for q, k, v and sinks on all, for mask and alibi through torch; gradients
        of gradients through PyTorch.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762; tiling and online softmax: Dao et al. 2022,
        arXiv:2205.14135; alibi: Press et al. 2021, arXiv:2108.12409; sinks: Xiao et al. 2023,
        arXiv:2309.17453.

    Example:
        >>> import lmfast, torch
        >>> q, k, v = torch.randn(3, 1, 2, 5, 16).unbind(0)
        >>> out = lmfast.ops.attention(q, k, v)
        >>> torch.allclose(out[:, :, 0], v[:, :, 0])  # the first query sees the first key only
        True
    """
    q, k, v = in_order(q), in_order(k), in_order(v)
    if backend is None and mask is window is softcap is sinks is alibi is None:
        out = _plain_call(q, k, v, causal, q_offset, lengths, scale)
        if out is not None:
            return out
    args = check(
        q,
        k,
        v,
        causal=causal,
        q_offset=q_offset,
        mask=mask,
        lengths=lengths,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi=alibi,
        scale=scale,
    )
    chosen = select(OP, args, backend)
    if chosen.backend == "torch":
        return _torch_forward(*args)
    if needs_grad(q, k, v, sinks):
        return apply(_Attention, *args, chosen.backend)[0]
    return chosen.forward(*args)[0]


_OPTIONS = (
    "bool causal, int? offset, Tensor? offsets, Tensor? lengths, Tensor? mask, int window, "
    "float softcap, Tensor? sinks, Tensor? alibi, float scale"
)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, *options: Any, for_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    for_gradient = for_gradient or options[len(Options._fields) :] == (True,)
    sums = q.new_empty((2 if for_gradient else 0, *q.shape[:3]), dtype=torch.float32)
    return torch.empty_like(q), sums


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


# The second result, for a backward, is each row's log-sum-exp in two parts, (2, B, H, T) float32: a
# reference value m of its scores (of the products alone, without options), and the sum of
# e^(score - m). Without a backward, (0, B, H, T).
_forward_op = define(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool for_gradient=False)"
    " -> (Tensor, Tensor)",
    _forward_fake,
)
_backward_op = define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor sums, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)


def _plain_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    q_offset: int | Tensor | None,
    lengths: Tensor | None,
    scale: float | None,
) -> Tensor | None:
    """The result of a call without options and gradients, if the C++ operator takes it as it is."""
    if not may_run_at_once("attention", None):
        return None
    offset, offsets = (None, q_offset) if isinstance(q_offset, Tensor) else (q_offset, None)
    try:
        if not on_cpu(q, k, v, offsets, lengths):
            return None
        # bool and int pass for each other in an operator.
        if isinstance(q_offset, bool) or not isinstance(causal, bool) or needs_grad(q, k, v):
            return None
        if scale is None:
            scale = 1.0 / math.sqrt(q.shape[3])
        return _forward_op(
            q, k, v, causal, offset, offsets, lengths, None, 0, 0.0, None, None, scale
        )[0]
    except (*REFUSALS, IndexError, ZeroDivisionError):
        return None


def _torch_forward(*args: Any) -> Tensor:
    return reference(*args) if preferred(*args) is None else sdpa(*args)


class _Attention(torch.autograd.Function):
    """Saves the output and the log-sum-exp of each query row, besides the inputs."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        *inputs, backend = args
        if backend == "cpu":
            return _cpu_forward(*inputs, for_gradient=True)
        return implementation("attention", backend).forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *options, ctx.backend = inputs
        out, sums = output
        o = Options(*options)
        ctx.mark_non_differentiable(sums)
        ctx.save_for_backward(q, k, v, out, sums, o.offsets, o.lengths, o.mask, o.sinks, o.alibi)
        ctx.options = o._replace(offsets=None, lengths=None, mask=None, sinks=None, alibi=None)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dsums: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, sums, offsets, lengths, mask, sinks, alibi = ctx.saved_tensors
        o = ctx.options._replace(
            offsets=offsets, lengths=lengths, mask=mask, sinks=sinks, alibi=alibi
        )
        if recording_backward():
            dq, dk, dv, dsinks = differentiate(
                lambda q, k, v, sinks: reference(q, k, v, *o._replace(sinks=sinks)),
                (q, k, v, sinks),
                (dout,),
            )
        else:
            backward = implementation("attention", ctx.backend).backward
            assert backward is not None
            dq, dk, dv, dsinks = backward(dout, q, k, v, out, sums, *o)
        grads = [dsinks if name == "sinks" else None for name in Options._fields]
        return dq, dk, dv, *grads, None


def _unsupported(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> str | None:
    o = Options(*options)
    if q.dtype == torch.float64:
        return "no kernel for torch.float64"
    if q.shape[3] > 256:
        return f"the kernel takes head sizes to 256, got {q.shape[3]}"
    if o.mask is not None and o.mask.dtype == torch.float64:
        return "no kernel for a torch.float64 mask"
    if needs_grad(o.mask):
        return "no kernel for the gradient of mask"
    if needs_grad(o.alibi):
        return "no kernel for the gradient of alibi"
    return unsupported_by_cpu_kernels(q, k, v, o.sinks, o.alibi)


def kernel_options(options: tuple[Any, ...]) -> Options:
    """The same options with their tensors as the C++ operators take them."""
    o = Options(*options)
    return o._replace(
        offsets=None if o.offsets is None else o.offsets.contiguous(),
        lengths=None if o.lengths is None else o.lengths.contiguous(),
        sinks=None if o.sinks is None else o.sinks.detach().float().contiguous(),
        alibi=None if o.alibi is None else o.alibi.detach().float().contiguous(),
    )


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, *options: Any, for_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    # Lists: PyTorch 2.14 does not trace generators inside an autograd function.
    q, k, v = [with_unit_last_stride(t) for t in (q, k, v)]
    return _forward_op(q, k, v, *kernel_options(options), for_gradient)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dout, q, k, v = [with_unit_last_stride(t) for t in (dout, q, k, v)]
    o = Options(*options)
    grads = _backward_op(dout, q, k, v, out, sums, *kernel_options(options))
    reference_value, total = sums.unbind(0)
    return *grads, sink_gradient(o.sinks, dout, out, reference_value, total)


def sink_gradient(
    sinks: Tensor | None, dout: Tensor, out: Tensor, m: Tensor, total: Tensor | float
) -> Tensor | None:
    """A sink takes the share e^(sink - m) / total of each row and gives it no value."""
    if sinks is None or not sinks.requires_grad:
        return None
    share = torch.exp(sinks.float()[:, None] - m) / total
    dsinks = -(share * (dout.float() * out.float()).sum(-1)).sum((0, 2))
    return dsinks.to(sinks.dtype)


OP = register_op(
    Op(
        name="attention",
        public=attention,
        reference=reference,
        check=check,
        sample_inputs=samples,
        differentiable=("q", "k", "v", "sinks"),
        peer=peer,
        prefer=preferred,
    )
)

register("attention", "cpu", ("cpu",), _cpu_forward, _cpu_backward, _unsupported)
