"""Recurrent layers: torch.nn's, and stacks of units of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lmfast.nn as layers
from lmfast import ops
from lmfast.patching.probe import Call, random_input
from lmfast.patching.rules import Plan, own_weights, takes, untouched
from lmfast.patching.swap import recipe

_TORCHS: dict[type, type] = {nn.RNN: layers.RNN, nn.LSTM: layers.LSTM, nn.GRU: layers.GRU}


def plan_torchs(module: nn.Module) -> Plan | str | None:
    """nn.RNN, nn.LSTM and nn.GRU themselves."""
    if type(module) not in _TORCHS:
        return None
    assert isinstance(module, nn.RNNBase)
    if module.proj_size:
        return "no kernel for projections (proj_size)"
    width = module.input_size

    def calls() -> list[Call]:
        x = random_input(module, 3, 4, width)
        lengths = [4, 2, 1] if module.batch_first else [3, 2, 1, 1]
        packed = pack_padded_sequence(x, torch.tensor(lengths), module.batch_first)
        return [Call((x,)), Call((packed,)), Call((random_input(module, 5, width),))]

    name = type(module).__name__
    return Plan("torch_recurrent", [{}], calls, f"lmfast.nn.{name}")


@recipe("torch_recurrent")
def _torch_recurrent(original: type, backend: str | None = None) -> dict[str, Any]:
    ours = _TORCHS[original]
    names = ("_one_step", "_prepare", "_weights_of", "_layers", "_torch_layer")
    found = {name: getattr(ours, name) for name in names}
    if backend == "torch":
        return {"forward": original.forward}  # type: ignore[attr-defined]
    return {**found, "forward": ours.forward}  # type: ignore[attr-defined]


def _unit_weights(unit: nn.Module) -> tuple[str, str, str] | None:
    """Names of the input's matrix, the state's and the bias of an Elman unit."""
    weights = own_weights(unit)
    square = [n for n, w in weights.items() if w.dim() == 2 and w.shape[0] == w.shape[1]]
    bias = [n for n, w in weights.items() if w.dim() == 1]
    if len(weights) != 3 or len(square) != 2 or len(bias) != 1 or not takes(type(unit), 2):
        return None
    # By convention W multiplies the input and U the state; the trial says whether it is so.
    square.sort(key=lambda n: n.lower().startswith("u"))
    return square[0], square[1], bias[0]


def plan_stack(module: nn.Module) -> Plan | str | None:
    """A stack of Elman units (`Uh`, `Wh`, `b`) that a loop steps through time."""
    children = list(module.named_children())
    if len(children) != 1 or own_weights(module) or not takes(type(module), 1):
        return None
    name, units = children[0]
    if not isinstance(units, nn.ModuleList) or not len(units):
        return None
    names = _unit_weights(units[0])
    if names is None or any(
        _unit_weights(u) != names or type(u) is not type(units[0]) for u in units
    ):
        return None
    width = own_weights(units[0])[names[0]].shape[0]
    orders = [names, (names[1], names[0], names[2])]
    return Plan(
        "elman_stack",
        [
            {"parts": name, "weights": order, "transposed": t}
            for order in orders
            for t in (False, True)
        ],
        lambda: [
            Call((random_input(module, 3, 5, width),)),
            Call((random_input(module, 2, 1, width),)),
        ],
        "lmfast.ops.elman_rnn",
        absorbed=list(units),
    )


@recipe("elman_stack")
def _elman_stack(
    original: type,
    parts: str,
    weights: tuple[str, str, str],
    transposed: bool,
    backend: str | None = None,
) -> dict[str, Any]:
    own = original.forward  # type: ignore[attr-defined]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        each = getattr(self, parts)
        if not untouched(each):
            return own(self, x)
        for unit in each:
            w, u, b = (getattr(unit, name) for name in weights)
            if not transposed:
                w, u = w.t(), u.t()
            h = x.new_zeros(x.shape[0], b.shape[0])
            x, _ = ops.elman_rnn(x, h, (w, u, b, torch.zeros_like(b)), backend=backend)
        return x

    return {"forward": forward}
