"""A recurrent plan in plain PyTorch, layer by layer: what its matrices are multiplied with.

Slow and readable; calibration runs it, and tests compare it with the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmfast.generation.engine.cells import CellLayer, CellPlan
from lmfast.generation.engine.plan import Linear
from lmfast.generation.engine.plan_forward import matrix_of, plain_products
from lmfast.nn.min_rnn import MinGRU, MinLSTM
from lmfast.ops._recurrent_reference import cell_step

_MINIMAL = {"min_gru": MinGRU, "min_lstm": MinLSTM}


class CellForward:
    """Runs texts through a plan.

    Rows are tokens, those of one text after the other.

    Args:
        plan: of the model.
        texts: of (T,) int64 each.
    """

    def __init__(self, plan: CellPlan, texts: Sequence[Tensor]) -> None:
        self._plan = plan
        self._ids = torch.cat([*texts])
        self._lengths = torch.tensor([len(t) for t in texts])
        self._starts = self._lengths.cumsum(0) - self._lengths

    def logits(self) -> Tensor:
        """After every token of all texts, (N, V)."""
        x = self.embed()
        for layer in self._plan.layers:
            x = self.layer(x, layer)
        (logits,) = plain_products(["head"], [self._plan.head], x)
        return logits

    def embed(self) -> Tensor:
        """What the first layer reads, (N, E)."""
        plan = self._plan
        table = plan.head.weight if plan.embedding is None else plan.embedding
        return matrix_of(table, plan.width)[self._ids]

    def layer(self, x: Tensor, layer: CellLayer) -> Tensor:
        """One layer, (N, E) to (N, E)."""
        cell = self._plan.cell
        projected = _product(layer.input, x)
        minimal = _MINIMAL.get(cell)
        keep = take = w_hh = b_hh = projected
        if minimal is not None:
            keep, take = minimal.gates(projected)
        else:
            w_hh, b_hh = _together(_state_gates(layer), x.shape[1])
        h = x.new_zeros(len(self._lengths), x.shape[1])
        c = torch.zeros_like(h)
        out = torch.empty_like(x)
        for t in range(int(self._lengths.max())):
            running = self._lengths > t
            at = self._starts[running] + t
            if minimal is not None:
                after, memory = keep[at] * h[running] + take[at], c[running]
            else:
                now = (projected[at], h[running], c[running])
                after, memory = cell_step(cell, *now, w_hh, b_hh)
            h[running], c[running], out[at] = after, memory, after
        return x + out if minimal is not None else out

    def operands(self, x: Tensor, layer: CellLayer) -> tuple[Tensor, Tensor]:
        """What a layer's matrices for states are multiplied with, of every token.

        Returns:
            The states before it (N, E), and what the textbook GRU's candidate sees of them.
        """
        before = self.layer(x, layer).roll(1, 0)
        before[self._starts] = 0.0
        if layer.candidate is None:
            return before, before
        reset = torch.sigmoid(_product(layer.input[:1], x) + _product(layer.state[:1], before))
        return before, reset * before


def _state_gates(layer: CellLayer) -> tuple[Linear, ...]:
    return layer.state if layer.candidate is None else (*layer.state, layer.candidate)


def _product(gates: Sequence[Linear], x: Tensor) -> Tensor:
    """``x W^T + b`` of all gates, next to each other."""
    return torch.cat(plain_products([""] * len(gates), gates, x), 1)


def _together(gates: Sequence[Linear], width: int) -> tuple[Tensor, Tensor]:
    """Matrices (G E, E) and biases (G E,) of all gates."""
    none = torch.zeros(width)
    biases = [none if g.bias is None else g.bias.detach().float() for g in gates]
    return torch.cat([matrix_of(g.weight, width) for g in gates]), torch.cat(biases)
