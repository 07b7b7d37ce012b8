"""Giving one module another forward: its class becomes a generated subclass of its own class.

Parameters, buffers, hooks, state_dict and the module itself stay what they are; `isinstance` and
the class's name stay true; torch.compile sees an ordinary method. Deep copies and pickles carry the
original class and the recipe, from which the subclass is made again.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lmfast.patching.libraries import load_all

Options = tuple[tuple[str, Any], ...]

# Name -> (original class, options) -> the attributes of the subclass. The options "label" and
# "note" are for the report.
_RECIPES: dict[str, Callable[..., dict[str, Any]]] = {}


def recipe(name: str) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., dict[str, Any]]]:
    """Decorator: registers what a replacement called `name` puts into the subclass."""

    def register(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        _RECIPES[name] = build
        return build

    return register


@functools.cache
def subclass(original: Any, name: str, options: Options) -> type[nn.Module]:
    """The subclass of `original` with the forward of a recipe; one per recipe and options."""
    if name not in _RECIPES:  # a pickle of another library's model
        load_all()
    settings = {key: value for key, value in options if key not in ("label", "note")}
    made = _RECIPES[name](original, **settings)
    if "forward" in made:
        made["forward"] = _for_every_call(original.forward, made["forward"])
    attributes = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        **made,
        "__reduce_ex__": _reduce_ex,
        "_lmfast_swap": (original, name, options),
    }
    return type(original)(original.__name__, (original,), attributes)


def _for_every_call(own: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Our forward for the calls it was made for; the original one for all others it can take.

    Those are arguments by name, where names differ, and optional arguments that ours has not.
    """
    try:
        theirs = list(inspect.signature(own).parameters)
        mine = inspect.signature(ours).parameters
    except (TypeError, ValueError):
        return ours
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if theirs == list(mine) or any(p.kind in variable for p in mine.values()):
        return ours
    count = len(mine) - 1

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != count:
            return own(self, *args, **kwargs)
        return ours(self, *args)

    return forward


def _new(original: type, name: str, options: Options) -> nn.Module:
    cls = subclass(original, name, options)
    return cls.__new__(cls)


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    if "_lmfast_swap" not in vars(type(self)):
        # A class that someone made from this one, such as torch's parametrizations do.
        return object.__reduce_ex__(self, protocol)
    found = super(type(self), self).__reduce_ex__(max(int(protocol), 2))
    assert isinstance(found, tuple)
    if found[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        raise TypeError(f"{type(self).__name__} has its own way of pickling: unpatch it first")
    return (_new, type(self)._lmfast_swap, *found[2:])  # type: ignore[attr-defined]


def swap_of(module: nn.Module) -> tuple[type, str, Options] | None:
    """(original class, recipe, options) of a module that was given another forward, or None."""
    return getattr(type(module), "_lmfast_swap", None)


def apply(module: nn.Module, name: str, options: Options) -> None:
    """Gives a module the forward of a recipe."""
    own: Any = type(module)
    module.__class__ = subclass(own, name, options)


def undo(module: nn.Module) -> bool:
    """Gives a module its own class back; False if it had it."""
    found = swap_of(module)
    if found is None:
        return False
    ours: Any = next(c for c in type(module).__mro__ if "_lmfast_swap" in vars(c))
    module.__class__ = _without(type(module), ours, found[0])
    # A wrapper put around forward meanwhile, as accelerate's hooks are, keeps the method it found.
    for key, value in list(vars(module).items()):
        if (
            inspect.ismethod(value)
            and value.__self__ is module
            and value.__func__ is vars(ours).get("forward")
        ):
            vars(module)[key] = types.MethodType(getattr(found[0], "forward"), module)  # noqa: B009
    return True


def _without(cls: Any, ours: type, original: Any) -> Any:
    """A class with `original` in the place of ours among its bases.

    A module's class may have been made from ours meanwhile, as torch's parametrizations do.
    """
    if cls is ours:
        return original
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    bases = tuple(_without(b, ours, original) if issubclass(b, ours) else b for b in cls.__bases__)
    return type(cls)(cls.__name__, bases, own)


def each_swapped(model: nn.Module) -> Iterator[nn.Module]:
    """Every module of a model that has another forward now."""
    return (m for m in list(model.modules()) if swap_of(m) is not None)
