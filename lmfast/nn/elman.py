"""The Elman recurrent network: a stack of simple tanh units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmfast import ops
from lmfast.nn.hooks import has_hooks
from lmfast.nn.sizes import check_sizes
from lmfast.ops._recurrent_batch import stack_forward
from lmfast.ops._recurrent_reference import CELLS, Layer
from lmfast.ops._recurrent_step import MAX_ROWS, is_plain, may_step, step_op
from lmfast.ops.elman_rnn import OP

_TANH = CELLS.index("tanh")


class ElmanUnit(nn.Module):
    """One layer of the stack: a matrix for the input, one for the state, one bias.

        h_t = tanh(x_t Wh + h_{t-1} Uh + b)

    Args:
        dim: width E of input and state; parameters `Uh` (E, E), `Wh` (E, E), `b` (E).

    Returns:
        Called with x (B, E) and h (B, E), the next state (B, E).

    Source: Elman 1990, "Finding Structure in Time".

    Example:
        >>> import torch
        >>> unit = ElmanUnit(3)
        >>> unit(torch.zeros(2, 3), torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_sizes(dim=dim)
        self.Uh = nn.Parameter(torch.empty(dim, dim))
        self.Wh = nn.Parameter(torch.empty(dim, dim))
        self.b = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices, zero bias."""
        nn.init.xavier_uniform_(self.Uh)
        nn.init.xavier_uniform_(self.Wh)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(torch.addmm(self.b, x, self.Wh).addmm(h, self.Uh))

    def must_be_called(self) -> bool:
        """Whether hooks, or a forward of one's own, do more than the formula."""
        own = type(self).forward is not ElmanUnit.forward or "forward" in vars(self)
        return own or has_hooks(self)

    def scan(self, x: Tensor, h: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run over all steps of x (B, T, E) from state h (B, E); see `lmfast.ops.elman_rnn`."""
        weights = (self.Wh.t(), self.Uh.t(), self.b, torch.zeros_like(self.b))
        return ops.elman_rnn(x, h, weights, lengths=lengths)


class ElmanRNN(nn.Module):
    """A stack of Elman layers over a batch of sequences.

        h[l]_t = tanh(x[l]_t Wh[l] + h[l]_{t-1} Uh[l] + b[l]),   x[l+1] = h[l]

    Args:
        emb_dim: width E of every layer.
        num_layers: number L of layers; parameters `rnn_units.{l}.Uh|Wh|b`.

    Raises:
        ValueError: a size is not positive, or a state or length does not fit the input.

    Backends: `lmfast.ops.elman_rnn`.

    Source: Elman 1990, "Finding Structure in Time".

    Example:
        >>> import torch
        >>> rnn = ElmanRNN(3, 2)
        >>> y, state = rnn.forward_with_state(torch.zeros(4, 5, 3))
        >>> y.shape, state.shape
        (torch.Size([4, 5, 3]), torch.Size([2, 4, 3]))
    """

    def __init__(self, emb_dim: int, num_layers: int) -> None:
        super().__init__()
        check_sizes(emb_dim=emb_dim, num_layers=num_layers)
        self.emb_dim = emb_dim
        self.num_layers = num_layers
        self.rnn_units = nn.ModuleList(ElmanUnit(emb_dim) for _ in range(num_layers))

    def units(self) -> list[ElmanUnit]:
        """Return the layers, bottom first."""
        return [unit for unit in self.rnn_units if isinstance(unit, ElmanUnit)]

    def forward(self, x: Tensor, h0: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Return the top layer's states (B, T, E); arguments as in `forward_with_state`."""
        return self.forward_with_state(x, h0, lengths)[0]

    def forward_with_state(
        self, x: Tensor, h0: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the stack and also return where it ended.

        Args:
            x: (B, T, E).
            h0: (L, B, E) states before the first step, zeros by default.
            lengths: (B,) int64, number of real steps of each right-padded row; None = all T.

        Returns:
            The top layer's states (B, T, E), zero behind a row's end, and the states (L, B, E)
            after each row's last real step.
        """
        if x.ndim != 3 or x.shape[-1] != self.emb_dim:
            raise ValueError(f"x must be (B, T, {self.emb_dim}), got {tuple(x.shape)}")
        batch = x.shape[0]
        if h0 is None:
            h0 = x.new_zeros(self.num_layers, batch, self.emb_dim)
        elif h0.shape != (self.num_layers, batch, self.emb_dim):
            raise ValueError(
                f"h0 must be {(self.num_layers, batch, self.emb_dim)}, got {tuple(h0.shape)}"
            )
        if lengths is not None and lengths.shape != (batch,):
            raise ValueError(f"lengths must be ({batch},), got {tuple(lengths.shape)}")
        if any(unit.must_be_called() for unit in self.units()):
            return self._by_calls(x, h0, lengths)
        if x.shape[1] == 1 and lengths is None and may_step("elman_rnn"):
            weights = [w for unit in self.units() for w in (unit.Wh, unit.Uh, unit.b)]
            if 0 < batch <= MAX_ROWS and all(map(is_plain, (x, h0, *weights))):
                stepped = step_op(x, h0, None, weights, self.num_layers, _TANH, True)
                return stepped[0], stepped[1]
        if lengths is None:
            layers = [
                Layer(h, None, unit.Wh.t(), unit.Uh.t(), unit.b, None)
                for unit, h in zip(self.units(), h0.unbind(0))
            ]
            found = stack_forward(OP, x, layers, "tanh")
            if found is not None:
                return found
        y, final = x, []
        for unit, h in zip(self.units(), h0.unbind(0)):
            y, h = unit.scan(y, h, lengths)
            final.append(h)
        return y, torch.stack(final)

    def _by_calls(self, x: Tensor, h0: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Call every unit at every step, as the formula reads, for those who watch the calls."""
        final = []
        for unit, h in zip(self.units(), h0.unbind(0)):
            states = []
            for t in range(x.shape[1]):
                new = unit(x[:, t], h)
                running = None if lengths is None else (lengths > t)[:, None]
                h = new if running is None else torch.where(running, new, h)
                states.append(new if running is None else torch.where(running, new, 0))
            x = torch.stack(states, 1) if states else x
            final.append(h)
        return x, torch.stack(final)
