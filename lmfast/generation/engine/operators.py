"""The operators of a packed decoder, which csrc/cpu/engine.cpp implements."""

from __future__ import annotations

from lmfast.ops._library import define


def _fake(*args: object) -> None:
    return None


# rows (groups, B, 4): first token, how many, column of the first, columns in use afterwards.
# slots, tables: of each group. keys, values: of each layer; scales: of both in turn, or none.
# rope: cosines and sines in turn. rounded: see rounded_rows.rounding.
engine_step = define(
    "engine_step(Tensor weights, Tensor program, Tensor ids, Tensor positions, Tensor wanted, "
    "Tensor rows, Tensor[] slots, Tensor[] tables, Tensor(a!)[] keys, Tensor(b!)[] values, "
    "Tensor(c!)[] scales, Tensor[] rope, int rounded, Tensor(d!) logits) -> ()",
    _fake,
)

# positions (steps, B), slots (steps, B) of each group; chosen (steps, B) gets the tokens.
engine_greedy = define(
    "engine_greedy(Tensor weights, Tensor program, Tensor ids, Tensor positions, Tensor wanted, "
    "Tensor rows, Tensor[] slots, Tensor[] tables, Tensor(a!)[] keys, Tensor(b!)[] values, "
    "Tensor(c!)[] scales, Tensor[] rope, int rounded, Tensor(d!) logits, Tensor stops, "
    "Tensor(e!) chosen) -> ()",
    _fake,
)
