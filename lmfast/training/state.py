"""A training state as named tensors and JSON values, in one piece whatever divides it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lmfast.training.processes import Processes, like, whole
from lmfast.training.seeding import random_state, set_random_state


def unsharded_copy(model: nn.Module) -> nn.Module:
    """Return a copy without memory, to be filled by `fill_copy` when a model is divided."""
    return copy.deepcopy(model).to("meta")


def fill_copy(empty: nn.Module, model: nn.Module, processes: Processes) -> nn.Module:
    """Return a whole model on the CPU with the values of a divided one, in the first process.

    All processes must call it.
    """
    filled = copy.deepcopy(empty).to_empty(device="cpu") if processes.first else empty
    own = dict(filled.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = whole(parameter)
            if processes.first:
                own[name].copy_(value)
        for name, buffer in model.named_buffers():
            if processes.first:
                filled.get_buffer(name).copy_(buffer)
    return filled


def load_whole(model: nn.Module, empty: nn.Module | None, values: dict[str, Tensor]) -> None:
    """Load a whole model's state dict into a model that may be divided: `empty` is its copy."""
    if empty is None:
        model.load_state_dict(values)
        return
    filled = copy.deepcopy(empty).to_empty(device="cpu")
    filled.load_state_dict(values)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(like(filled.get_parameter(name), parameter))


def optimizer_parts(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's state as tensors named `optimizer.INDEX.NAME` and JSON values.

    All processes must call it.
    """
    content = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, state in content["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = whole(value)
            else:
                scalars.setdefault(str(index), {})[name] = value
    return tensors, {"groups": content["param_groups"], "scalars": scalars}


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], content: dict[str, Any]
) -> None:
    """Restore what `optimizer_parts` returned."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if not key.startswith("optimizer."):
            continue
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = like(value, parameters[int(index)])
    for key, scalars in content["scalars"].items():
        state.setdefault(int(key), {}).update(scalars)
    optimizer.load_state_dict({"state": state, "param_groups": content["groups"]})


def random_parts(processes: Processes) -> tuple[dict[str, Tensor], list[Any]]:
    """Return the random states of all processes, to the first; all must call it."""
    tensors: dict[str, Tensor] = {}
    values = []
    for rank, (states, others) in enumerate(processes.gather(random_state())):
        tensors.update({f"random.{rank}.{name}": state for name, state in states.items()})
        values.append(others)
    return tensors, values


def load_random(processes: Processes, tensors: dict[str, Tensor], values: list[Any]) -> None:
    """Restore this process's random state; a process that was not there keeps its own."""
    prefix = f"random.{processes.rank}."
    states = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    if states:
        set_random_state(states, values[processes.rank])


def whole_carried(carried: list[Tensor | None], processes: Processes) -> dict[str, Tensor]:
    """Return the recurrent states (L, B, E) of all parts and processes, if there are any."""
    parts = [state for state in carried if state is not None]
    if not parts:
        return {}
    rows = processes.gather(torch.cat(parts, dim=1).cpu())
    return {"carried": torch.cat(rows, dim=1)} if rows else {}


def load_carried(
    tensors: dict[str, Tensor], processes: Processes, parts: int, device: torch.device
) -> list[Tensor | None]:
    """Return this process's parts of what `whole_carried` returned."""
    if "carried" not in tensors:
        return [None] * parts
    rows = processes.rows(tensors["carried"].movedim(1, 0), parts)
    return [part.movedim(0, 1).contiguous().to(device) for part in rows]
