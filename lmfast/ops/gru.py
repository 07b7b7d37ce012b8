"""The GRU layer over whole sequences, forward and backward."""

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


def gru(
    x: Tensor,
    state: Tensor | None,
    weights: Sequence[Tensor],
    *,
    reset_after: bool = True,
    lengths: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs one GRU layer over sequences.

    With ``r, z = sigmoid(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``, torch's form is
    ``n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn))``, ``h_t = (1 - z) n + z h_{t-1}``, and
    the textbook's, with ``reset_after=False``,
    ``n = tanh(W_in x_t + b_in + W_hn (r h_{t-1}) + b_hn)``, ``h_t = (1 - z) h_{t-1} + z n``. The
    state is kept in fp32 (fp64 for fp64 input).

    Args:
        x: (B, T, D), float32, bfloat16, float16 or float64; any strides. Time-major memory seen
            through ``transpose(0, 1)`` is read in place.
        state: (B, H), before the first step; None for zeros.
        weights: (w_ih (3H, D), w_hh (3H, H)), with b_ih and b_hh (3H,) behind them or not, in the
            row order r, z, n of ``torch.nn.GRU``; any strides.
        reset_after: the reset gate acts after the product with W_hn (torch, cuDNN), or before it.
        lengths: (B,) integers, real steps of each right-padded row; None: all T.
        reverse: from each row's last real step to its first.
        backend: overrides the choice of implementation.

    Returns:
        (y, state): y (B, T, H), zero behind a row's end, and the state (B, H) after each row's
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
        With AMX or AVX512-BF16, torch's form, at least 16 rows and a hidden size that is a
        multiple of 32, products run in bf16 for bf16 inputs, and for float32 ones under autocast
        or at ``torch.set_float32_matmul_precision("medium")``.

    Source:
        Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, 2014.

    Example:
        >>> import lmfast, torch
        >>> x, w_ih, w_hh = torch.ones(1, 2, 3), torch.full((6, 3), 0.1), torch.full((6, 2), 0.1)
        >>> y, state = lmfast.ops.gru(x, None, (w_ih, w_hh))
        >>> y.shape, torch.equal(y[:, -1], state)
        (torch.Size([1, 2, 2]), True)
    """
    args = _check(x, state, weights, reset_after=reset_after, lengths=lengths, reverse=reverse)
    return select(OP, args, backend).forward(*args)


def _check(
    x: Tensor,
    state: Tensor | None,
    weights: Sequence[Tensor],
    *,
    reset_after: bool = True,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Any, ...]:
    cell = "gru" if reset_after else "gru_textbook"
    return check_recurrent_arguments(x, state, None, weights, lengths, cell, reverse)


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    return recurrent_samples(device, dtype, 3, False, [{}, {"reset_after": False}])


OP = register_recurrent_op("gru", gru, _check, _samples)
