"""Rotary positions: the forward of an attention layer with another function under the same name.

transformers' attention layers call a function of their module, `apply_rotary_pos_emb(q, k, cos,
sin)` or `(x, sin, cos)`, which is written out in a dozen operators. The layer's own code runs on,
with a namespace of its own in which that name means `lmfast.ops.rope`; the module and its function
stay as they are.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmfast import ops
from lmfast.ops._library import is_autocast, needs_grad
from lmfast.patching.probe import Call
from lmfast.patching.rules import Plan
from lmfast.patching.swap import recipe

# How a model's (B, T, D_rot) cosines hold one number per pair, and whether pairs are neighbours.
_TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "halves": lambda t: t[..., : t.shape[-1] // 2],  # [f, f]
    "twice": lambda t: t[..., ::2],  # f0, f0, f1, f1, ...
    "once": lambda t: t,
}
_VARIANTS = (("halves", False), ("halves", True), ("twice", True), ("once", False), ("once", True))

Rotate = Callable[..., Any]


def _spread(angles: Tensor, tables: str) -> Tensor:
    if tables == "halves":
        return torch.cat((angles, angles), -1)
    return angles.repeat_interleave(2, -1) if tables == "twice" else angles


def replacement(own: Rotate, tables: str, interleaved: bool, backend: str | None) -> Rotate:
    """`own(q, k, cos, sin, unsqueeze_dim=1)` by `lmfast.ops.rope`."""

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        fits = (
            not args
            and unsqueeze_dim in (1, 2)
            and q.dim() == k.dim() == 4
            and cos.dim() == 3
            and not needs_grad(cos, sin)
            # The dtype of the result is the model's own affair elsewhere.
            and (q.dtype == k.dtype == cos.dtype or is_autocast(q))
        )
        if not fits:
            return own(q, k, cos, sin, *args, unsqueeze_dim=unsqueeze_dim)
        if unsqueeze_dim == 2:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        c, s, positions = _prepared(cos, sin, tables, q.dtype)
        q, k = ops.rope(q, k, c, s, interleaved=interleaved, positions=positions, backend=backend)
        if unsqueeze_dim == 2:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return q, k

    return rotate


def replacement_of_one(own: Rotate, tables: str, interleaved: bool, backend: str | None) -> Rotate:
    """`own(x, sin, cos)` for x (B, T, H, D), as GPT-J has it, by `lmfast.ops.rope`."""

    def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        fits = x.dim() == 4 and cos.dim() == 3 and not needs_grad(cos, sin)
        if not fits or x.dtype != cos.dtype:
            return own(x, sin, cos)
        x = x.transpose(1, 2)
        c, s, positions = _prepared(cos, sin, tables, x.dtype)
        x, _ = ops.rope(
            x, x[:, :0], c, s, interleaved=interleaved, positions=positions, backend=backend
        )
        return x.transpose(1, 2)

    return rotate


_FORMS = {"pair": replacement, "one": replacement_of_one}


def _prepared(
    cos: Tensor, sin: Tensor, tables: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tables (rows, D_rot / 2) and each token's row; made once for all layers of a pass."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        # Tables of inference mode cannot tell that they were changed in place.
        versions = [None if t.is_inference() else t._version for t in (cos, sin)]
        state = (tables, dtype, *versions)
        kept = getattr(cos, "_lmfast_tables", None)
        if kept is not None and kept[0] is sin and kept[1] == state:
            return kept[2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    batch, steps, _ = cos.shape
    # [B or 1, T, D_rot / 2] -> [rows, D_rot / 2]
    c, s = (_TABLES[tables](t).to(wide).flatten(0, 1).contiguous() for t in (cos, sin))
    positions = None
    if batch > 1:
        positions = torch.arange(batch * steps, device=cos.device).view(batch, steps)
    found = (c, s, positions)
    if not compiling:
        cos._lmfast_tables = (sin, state, found)  # type: ignore[attr-defined]
    return found


def _variants(function: Rotate) -> list[tuple[str, str, bool]]:
    """How `function` rotates: its form, its tables and pairs, where ops.rope does the same."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=generator)
    k = torch.randn(2, 1, 5, 8, dtype=torch.float64, generator=generator)
    angles = torch.rand(2, 5, 4, dtype=torch.float64, generator=generator) * 3
    found = []
    for form, (tables, interleaved) in itertools.product(_FORMS, _VARIANTS):
        cos, sin = (_spread(t, tables) for t in (angles.cos(), angles.sin()))
        args = (q, k, cos, sin) if form == "pair" else (q.transpose(1, 2), sin, cos)
        try:
            expected = function(*args)
            got = _FORMS[form](function, tables, interleaved, "torch")(*args)
            if form == "one":
                expected, got = (expected,), (got,)
            # Some round to float32 inside.
            if all(torch.allclose(a, b, 0, 1e-5) for a, b in zip(expected, got, strict=True)):
                found.append((form, tables, interleaved))
        except Exception:  # someone else's function, on arguments that it does not take
            continue
    return found


