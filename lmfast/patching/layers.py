"""Activations, linear layers and gated feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lmfast import ops
from lmfast.ops._linear_cpu import worth_asking
from lmfast.patching.probe import Call, random_input
from lmfast.patching.rules import Plan, is_leaf, own_weights, takes, untouched
from lmfast.patching.swap import recipe

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def activation_name(module: Any) -> str | None:
    """Which of the activations with a fused kernel a module or function is, or None."""
    x = torch.linspace(-9, 9, 181, dtype=torch.float64).requires_grad_()
    call = module.forward if isinstance(module, nn.Module) else module  # without its hooks
    try:
        with torch.enable_grad():
            y = call(x)
            (dy,) = torch.autograd.grad(y.sum(), x)
    except Exception:
        return None
    for name, function in _ACTIVATIONS.items():
        with torch.enable_grad():
            z = function(x)
            (dz,) = torch.autograd.grad(z.sum(), x)
        # gelu and its tanh form are 5e-4 apart.
        if torch.allclose(y, z, 0, 1e-7) and torch.allclose(dy, dz, 0, 1e-7):
            return name
    return None


class _CountOperators(TorchDispatchMode):
    """Counts the operators that run inside."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def plan_activation(module: nn.Module) -> Plan | str | None:
    """A GELU or SiLU written out in several operators."""
    if _is_torchs(module) or not is_leaf(module) or own_weights(module) or module._buffers:
        return None
    if not takes(type(module), 1) or takes(type(module), 0):
        return None
    name = activation_name(module.forward)
    if name is None:
        return None
    x = torch.zeros(3)
    with _CountOperators() as counter:
        module.forward(x)
    if counter.count <= 1:
        return f"torch's fused {name} already"
    return Plan(
        "activation",
        [{"name": name}],
        lambda: [Call((random_input(module, 2, 3, 5),))],
        f"torch's fused {name}",
    )


@recipe("activation")
def _activation(original: type, name: str, backend: str | None = None) -> dict[str, Any]:
    function = _ACTIVATIONS[name]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return function(x)

    return {"forward": forward}


# What a forward may name that does nothing but multiply by the weight and add the bias.
_PRODUCT = set("weight bias T mT t transpose torch nn functional F linear matmul addmm".split())


def _only_multiplies(cls: Any) -> bool:
    """Whether a class of linear layers has nn.Linear's forward, or spells out the same product.

    Subclasses are often made to do something on the side, which no trial on numbers shows; torch's
    own are made for quantisation, or are read by nn.MultiheadAttention.
    """
    if cls is nn.Linear:
        return True
    code = getattr(cls.forward, "__code__", None)
    return (
        code is not None
        and set(code.co_names) <= _PRODUCT
        and not cls.__module__.startswith("torch.")
    )


def plan_linear(module: nn.Module) -> Plan | str | None:
    """nn.Linear, its like in another spelling, and with a transposed weight as GPT-2 has it."""
    transposed = type(module).__name__ == "Conv1D"
    if not isinstance(module, nn.Linear) and not transposed:
        return None
    if isinstance(module, nn.Linear) and not _only_multiplies(type(module)):
        return None
    weights = own_weights(module)
    if not is_leaf(module) or not set(weights) <= {"weight", "bias"} or "weight" not in weights:
        return None
    if weights["weight"].dim() != 2:
        return None
    width = weights["weight"].shape[0 if transposed else 1]

    def calls() -> list[Call]:
        return [
            Call((random_input(module, 2, 3, width),)),
            # As many rows as the kernels start from.
            Call((random_input(module, 2, 131, width),)),
        ]

    return Plan(
        "linear",
        [{"transposed": transposed}],
        calls,
        "lmfast.ops.linear",
        "few rows, or 256 and more",
    )


