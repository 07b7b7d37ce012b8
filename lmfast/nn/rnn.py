"""torch.nn's recurrent layers with the loop over time in one fused operator per layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from lmfast._dispatch import Op, select
from lmfast._transforms import transform_of
from lmfast.nn.hooks import has_forward_hooks
from lmfast.ops._recurrent import cpu_layer
from lmfast.ops._recurrent_batch import sequence_under_autocast
from lmfast.ops._recurrent_both import cpu_both_ways
from lmfast.ops._recurrent_projected import projected_layer, runs_projected
from lmfast.ops._recurrent_reference import CELLS, Layer, Loop, made_layer
from lmfast.ops._recurrent_stack import cpu_stack, runs_as_wavefront
from lmfast.ops._recurrent_step import MAX_ROWS, is_plain, may_step, step_op
from lmfast.ops.elman_rnn import OP as ELMAN
from lmfast.ops.gru import OP as GRU_OP
from lmfast.ops.lstm import OP as LSTM_OP

_CELLS = {
    "RNN_TANH": (ELMAN, "tanh"),
    "RNN_RELU": (ELMAN, "relu"),
    "LSTM": (LSTM_OP, "lstm"),
    "GRU": (GRU_OP, "gru"),
}


def _fits(t: object, shape: tuple[int, ...], like: Tensor) -> bool:
    alike = isinstance(t, Tensor) and t.dtype == like.dtype and t.device == like.device
    return alike and t.shape == shape  # type: ignore[attr-defined]


def _exports_onnx() -> bool:
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def _states(hx: Any, lstm: bool) -> tuple[Any, ...] | None:
    """(h,) or (h, c); None for anything else."""
    if not lstm:
        return (hx,)
    return tuple(hx) if isinstance(hx, (tuple, list)) and len(hx) == 2 else None


def _runs_fused(op: Op, cell: str, x: Tensor, weights: list[Tensor | None]) -> bool:
    args = (x, None, None, *weights, None, cell, False)
    return select(op, args).backend == "cpu" or transform_of(x, *weights) is not None


class _FusedLayers(nn.RNNBase):
    """Takes the calls that the fused operator can run and leaves all others, among them every
    malformed one, to torch.nn's class, so that what they return or raise is torch.nn's.

    That class lends its forward and is no base: torch.compile refuses every instance of it.
    """

    _torch_layer: Any

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not torch.is_grad_enabled():
            stepped = self._one_step(input, hx)
            if stepped is not None:
                return stepped
        if torch.jit.is_tracing() or _exports_onnx():  # for those that know torch.nn's operators
            return self._torch_layer.forward(self, input, hx)
        self._update_flat_weights()
        narrow = torch.is_autocast_enabled("cpu")
        given = (input, hx)
        if narrow and isinstance(self._flat_weights[0], Tensor):
            given = sequence_under_autocast(given, self._flat_weights[0].dtype)
        prepared = self._prepare(*given)
        if prepared is None:
            return self._torch_layer.forward(self, input, hx)
        x, states, sizes, batch = prepared
        y, finals = self._layers(x, states, sizes, batch)
        if narrow:
            dtype = torch.get_autocast_dtype("cpu")
            if self.mode == "GRU":  # for which autocast has no rule: the dtype of its state
                dtype = (input.data if hx is None else hx).dtype
            y, finals = y.to(dtype), [s.to(dtype) for s in finals]
        result: Any
        if isinstance(input, PackedSequence):
            finals = [_permuted(s, input.unsorted_indices) for s in finals]
            result = PackedSequence(y, sizes, input.sorted_indices, input.unsorted_indices)
        else:
            y = y.view(-1, batch, y.shape[1])
            if input.dim() == 2:
                y, finals = y.squeeze(1), [s.squeeze(1) for s in finals]
            elif self.batch_first:
                y = y.transpose(0, 1)
            result = y
        return result, (tuple(finals) if self.mode == "LSTM" else finals[0])

    def __prepare_scriptable__(self) -> nn.RNNBase:
        """torch.nn's layer with these parameters: what ``torch.jit.script`` takes.

        It puts that layer into the model it is given, which then runs without the fused operators;
        script a deep copy to keep them.
        """
        own = type(self).forward is not _FusedLayers.forward
        if own or has_forward_hooks(self) or is_parametrized(self):
            raise NotImplementedError(
                f"torch.jit.script takes {type(self).__name__} as torch.nn's layer, without its "
                "hooks, parametrizations and a subclass's forward: remove them first"
            )
        options: dict[str, Any] = {"proj_size": self.proj_size} if self.proj_size else {}
        if self.mode.startswith("RNN"):
            options["nonlinearity"] = self.mode[4:].lower()
        sizes = (self.input_size, self.hidden_size, self.num_layers)
        options |= {"bias": self.bias, "batch_first": self.batch_first, "dropout": self.dropout}
        options |= {"bidirectional": self.bidirectional, "device": "meta"}
        layer: nn.RNNBase = self._torch_layer(*sizes, **options)
        for name in layer._flat_weights_names:
            setattr(layer, name, getattr(self, name))
        return layer.train(self.training)

    def _one_step(self, x: Any, hx: Any) -> Any:
        """The result for one time step without gradients, None for everything else.

        A stream's call is 10 us, a third of which would be looking at all tensors here: the
        operator looks at them anyway, and what it refuses is left to the way of sequences.
        Parameters come from the dictionary they are stored in.
        """
        op, cell = _CELLS[self.mode]
        if not may_step(op.name) or not is_plain(x) or x.dim() != 3:
            return None
        steps, batch, _ = x.shape
        if self.batch_first:
            steps, batch = batch, steps
        if steps != 1 or not 0 < batch <= MAX_ROWS:
            return None
        if self.bidirectional or self.proj_size or (self.dropout and self.training):
            return None
        h0, c0 = hx, None
        if cell == "lstm" and hx is not None:
            if type(hx) is not tuple or len(hx) != 2:
                return None
            h0, c0 = hx
        find = self._parameters.get
        weights: list[Any] = [find(name) for name in self._flat_weights_names]
        if torch.compiler.is_compiling():
            if _exports_onnx():
                return None
            shape = (self.num_layers, batch, self.hidden_size)
            given = [s for s in (h0, c0) if s is not None]
            if not all(is_plain(s) and s.shape == shape for s in given):
                return None
            # A weight that is computed, by a parametrization or a norm, is no parameter.
            if not all(is_plain(w) for w in weights) or x.shape[2] != self.input_size:
                return None
            y, h, c = step_op(x, h0, c0, weights, self.num_layers, CELLS.index(cell), False)
            return y, ((h, c) if cell == "lstm" else h)
        try:
            y, h, c = step_op(x, h0, c0, weights, self.num_layers, CELLS.index(cell), False)
        except (RuntimeError, TypeError, ValueError):
            return None
        return y, ((h, c) if cell == "lstm" else h)

    def _prepare(
        self, input: Any, hx: Any
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor | None, int] | None:
        """Rows in time-major order, states (L, B, H), batch sizes and B; None to leave the call."""
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        weight = self._flat_weights[0]
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
            return None
        if x.shape[-1:] != (self.input_size,):
            return None
        given = [w for w in self._flat_weights if w is not None]
        if any(w.dtype != x.dtype or w.device != x.device for w in given):
            return None
        if x.dim() not in ((2,) if packed else (2, 3)) or x.numel() == 0:
            return None
        op, cell = _CELLS[self.mode]
        if not _runs_fused(op, cell, x, self._weights_of(0)[:4]):
            return None
        sizes: Tensor | None = None
        unbatched = not packed and x.dim() == 2
        if isinstance(input, PackedSequence):
            sizes = input.batch_sizes
            order = input.sorted_indices  # in a graph no size may depend on numbers
            batch = int(sizes[0]) if order is None else order.shape[0]
        elif unbatched:
            batch = 1
        else:
            if self.batch_first:
                x = x.transpose(0, 1)
            batch = x.shape[1]
            x = x.reshape(-1, self.input_size)
        if self.proj_size and not runs_projected(x, self.hidden_size, batch):
            return None
        if hx is None:
            return x, None, sizes, batch
        states = _states(hx, self.mode == "LSTM")
        stack = self.num_layers * (2 if self.bidirectional else 1)
        rows = (stack,) if unbatched else (stack, batch)
        widths = (self.proj_size or self.hidden_size, self.hidden_size)
        if states is None:
            return None
        if not all(_fits(s, (*rows, n), x) for s, n in zip(states, widths, strict=False)):
            return None
        if unbatched:
            states = tuple(s.unsqueeze(1) for s in states)
        if packed:
            states = tuple(_permuted(s, input.sorted_indices) for s in states)
        return x, states, sizes, batch

    def _weights_of(self, index: int) -> list[Any]:
        """(w_ih, w_hh, b_ih, b_hh) of one layer and direction, behind them w_hr if it projects."""
        each = (4 if self.bias else 2) + (1 if self.proj_size else 0)
        found: list[Any] = list(self._flat_weights[index * each : (index + 1) * each])
        return found if self.bias else [*found[:2], None, None, *found[2:]]

    def _layers(
        self, x: Tensor, states: tuple[Tensor, ...] | None, sizes: Tensor | None, batch: int
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers over rows; returns the top's rows and the final states (L, B, H)."""
        cell = _CELLS[self.mode][1]
        directions = 2 if self.bidirectional else 1
        dropout = self.dropout if self.training else 0.0
        loop = Loop(sizes, batch, cell, False)
        all_ways: list[Layer] = []
        for index in range(self.num_layers * directions):
            given = [] if states is None else [s[index] for s in states]
            weights = self._weights_of(index)[:4]
            all_ways.append(made_layer((*(*given, None, None)[:2], *weights)))
        finals: list[tuple[Tensor, ...]] = []
        plain = directions == 1 and not self.proj_size
        if plain and not dropout and runs_as_wavefront(x, all_ways, loop):
            x, stack = cpu_stack(x, all_ways, loop)
            finals = [final if cell == "lstm" else final[:1] for final in stack]
            return x, [torch.stack(s) for s in zip(*finals, strict=True)]
        for layer in range(self.num_layers):
            if layer and dropout:
                x = F.dropout(x, dropout)
            ways = all_ways[layer * directions : (layer + 1) * directions]
            found: tuple[tuple[Tensor, Tensor, Tensor], ...]
            if self.proj_size:
                found = tuple(
                    projected_layer(
                        x,
                        way,
                        self._weights_of(layer * directions + i)[4],
                        loop._replace(reverse=i == 1),
                    )
                    for i, way in enumerate(ways)
                )
                x = torch.cat([way[0] for way in found], 1)
            elif directions == 2:
                found = cpu_both_ways(x, ways[0], ways[1], loop)
                x = torch.cat((found[0][0], found[1][0]), 1)
            else:
                found = (cpu_layer(x, ways[0], loop),)
                x = found[0][0]
            finals += [way[1 : 3 if cell == "lstm" else 2] for way in found]
        return x, [torch.stack(s) for s in zip(*finals, strict=True)]


