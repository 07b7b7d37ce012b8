"""The output layer and its loss in one operator, forward and backward, without the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmfast._dispatch import Op, implementation, register, register_op, select
from lmfast._transforms import transform_of
from lmfast.ops._autograd import apply, differentiate, recording_backward
from lmfast.ops._library import (
    define,
    is_readable,
    needs_grad,
    unsupported_by_cpu_kernels,
)
from lmfast.ops._linear_cross_entropy_arguments import (
    REDUCTIONS,
    check_linear_cross_entropy,
    linear_cross_entropy_samples,
    with_shape,
)
from lmfast.ops._linear_cross_entropy_chunked import (
    chunked_linear_cross_entropy,
    output_logits,
    reduce_losses,
    row_losses,
)

_WIDEST_FP32, _WIDEST_BF16 = 1024, 2048  # E up to which the C++ kernels win, see _cpu_supports


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T + bias``, without storing these logits.

    With ``y = hidden @ weight.T + bias`` (``y = softcap * tanh(y / softcap)`` if capped),
    ``lse = log(sum(exp(y)))`` and ``s = label_smoothing``, the loss of a row is
    ``lse - (1 - s) * y[target] - s * mean(y) + z_loss * lse^2``. It equals
    ``F.cross_entropy(F.linear(hidden, weight, bias), targets)``.

    Sums and gradients accumulate in fp32 (fp64 for fp64). fp32 products stay fp32 unless
    ``torch.set_float32_matmul_precision("medium")`` or autocast to bf16 allow bf16 ones, which
    need AMX or AVX512-BF16 on a CPU (AMX multiplies fp32 as exact sums of bf16 numbers, with
    fp32's accuracy). When a
    gradient is needed, it is computed together with the loss. Rows whose target is
    ``ignore_index`` are left out of the computation.

    Args:
        hidden: (..., E), float32, bfloat16, float16 or float64; any strides.
        weight: (V, E); the transposed view of an (E, V) parameter is as fast. Its gradient has
            its own strides and dtype.
        targets: (...) int64, the leading dimensions of hidden; in [0, V) or ``ignore_index``.
        bias: (V,) or None.
        ignore_index: target of the rows without a loss and without a gradient.
        reduction: "mean" over the rows that are not ignored (0 if there are none), "sum", or
            "none" for one loss per row, 0 where ignored.
        label_smoothing: share of the target spread evenly over the vocabulary, in [0, 1].
        z_loss: weight of the squared logsumexp, which keeps logits from drifting.
        softcap: bound of the logits, as Gemma 2 has it; None for none.
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.

    Returns:
        A scalar, or targets' shape for "none"; float32 (float64 for float64 input): a loss
        rounded to bf16 would have two digits.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes that do not fit, a target outside the vocabulary, an unknown reduction.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++), triton (in chunks of rows around cuBLAS's products), torch (in chunks of rows).
        Gradients on all; gradients of gradients through PyTorch with full logits.

    Source:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024,
        arXiv:2411.09009; Hsu et al., Liger Kernel, 2024, arXiv:2410.10989. z-loss: Chowdhery et
        al., PaLM, 2022, arXiv:2204.02311.

    Example:
        >>> import lmfast, torch
        >>> hidden, weight = torch.eye(2, 3), torch.eye(4, 3)
        >>> lmfast.ops.linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
        tensor(0.7437)
    """
    args = check_linear_cross_entropy(
        hidden,
        weight,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )
    chosen = select(OP, args, backend)
    if transform_of(*args):  # the chunks compute gradients themselves
        return _reference(*args)
    if needs_grad(hidden, weight, bias):
        wanted = tuple(t is not None and t.requires_grad for t in (hidden, weight, bias))
        return apply(_LinearCrossEntropy, *args, chosen.backend, wanted)[0]
    return _with_gradients(chosen.backend, None, args)[0]


