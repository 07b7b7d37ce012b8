"""The ids of several texts in one array: text i has ``ids[offsets[i]:offsets[i + 1]]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def with_rows(
    ids: np.ndarray, offsets: np.ndarray, rows: Mapping[int, Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Put the ids of some texts in the places where there are none yet."""
    parts: list[np.ndarray] = []
    lengths = np.diff(offsets)
    done = 0
    for i in sorted(rows):
        parts += [ids[offsets[done] : offsets[i]], np.array(rows[i], dtype=np.int32)]
        lengths[i] = len(rows[i])
        done = i
    parts.append(ids[offsets[done] :])
    return np.concatenate(parts), np.concatenate(([0], np.cumsum(lengths)))


def framed(
    ids: np.ndarray, offsets: np.ndarray, before: Sequence[int], after: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Put the same ids before and after each text."""
    count = len(offsets) - 1
    places = offsets + (len(before) + len(after)) * np.arange(count + 1)
    out = np.empty(places[-1], dtype=np.int32)
    own = np.ones(len(out), dtype=bool)
    frame = [(places[:-1] + i, id) for i, id in enumerate(before)]
    frame += [(places[1:] - len(after) + i, id) for i, id in enumerate(after)]
    for where, id in frame:
        out[where] = id
        own[where] = False
    out[own] = ids
    return out, places
