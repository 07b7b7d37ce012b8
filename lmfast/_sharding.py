"""Operators on DTensors: on whole tensors, and on the parts of a batch where they lie.

A DTensor is divided among processes or held by each (`torch.distributed.tensor`). Every operator of
this library that writes nothing in place runs on tensors that all processes hold whole: a sharded
parameter is gathered for it. Those of a Transformer block, and losses that are summed or kept by
row, need no exchange where a batch is divided; gradients of what each process holds are then sums
over the processes. Attention runs by heads as well, and products by columns and by depth.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_PLAIN = (Tensor, torch.nn.Parameter)
_DTENSOR = "torch.distributed.tensor"

SUM = None  # an output of which each process has a part of the sum
_NONE, _SUM = 0, 2  # reductions of a loss
# Dimension of each divided input, and of each output; the other inputs are whole.
_Rule = tuple[dict[str, int], tuple[int | None, ...]]

_registered = False


def prepare_sharding(first: object) -> None:
    """Tell PyTorch the rules below once a tensor may be a DTensor.

    Importing them takes 0.4 s, so that is left to whoever makes DTensors.
    """
    global _registered
    if type(first) in _PLAIN or _registered or _DTENSOR not in sys.modules:
        return
    _registered = True
    _register()


def summed(tensor: Tensor) -> Tensor:
    """Return a DTensor of which processes hold parts of a sum as one that each holds whole.

    The rows that an embedding divided by its vocabulary finds are such a sum, and PyTorch's can be
    used once only.
    """
    if type(tensor) is Tensor or not hasattr(tensor, "placements"):
        return tensor
    from torch.distributed.tensor import Replicate

    divided: Any = tensor
    places = [Replicate() if place.is_partial() else place for place in divided.placements]
    return divided.redistribute(placements=places)


def in_order(tensor: Tensor) -> Tensor:
    """Return a DTensor with its dimensions in order in memory; other tensors as they are.

    A DTensor's strides say how its parts lie; those that came from other processes lie in order
    whatever it says. Operators whose result lies as an argument does would then be misread.
    """
    if type(tensor) in _PLAIN or not hasattr(tensor, "placements"):
        return tensor
    return tensor.contiguous()


def _rows(*inputs: str, outputs: tuple[int | None, ...]) -> Callable[[dict[str, Any]], list[_Rule]]:
    """The first dimension divided, where it is not the one that an operator sums over."""
    rule = (dict.fromkeys(inputs, 0), outputs)
    return lambda given: [rule] if given[inputs[0]].ndim > 1 else []


def _rope(given: dict[str, Any]) -> list[_Rule]:
    if given["positions"] is not None:
        return []
    return [({"q": dim, "k": dim}, (dim, dim)) for dim in (0, 1)]


def _attention(given: dict[str, Any]) -> list[_Rule]:
    names = ("offsets", "lengths", "mask", "sinks", "alibi")
    if any(given[name] is not None for name in names):
        return []
    backward = "dout" in given
    divided = ("dout", "q", "k", "v", "out") if backward else ("q", "k", "v")
    rules: list[_Rule] = []
    processes = given["q"].mesh.size()
    # Queries' and keys' heads go together only in equal parts.
    by_heads = all(given[name].shape[1] % processes == 0 for name in ("q", "k"))
    for dim in (0, 1) if by_heads else (0,):  # batch, heads; sums are (2, B, H, T)
        inputs = dict.fromkeys(divided, dim)
        if backward:
            inputs["sums"] = dim + 1
        rules.append((inputs, (dim, dim, dim) if backward else (dim, dim + 1)))
    return rules


def _product(given: dict[str, Any]) -> list[_Rule]:
    last = given["x"].ndim - 1
    rules: list[_Rule] = [({"weight": 0, "bias": 0}, (last,))]
    if last > 0:
        rules.append(({"x": 0}, (0,)))
    if given["bias"] is None and not given["relu"]:
        rules.append(({"x": last, "weight": 1}, (SUM,)))
    return rules


def _loss(rows: str, gradients: tuple[int | None, ...]) -> Callable[[dict[str, Any]], list[_Rule]]:
    """A mean is over the rows of all processes, which no process knows."""

    def rules(given: dict[str, Any]) -> list[_Rule]:
        if given["reduction"] == _NONE:
            return [({rows: 0, "targets": 0, "dloss": 0}, (0, *gradients))]
        if given["reduction"] == _SUM:
            return [({rows: 0, "targets": 0}, (SUM, *gradients))]
        return []

    return rules


_DIVIDED: dict[str, Callable[[dict[str, Any]], list[_Rule]]] = {
    "rms_norm": _rows("x", outputs=(0,)),
    "add_rms_norm": _rows("x", "residual", outputs=(0, 0)),
    "rms_norm_backward": _rows("dy", "x", "dsum", outputs=(0, SUM)),
    "swiglu": _rows("gate", "up", outputs=(0,)),
    "geglu": _rows("gate", "up", outputs=(0,)),
    "swiglu_backward": _rows("dy", "gate", "up", outputs=(0, 0)),
    "geglu_backward": _rows("dy", "gate", "up", outputs=(0, 0)),
    "rope": _rope,
    "attention": _attention,
    "attention_backward": _attention,
    "linear_amx": _product,
    "linear_few_rows": _product,
    "cross_entropy": _loss("logits", (0,)),
    "linear_cross_entropy": _loss("hidden", (0, SUM, SUM)),
}


def _register() -> None:
    """Give every operator without writes its rules."""
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full_name.partition("::")
        if namespace != "lmfast" or "." in name:
            continue
        op = getattr(torch.ops.lmfast, name).default
        returns = op._schema.returns
        writes = any(argument.alias_info is not None for argument in op._schema.arguments)
        if not writes and returns and all(r.type.isSubtypeOf(_TENSOR) for r in returns):
            _register_operator(op, _DIVIDED.get(name.removeprefix("triton_")))


_TENSOR = torch._C.TensorType.get()


def _register_operator(op: Any, rules: Callable[[dict[str, Any]], list[_Rule]] | None) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    names = [argument.name for argument in op._schema.arguments]
    count = len(op._schema.returns)

    def acceptable(*args: Any, **kwargs: Any) -> list[tuple[list[Any], list[Any]]]:
        given = {**dict(zip(names, args)), **kwargs}

        def placed(rule: _Rule) -> tuple[list[Any], list[Any]]:
            dims, results = rule
            inputs = [
                Shard(dims[name])
                if name in dims and value is not None
                else [Replicate() if hasattr(v, "placements") else None for v in _leaves(value)]
                for name, value in given.items()
            ]
            outputs = [Partial() if dim is SUM else Shard(dim) for dim in results]
            return outputs, [p for each in inputs for p in _leaves(each)]

        whole = placed(({}, ()))[1]
        found = [([Replicate()] * count, whole)]
        return found + [placed(rule) for rule in (rules(given) if rules else [])]

    register_sharding(op)(acceptable)
    # Every argument decides what comes out, not only those from the first integer on.
    propagator = DTensor._op_dispatcher.sharding_propagator
    propagator.op_to_schema_info[op] = RuntimeSchemaInfo(0, needs_pytree=True)


def _leaves(value: Any) -> list[Any]:
    return tree_leaves(value, is_leaf=lambda leaf: leaf is None)
