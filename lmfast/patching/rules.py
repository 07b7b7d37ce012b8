"""What a rule is, and what all rules share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lmfast.nn.hooks import has_hooks
from lmfast.patching import swap
from lmfast.patching.probe import Call


@dataclass
class Plan:
    """A replacement that a module looks made for; nothing is replaced before it is tried.

    Attributes:
        recipe: name of the replacement in `lmfast.patching.swap`.
        candidates: its options, the likeliest first; `label` among them overrides the plan's, and
            `parts` names a child whose children's work the replacement does.
        calls: makes the calls it is tried with.
        label: what the report says when it fits.
        note: what the report adds.
        absorbed: modules whose forward is called no more.
    """

    recipe: str
    candidates: list[dict[str, Any]]
    calls: Callable[[], list[Call]]
    label: str
    note: str = ""
    absorbed: list[nn.Module] = field(default_factory=list)


# A rule looks at a module: a plan, the reason for leaving it alone, or None for "not mine".
Rule = Callable[[nn.Module], "Plan | str | None"]


def options_of(values: dict[str, Any], plan: Plan, backend: str | None) -> swap.Options:
    """Options in the form that classes are made by."""
    found = {"label": plan.label, "note": plan.note, "backend": backend, **values}
    return tuple(sorted(found.items()))


def takes(cls: type, count: int) -> bool:
    """Whether a class's forward can be called with `count` positional arguments beside self."""
    try:
        signature = inspect.signature(cls.forward)  # type: ignore[attr-defined]
        signature.bind(None, *[None] * count)
    except (TypeError, ValueError):
        return False
    return True


def own_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters by name, without those of its children."""
    return {name: p for name, p in module._parameters.items() if p is not None}


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no children."""
    return not any(child is not None for child in module._modules.values())


def untouched(parts: Iterable[nn.Module]) -> bool:
    """Whether no hook and no forward of its own is on modules whose work another one does."""
    return not any(has_hooks(p) or "forward" in vars(p) for p in parts)