def _reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    bf16: bool,
) -> Tensor:
    flat = targets.reshape(-1)
    keep = flat != ignore_index
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = output_logits(rows, weight, bias, softcap, bf16)
    losses, *_ = row_losses(logits, torch.where(keep, flat, 0), label_smoothing, z_loss)
    return reduce_losses(losses, keep, reduction, targets.shape)


def _with_gradients(
    backend: str,
    dloss: Tensor | None,
    args: tuple[Any, ...],
    wanted: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    if backend == "torch":
        return chunked_linear_cross_entropy(dloss, *args, wanted=wanted)
    run = implementation("linear_cross_entropy", backend).backward
    assert run is not None
    return run(dloss, *args, wanted=wanted)


def _scaling_is_exact(dloss: Tensor, grads: tuple[Tensor | None, ...]) -> bool:
    """Whether scaled gradients are as good as ones computed for ``dloss``: bf16 and fp16 would be
    rounded twice, unless the factor is a power of two, as loss scales and most numbers of
    accumulated batches are."""
    if not is_readable(dloss) or all(g is None or g.dtype == torch.float32 for g in grads):
        return True
    return abs(math.frexp(dloss.item())[0]) == 0.5


def _waits(hidden: Tensor, weight: Tensor, reduction: str, backend: str) -> bool:
    """Whether the gradients wait for the incoming one: it has a value per row, or it is the scale
    that keeps probabilities over the number of rows within the range of float16. (The C++ kernels
    hold them in fp32: of 2048 rows and 4000 classes, 0.03 % off here against 0.3 % at once.)"""
    narrow = torch.float16 in (hidden.dtype, weight.dtype) and backend != "cpu"
    return reduction == "none" or narrow


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients come with the loss, for an incoming gradient of one, and are scaled by the
    real one later, unless they have to wait for it.

    Eager mode gives the gradients away in the backward: an accumulating parameter can then keep
    them without a copy. A second backward through a retained graph computes them again, and so
    does a factor that would round them twice.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        *args, backend, wanted = inputs
        if _waits(args[0], args[1], args[5], backend):
            return (_with_gradients(backend, None, tuple(args))[0], None, None, None)
        return _with_gradients(backend, None, tuple(args), wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        hidden, weight, targets, bias, *settings, ctx.backend, ctx.wanted = inputs
        ctx.settings = tuple(settings)
        grads = output[1:]
        ctx.mark_non_differentiable(*(g for g in grads if g is not None))
        ctx.compiled = torch.compiler.is_compiling()
        ctx.waits = _waits(hidden, weight, settings[1], ctx.backend)
        ctx.grads = None if ctx.compiled or ctx.waits else grads
        ctx.save_for_backward(hidden, weight, targets, bias, *(grads if ctx.compiled else ()))

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *unused: Any) -> tuple[Any, ...]:
        hidden, weight, targets, bias, *grads = ctx.saved_tensors
        rest = (None,) * (len(ctx.settings) + 2)
        if recording_backward():
            dhidden, dweight, dbias = differentiate(
                lambda h, w, b: _reference(h, w, targets, b, *ctx.settings),
                (hidden, weight, bias),
                (dloss,),
            )
            return (dhidden, dweight, None, dbias, *rest)
        given, ctx.grads = ctx.grads, None
        if given is not None and _scaling_is_exact(dloss, given):
            if not (is_readable(dloss) and dloss.item() == 1.0):
                for g in given:
                    if g is not None:
                        g.mul_(dloss)
            dhidden, dweight, dbias = given
        elif ctx.compiled and not ctx.waits:
            dhidden, dweight, dbias = (
                None if g is None else (g * dloss).to(g.dtype) for g in grads
            )
        else:
            args = (hidden, weight, targets, bias, *ctx.settings)
            _, dhidden, dweight, dbias = _with_gradients(ctx.backend, dloss, args, ctx.wanted)
        return (dhidden, dweight, None, dbias, *rest)


def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    dloss: Tensor | None,
    mean: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    bf16: bool,
    want_dhidden: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = hidden.shape
    return (
        hidden.new_empty((rows,) if reduction == 0 else (), dtype=torch.float32),
        hidden.new_empty((rows if want_dhidden else 0, width)),
        torch.empty_like(weight) if want_dweight else weight.new_empty(0),
        hidden.new_empty(weight.shape[0] if want_dbias else 0, dtype=torch.float32),
    )


# Rows and targets flattened; bias, dloss and mean in fp32. dloss: (N,) or for a scalar loss (1,),
# None for ones. mean: with label_smoothing, of weight's rows, the mean bias behind it, in two parts
# of which the second is what fp32 leaves of the first (a bias of 1e6 has one digit behind the
# point, and what is common to all logits does not cancel without the others). Returns the
# loss and the gradients wanted, empty tensors for the others.
_op = define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "Tensor? dloss, Tensor? mean, SymInt ignore_index, int reduction, "
    "float label_smoothing, float z_loss, float softcap, bool bf16, bool want_dhidden, "
    "bool want_dweight, bool want_dbias) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def launcher(op: Any, takes_mean: bool) -> Callable[..., Any]:
    """The backward of an implementation by an operator with the schema above.

    Args:
        op: the operator.
        takes_mean: whether it needs ``mean`` with label_smoothing.
    """

    def run(
        dloss: Tensor | None,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        bf16: bool,
        *,
        wanted: tuple[bool, bool, bool] = (False, False, False),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        rows = hidden.reshape(-1, hidden.shape[-1])
        mean = None
        if takes_mean and label_smoothing:
            mean_bias = rows.new_zeros((), dtype=torch.float64)
            if bias is not None:
                mean_bias = bias.mean(dtype=torch.float64)
            low = (mean_bias - mean_bias.float()).nan_to_num()  # not of an infinite mean
            parts = torch.stack((mean_bias, low)).float()
            mean = torch.cat((weight.mean(0, dtype=torch.float32), parts))
        loss, dhidden, dweight, dbias = op(
            rows,
            weight,
            targets.reshape(-1).contiguous(),
            None if bias is None else bias.float().contiguous(),
            None if dloss is None else dloss.reshape(-1).float().contiguous(),
            mean,
            ignore_index,
            REDUCTIONS.index(reduction),
            label_smoothing,
            z_loss,
            softcap,
            bf16,
            *wanted,
        )
        return (
            with_shape(loss, targets.shape) if reduction == "none" else loss,
            with_shape(dhidden, hidden.shape) if wanted[0] else None,
            dweight if wanted[1] else None,
            dbias.to(bias.dtype) if wanted[2] and bias is not None else None,
        )

    return run


def _cpu_supports(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    bf16: bool,
) -> str | None:
    if torch.float64 in (hidden.dtype, weight.dtype):
        return "no kernel for torch.float64"
    if hidden.shape[-1] == 0:
        return "no kernel for rows of hidden without elements"
    if label_smoothing and softcap:
        return "label_smoothing together with softcap runs on the torch backend only"
    # One thread, 512 rows: at E = 2048 and 16 k classes fp32 917 ms against 719 in chunks (bf16
    # 214 against 293), at E = 4096 and 8 k classes 1005 against 642 (294 against 216).
    rounded = bf16 or hidden.dtype == weight.dtype == torch.bfloat16
    if hidden.shape[-1] > (_WIDEST_BF16 if rounded else _WIDEST_FP32):
        return f"E = {hidden.shape[-1]} is faster in chunks of rows with PyTorch's products"
    return unsupported_by_cpu_kernels(hidden, weight, bias)


OP = register_op(
    Op(
        name="linear_cross_entropy",
        public=linear_cross_entropy,
        reference=_reference,
        check=check_linear_cross_entropy,
        sample_inputs=linear_cross_entropy_samples,
        differentiable=("hidden", "weight", "bias"),
    )
)

_cpu = launcher(_op, takes_mean=True)
register(
    "linear_cross_entropy", "cpu", ("cpu",), lambda *args: _cpu(None, *args)[0], _cpu, _cpu_supports
)
