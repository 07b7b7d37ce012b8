"""Low-rank updates of transformers' `Conv1D`, the linear layer of GPT-2, with weight (in, out)."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from torch import Tensor


def classes_in_use() -> dict[type, type]:
    """`Conv1D` -> its class with updates; empty where transformers' layers are not imported."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return {} if loaded is None else {loaded.Conv1D: _updated(loaded.Conv1D)}


@cache
def _updated(plain: type) -> type:
    class LowRankConv1D(plain):  # type: ignore[misc, valid-type]
        """`Conv1D` with updates in `low_rank`; a layer becomes one by its class alone."""

        def forward(self, x: Tensor) -> Tensor:
            return self.low_rank(x, self.weight.t(), self.bias)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _restored, (self.__dict__,)

    return LowRankConv1D


def _restored(state: dict[str, Any]) -> Any:
    from transformers.pytorch_utils import Conv1D

    module: Any = Conv1D.__new__(_updated(Conv1D))
    module.__dict__.update(state)
    return module
