"""The loss of transformers' language models, from the features in front of the output layer.

`forward(labels=...)` computes logits, then a loss from them. Inside such a call with gradients, a
patched output layer returns logits that are not computed yet; the loss function, when it gets them,
takes `lmfast.ops.linear_cross_entropy`. Whoever looks at the logits afterwards has them computed
then, with their gradient.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from lmfast import _extension, ops
from lmfast.integrations._continuous import continuous_batching
from lmfast.ops._library import is_autocast
from lmfast.ops._precision import bf16_products_allowed
from lmfast.patching import swap
from lmfast.patching.swap import recipe

# Steps that models take from the output layer to the logits; they wait as well.
Steps = tuple[tuple[str, float], ...]
_STEPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mul": lambda t, x: t * x,
    "div": lambda t, x: t / x,
    "tanh": lambda t, _: torch.tanh(t),
}
_NAMES = {
    torch.mul: "mul",
    torch.Tensor.mul: "mul",
    torch.Tensor.__mul__: "mul",
    torch.Tensor.__rmul__: "mul",
    torch.div: "div",
    torch.Tensor.div: "div",
    torch.Tensor.__truediv__: "div",
    torch.tanh: "tanh",
    torch.Tensor.tanh: "tanh",
}


class LazyLogits(torch.Tensor):
    """Logits (..., V) that are computed when something other than their loss needs them.

    Shape, dtype and device are known; every operator works on the computed logits, with gradients.
    """

    layer: Any
    hidden: Tensor
    steps: Steps
    _computed: Tensor | None

    @staticmethod
    def make(layer: Any, hidden: Tensor, steps: Steps = ()) -> LazyLogits:
        dtype, device = hidden.dtype, hidden.device
        if is_autocast(hidden):
            dtype = torch.get_autocast_dtype(device.type)
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            LazyLogits, (*hidden.shape[:-1], layer.weight.shape[0]), dtype=dtype, device=device
        )
        self.layer, self.hidden, self.steps, self._computed = layer, hidden, steps, None
        return self

    def compute(self) -> Tensor:
        """The logits."""
        if self._computed is None:
            logits = F.linear(self.hidden, self.layer.weight, self.layer.bias)
            for name, number in self.steps:
                logits = _STEPS[name](logits, number)
            self._computed = logits
        return self._computed

    def fused_form(self) -> tuple[float, float | None] | None:
        """(factor, soft cap) that the steps amount to, or None if they are others."""
        steps, cap = self.steps, None
        if len(steps) >= 3 and [s[0] for s in steps[-3:]] == ["div", "tanh", "mul"]:
            if steps[-3][1] != steps[-1][1]:
                return None
            steps, cap = steps[:-3], steps[-1][1]
        factor = 1.0
        for name, number in steps:
            if name == "tanh":
                return None
            factor = factor * number if name == "mul" else factor / number
        return factor, cap

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _DESCRIPTION:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is torch.Tensor.contiguous and not kwargs and len(args) == 1:
            return args[0]
        name = _NAMES.get(func)
        if name is not None and not kwargs and isinstance(args[0], LazyLogits):
            number = args[1] if len(args) == 2 else 0.0
            if isinstance(number, (int, float)) and len(args) == (1 if name == "tanh" else 2):
                return LazyLogits.make(
                    args[0].layer, args[0].hidden, (*args[0].steps, (name, float(number)))
                )
        return func(*_compute_all(args), **_compute_all(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*_compute_all(args), **_compute_all(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.compute())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.compute().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.compute().__deepcopy__(memo)


_DESCRIPTION = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.layout.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
}


def _compute_all(value: Any) -> Any:
    if isinstance(value, LazyLogits):
        return value.compute()
    if isinstance(value, (tuple, list)):
        return type(value)(_compute_all(v) for v in value)
    if isinstance(value, dict):
        return {k: _compute_all(v) for k, v in value.items()}
    return value


@contextmanager
def _let_wait(layer: nn.Module) -> Iterator[None]:
    """Inside, the output layer returns logits that are not computed; in this thread only."""
    thread = threading.get_ident()

    def forward(hidden: Tensor) -> Tensor:
        if threading.get_ident() == thread:
            return LazyLogits.make(layer, hidden)
        return type(layer).forward(layer, hidden)

    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        vars(layer).pop("forward", None)


def causal_lm_loss(
    logits: LazyLogits,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss without the logits.

    Args:
        logits: not computed yet.
        labels: (B, T); shifted here, so that token t predicts label t + 1.
        vocab_size: V; with another number than the logits', they are computed.
        num_items_in_batch: the summed loss is divided by it; without it, it is the mean.
        shift_labels: labels that are shifted already.
    """
    form = logits.fused_form()
    if form is None or vocab_size != logits.shape[-1]:
        return ForCausalLMLoss(
            logits.compute(), labels, vocab_size, num_items_in_batch, ignore_index, shift_labels
        )
    hidden, weight, bias = logits.hidden, logits.layer.weight, logits.layer.bias
    factor, softcap = form
    if factor != 1.0:
        hidden = hidden * factor
        bias = None if bias is None else bias * factor
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = ops.linear_cross_entropy(
        hidden.flatten(0, -2),
        weight,
        shift_labels.reshape(-1).to(hidden.device),
        bias=bias,
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
        softcap=softcap,
        backend=backend,
    )
    if num_items_in_batch is None:
        # PyTorch's mean over no target at all is nan; divided, as nothing has to wait for a GPU.
        return loss / (shift_labels != ignore_index).any().to(loss.device, loss.dtype)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _pays(weight: Tensor) -> bool:
    """Whether the loss without logits is as fast as PyTorch's with them.

    Its bf16 products need AMX or AVX512-BF16; without them they are fp32's, and PyTorch's bf16 ones
    are faster.
    """
    if weight.device.type != "cpu" or not _extension.cpu.loaded or _extension.has_bf16_tiles():
        return True
    rounded = bf16_products_allowed() or torch.is_autocast_enabled("cpu")
    return weight.dtype == torch.float32 and not rounded


def _output_layer(model: Any) -> nn.Module | None:
    """The model's output layer if its logits can wait."""
    layer = model.get_output_embeddings()
    if layer is None or "forward" in vars(layer):
        return None
    found = swap.swap_of(layer)
    if (type(layer) if found is None else found[0]) is not nn.Linear:
        return None  # an adapter on it, for example
    if not _pays(layer.weight):
        return None
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return None if hooks or layer._backward_pre_hooks else layer


@recipe("transformers_model")
def _transformers_model(original: Any, backend: str | None = None) -> dict[str, Any]:
    own, loss_of = original.forward, original.loss_function.fget

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer = None
        if kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None:
            may = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            if may and loss_of(self) is ForCausalLMLoss:
                layer = _output_layer(self)
        if layer is None:
            return own(self, *args, **kwargs)
        with _let_wait(layer):
            return own(self, *args, **kwargs)

    def get_loss_function(self: Any) -> Any:
        plain = loss_of(self)
        if plain is not ForCausalLMLoss or torch.compiler.is_compiling():
            return plain

        def loss(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            if isinstance(logits, LazyLogits):
                return causal_lm_loss(logits, *args, **{**kwargs, "backend": backend})
            return plain(logits, *args, **kwargs)

        return loss

    def set_loss_function(self: Any, value: Any) -> None:
        original.loss_function.fset(self, value)

    made = {"forward": forward, "loss_function": property(get_loss_function, set_loss_function)}
    return {**made, **continuous_batching(original)}
