"""Rotary position embedding as a layer that keeps its tables."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from lmfast import ops
from lmfast.nn.sizes import check_ints


@functools.lru_cache(maxsize=32)
def _tables(
    length: int, dim: int, base: float, scaling: str | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    # Layers share one pair. Made outside inference mode, so that a model that generated first can
    # still be trained: autograd refuses to save tensors created inside it.
    with torch.inference_mode(False), torch.no_grad():
        options = None if scaling is None else json.loads(scaling)
        return ops.rope_tables(length, dim, base, scaling=options, device=device)


class RotaryEmbedding(nn.Module):
    """Rotate pairs of query and key features by angles proportional to their position.

        (a, b) -> (a cos t - b sin t, a sin t + b cos t),   t = position * base^(-2p / dim)

    Args:
        dim: number D of features per head that are rotated, even.
        base: of the geometric series of frequencies.
        interleaved: pairs are (2p, 2p+1) if true, (p, p + dim/2) if false.
        scaling: context extension as in `lmfast.ops.rope_tables`, or None.

    The cosine and sine tables are fp32, shared between layers, and grow on demand; they are not in
    the state dict.

    Raises:
        ValueError: `dim` is odd or not positive.

    Backends: those of `lmfast.ops.rope`.

    Source: Su et al. 2021, "RoFormer", arXiv:2104.09864.

    Example:
        >>> import torch
        >>> q = k = torch.tensor([[[[2.0, 1.0]]]])
        >>> rotated, _ = RotaryEmbedding(2)(q, k, positions=0)
        >>> rotated.flatten().tolist()
        [2.0, 1.0]
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        *,
        interleaved: bool = True,
        scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_ints(dim=dim)
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even and at least 2 for rotary pairs, got {dim}")
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scaling = None if scaling is None else dict(scaling)
        kind = None if scaling is None else scaling.get("rope_type", scaling.get("type"))
        self._depends_on_length = kind == "dynamic"
        self._scaling_key = None if scaling is None else json.dumps(self.scaling, sort_keys=True)

    def tables(self, length: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each (at least `length`, dim/2), on `device`."""
        # A graph makes its own: it cannot see into the cache. FakeTensors must not get into it.
        if torch.compiler.is_compiling() or (
            torch._C._len_torch_dispatch_stack() and detect_fake_mode([]) is not None
        ):
            return ops.rope_tables(length, self.dim, self.base, scaling=self.scaling, device=device)
        if not self._depends_on_length:
            # Powers of two: a growing cache asks for new tables only log2(length) times.
            length = max(256, 1 << (length - 1).bit_length())
        return _tables(length, self.dim, self.base, self._scaling_key, torch.device(device))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        positions: int | Tensor | None = None,
        *,
        length: int | None = None,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys.

        Args:
            q: (B, H, T, D); k: (B, Hkv, T, D).
            positions: None for 0..T-1, an int or (B,) int64 for the position of the first token, or
                (B, T) int64 for all of them.
            length: number of table rows needed, that is the largest position + 1. Found from
                `positions` if not given, which waits for the device when they are a tensor.
            inplace: write the result into q and k; only without gradients.

        Returns:
            The rotated (q, k).
        """
        steps = q.shape[-2]
        if length is None:
            if positions is None:
                length = steps
            elif isinstance(positions, Tensor):
                last = int(positions.max()) if positions.numel() else 0
                length = last + (steps if positions.ndim == 1 else 1)
            else:
                length = positions + steps
        cos, sin = self.tables(max(length, 1), q.device)
        return ops.rope(
            q, k, cos, sin, interleaved=self.interleaved, positions=positions, inplace=inplace
        )

    def extra_repr(self) -> str:
        text = f"{self.dim}, base={self.base:g}, interleaved={self.interleaved}"
        return text if self.scaling is None else f"{text}, scaling={self.scaling}"
