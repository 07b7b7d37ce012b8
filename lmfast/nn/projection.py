"""Where layers multiply by their own matrices: the one place an update of a matrix enters."""

from __future__ import annotations

from torch import Tensor, nn

from lmfast import ops
from lmfast.nn.low_rank import LowRank


class Projections(nn.Module):
    """A module with matrices (in, out) of its own, which `project` multiplies by.

    A `LowRank` registered under `low_rank_name(weight)` takes part in the product.
    """

    def project(self, x: Tensor, weight: str, bias: str, *, relu: bool = False) -> Tensor:
        """Multiply x (..., in) by the parameter `weight` (in, out) and add the parameter `bias`."""
        matrix, offset = self._own(weight), self._own(bias)
        assert matrix is not None
        low_rank = self._modules.get(low_rank_name(weight))
        if low_rank is None:
            return ops.linear(x, matrix.t(), offset, relu=relu)
        y = low_rank(x, matrix.t(), offset)
        return y.relu() if relu else y

    def _own(self, name: str) -> Tensor | None:
        """The parameter of a name: quickly, or where it is computed, by a parametrization, so."""
        found = self._parameters.get(name)
        return getattr(self, name) if found is None else found


def low_rank_name(weight: str) -> str:
    """The name of the submodule with the updates of a parameter."""
    return f"{weight}_low_rank"


def low_rank_of(module: nn.Module, weight: str) -> LowRank | None:
    """The updates of a module's parameter that `Projections.project` uses, if any."""
    found = module._modules.get(low_rank_name(weight))
    return found if isinstance(found, LowRank) else None
