"""Norms: any module with one weight per feature that divides by the root mean square."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfast import ops
from lmfast.ops._library import accumulation_dtype
from lmfast.patching.probe import Call, random_input
from lmfast.patching.rules import Plan, is_leaf, own_weights, takes
from lmfast.patching.swap import recipe

# Where no attribute says it: what norms are written with.
_USUAL_EPS = (1e-6, 1e-5, 1e-8, 1e-12, 0.0)


def _epsilons(module: nn.Module) -> list[dict[str, Any]]:
    """Options for where the epsilon is, the likeliest first."""
    names = [
        name
        for name, value in vars(module).items()
        if isinstance(value, float) and 0.0 <= value <= 1e-2
    ]
    names.sort(key=lambda name: "eps" not in name)
    return [{"eps_name": name} for name in names] or [{"eps": value} for value in _USUAL_EPS]


def _calls(module: nn.Module, width: int) -> list[Call]:
    # Small rows tell one epsilon from another.
    scale = torch.tensor([1.0, 1e-3, 3e-5]).view(3, 1)
    x = random_input(module, 2, 3, width)
    return [Call(((x.detach() * scale.to(x.device, x.dtype)).requires_grad_(),))]


def plan(module: nn.Module) -> Plan | str | None:
    """RMSNorm in any spelling: `x / rms(x) * w` or `x / rms(x) * (1 + w)`."""
    if isinstance(module, nn.LayerNorm):
        return "torch's LayerNorm is one fused kernel already"
    weights = own_weights(module)
    if not is_leaf(module) or len(weights) != 1 or module._buffers:
        return None
    (name, weight), *_ = weights.items()
    if weight.dim() != 1 or not takes(type(module), 1):
        return None
    if isinstance(module, nn.RMSNorm):
        if len(module.normalized_shape) != 1:
            return "it normalises several dimensions at once"
        eps: list[dict[str, Any]] = [{"eps_name": "eps"}]
    else:
        eps = _epsilons(module)

    return Plan(
        "rms_norm",
        [{"weight": name, "one_plus": plus, **e} for plus in (False, True) for e in eps],
        lambda: _calls(module, weight.shape[0]),
        "lmfast.ops.rms_norm",
    )


@recipe("rms_norm")
def _rms_norm(
    original: type,
    weight: str,
    one_plus: bool,
    eps_name: str | None = None,
    eps: float = 0.0,
    backend: str | None = None,
) -> dict[str, Any]:
    own = original.forward  # type: ignore[attr-defined]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        w = getattr(self, weight)
        # Mixed dtypes are promoted in a way of its own by every norm.
        if x.dtype != w.dtype:
            return own(self, x)
        epsilon = eps if eps_name is None else getattr(self, eps_name)
        if epsilon is None:
            epsilon = torch.finfo(accumulation_dtype(x.dtype)).eps  # as torch's own
        if one_plus:
            w = 1.0 + (w.float() if w.dtype in (torch.bfloat16, torch.float16) else w)
        return ops.rms_norm(x, w, epsilon, backend=backend)

    return {"forward": forward}


def plan_layer_norm(module: nn.Module) -> Plan | str | None:
    """A LayerNorm written out in several operators: F.layer_norm is one."""
    if isinstance(module, nn.LayerNorm):
        return None  # `plan` has said why
    weights = own_weights(module)
    if not is_leaf(module) or not 1 <= len(weights) <= 2 or not takes(type(module), 1):
        return None
    if any(w.dim() != 1 for w in weights.values()) or len({w.shape for w in weights.values()}) > 1:
        return None
    names = sorted(weights, key=lambda name: "bias" in name or name in ("b", "beta", "shift"))
    eps = _epsilons(module)
    bias = names[1] if len(names) == 2 else None

    return Plan(
        "layer_norm",
        [{"weight": names[0], "bias": bias, **e} for e in eps],
        lambda: _calls(module, len(weights[names[0]])),
        "torch's fused layer_norm",
    )


@recipe("layer_norm")
def _layer_norm(
    original: type,
    weight: str,
    bias: str | None,
    eps_name: str | None = None,
    eps: float = 0.0,
    backend: str | None = None,
) -> dict[str, Any]:
    own = original.forward  # type: ignore[attr-defined]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        w = getattr(self, weight)
        if x.dtype != w.dtype:
            return own(self, x)
        b = None if bias is None else getattr(self, bias)
        epsilon = eps if eps_name is None else getattr(self, eps_name)
        return F.layer_norm(x, w.shape, w, b, epsilon)

    return {"forward": forward}
