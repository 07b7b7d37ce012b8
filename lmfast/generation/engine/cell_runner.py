"""Runs a packed recurrent model step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmfast.generation.engine.cells import CellPlan, pack_cells
from lmfast.generation.engine.rounded_rows import (
    ROUNDED_FROM,
    rounding,
    short_rows,
    step_apart,
)
from lmfast.generation.engine.watch import Watch
from lmfast.generation.states import RecurrentState
from lmfast.ops._library import define

# Tokens of all rows that go through the layers together.
_TOKENS = 4096


def _fake(*args: object) -> None:
    return None


# ids (B, T), lengths (B); logits of the last token of each row, or with `all` of all real tokens.
# rounded: see rounded_rows.rounding.
_step = define(
    "engine_cells(Tensor weights, Tensor program, Tensor ids, Tensor lengths, bool all, "
    "int rounded, Tensor(a!) state, Tensor(b!) logits) -> ()",
    _fake,
)
# ids (B); chosen (steps, B) gets the tokens.
_greedy = define(
    "engine_cells_greedy(Tensor weights, Tensor program, Tensor ids, int rounded, "
    "Tensor(a!) state, Tensor(b!) logits, Tensor stops, Tensor(c!) chosen) -> ()",
    _fake,
)


class CellRunner:
    """A recurrent model packed for the CPU; its state is what the model's own `new_state` gives.

    Results do not depend on the number of threads, nor on what else is in the batch beyond the last
    bits. With narrower weights than "fp32", a row's products may be of bf16 where a call feeds it
    32 tokens or more; in a batch of as many rows all may.

    Args:
        make_plan: returns the model's plan; called again by `repack`.
        weights: "fp32", "bf16", "int8" or "int4".
        group: numbers of a row of integers that share a scale; None: all.
    """

    max_positions: int | None = None

    def __init__(
        self, make_plan: Callable[[], CellPlan], weights: str, group: int | None = None
    ) -> None:
        self._make_plan = make_plan
        self.weights, self.group = weights, group
        self._narrow = weights != "fp32"
        self.rounded_from = ROUNDED_FROM if self._narrow else 1
        self.device = torch.device("cpu")
        self.repack()

    def repack(self) -> None:
        """Pack the model's weights as they are now."""
        plan = self._make_plan()
        self._packed = pack_cells(plan, self.weights, self.group)
        self.vocab_size, self.pad_idx = plan.vocab, plan.pad_idx
        self._planes = len(plan.layers) * (2 if plan.cell == "lstm" else 1)
        self._width = plan.width
        self._watch = Watch(plan.parameters)

    def memory(self) -> int:
        """Bytes of the packed weights."""
        return self._packed.weights.nbytes

    def new_state(self, batch: int, capacity: int | None = None) -> RecurrentState:
        """Return the state before the first token, zeros."""
        return RecurrentState(torch.zeros(self._planes, batch, self._width))

    def step(
        self,
        ids: Tensor,
        state: RecurrentState,
        lengths: Tensor | None = None,
        *,
        all_positions: bool = False,
    ) -> tuple[Tensor, RecurrentState]:
        """Feed the next tokens, see `lmfast.generation.runner.Runner.step`.

        Raises:
            TypeError: ids or lengths of another type, a state that is no `RecurrentState`.
            ValueError: shapes, ids or lengths that do not fit, parameters that changed since
                packing.
        """
        counts = self._check(ids, state, lengths)
        batch, steps = ids.shape
        most = counts.tolist()
        if (short := short_rows(self._narrow, most)) is not None:
            return step_apart(self, ids, state, most, short, all_positions), state
        rounded = rounding(self._narrow, batch, max(most, default=0), all_positions)
        memory = self._own(state)
        size = max(1, _TOKENS // max(batch, 1))
        shape = (batch, steps, self.vocab_size) if all_positions else (batch, self.vocab_size)
        logits = torch.zeros(shape)
        for begin in range(0, steps, size):
            part = ids[:, begin : begin + size].contiguous()
            now = (counts - begin).clamp(0, part.shape[1])
            total = int(now.sum())
            if total == 0:
                break
            found = torch.empty(total if all_positions else batch, self.vocab_size)
            packed = self._packed.weights, self._packed.program
            _step(*packed, part, now, all_positions, rounded, memory, found)
            if all_positions:
                real = torch.arange(part.shape[1]) < now[:, None]
                logits[:, begin : begin + size][real] = found
            elif size >= steps and lengths is None:
                return found, state
            else:
                here = now > 0
                logits[here] = found[here]
        return logits, state

    def greedy(
        self, ids: Tensor, state: RecurrentState, steps: int, stops: Sequence[int] = ()
    ) -> Tensor:
        """Feed ids (B,), then up to `steps - 1` times the likeliest after them, in one call.

        Returns:
            (n, B) int64, the tokens chosen, 1 <= n <= steps; fewer once a row gets one of `stops`.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self._check(ids.view(-1, 1), state, None)
        batch = len(ids)
        chosen = torch.full((steps, batch), -1)
        if batch == 0:
            return chosen[:1]
        logits = torch.empty(batch, self.vocab_size)
        memory = self._own(state)
        ends = torch.tensor(stops, dtype=torch.int64)
        packed = self._packed.weights, self._packed.program
        rounded = rounding(self._narrow, batch, 1, True)
        _greedy(*packed, ids.contiguous(), rounded, memory, logits, ends, chosen)
        done = steps if not len(stops) else int((chosen[:, 0] >= 0).sum())
        return chosen[:done]

    def _own(self, state: RecurrentState) -> Tensor:
        """The state's memory, to be changed in place."""
        state.tensor = state.tensor.contiguous()
        return state.tensor

    def _check(self, ids: Tensor, state: RecurrentState, lengths: Tensor | None) -> Tensor:
        """Lengths (B,) int64."""
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            raise TypeError(f"ids must be an int64 tensor, got {getattr(ids, 'dtype', type(ids))}")
        if not isinstance(state, RecurrentState):
            raise TypeError(f"state must be a RecurrentState, got {type(state).__name__}")
        if ids.ndim != 2 or ids.shape[0] != state.batch or ids.shape[1] < 1:
            raise ValueError(
                f"ids must be (B, T) with T >= 1 and the {state.batch} rows of the state, got "
                f"{tuple(ids.shape)}"
            )
        expected = (self._planes, state.batch, self._width)
        if tuple(state.tensor.shape) != expected or state.tensor.dtype != torch.float32:
            raise ValueError(
                f"state must be float32 {expected}, got {state.tensor.dtype} "
                f"{tuple(state.tensor.shape)}"
            )
        if ids.numel():
            low, high = (int(v) for v in torch.aminmax(ids))
            if low < 0 or high >= self.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}, got {wrong}")
        if not self._watch.untouched():
            self._watch.check()
        if lengths is None:
            return torch.full((len(ids),), ids.shape[1])
        if not isinstance(lengths, Tensor) or lengths.is_floating_point():
            raise TypeError(f"lengths must be a tensor of integers, got {lengths!r}")
        low, high = 0, ids.shape[1]
        if lengths.shape != (len(ids),) or bool(((lengths < low) | (lengths > high)).any()):
            raise ValueError(
                f"lengths must be {len(ids)} numbers from 0 to T = {high}, got {lengths.tolist()}"
            )
        return lengths.to(torch.int64).contiguous()