def _refuse_projections(options: dict[str, Any]) -> None:
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def _permuted(state: Tensor, order: Tensor | None) -> Tensor:
    return state if order is None else state.index_select(1, order)


class RNN(_FusedLayers):
    """``torch.nn.RNN``, with each layer's loop over time in one operator.

    ``h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``, or relu.

    An ``nn.RNNBase`` but not an instance of ``torch.nn.RNN``, so that torch.compile takes it
    in one graph.

    Args:
        Those of ``torch.nn.RNN``; parameters, state_dict and initialisation are its own, so weights
        load both ways. Called as it, with tensors (T, B, D), (B, T, D) or (T, D), or a
        PackedSequence, and an optional state.

    Returns:
        Called: what ``torch.nn.RNN`` returns.

    Raises:
        What ``torch.nn.RNN`` raises.

    Backends: cpu (C++); everything else (other devices, float64) runs as ``torch.nn.RNN``.

    Source: Elman, Finding Structure in Time, 1990.

    Example:
        >>> import lmfast, torch
        >>> rnn = lmfast.nn.RNN(3, 4, num_layers=2, batch_first=True)
        >>> y, h = rnn(torch.zeros(2, 5, 3))
        >>> y.shape, h.shape
        (torch.Size([2, 5, 4]), torch.Size([2, 2, 4]))
    """

    _torch_layer = nn.RNN

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projections(kwargs)
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity {self.nonlinearity!r}. Select from 'tanh' or 'relu'."
            )
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)


