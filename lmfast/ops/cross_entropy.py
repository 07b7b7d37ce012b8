"""Cross-entropy of given logits, with its gradient in one pass and in place where allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lmfast._dispatch import Op, implementation, register, register_op, select
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import (
    accumulation_dtype,
    check_same_device,
    check_tensor,
    define,
    is_readable,
    needs_grad,
    unsupported_by_cpu_kernels,
    with_unit_last_stride,
)
from lmfast.ops._linear_cross_entropy_arguments import (
    REDUCTIONS,
    check_loss_settings,
    check_target_range,
    with_shape,
)
from lmfast.ops._linear_cross_entropy_chunked import reduce_losses, row_losses
from lmfast.testing import Sample


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of logits.

    With ``lse = log(sum(exp(logits)))`` and ``s = label_smoothing``, the loss of a row is
    ``lse - (1 - s) * logits[target] - s * mean(logits) + z_loss * lse^2``. The gradient is
    computed together with the loss. Where the logits come from a linear layer,
    ``lmfast.ops.linear_cross_entropy`` does without them.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64; any strides.
        targets: (...) int64, the leading dimensions of logits; in [0, V) or ``ignore_index``.
        ignore_index: target of the rows without a loss and without a gradient.
        reduction: "mean" over the rows that are not ignored (0 if there are none), "sum", or
            "none" for one loss per row, 0 where ignored.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1].
        z_loss: weight of the squared logsumexp.
        inplace: the gradient may take the place of the logits, which saves their size in memory;
            they must not be used afterwards. Not with "none", where gradients differ by row.
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        A scalar, or targets' shape for "none"; float32 (float64 for float64 logits).

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes that do not fit, a target outside the classes, an unknown reduction,
            inplace with "none", with logits that are a leaf, or with overlapping ones.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++), triton, torch. Gradients on all; gradients of gradients through PyTorch, not in
        place.

    Source:
        Hsu et al., Liger Kernel, 2024, arXiv:2410.10989 (the gradient in place of the logits).

    Example:
        >>> import lmfast, torch
        >>> lmfast.ops.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor(1.3863)
    """
    args = _check(
        logits,
        targets,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        inplace=inplace,
    )
    chosen = select(OP, args, backend)
    if chosen.backend == "torch":
        return _reference(*args)
    if needs_grad(logits):
        return apply(_CrossEntropy, *args, chosen.backend)[0]
    return chosen.forward(*args)


def _check(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    inplace: bool = False,
) -> tuple[Any, ...]:
    check_tensor("logits", logits)
    check_loss_settings(targets, ignore_index, reduction, label_smoothing, z_loss)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one class, got shape {tuple(logits.shape)}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets must have logits' leading dimensions {tuple(logits.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    check_same_device("targets", targets, "logits", logits)
    check_target_range(targets, logits.shape[-1], ignore_index)
    if inplace:
        if reduction == "none":
            raise ValueError('inplace must be False with reduction "none"')
        if logits.requires_grad and logits.is_leaf:
            raise ValueError("inplace must be False for logits that are a leaf with a gradient")
        if not logits.is_contiguous():
            raise ValueError("logits must be contiguous with inplace, or inplace be False")
    return (
        with_unit_last_stride(logits),
        targets,
        ignore_index,
        reduction,
        float(label_smoothing),
        float(z_loss),
        bool(inplace),
    )


def _reference(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    inplace: bool,
) -> Tensor:
    flat = targets.reshape(-1)
    keep = flat != ignore_index
    rows = logits.reshape(-1, logits.shape[-1]).to(accumulation_dtype(logits.dtype))
    losses, *_ = row_losses(rows, torch.where(keep, flat, 0), label_smoothing, z_loss)
    return reduce_losses(losses, keep, reduction, targets.shape)


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def ids(classes: int, *shape: int) -> Tensor:
        return torch.randint(classes, shape, generator=generator, device=device)

    for n, v in ((1, 1), (3, 5), (7, 17), (4, 513), (33, 1031)):
        yield Sample(f"{n}x{v}", (normal(n, v) * 3, ids(v, n)))
    some = ids(19, 2, 9)
    some[:, 5:] = -100
    yield Sample("ignored", (normal(2, 9, 19), some))
    yield Sample("all ignored", (normal(3, 19), some[0, 5:8]))
    yield Sample("no rows", (normal(0, 19), ids(19, 0)))
    yield Sample("strided", (normal(9, 40)[::2, 3:22], ids(19, 5)), {"reduction": "sum"})
    yield Sample("none", (normal(2, 9, 19), some), {"reduction": "none"})
    yield Sample("smoothing", (normal(9, 35), ids(35, 9)), {"label_smoothing": 0.1})
    yield Sample("z-loss", (normal(9, 35), ids(35, 9)), {"z_loss": 0.01})
    yield Sample("large", (normal(9, 35) * 1e4, ids(35, 9)), {"reduction": "none"})
    masked = normal(5, 35)
    masked[:, 7:12] = float("-inf")
    yield Sample("classes masked out", (masked, ids(7, 5)))


