"""The position-wise feed-forward layers of the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfast import ops
from lmfast.nn.packed import PackedParameters
from lmfast.nn.projection import Projections
from lmfast.nn.sizes import check_sizes
from lmfast.ops.geglu import check_approximate

ACTIVATIONS = {
    "relu": lambda x: x,  # part of the product
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class MLP(Projections):
    """Two linear maps with an activation between them, applied to every position alike.

        y = act(x W_1 + B_1) W_2 + B_2

    Args:
        emb_dim: width E of input and output.
        hidden_dim: width of the hidden layer, 4 E by default.
        activation: "relu", "gelu" (exact), "gelu_tanh" or "silu".
        bias: whether there are B_1 and B_2.

    Parameters `W_1` (E, hidden), `B_1` (hidden), `W_2` (hidden, E), `B_2` (E).

    Raises:
        TypeError: a width is no int.
        ValueError: a width is not positive or there is no such activation.

    Backends: those of `lmfast.ops.linear`; bias and ReLU are part of the matrix product.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.3, arXiv:1706.03762.

    Example:
        >>> import torch
        >>> MLP(8)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    B_1: nn.Parameter | None
    B_2: nn.Parameter | None

    def __init__(
        self,
        emb_dim: int,
        hidden_dim: int | None = None,
        *,
        activation: str = "relu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(emb_dim=emb_dim)
        hidden_dim = 4 * emb_dim if hidden_dim is None else hidden_dim
        check_sizes(hidden_dim=hidden_dim)
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        self.activation = activation
        self.W_1 = nn.Parameter(torch.empty(emb_dim, hidden_dim))
        self.register_parameter("B_1", nn.Parameter(torch.empty(hidden_dim)) if bias else None)
        self.W_2 = nn.Parameter(torch.empty(hidden_dim, emb_dim))
        self.register_parameter("B_2", nn.Parameter(torch.empty(emb_dim)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices, zero biases."""
        for weight in (self.W_1, self.W_2):
            nn.init.xavier_uniform_(weight)
        for bias in (self.B_1, self.B_2):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        relu = self.activation == "relu"
        hidden = self.project(x, "W_1", "B_1", relu=relu)  # (B, T, hidden)
        return self.project(ACTIVATIONS[self.activation](hidden), "W_2", "B_2")

    def extra_repr(self) -> str:
        return (
            f"{self.W_1.shape[0]}, hidden_dim={self.W_1.shape[1]}, activation={self.activation}, "
            f"bias={self.B_1 is not None}"
        )


class SwiGLU(PackedParameters):
    """A feed-forward layer whose hidden values are gated by the SiLU of another projection.

        y = (silu(x W_G + B_G) * (x W_U + B_U)) W_D + B_D

    Args:
        emb_dim: width E of input and output.
        hidden_dim: width of the hidden layer; by default 8 E / 3, rounded up to a multiple of 64,
            which makes three matrices about as large as the two of `MLP`.
        bias: whether there are biases.

    The parameters are `W_GU` (E, 2 hidden), gate before up, and `W_D` (hidden, E), with biases
    `B_GU` and `B_D`. State dicts hold `W_G`, `W_U` (E, hidden), `B_G` and `B_U` (hidden) in their
    places; a packed `W_GU` loads as well.

    Raises:
        TypeError: a width is no int.
        ValueError: a width is not positive.

    Backends: those of `lmfast.ops.linear` and `lmfast.ops.swiglu`, which reads both halves of the
    one product in place.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202.

    Example:
        >>> import torch
        >>> SwiGLU(8)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    B_GU: nn.Parameter | None
    B_D: nn.Parameter | None

    def __init__(self, emb_dim: int, hidden_dim: int | None = None, *, bias: bool = False) -> None:
        super().__init__()
        check_sizes(emb_dim=emb_dim)
        hidden_dim = -(-8 * emb_dim // 192) * 64 if hidden_dim is None else hidden_dim
        check_sizes(hidden_dim=hidden_dim)
        self.hidden_dim = hidden_dim
        self.W_GU = nn.Parameter(torch.empty(emb_dim, 2 * hidden_dim))
        self.register_parameter("B_GU", nn.Parameter(torch.empty(2 * hidden_dim)) if bias else None)
        self.W_D = nn.Parameter(torch.empty(hidden_dim, emb_dim))
        self.register_parameter("B_D", nn.Parameter(torch.empty(emb_dim)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform, gate and up each by its own fan-in and fan-out; zero biases."""
        with torch.no_grad():
            for _, columns in self.part_views("W_GU", self.W_GU):
                nn.init.xavier_uniform_(columns)
        nn.init.xavier_uniform_(self.W_D)
        for bias in (self.B_GU, self.B_D):
            if bias is not None:
                nn.init.zeros_(bias)

    def parts(self) -> dict[str, list[tuple[str, int]]]:
        """Return the names and sizes of gate and up."""
        return {
            f"{kind}_GU": [(f"{kind}_G", self.hidden_dim), (f"{kind}_U", self.hidden_dim)]
            for kind in ("W", "B")
        }

    def forward(self, x: Tensor) -> Tensor:
        packed = self.project(x, "W_GU", "B_GU")  # (B, T, 2 hidden)
        return self.project(self._gated(packed), "W_D", "B_D")

    def _gated(self, packed: Tensor) -> Tensor:
        return ops.swiglu(packed)

    def extra_repr(self) -> str:
        return f"{self.W_D.shape[1]}, hidden_dim={self.hidden_dim}, bias={self.B_D is not None}"


class GeGLU(SwiGLU):
    """`SwiGLU` with GELU in the place of SiLU.

        y = (gelu(x W_G + B_G) * (x W_U + B_U)) W_D + B_D

    Args:
        emb_dim, hidden_dim, bias: as in `SwiGLU`, and so are the parameters.
        approximate: "tanh" or "none", as in `lmfast.ops.geglu`.

    Raises:
        TypeError: a width is no int.
        ValueError: a width is not positive, or `approximate` is something else.

    Backends: those of `lmfast.ops.linear` and `lmfast.ops.geglu`.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202.

    Example:
        >>> import torch
        >>> GeGLU(8, 20)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        emb_dim: int,
        hidden_dim: int | None = None,
        *,
        bias: bool = False,
        approximate: str = "tanh",
    ) -> None:
        super().__init__(emb_dim, hidden_dim, bias=bias)
        check_approximate(approximate)
        self.approximate = approximate

    def _gated(self, packed: Tensor) -> Tensor:
        return ops.geglu(packed, approximate=self.approximate)