class LSTM(_FusedLayers):
    """``torch.nn.LSTM``, with each layer's loop over time in one operator.

    ``c_t = s(f) c_{t-1} + s(i) tanh(g)``, ``h_t = s(o) tanh(c_t)`` with gates i, f, g, o from
    ``W_ih x_t + b_ih + W_hh h_{t-1} + b_hh``.

    An ``nn.RNNBase`` but not an instance of ``torch.nn.LSTM``, so that torch.compile takes it
    in one graph.

    Args:
        Those of ``torch.nn.LSTM``; parameters, state_dict and initialisation are its own, so
        weights load both ways. Called as it, PackedSequence included.

    Returns:
        Called: what ``torch.nn.LSTM`` returns.

    Raises:
        What ``torch.nn.LSTM`` raises.

    Backends: cpu (C++; projections where rows and state are few); everything else (other devices,
    float64) runs as ``torch.nn.LSTM``.

    Source: Hochreiter and Schmidhuber, Long Short-Term Memory, 1997.

    Example:
        >>> import lmfast, torch
        >>> lstm = lmfast.nn.LSTM(3, 4, bidirectional=True)
        >>> y, (h, c) = lstm(torch.zeros(5, 2, 3))
        >>> y.shape, c.shape
        (torch.Size([5, 2, 8]), torch.Size([2, 2, 4]))
    """

    _torch_layer = nn.LSTM

    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(_FusedLayers):
    """``torch.nn.GRU``, with each layer's loop over time in one operator.

    ``n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn))``, ``h_t = (1 - z) n + z h_{t-1}`` with
    r and z the sigmoids of their gates.

    An ``nn.RNNBase`` but not an instance of ``torch.nn.GRU``, so that torch.compile takes it
    in one graph.

    Args:
        Those of ``torch.nn.GRU``; parameters, state_dict and initialisation are its own, so
        weights load both ways. Called as it, PackedSequence included.

    Returns:
        Called: what ``torch.nn.GRU`` returns.

    Raises:
        What ``torch.nn.GRU`` raises.

    Backends: cpu (C++); everything else (other devices, float64) runs as ``torch.nn.GRU``.

    Source: Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, 2014.

    Example:
        >>> import lmfast, torch
        >>> gru = lmfast.nn.GRU(3, 4)
        >>> y, h = gru(torch.zeros(5, 2, 3))
        >>> y.shape, h.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """

    _torch_layer = nn.GRU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projections(kwargs)
        super().__init__("GRU", *args, **kwargs)
