"""The GRU as textbooks write it, with the reset gate before the product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lmfast.nn.padded import layers_of
from lmfast.ops._recurrent_batch import stack_forward
from lmfast.ops._recurrent_reference import made_layer
from lmfast.ops.gru import OP


class TextbookGRU(nn.RNNBase):
    """A stack of GRU layers whose reset gate acts on the state, not on the product.

    ``r, z = s(W_ih x + b_ih + W_hh h + b_hh)``, ``n = tanh(W_in x + b_in + W_hn (r h) + b_hn)``,
    ``h' = (1 - z) h + z n``. torch and cuDNN reset after the product with W_hn and have 1 - z for
    z, so that neither can run this form.

    Args:
        Those of ``torch.nn.GRU``. Parameters, their names and the call are its own, PackedSequence
        included; `lmfast.nn.gru_from_textbook` makes them from matrices on [h, x].

    Returns:
        Called: what ``torch.nn.GRU`` returns.

    Raises:
        What ``torch.nn.GRU`` raises.

    Backends: those of `lmfast.ops.gru`.

    Source: Cho et al. 2014, arXiv:1406.1078.

    Example:
        >>> import lmfast, torch
        >>> y, h = lmfast.nn.TextbookGRU(3, 4, bidirectional=True)(torch.zeros(5, 2, 3))
        >>> y.shape, h.shape
        (torch.Size([5, 2, 8]), torch.Size([2, 2, 4]))
    """

    reset_after = False

    # Not an nn.GRU, which computes something else and which torch.compile refuses to look into.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("proj_size", 0):
            raise ValueError("proj_size must be 0: only an LSTM has projections")
        super().__init__("GRU", *args, **kwargs)

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        lengths, packed = None, None
        if isinstance(input, PackedSequence):
            packed = input
            x, lengths = pad_packed_sequence(input, batch_first=True)
        else:
            if input.dim() not in (2, 3):
                raise ValueError(f"GRU: Expected input to be 2D or 3D, got {input.dim()}D instead")
            x = input[None] if input.dim() == 2 else input
            x = x if self.batch_first or input.dim() == 2 else x.transpose(0, 1)
        unbatched = packed is None and input.dim() == 2
        if hx is not None and unbatched:
            hx = hx[:, None]
        directions = 2 if self.bidirectional else 1
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, "
                f"got {x.shape[-1]}"
            )
        expected = (self.num_layers * directions, x.shape[0], self.hidden_size)
        if hx is not None and hx.shape != expected:
            raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.shape)}")
        y, h_n = self._layers(x, hx, lengths, directions)
        if packed is not None:
            return _packed_like(y, packed), h_n
        if unbatched:
            return y[0], h_n[:, 0]
        return (y if self.batch_first else y.transpose(0, 1)), h_n

    def _layers(
        self, x: Tensor, hx: Tensor | None, lengths: Tensor | None, directions: int
    ) -> tuple[Tensor, Tensor]:
        if directions == 1 and not (self.dropout and self.training) and lengths is None:
            states = [None] * self.num_layers if hx is None else hx.unbind(0)
            ways = zip(states, self.all_weights, strict=True)
            layers = [made_layer((h, None, *w)) for h, w in ways]
            found = stack_forward(OP, x, layers, "gru_textbook")
            if found is not None:
                return found
        return layers_of(self, x, hx, lengths)


def _packed_like(y: Tensor, packed: PackedSequence) -> PackedSequence:
    """The padded rows y (B, T, H) in the order and with the indices of a PackedSequence."""
    order = packed.sorted_indices
    rows = y if order is None else y.index_select(0, order)
    sequence = torch.arange(int(packed.batch_sizes[0]))
    lengths = (packed.batch_sizes[:, None] > sequence).sum(0)
    data = pack_padded_sequence(rows, lengths, batch_first=True).data
    return PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices)
