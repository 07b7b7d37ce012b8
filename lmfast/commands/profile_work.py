"""What `lmfast profile` counts: bytes and floating-point operations of operators and layers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lmfast.commands.profile_measure import around_layers

# Of their tables only the rows asked for are touched.
_GATHERS = ("aten::embedding", "aten::index", "aten::index_select", "aten::gather")


def _attention(q: Tensor, k: Tensor, causal: bool) -> float:
    """Scores and their product with the values; causal: over the keys a query sees."""
    batch, heads, steps, size = q.shape
    keys = k.shape[2]
    hidden = steps * (steps - 1) / 2 if causal and steps <= keys else 0.0
    return 4.0 * size * batch * heads * (steps * keys - hidden)


def _on_cache(q: Tensor, lengths: Tensor) -> float:
    return 4.0 * q.shape[1] * q.shape[2] * q.shape[3] * float(lengths.sum())


def _entries(weights: Any) -> int:
    return sum(w.numel() for w in weights if isinstance(w, Tensor) and w.dim() == 2)


# Operators of this package -> their operations, from the arguments. The others are bytes alone.
_FLOPS: dict[str, Callable[..., float]] = {
    "linear": lambda x, w, *rest: 2.0 * x.numel() * w.shape[0],
    "linear_amx": lambda x, w, *rest: 2.0 * x.numel() * w.shape[0],
    "linear_few_rows": lambda x, w, *rest: 2.0 * x.numel() * w.shape[0],
    "quantised_linear": lambda x, w, *rest: 2.0 * x.numel() * w.shape[0],
    "quantised_linear_backward": lambda dy, w, s: 2.0 * dy.numel() * (_depth(w)),
    "product_f32": lambda a, b, *rest: 2.0 * a.numel() * b.shape[-1],
    "linear_cross_entropy": lambda h, w, *rest: (
        2.0 * h.numel() * w.shape[0] * (1 + sum(rest[10:12]))
    ),
    "attention": lambda q, k, v, causal, *rest: _attention(q, k, causal),
    "attention_backward": lambda g, q, k, v, o, s, causal, *rest: 2.5 * _attention(q, k, causal),
    "cached_attention": lambda q, k, v, lengths, *rest: _on_cache(q, lengths),
    "decode_attention": lambda q, *rest: _on_cache(q, rest[6]),
    "recurrent_forward": lambda p, w, *rest: 2.0 * p.shape[0] * w.numel(),
    "recurrent_bf16_forward": lambda p, w, *rest: 2.0 * p.shape[0] * w.numel(),
    "recurrent_backward": lambda *a: 2.0 * a[3].shape[0] * a[6].numel(),
    "recurrent_bf16_backward": lambda *a: 2.0 * a[3].shape[0] * a[6].numel(),
    "recurrent_forward_stack": lambda x, wi, wh, *rest: (
        2.0 * x.numel() / x.shape[-1] * _entries([*wi, *wh])
    ),
    "recurrent_backward_stack": lambda *a: 2.0 * a[3][0].shape[0] * _entries([*a[6], *a[7]]),
    "recurrent_step": lambda x, h, c, weights, *rest: 2.0 * x.shape[0] * _entries(weights),
}


def _depth(codes: Tensor) -> int:
    return codes.shape[1] * (1 if codes.dtype == torch.int8 else 2)


class Work(TorchDispatchMode):
    """Counts while it is entered, by operator and by the layers that are running.

    Bytes: every tensor an operator is given once, every one it makes or writes to once; views are
    free. On a cache, of keys and values only what the lengths say. Operations: those of products,
    attention and recurrent loops; others are counted as none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.flops: dict[str, float] = defaultdict(float)
        self.layer_bytes: Counter[str] = Counter()
        self.layer_flops: dict[str, float] = defaultdict(float)
        self._running: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        moved, flops = _moved(func, args, kwargs or {}, result), _flops(func, args, kwargs, result)
        self.bytes[name] += moved
        self.flops[name] += flops
        for layer in self._running:
            self.layer_bytes[layer] += moved
            self.layer_flops[layer] += flops
        return result

    def by_layer(self, module: nn.Module, depth: int) -> AbstractContextManager[None]:
        """Also counts by the modules down to `depth`, in their forward passes."""
        return around_layers(module, depth, self._running.append, self._running.remove)


def _size(t: Tensor) -> int:
    """Bytes of a tensor; of one whose elements share memory, of that memory."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    returns = func._schema.returns
    if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
        return 0  # a view
    name = func._schema.name
    outputs: list[Tensor] = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    if name in _GATHERS:
        return 2 * sum(map(_size, outputs))
    if name.startswith("lmfast::") and name.endswith(("cached_attention", "decode_attention")):
        return _moved_on_cache(name, args)
    if name.endswith("rope_append"):
        return 2 * sum(_size(t) for t in args[:3])
    arguments = func._schema.arguments
    pairs = [*zip(arguments, args), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    read: dict[int, int] = {}
    written: dict[int, int] = {}
    for argument, value in pairs:
        for t in tree_leaves(value):
            if not isinstance(t, Tensor):
                continue
            if not argument.is_out:  # what lies there before is not read
                read[id(t)] = _size(t)
            if argument.alias_info is not None and argument.alias_info.is_write:
                written[id(t)] = _size(t)
    made = (_size(t) for t in outputs if id(t) not in read and id(t) not in written)
    return sum(read.values()) + sum(written.values()) + sum(made)


def _moved_on_cache(name: str, args: tuple[Any, ...]) -> int:
    appends = name.endswith("decode_attention")
    keys, lengths = (args[3], args[7]) if appends else (args[1], args[3])
    scale = 4 if keys.dtype == torch.int8 else 0
    vector = keys.shape[1] * (keys.shape[3] * keys.element_size() + scale)
    return 2 * int(lengths.sum()) * vector + 2 * _size(args[0])


def _flops(func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> float:
    namespace, _, name = func._schema.name.partition("::")
    if namespace == "lmfast":
        formula = _FLOPS.get(name.removeprefix("triton_"))
        return 0.0 if formula is None else formula(*args)
    formula = flop_registry.get(func._overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **(kwargs or {}), out_val=result))
