"""minGRU and minLSTM: gates that do not look at the state, so that all steps are one scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfast import ops
from lmfast.nn.sizes import check_sizes


class _MinRNN(nn.Module):
    """One layer: a linear map of the input to gates and candidates, and a linear recurrence."""

    parts: int

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.linear = nn.Linear(input_size, self.parts * hidden_size, bias=bias)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.dim() != 3 or x.shape[-1] != self.input_size:
            raise ValueError(f"x must be (B, T, {self.input_size}), got {tuple(x.shape)}")
        keep, take = self.gates(self.linear(x))
        return ops.linear_recurrence(keep, take, state)

    @staticmethod
    def gates(projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is kept of the state and what is added to it, (..., H) each."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


def _positive(x: Tensor) -> Tensor:
    """x + 1/2 above zero, sigmoid(x) below: candidates stay positive, so nothing ever cancels."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


class MinGRU(_MinRNN):
    """A GRU whose gate and candidate depend on the input alone.

        z, v = W x_t + b;  h_t = (1 - s(z)) h_{t-1} + s(z) g(v)

    with g(v) = v + 1/2 above zero and s(v) below.

    Args:
        input_size, hidden_size: widths D and H.
        bias: of the linear map.

    Returns:
        Called with x (B, T, D) and a state (B, H) or None: all states (B, T, H) and the last one.

    Raises:
        ValueError: a size is not positive, x has another width.

    Backends: those of `lmfast.ops.linear_recurrence`.

    Source: Feng et al. 2024, Were RNNs All We Needed?, arXiv:2410.01201.

    Example:
        >>> import torch
        >>> y, h = MinGRU(3, 4)(torch.zeros(2, 5, 3))
        >>> y.shape, torch.equal(y[:, -1], h)
        (torch.Size([2, 5, 4]), True)
    """

    parts = 2

    @staticmethod
    def gates(projected: Tensor) -> tuple[Tensor, Tensor]:
        z, v = projected.chunk(2, -1)
        # 1 - s(z) as s(-z): right also where s(z) rounds to one.
        return torch.sigmoid(-z), torch.sigmoid(z) * _positive(v)


class MinLSTM(_MinRNN):
    """An LSTM whose gates and candidate depend on the input alone, its gates adding up to one.

        f, i, v = W x_t + b;  h_t = s(f) / (s(f) + s(i)) h_{t-1} + s(i) / (s(f) + s(i)) g(v)

    with g as in `MinGRU`.

    Args, Returns, Raises, Backends, Source: as of `MinGRU`.

    Example:
        >>> import torch
        >>> y, h = MinLSTM(3, 4)(torch.zeros(2, 5, 3))
        >>> y.shape, torch.equal(y[:, -1], h)
        (torch.Size([2, 5, 4]), True)
    """

    parts = 3

    @staticmethod
    def gates(projected: Tensor) -> tuple[Tensor, Tensor]:
        f, i, v = projected.chunk(3, -1)
        # s(f) / (s(f) + s(i)) = s(log s(f) - log s(i)): no quotient of two zeros.
        share = F.logsigmoid(f) - F.logsigmoid(i)
        return torch.sigmoid(share), torch.sigmoid(-share) * _positive(v)
