"""The LSTM layer over whole sequences, forward and backward."""

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


def lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Runs one LSTM layer over sequences.

    With ``i, f, g, o = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh`` and s the sigmoid:
    ``c_t = s(f) c_{t-1} + s(i) tanh(g)``, ``h_t = s(o) tanh(c_t)``. States are kept in fp32 (fp64
    for fp64 input).

    Args:
        x: (B, T, D), float32, bfloat16, float16 or float64; any strides. Time-major memory seen
            through ``transpose(0, 1)`` is read in place.
        state: (h, c), each (B, H), before the first step; None for zeros.
        weights: (w_ih (4H, D), w_hh (4H, H)), with b_ih and b_hh (4H,) behind them or not, in the
            row order i, f, g, o of ``torch.nn.LSTM``; any strides.
        lengths: (B,) integers, real steps of each right-padded row; None: all T.
        reverse: from each row's last real step to its first.
        backend: overrides the choice of implementation.

    Returns:
        (y, (h, c)): y (B, T, H), zero behind a row's end, and the states (B, H) after each row's
        last step in the order of the loop.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit, lengths out of range.
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
        Hochreiter and Schmidhuber, Long Short-Term Memory, 1997; Gers et al., Learning to Forget,
        2000.

    Example:
        >>> import lmfast, torch
        >>> x, w_ih, w_hh = torch.ones(1, 2, 3), torch.full((8, 3), 0.1), torch.full((8, 2), 0.1)
        >>> y, (h, c) = lmfast.ops.lstm(x, None, (w_ih, w_hh))
        >>> y.shape, torch.equal(y[:, -1], h)
        (torch.Size([1, 2, 2]), True)
    """
    args = _check(x, state, weights, lengths=lengths, reverse=reverse)
    return select(OP, args, backend).forward(*args)


def _check(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Any, ...]:
    if state is not None and (not isinstance(state, (tuple, list)) or len(state) != 2):
        raise TypeError(f"state must be a tuple (h, c), got {type(state).__name__}")
    h0, c0 = state or (None, None)
    return check_recurrent_arguments(x, h0, c0, weights, lengths, "lstm", reverse)


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    return recurrent_samples(device, dtype, 4, True, [{}])


OP = register_recurrent_op("lstm", lstm, _check, _samples)
