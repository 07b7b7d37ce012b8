"""A table of token vectors whose padding row stays zero."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfast._sharding import summed
from lmfast.ops._library import is_readable


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` whose padding row is zero whatever initialised or loaded the table.

        y = weight[ids], zero where ids = padding_idx

    PyTorch zeroes that row once, in its own initialisation, and gives it no gradient: a later
    initialisation fills it, and it then stays as it is. Here the row is zeroed again at the first
    use after the table changed (3 us; nothing while it did not change).

    The gradient is dense: for 3,712 tokens, V = 32,011 and E = 128 PyTorch's backward takes 0.74
    ms, half of it to clear the 16 MB, and fused AdamW, which reads all of it anyway, 1.8 ms. With
    ``sparse=True`` it takes 0.29 ms, but SparseAdam then 2.6 ms; it pays for tables that are large
    beside a batch, under optimisers that take such gradients: SGD (0.3 ms), Adagrad, SparseAdam.

    Args:
        num_embeddings: V.
        embedding_dim: E.
        padding_idx: id whose vector is zero and never learnt, or None.
        options: the other keyword arguments of `torch.nn.Embedding`.

    Returns:
        Called with ids (...) int64 or int32, vectors (..., E).

    Raises:
        ValueError, AssertionError: as `torch.nn.Embedding`.
        TypeError: called with ids that are no tensor of int64 or int32.
        IndexError: an id that is no row of the table, on a CPU.

    Backends: PyTorch.

    Source: Bengio et al. 2003, "A Neural Probabilistic Language Model".

    Example:
        >>> import torch
        >>> embedding = Embedding(5, 2, padding_idx=0)
        >>> _ = torch.nn.init.ones_(embedding.weight)
        >>> embedding(torch.tensor([0, 3])).tolist()
        [[0.0, 0.0], [1.0, 1.0]]
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        **options: Any,
    ) -> None:
        self._cleared: tuple[int, int] | None = None
        super().__init__(num_embeddings, embedding_dim, padding_idx, **options)

    def clear_padding(self) -> None:
        """Zero the padding row if the table changed since it was last zeroed."""
        weight = self.weight
        if self.padding_idx is None or torch.compiler.is_compiling():
            return  # a compiled graph cannot look at what changed
        if type(weight) is not nn.Parameter or weight.is_inference():
            return
        # Not at every call: a tied output layer has saved the table for its backward, and one
        # more change of it would be taken for a mistake.
        if self._cleared == (id(weight), weight._version):
            return
        with torch.no_grad():
            weight[self.padding_idx].zero_()
        self._cleared = (id(weight), weight._version)

    def forward(self, ids: Tensor) -> Tensor:
        self.clear_padding()
        if torch.compiler.is_compiling():
            return self._vectors(ids)
        try:
            return self._vectors(ids)
        except (IndexError, RuntimeError, TypeError) as error:
            self._explain(ids, error)
            raise

    def _vectors(self, ids: Tensor) -> Tensor:
        return summed(
            F.embedding(
                ids,
                self.weight,
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.sparse,
            )
        )

    def _explain(self, ids: object, error: Exception) -> None:
        """Raise, as PyTorch did, but with what does not fit; looked for once it did not."""
        if not isinstance(ids, Tensor):
            raise TypeError(f"ids must be a tensor, got {type(ids).__name__}") from error
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids must be int64 or int32, got {ids.dtype}") from error
        if isinstance(error, IndexError) and is_readable(ids) and ids.numel():
            lowest, highest = int(ids.min()), int(ids.max())
            wrong = lowest if lowest < 0 else highest
            raise IndexError(
                f"ids must lie in 0..{self.num_embeddings - 1}, the rows of the table, got {wrong}"
            ) from error