def _holds(wrapper: types.FunctionType) -> list[types.CellType]:
    """Where a decorator's function keeps the one it wraps."""
    inner = wrapper.__wrapped__  # type: ignore[attr-defined]
    return [cell for cell in wrapper.__closure__ or () if cell.cell_contents is inner]


def own_function(function: Any) -> types.FunctionType | None:
    """The function under decorators that can be rebuilt around another one, or None."""
    while isinstance(function, types.FunctionType) and hasattr(function, "__wrapped__"):
        if not _holds(function):
            return None
        function = function.__wrapped__
    return function if isinstance(function, types.FunctionType) else None


def rotary_functions(module: nn.Module) -> dict[str, Rotate]:
    """The functions that look like rotary ones among the names a module's forward uses."""
    own = own_function(type(module).forward)
    if own is None:
        return {}
    found = {}
    for name in own.__code__.co_names:
        value = own.__globals__.get(name)
        if callable(value) and "rotary" in name and "apply" in name:
            found[name] = value
    return found


def rotary_candidates(module: nn.Module) -> list[dict[str, Any]]:
    """Options for what the rotary functions of a layer may be by `lmfast.ops.rope`."""
    return [
        {"function": name, "form": form, "tables": tables, "interleaved": interleaved}
        for name, function in rotary_functions(module).items()
        for form, tables, interleaved in _variants(function)
    ]


def plan_rotary(module: nn.Module, call: Callable[[], list[Call]]) -> Plan | str | None:
    """A layer that calls one rotary function, on q and k together or in turn."""
    functions = rotary_functions(module)
    if not functions:
        return None
    candidates = rotary_candidates(module)
    if not candidates:
        return f"{' and '.join(functions)} is not a rotation that lmfast.ops.rope computes"
    return Plan("rotary", candidates, call, "lmfast.ops.rope")


@recipe("rotary")
def _rotary(
    original: type,
    function: str,
    tables: str,
    interleaved: bool,
    form: str = "pair",
    backend: str | None = None,
) -> dict[str, Any]:
    whole = original.forward  # type: ignore[attr-defined]
    own = own_function(whole)
    assert own is not None
    rotate = _FORMS[form](own.__globals__[function], tables, interleaved, backend)
    # Without a __name__, torch.compile looks names up in this namespace, not in the module's.
    scope = {**own.__globals__, function: rotate}
    scope.pop("__name__", None)
    return {"forward": _rebuilt(whole, scope)}


def _rebuilt(function: types.FunctionType, scope: dict[str, Any]) -> types.FunctionType:
    """A copy of a function, or of the one under its decorators, that looks names up in `scope`."""
    closure = function.__closure__
    inner = getattr(function, "__wrapped__", None)
    if inner is not None:
        new = _rebuilt(inner, scope)
        held = _holds(function)
        closure = tuple(types.CellType(new) if c in held else c for c in closure or ())
        scope = function.__globals__
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__
    copy.__doc__ = function.__doc__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    if inner is not None:
        copy.__wrapped__ = new  # type: ignore[attr-defined]
    return copy
