"""What the trainable language models have in common: logits, loss and stateful steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lmfast import ops
from lmfast._transforms import in_transform, transform_of
from lmfast.nn import sizes
from lmfast.nn.embedding import Embedding
from lmfast.ops._autograd import apply
from lmfast.ops._library import is_readable

_REGISTRY: dict[str, type[LanguageModel]] = {}


class LanguageModel(nn.Module):
    """Base of models that map ids (B, T) to the logits of the next token (B, T, V).

    A subclass names its `kind`, keeps its constructor arguments in `self.options`, and gives
    `hidden`, `head`, `new_state` and `advance`; the rest is here. `kind` and `options` are what a
    checkpoint's JSON stores, and `build_model` makes the model again from them.
    """

    kind: ClassVar[str]
    vocab_size: int
    pad_idx: int | None
    options: dict[str, Any]
    embedding: Embedding
    logit_softcap: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):  # a user's subclass must not be what files of its parent become
            _REGISTRY[cls.kind] = cls

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-ready description from which `build_model` makes an equal model."""
        return {"model": self.kind, **self.options}

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the features (B, T, E) that the output layer turns into logits."""
        raise NotImplementedError

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (V, E) and bias (V) or None of the output layer."""
        raise NotImplementedError

    def new_state(self, batch: int, capacity: int | None = None) -> Any:
        """Return the state before the first token, with room for `capacity` tokens if it grows."""
        raise NotImplementedError

    def advance(self, ids: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """Return the features (B, T, E) of the next tokens and the state after them."""
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B, T) int64 to logits (B, T, V)."""
        return self._logits(self.hidden(ids))

    def loss(self, ids: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
        """Mean cross-entropy of the targets, without ever holding all logits.

            loss = mean over targets != ignore_index of -log softmax(hidden W^T + b)[target]

        Args:
            ids, targets: (B, T) int64.
            ignore_index: targets with this value count for nothing.

        Returns:
            A scalar; 0 with zero gradients if every target is ignored.

        Backends: those of `lmfast.ops.linear_cross_entropy`.

        Example:
            >>> import torch
            >>> from lmfast.models import DecoderLanguageModel
            >>> model = DecoderLanguageModel(50, 16, 2, 1, 0)
            >>> model.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).shape
            torch.Size([])
        """
        check_ids(ids)
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets must be a tensor of ids, got {type(targets).__name__}")
        if targets.shape != ids.shape:
            raise ValueError(
                f"targets must have the shape of ids {tuple(ids.shape)}, got {tuple(targets.shape)}"
            )
        weight, bias = self.head()
        return ops.linear_cross_entropy(
            self.hidden(ids),
            weight,
            targets,
            bias=bias,
            ignore_index=ignore_index,
            softcap=self.logit_softcap,
        )

    def step(
        self,
        ids: Tensor,
        state: Any,
        lengths: Tensor | None = None,
        *,
        all_positions: bool = False,
    ) -> tuple[Tensor, Any]:
        """Feed the next tokens and return the logits of the one that follows.

        Args:
            ids: (B, T) int64, T >= 1; T = 1 when decoding, more for a prompt.
            state: from `new_state` or the previous call. A key/value cache is extended in place.
            lengths: (B,) int64, number of real tokens of each right-padded row, at least 1; None
                = all T.
            all_positions: return the logits after every token.

        Returns:
            Logits (B, V) after each row's last real token, or (B, T, V) with `all_positions`, and
            the state to pass next.

        Raises:
            ValueError: ids are not (B, T) with a token, or lengths not (B,) or, on the CPU, not
                in 1..T.
        """
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(
                f"ids must be (B, T) with at least one token, got {tuple(ids.shape)}; one token of "
                "each row is ids[:, None]"
            )
        if lengths is not None:
            check_lengths(lengths, ids)
        features, state = self.advance(ids, state, lengths)
        if all_positions:
            return self._logits(features), state
        if lengths is None:
            last = features[:, -1]  # (B, E)
        else:
            last = features[torch.arange(len(ids), device=ids.device), lengths - 1]
        return self._logits(last), state

    def num_parameters(self) -> int:
        """Return the number of trainable values, shared ones counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def _logits(self, features: Tensor) -> Tensor:
        weight, bias = self.head()
        logits = ops.linear(features, weight, bias)
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)


class _KeepRowFixed(torch.autograd.Function):
    """Identity whose gradient is zero in one row: the padding row of a shared matrix."""

    @staticmethod
    def forward(weight: Tensor, row: int) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.row = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        above, fixed, below = grads[0].tensor_split((ctx.row, ctx.row + 1))
        return torch.cat((above, torch.zeros_like(fixed), below)), None


def keep_row_fixed(weight: Tensor, row: int | None) -> Tensor:
    """The matrix an output layer shares with an embedding: nothing flows back to row `row`."""
    if row is None or not torch.is_grad_enabled():
        return weight
    if in_transform() or transform_of(weight):  # for which the function has no rule
        fixed = (torch.arange(len(weight), device=weight.device) == row)[:, None]
        return torch.where(fixed, weight.detach(), weight)
    return apply(_KeepRowFixed, weight, row)


def check_sizes(vocab_size: int, emb_dim: int, pad_idx: int | None) -> None:
    """Raise TypeError or ValueError for sizes no model can have."""
    sizes.check_sizes(vocab_size=vocab_size, emb_dim=emb_dim)
    if pad_idx is None:
        return
    sizes.check_ints(pad_idx=pad_idx)
    if not 0 <= pad_idx < vocab_size:
        raise ValueError(f"pad_idx must be in 0..{vocab_size - 1} or None, got {pad_idx}")


def check_ids(ids: Tensor) -> None:
    """Raise TypeError unless ids are a tensor, ValueError unless they are (B, T)."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a tensor (B, T) of ids, got {type(ids).__name__}")
    if ids.dim() != 2:
        raise ValueError(f"ids must be (B, T), got {tuple(ids.shape)}")


def check_lengths(lengths: Tensor, ids: Tensor) -> None:
    """Raise unless lengths are (B,) integers and, where they can be read, in 1..T for (B, T)."""
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths must be an integer tensor, got {lengths!r}")
    if lengths.shape != ids.shape[:1]:
        raise ValueError(f"lengths must be ({ids.shape[0]},), got {tuple(lengths.shape)}")
    if lengths.numel() == 0 or not is_readable(lengths):
        return
    least, most = int(lengths.min()), int(lengths.max())
    if least < 1 or most > ids.shape[1]:
        raise ValueError(f"lengths must be in 1..{ids.shape[1]}, got values from {least} to {most}")


def build_model(config: Mapping[str, Any]) -> LanguageModel:
    """Make a model from the mapping its `config` property returned.

    Args:
        config: `{"model": kind, **constructor arguments}`.

    Returns:
        A model with newly initialised parameters.

    Raises:
        ValueError: the kind is unknown or an argument does not belong to it.

    Example:
        >>> from lmfast.models import RecurrentLanguageModel
        >>> model = RecurrentLanguageModel(100, 16, 2, 0)
        >>> build_model(model.config).num_parameters() == model.num_parameters()
        True
    """
    options = dict(config)
    kind = options.pop("model", None)
    if kind not in _REGISTRY:
        raise ValueError(f"unknown model {kind!r}; known: {', '.join(sorted(_REGISTRY))}")
    try:
        return _REGISTRY[kind](**options)
    except TypeError as error:
        raise ValueError(f"the configuration of the {kind} model is not valid: {error}") from error
