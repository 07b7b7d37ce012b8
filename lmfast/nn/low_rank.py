"""Low-rank updates of a weight: beside a layer that multiplies by it, or of a bare parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfast import ops


@dataclass(frozen=True)
class Update:
    """One update ``scale A B`` of some columns of a weight read as (in, out).

    Attributes:
        name: of the part that is updated; with columns of a packed weight, that part's own.
        start, size: its columns.
        rank: R, columns of A.
        scale: of the product.
    """

    name: str
    start: int
    size: int
    rank: int
    scale: float


class LowRank(nn.Module):
    """The updates of one weight: A (in, R) and B (R, size) of each, and whether they are in it.

    A is drawn as torch.nn.Linear draws its weight, B is zero: at first nothing changes.

    Args:
        in_features: rows of the weight read as (in, out).
        out_features: its columns.
        updates: of disjoint columns.
        dropout: share of the input's features that the updates do not see while training.
        dtype, device: of A and B.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        updates: Sequence[Update],
        *,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.updates = tuple(updates)
        self.dropout = dropout
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for update in self.updates:
            a = torch.empty(in_features, update.rank, dtype=dtype, device=device)
            nn.init.uniform_(a, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))
            self.A[update.name] = nn.Parameter(a)
            b = torch.zeros(update.rank, update.size, dtype=dtype, device=device)
            self.B[update.name] = nn.Parameter(b)
        # The weight without the updates, while they are in it: what makes taking them out exact.
        self._original: Tensor | None = None

    @property
    def merged(self) -> bool:
        """Whether the weight holds the updates."""
        return self._original is not None

    @property
    def settings(self) -> dict[str, Any]:
        """What makes an equal module, JSON-ready."""
        return {"updates": [asdict(u) for u in self.updates], "dropout": self.dropout}

    def delta(self) -> Tensor:
        """The sum of the updates, (in, out)."""
        whole = self.A[self.updates[0].name].new_zeros(self.in_features, self.out_features)
        for u in self.updates:
            columns = whole.narrow(1, u.start, u.size)
            columns.addmm_(self.A[u.name], self.B[u.name], alpha=u.scale)
        return whole

    @torch.no_grad()
    def merge(self, weight: Tensor) -> None:
        """Add the updates to the weight (in, out), and keep what it was."""
        if self._original is None:
            self._original = weight.detach().clone()
            weight.add_(self.delta())

    @torch.no_grad()
    def unmerge(self, weight: Tensor) -> None:
        """Give the weight back the values it had, bit for bit."""
        if self._original is not None:
            weight.copy_(self._original)
            self._original = None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by the weight (out, in) and by the updates: (..., in) to (..., out)."""
        if self.merged:
            return ops.linear(x, weight, bias)
        low = F.dropout(x, self.dropout) if self.training and self.dropout else None
        a, b, scale = self._factors()
        return ops.lora_linear(x, weight, a, b, bias=bias, scale=scale, low=low)

    def _factors(self) -> tuple[Tensor, Tensor, float]:
        """All updates as one: A side by side, B as blocks in their columns."""
        first = self.updates[0]
        if len(self.updates) == 1 and first.size == self.out_features:
            return self.A[first.name], self.B[first.name], first.scale
        a = torch.cat([self.A[u.name] for u in self.updates], dim=1)
        # Blocks differ in scale: it goes into B, which is small.
        rows = [
            F.pad(self.B[u.name] * u.scale, (u.start, self.out_features - u.start - u.size))
            for u in self.updates
        ]
        return a, torch.cat(rows), 1.0

    def extra_repr(self) -> str:
        named = ", ".join(f"{u.name}: rank {u.rank}, scale {u.scale:g}" for u in self.updates)
        return f"{named}, dropout={self.dropout}"


class LowRankParameter(LowRank):
    """The update of a parameter that its module multiplies by on its own.

    A parametrization (`torch.nn.utils.parametrize`): reading the parameter gives W + scale A B. The
    input is not seen here, so there is no dropout, and the gradient of the whole W is made.

    Args:
        in_features, out_features: of the parameter, (in, out).
        updates: one, of all columns.
        dtype, device: of A and B.
    """

    def forward(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        if self.merged:
            return weight
        update = self.updates[0]
        return torch.addmm(weight, self.A[update.name], self.B[update.name], alpha=update.scale)


class LowRankLinear(nn.Linear):
    """`torch.nn.Linear` with updates in `low_rank`; a layer becomes one by its class alone."""

    low_rank: LowRank

    def forward(self, input: Tensor) -> Tensor:
        return self.low_rank(input, self.weight, self.bias)


def updates_from(settings: Mapping[str, Any]) -> tuple[Update, ...]:
    """The updates that `LowRank.settings` describes."""
    return tuple(Update(**entry) for entry in settings["updates"])
