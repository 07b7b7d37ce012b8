"""Output layers: their loss without logits, where they do nothing but multiply and add."""

from __future__ import annotations

from torch import Tensor, nn

from lmfast import ops
from lmfast.nn.hooks import has_hooks
from lmfast.nn.low_rank import LowRankLinear


def only_multiplies(layer: nn.Linear) -> bool:
    """Whether all that a layer does is to multiply by its weight and add its bias.

    Hooks, low-rank updates beside the weight and adapters of peft do more: it must be called.
    """
    kind = type(layer)
    own = kind.forward is nn.Linear.forward or hasattr(kind, "_lmfast_swap")
    return own and "forward" not in vars(layer) and not has_hooks(layer)


def loss_of(layer: nn.Linear, features: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Mean cross-entropy of the layer's logits, which are made only where it must be called."""
    if not only_multiplies(layer):
        return ops.cross_entropy(layer(features), targets, ignore_index=ignore_index)
    return ops.linear_cross_entropy(
        features, layer.weight, targets, bias=layer.bias, ignore_index=ignore_index
    )


def output_layer(fc: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (V, E), low-rank updates included, and bias of an output layer.

    Raises:
        TypeError: it is no linear layer any more, but a wrapper, say, that adds something.
        ValueError: the updates are to see only a share of the features.
    """
    if not isinstance(fc, nn.Linear):
        raise TypeError(
            f"the output layer must be a torch.nn.Linear, whose matrix is read, got {type(fc)}; "
            "lmfast.training.lora updates it in place"
        )
    if not isinstance(fc, LowRankLinear) or fc.low_rank.merged:
        return fc.weight, fc.bias
    if fc.training and fc.low_rank.dropout:
        raise ValueError(
            f"updates of the output layer must have no dropout, got {fc.low_rank.dropout}"
        )
    return fc.weight + fc.low_rank.delta().t(), fc.bias
