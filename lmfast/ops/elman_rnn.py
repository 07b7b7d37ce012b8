"""The Elman recurrent layer over whole sequences, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lmfast._dispatch import select
from lmfast.ops._recurrent_batch import (
    check_recurrent_arguments,
    recurrent_samples,
    register_recurrent_op,
)
from lmfast.testing import Sample


def elman_rnn(
    x: Tensor,
    state: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs one Elman layer over sequences.

    ``h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``, or relu instead of tanh. The state is
    kept in fp32 (fp64 for fp64 input).

    Args:
        x: (B, T, D), float32, bfloat16, float16 or float64; any strides. Time-major memory seen
            through ``transpose(0, 1)`` is read in place.
        state: (B, H), before the first step; None for zeros.
        weights: (w_ih (H, D), w_hh (H, H)), with b_ih (H,) and b_hh (H,) behind them or not, as
            in ``torch.nn.RNN``; any strides. The textbook's right-multiplied ``Wh``, ``Uh``, ``b``
            are ``(Wh.t(), Uh.t(), b)``, without a copy.
        nonlinearity: "tanh" or "relu".
        lengths: (B,) integers, real steps of each right-padded row; None: all T.
        reverse: from each row's last real step to its first.
        backend: overrides the choice of implementation.

    Returns:
        (y, state): y (B, T, H), zero behind a row's end, and the state (B, H) after each row's
        last step in the order of the loop.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit, lengths out of range, another nonlinearity.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++, not float64), cuda (C++: one kernel for all steps, weights on the chip, where
        they fit), torch (on a GPU cuDNN's layers). Gradients on all; gradients of gradients
        through PyTorch.
        With AMX, large products over all steps are those of `lmfast.ops.linear`: in fp32's
        accuracy, infinite inputs give NaN.
        With AMX or AVX512-BF16, at least 16 rows and a hidden size that is a multiple of 32,
        products run in bf16 for bf16 inputs, and for float32 ones under autocast or at
        ``torch.set_float32_matmul_precision("medium")``.

    Source:
        Elman, Finding Structure in Time, 1990.

    Example:
        >>> import lmfast, torch
        >>> x, w_ih, w_hh = torch.ones(1, 2, 3), torch.full((2, 3), 0.1), torch.full((2, 2), 0.1)
        >>> y, state = lmfast.ops.elman_rnn(x, None, (w_ih, w_hh))
        >>> y
        tensor([[[0.2913, 0.2913],
                 [0.3437, 0.3437]]])
    """
    args = _check(x, state, weights, nonlinearity=nonlinearity, lengths=lengths, reverse=reverse)
    return select(OP, args, backend).forward(*args)


def _check(
    x: Tensor,
    state: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Any, ...]:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    return check_recurrent_arguments(x, state, None, weights, lengths, nonlinearity, reverse)


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    return recurrent_samples(device, dtype, 1, False, [{}, {"nonlinearity": "relu"}])


OP = register_recurrent_op("elman_rnn", elman_rnn, _check, _samples)
