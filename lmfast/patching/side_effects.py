"""Whether a forward does more than compute its result, which no trial on numbers shows.

Counting calls, keeping inputs, printing: people put such things into a forward or around it, and a
module with another forward would stop doing them. This reads the code that a forward is made of;
what it cannot follow (methods of objects of one's own) it takes for computing.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import types
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

# What a closure or a name of a module of code may hold that no call changes.
_CONSTANTS = (
    *(bool, int, float, complex, str, bytes, tuple, frozenset, type(None), type),
    *(types.ModuleType, torch.dtype, torch.device, torch.Tensor),
)
_CONTAINERS = (list, dict, set, bytearray, deque)
# How a container is changed.
_STORES = {"STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"}
_CHANGES = {
    *("add", "append", "appendleft", "clear", "discard", "extend", "extendleft", "insert", "pop"),
    *("popitem", "popleft", "remove", "reverse", "rotate", "setdefault", "sort", "update"),
}
_INSTALLED = {"site-packages", "dist-packages"}
_TALKING = {print, input, open, setattr, delattr, exec, eval}


def side_effect(module: nn.Module) -> str | None:
    """What a module's forward does on the side, or None."""
    seen: set[types.CodeType] = set()
    for cls in type(module).__mro__:
        if "forward" not in vars(cls):
            continue
        forward = vars(cls)["forward"]
        found = _of(forward, module, seen)
        if found is not None:
            return found
        code = getattr(forward, "__code__", None)
        if code is None or "__class__" not in code.co_freevars:  # it does not call super()
            return None
    return None


def _of(function: Any, module: nn.Module, seen: set[types.CodeType]) -> str | None:
    """What a function that a module's forward is, or calls, does on the side."""
    if isinstance(function, property):
        function = function.fget
    if isinstance(function, (staticmethod, classmethod, types.MethodType)):
        function = function.__func__
    if isinstance(function, functools.partial):
        function = function.func
    if not isinstance(function, types.FunctionType):
        return None
    if str(function.__globals__.get("__name__")).startswith("torch."):
        wrapped = getattr(function, "__wrapped__", None)  # as by torch.autocast and torch.no_grad
        return None if wrapped is None else _of(wrapped, module, seen)
    if _is_of_another_library(function, module):
        return None
    if hasattr(function, "__wrapped__"):
        return f"{function.__name__} is decorated"
    code = function.__code__
    if code in seen:
        return None
    seen.add(code)
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):
        if name != "__class__" and not _is_constant(cell):
            return f"{function.__name__} uses {name!r} of the function around it"
    steps = list(_instructions(code))
    changes = any(step.opname in _STORES or step.argval in _CHANGES for step in steps)
    for step in steps:
        found = _of_instruction(step, function, module, changes, seen)
        if found is not None:
            return found
    return None


def _is_of_another_library(function: types.FunctionType, module: nn.Module) -> bool:
    """Whether it is installed, and not with the module: libraries keep tables of their own."""
    if not _INSTALLED.intersection(Path(function.__code__.co_filename).parts):
        return False
    home = str(function.__globals__.get("__name__")).partition(".")[0]
    return all(cls.__module__.partition(".")[0] != home for cls in type(module).__mro__)


def _is_constant(cell: types.CellType) -> bool:
    try:
        return isinstance(cell.cell_contents, _CONSTANTS)
    except ValueError:  # nothing in it yet
        return False


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Those of a function and of the comprehensions and functions in it."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)


def _of_instruction(
    step: dis.Instruction,
    function: types.FunctionType,
    module: nn.Module,
    changes: bool,
    seen: set[types.CodeType],
) -> str | None:
    name, where = step.argval, function.__name__
    if step.opname in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"):
        return f"{where} sets {name!r}"
    if step.opname == "STORE_DEREF" and name in function.__code__.co_freevars:
        return f"{where} sets {name!r}"
    if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
        value = function.__globals__.get(name, getattr(builtins, name, None))
        if changes and isinstance(value, _CONTAINERS):
            return f"{where} uses {name!r}, which it may change"
        if isinstance(value, types.BuiltinFunctionType) and value in _TALKING:
            return f"{where} calls {name}"
        return _of(value, module, seen)
    if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and name != "forward":
        value = inspect.getattr_static(module, name, None)
        if changes and isinstance(value, _CONTAINERS):
            return f"{where} uses {name!r}, which it may change"
        return _of(value, module, seen)
    return None
