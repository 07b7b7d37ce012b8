"""Noticing that a model changed after it was packed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor


class Watch:
    """Remembers parameters as they are, weakly: whoever drops the model has its memory back."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        watched = [p for p in parameters if not p.is_inference()]
        # In one piece: threads may look while one of them finds that some have gone.
        self._known = (
            [weakref.ref(p) for p in watched],
            [p._version for p in watched],
            [p.data_ptr() for p in watched],
        )

    def untouched(self) -> bool:
        """The short test: no parameter has another version, and none is gone."""
        seen, versions, _ = self._known
        return [p._version for ref in seen if (p := ref()) is not None] == versions

    def check(self) -> None:
        """ValueError if one of the parameters changed; those that are gone cannot."""
        alive = [
            (ref, p, version, place)
            for ref, version, place in zip(*self._known, strict=True)
            if (p := ref()) is not None
        ]
        for _, p, version, place in alive:
            if p._version != version or p.data_ptr() != place:
                raise ValueError(
                    "the model's parameters changed since they were packed: make a new "
                    "Generator, or call the engine's repack()"
                )
        if len(alive) < len(self._known[0]):
            self._known = (
                [ref for ref, *_ in alive],
                [version for _, _, version, _ in alive],
                [place for *_, place in alive],
            )
