"""The position-wise feed-forward layer of the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Two linear maps with a ReLU between them, applied to every position alike.

        y = relu(x W_1 + B_1) W_2 + B_2

    Args:
        emb_dim: width E of input and output.
        hidden_dim: width of the hidden layer, 4 E by default.

    Parameters `W_1` (E, hidden), `B_1` (hidden), `W_2` (hidden, E), `B_2` (E).

    Raises:
        ValueError: a width is not positive.

    Backends: PyTorch; the bias is added inside the matrix product.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.3, arXiv:1706.03762.

    Example:
        >>> import torch
        >>> MLP(8)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, emb_dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden_dim = 4 * emb_dim if hidden_dim is None else hidden_dim
        if emb_dim < 1 or hidden_dim < 1:
            raise ValueError(
                f"emb_dim and hidden_dim must be at least 1, got {emb_dim} and {hidden_dim}"
            )
        self.W_1 = nn.Parameter(torch.empty(emb_dim, hidden_dim))
        self.B_1 = nn.Parameter(torch.empty(hidden_dim))
        self.W_2 = nn.Parameter(torch.empty(hidden_dim, emb_dim))
        self.B_2 = nn.Parameter(torch.empty(emb_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices, zero biases."""
        for weight in (self.W_1, self.W_2):
            nn.init.xavier_uniform_(weight)
        for bias in (self.B_1, self.B_2):
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        # relu_ overwrites the product just made: no second (B, T, 4E) tensor is allocated.
        hidden = F.linear(x, self.W_1.t(), self.B_1).relu_()  # (B, T, 4E)
        return F.linear(hidden, self.W_2.t(), self.B_2)

    def extra_repr(self) -> str:
        return f"{self.W_1.shape[0]}, hidden_dim={self.W_1.shape[1]}"
