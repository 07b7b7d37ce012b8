"""A classification head on the last token's features of a language model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SequenceClassifier(nn.Module):
    """Classes of whole texts, from the features of each one's last real token.

        logits = hidden[last] W^T + b

    The last real token is found by the attention mask, never by comparing with a padding id, so
    padding on the left and on the right give the same.

    Args:
        model: a `lmfast.models` language model, or one of transformers, whose features are those of
            its `base_model`; it is trained along unless frozen, or updated by
            `lmfast.training.lora`.
        num_classes: C.
        features: E, the width of the features; found from the model by default.

    State-dict names: those of the model under `model.`, and `head.weight` (C, E), `head.bias` (C).

    Raises:
        ValueError: fewer than 2 classes, or features of unknown width.

    Example:
        >>> from lmfast.models import DecoderLanguageModel
        >>> classifier = SequenceClassifier(DecoderLanguageModel(50, 16, 2, 1, 0), 3)
        >>> classifier(torch.tensor([[4, 5, 6]])).shape
        torch.Size([1, 3])
    """

    def __init__(self, model: nn.Module, num_classes: int, *, features: int | None = None) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        config = getattr(model, "config", None)
        width = features or getattr(model, "emb_dim", getattr(config, "hidden_size", None))
        if not isinstance(width, int):
            raise ValueError("features must be given: the model does not say how wide they are")
        self.model = model
        like = next(model.parameters())
        self.head = nn.Linear(width, num_classes, dtype=like.dtype, device=like.device)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map texts to logits of the classes.

        Args:
            ids: (B, T) int64.
            attention_mask: (B, T), nonzero at real tokens, at least one per row; None = all.

        Returns:
            (B, C).

        Raises:
            ValueError: a mask of another shape, or a row without a real token.
        """
        if attention_mask is None:
            last = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        else:
            if attention_mask.shape != ids.shape:
                raise ValueError(
                    f"attention_mask must have the shape of ids {tuple(ids.shape)}, "
                    f"got {tuple(attention_mask.shape)}"
                )
            real = attention_mask.bool()
            if ids.device.type == "cpu" and not bool(real.any(1).all()):
                empty = int((~real.any(1)).nonzero()[0])
                raise ValueError(f"text {empty} is empty: its attention_mask is all zero")
            places = torch.arange(ids.shape[1], device=ids.device)
            last = torch.where(real, places, -1).amax(1)
        hidden = self._features(ids, attention_mask)  # (B, T, E)
        return self.head(hidden[torch.arange(len(ids), device=ids.device), last])

    def loss(self, ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the classes labels (B,) int64; -100 counts for nothing."""
        return F.cross_entropy(self(ids, attention_mask).float(), labels)

    def _features(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        model: Any = self.model
        if not hasattr(model, "hidden"):
            positions = None
            if attention_mask is not None:
                positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
            output = model.base_model(
                input_ids=ids, attention_mask=attention_mask, position_ids=positions
            )
            return output.last_hidden_state
        if attention_mask is None:
            return model.hidden(ids)
        if "attention_mask" in inspect.signature(model.hidden).parameters:
            return model.hidden(ids, attention_mask=attention_mask)
        # A recurrent model reads from left to right: real tokens first, then put back.
        order = attention_mask.bool().int().argsort(dim=1, descending=True, stable=True)
        hidden = model.hidden(ids.gather(1, order))
        back = order.argsort(1)[:, :, None].expand_as(hidden)
        return hidden.gather(1, back)
