"""What is called to train: a model and its loss as one module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmfast import ops
from lmfast.training.metrics import LossFunction


class Objective(nn.Module):
    """The loss of a batch, in the precision asked for, with or without a carried state.

    It is a module of its own so that DDP and FSDP2 see one call with everything in it.

    Args:
        model: what is trained.
        loss: mean loss of (model, inputs, targets, ignore_index).
        ignore_index: targets that do not count.
        autocast: dtype that PyTorch's autocast computes in, None = that of the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        ignore_index: int,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self._ignore_index = ignore_index
        self._autocast = autocast

    def forward(
        self, inputs: Tensor, targets: Tensor, state: Any = None, carry: bool = False
    ) -> tuple[Tensor, Any]:
        """Return the mean loss and, with `carry`, the state after the batch, without history."""
        enabled = self._autocast is not None
        with torch.autocast(inputs.device.type, dtype=self._autocast, enabled=enabled):
            if not carry:
                return self._loss(self.model, inputs, targets, self._ignore_index), None
            model: Any = self.model
            if state is None:
                state = model.new_state(inputs.shape[0])
            features, state = model.advance(inputs, state, None)
            weight, bias = model.head()
            loss = ops.linear_cross_entropy(
                features, weight, targets, bias=bias, ignore_index=self._ignore_index
            )
            return loss, state.detach()


@contextmanager
def recomputed_blocks(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Let the model's blocks forget what they computed and compute it again in the backward pass.

    Memory for activations then is that of one block and the inputs of all, for a third more work.

    Args:
        model: with its blocks in `layers`.
        enabled: otherwise nothing changes.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost", arXiv:1604.06174.
    """
    layers = list(model.layers) if enabled and isinstance(model.layers, nn.ModuleList) else []
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward  # the class's own is found again
            if forward is not None:
                layer.forward = forward


def _recomputed(forward: Any, *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    return checkpoint(forward, *args, use_reentrant=False, **options)