@recipe("linear")
def _linear(original: type, transposed: bool, backend: str | None = None) -> dict[str, Any]:
    own = original.forward  # type: ignore[attr-defined]

    def forward(self: Any, input: Tensor) -> Tensor:
        w = self.weight.t() if transposed else self.weight
        # What ops.linear would leave to PyTorch, without asking it.
        if input.dtype != w.dtype or not worth_asking(input, w):
            return own(self, input)
        return ops.linear(input, w, self.bias, backend=backend)

    return {"forward": forward}


def _linear_children(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of the children that are linear layers of any kind."""
    found = {}
    for name, child in module.named_children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(child, nn.Embedding):
            rows, columns = weight.shape
            found[name] = (rows, columns) if type(child).__name__ == "Conv1D" else (columns, rows)
    return found


def plan_gated(module: nn.Module) -> Plan | str | None:
    """`down(act(gate(x)) * up(x))`, with gate and up apart or in one layer."""
    linear = _linear_children(module)
    if len(linear) not in (2, 3) or own_weights(module) or not takes(type(module), 1):
        return None
    # Dropout and the activation may be there as well; nothing that has weights.
    others = {n: c for n, c in module.named_children() if n not in linear}
    if any(True for c in others.values() for _ in c.parameters()):
        return None
    name = next(
        (
            found
            for source in (others.values(), [v for v in vars(module).values() if callable(v)])
            for function in source
            if (found := activation_name(function)) in ("silu", "gelu", "gelu_tanh")
        ),
        None,
    )
    names = list(linear)
    candidates: list[dict[str, Any]] = []
    for down in names:
        hidden, width = linear[down]
        rest = [n for n in names if n != down]
        if len(rest) == 1 and linear[rest[0]] == (width, 2 * hidden):
            candidates += [
                {"gate": rest[0], "up": None, "down": down, "up_first": f} for f in (0, 1)
            ]
        elif len(rest) == 2 and all(linear[n] == (width, hidden) for n in rest):
            candidates += [
                {"gate": g, "up": u, "down": down, "up_first": 0} for g, u in (rest, rest[::-1])
            ]
    if not candidates:
        return None
    kinds = [name] if name else ["silu", "gelu_tanh", "gelu"]
    width = linear[candidates[0]["down"]][1]
    label = {"silu": "lmfast.ops.swiglu"}
    return Plan(
        "gated",
        [
            {**c, "activation": kind, "label": label.get(kind, "lmfast.ops.geglu")}
            for kind in kinds
            for c in candidates
        ],
        lambda: [Call((random_input(module, 2, 3, width),))],
        label.get(kinds[0], "lmfast.ops.geglu"),
    )


def _gated_product(activation: str, backend: str | None) -> Callable[..., Tensor]:
    if activation == "silu":
        return lambda gate, up=None: ops.swiglu(gate, up, backend=backend)
    how = "tanh" if activation == "gelu_tanh" else "none"
    return lambda gate, up=None: ops.geglu(gate, up, approximate=how, backend=backend)


@recipe("gated")
def _gated(
    original: type,
    gate: str,
    up: str | None,
    down: str,
    up_first: int,
    activation: str,
    backend: str | None = None,
) -> dict[str, Any]:
    product, own = _gated_product(activation, backend), original.forward  # type: ignore[attr-defined]
    layers = {gate, up, down}

    def is_fused(self: nn.Module) -> bool:
        """Whether nobody looks at the activation, which is not called as a module any more."""
        return untouched(m for name, m in self.named_children() if name not in layers)

    # The layers are called as modules, so that adapters and hooks on them keep working.
    if up is None:

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            if not is_fused(self):
                return own(self, x)
            packed = getattr(self, gate)(x)
            if up_first:
                second, first = packed.chunk(2, -1)
                return getattr(self, down)(product(first, second))
            return getattr(self, down)(product(packed))
    else:

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            if not is_fused(self):
                return own(self, x)
            return getattr(self, down)(product(getattr(self, gate)(x), getattr(self, up)(x)))

    return {"forward": forward}
