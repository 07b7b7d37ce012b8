"""One step of a cache: which tokens come, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lmfast.cache._storage import Storage, on_device

Padding = Literal["right", "left"]


@dataclass(slots=True)
class NewTokens:
    """Where the tokens of one step belong, on the host: B rows, T tokens each, padding among them.

    Attributes:
        starts: (B,) lengths before the step; ends: after it.
        reach: (B,) what the queries may look at: `ends`, or up to the padding behind them.
        positions: (B, T) position of each token, padding included.
        kept: indices b * T + t of the tokens that are stored; None = all.
        longest: the largest of `ends`.
    """

    starts: np.ndarray
    ends: np.ndarray
    reach: np.ndarray
    positions: np.ndarray
    kept: np.ndarray | None
    longest: int


@dataclass(slots=True)
class Placement:
    """Where the tokens of one step lie in a group of layers, as the operators take it.

    Attributes:
        slots: (N,) int64, row * columns + column of every token that is stored.
        lengths: (B,) int64, keys per row, the new ones included, counted from column 0.
        longest: the largest of them.
        first: (B,) position of the token in column 0; None: 0.
        table: (B, columns / 64) int32, the row that holds each block of columns; None: row b.
        storage: of each layer of the group.
    """

    slots: Tensor
    lengths: Tensor
    longest: int
    first: np.ndarray | None
    table: Tensor | None
    storage: dict[int, Storage]


@dataclass(slots=True)
class Step:
    """What all layers of one step have in common.

    Attributes:
        shape: of k and v.
        tokens: which of the B * T tokens are stored; None = all.
        positions: for the rotation: of the first token of all rows, or (B,) of each, or (B, T).
    """

    shape: torch.Size
    new: NewTokens
    tokens: Tensor | None
    positions: int | Tensor


def check_integer(name: str, value: object) -> None:
    """TypeError for what is no integer, a truth value among it."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def integers(name: str, values: object) -> np.ndarray:
    """A sequence or tensor of integers as int64; TypeError for other numbers."""
    found = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values
    if not isinstance(found, Sequence) or isinstance(found, (str, bytes)):
        raise TypeError(f"{name} must be a sequence or 1-d tensor of integers, got {found!r}")
    for value in found:
        check_integer(f"every entry of {name}", value)
    return np.array(found, dtype=np.int64)


def new_tokens(
    lengths: np.ndarray, longest: int, steps: int, counts: Sequence[int] | None, padding: Padding
) -> NewTokens:
    """Where T tokens per row belong, of which `counts` are real and the others padding.

    `longest` is the largest length, so that a token more needs no search for it: numpy takes 3 us.

    Raises:
        TypeError: counts are not integers.
        ValueError: the counts or the side of the padding make no sense.
    """
    if padding not in ("right", "left"):
        raise ValueError(f'padding must be "right" or "left", got {padding!r}')
    if counts is None:
        ends = lengths + steps
        positions = lengths[:, None] + np.arange(steps)
        return NewTokens(lengths, ends, ends, positions, None, longest + steps if len(ends) else 0)
    real = integers("counts", counts)
    if real.shape != lengths.shape or (real < 0).any() or (real > steps).any():
        raise ValueError(
            f"counts must be {len(lengths)} numbers from 0 to T = {steps}, got {list(counts)}"
        )
    ends = lengths + real
    # Queries of right padding look at what lies behind the row's end, and nobody looks at them;
    # those of left padding stand before its new tokens.
    reach = lengths + steps if padding == "right" else ends
    positions = (reach - steps)[:, None] + np.arange(steps)
    kept = (positions >= lengths[:, None]) & (positions < ends[:, None])
    longest = int(ends.max(initial=0))
    return NewTokens(lengths, ends, reach, positions, np.flatnonzero(kept), longest)


def make_step(shape: torch.Size, new: NewTokens, longest: int, device: torch.device) -> Step:
    """The step of new tokens; `longest` is the longest row before it."""
    positions: int | Tensor = longest
    if new.kept is not None and (new.positions < 0).any():  # in front of the first token
        positions = on_device(new.positions.clip(0), device)
    elif (new.kept is not None or len(new.starts) > 1) and (new.positions[:, :1] != longest).any():
        positions = on_device(new.positions[:, 0].copy(), device)
    tokens = None if new.kept is None else on_device(new.kept, device)
    return Step(shape, new, tokens, positions)
