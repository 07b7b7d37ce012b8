"""Noticing that a model changed after it was packed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor


class Watch:
    """Remembers parameters as they are, weakly: whoever drops the model has its memory back."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        watched = [p for p in parameters if not p.is_inference()]
        self._seen = [weakref.ref(p) for p in watched]
        self._versions = [p._version for p in watched]
        self._places = [p.data_ptr() for p in watched]

    def untouched(self) -> bool:
        """The short test: no parameter has another version, and none is gone."""
        return [p._version for ref in self._seen if (p := ref()) is not None] == self._versions

    def check(self) -> None:
        """ValueError if one of the parameters changed; those that are gone cannot."""
        for index in reversed(range(len(self._seen))):
            p = self._seen[index]()
            if p is None:
                for known in (self._seen, self._versions, self._places):
                    del known[index]  # type: ignore[attr-defined]
            elif p._version != self._versions[index] or p.data_ptr() != self._places[index]:
                raise ValueError(
                    "the model's parameters changed since they were packed: call repack()"
                )
