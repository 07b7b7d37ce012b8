"""Root-mean-square normalisation as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmfast import ops
from lmfast.nn.hooks import has_hooks
from lmfast.nn.sizes import check_sizes


class RMSNorm(nn.Module):
    """Normalise the last axis by its root mean square and scale it.

        y = x / sqrt(mean(x^2) + eps) * scale

    Args:
        dim: size E of the last axis.
        eps: added to the mean square in fp32, so it does not underflow in half precision; an
            all-zero row, as padding makes them, gives exact zeros.
        device, dtype: of the parameter `scale` (E), ones at the start.

    A state dict with `weight` in place of `scale` (torch.nn.RMSNorm, transformers) loads as well.

    Raises:
        ValueError: `dim` is not positive.

    Backends: those of `lmfast.ops.rms_norm`.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Example:
        >>> import torch
        >>> norm = RMSNorm(4)
        >>> norm(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).detach()
        tensor([[0.3651, 0.7303, 1.0954, 1.4606]])
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim)
        self.dim = dim
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.scale, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(norm(x + residual), x + residual)` from one pass over both inputs.

        In two where hooks or a subclass's `forward` must see the norm's own call.
        """
        if has_hooks(self) or type(self).forward is not RMSNorm.forward:
            total = x + residual
            return self(total), total
        if x.dtype != residual.dtype:
            # Under autocast a layer's output is bf16 and the residual stream fp32: the sum is fp32.
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
        return ops.add_rms_norm(x, residual, self.scale, self.eps)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if f"{prefix}weight" in state_dict and f"{prefix}scale" not in state_dict:
            state_dict[f"{prefix}scale"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"