def _fake(
    logits: Tensor,
    targets: Tensor,
    dloss: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
    want_dlogits: bool,
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    loss = logits.new_empty(
        (rows,) if reduction == 0 else (), dtype=accumulation_dtype(logits.dtype)
    )
    return loss, logits.new_empty(logits.shape if want_dlogits else (0,))


def _inplace_fake(
    logits: Tensor,
    targets: Tensor,
    dloss: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    return logits.new_empty((), dtype=accumulation_dtype(logits.dtype))


# Rows and targets flattened; dloss in fp64: (N,), or for a scalar loss (1,), None for ones. The
# second leaves the gradient in the logits.
_ARGUMENTS = (
    "Tensor targets, Tensor? dloss, SymInt ignore_index, int reduction, float label_smoothing, "
    "float z_loss"
)
_op = define(
    f"cross_entropy(Tensor logits, {_ARGUMENTS}, bool want_dlogits) -> (Tensor, Tensor)", _fake
)
_inplace_op = define(f"cross_entropy_(Tensor(a!) logits, {_ARGUMENTS}) -> Tensor", _inplace_fake)


class _CrossEntropy(torch.autograd.Function):
    """The gradient comes with the loss, for an incoming gradient of one. For another one it is
    computed again, which reads as much as scaling would and rounds once; so it is for reduction
    "none", in compiled graphs, and on a GPU, where looking at the incoming one would wait for it.
    Only in place of the logits it is scaled.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        *args, backend = inputs
        eager = is_readable(args[0])
        with_loss = args[-1] or (eager and args[3] != "none")
        return _with_gradient(backend, None, *args, want_dlogits=with_loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, targets, *settings, ctx.backend = inputs
        ctx.settings = tuple(settings)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(None if settings[-1] else logits, targets, output[1])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *unused: Any) -> tuple[Any, ...]:
        logits, targets, grad = ctx.saved_tensors
        *_, inplace = ctx.settings
        rest = (None,) * (len(ctx.settings) + 2)
        if recording_backward():
            if inplace:
                raise RuntimeError("cross_entropy: no gradient of a gradient with inplace=True")
            found = differentiate(
                lambda x: _reference(x, targets, *ctx.settings), (logits,), (dloss,)
            )
            return (*found, *rest)
        if inplace and torch.compiler.is_compiling():
            return ((grad * dloss).to(grad.dtype), *rest)
        as_it_is = (
            is_readable(dloss) and grad.numel() > 0 and dloss.numel() == 1 and dloss.item() == 1.0
        )
        if inplace:
            # Once: a second backward finds another version of the saved gradient and says so.
            if not as_it_is:
                return (grad.mul_(dloss), *rest)
            torch.autograd.graph.increment_version(grad)
        if as_it_is:
            return (grad, *rest)
        args = (logits, targets, *ctx.settings)
        return (_with_gradient(ctx.backend, dloss, *args, want_dlogits=True)[1], *rest)


def _with_gradient(
    backend: str, dloss: Tensor | None, *args: Any, want_dlogits: bool
) -> tuple[Tensor, Tensor]:
    run = implementation("cross_entropy", backend).backward
    assert run is not None
    return run(dloss, *args, want_dlogits=want_dlogits)


def launcher(op: Any, inplace_op: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The backward of an implementation by operators with the schemas above."""

    def run(
        dloss: Tensor | None,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        z_loss: float,
        inplace: bool,
        *,
        want_dlogits: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = logits.reshape(-1, logits.shape[-1])
        settings = (
            targets.reshape(-1).contiguous(),
            None if dloss is None else dloss.reshape(-1).double().contiguous(),
            ignore_index,
            REDUCTIONS.index(reduction),
            label_smoothing,
            z_loss,
        )
        if inplace and want_dlogits:
            loss = inplace_op(rows, *settings)
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version(logits)  # whoever saved them is to notice
            return loss, rows.detach().reshape(logits.shape)
        loss, dlogits = op(rows, *settings, want_dlogits)
        return (
            with_shape(loss, targets.shape) if reduction == "none" else loss,
            with_shape(dlogits, logits.shape) if want_dlogits else dlogits,
        )

    return run


OP = register_op(
    Op(
        name="cross_entropy",
        public=cross_entropy,
        reference=_reference,
        check=_check,
        sample_inputs=_samples,
        differentiable=("logits",),
    )
)

_cpu = launcher(_op, _inplace_op)
register(
    "cross_entropy",
    "cpu",
    ("cpu",),
    lambda *args: _cpu(None, *args, want_dlogits=False)[0],
    _cpu,
    lambda logits, *settings: unsupported_by_cpu_kernels(logits),
)
