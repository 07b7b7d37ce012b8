"""Where low-rank updates can be put: the matrices of a model, by name and kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lmfast.nn.low_rank import LowRank, LowRankLinear, LowRankParameter, Update
from lmfast.nn.packed import PackedParameters
from lmfast.nn.projection import Projections, low_rank_name, low_rank_of
from lmfast.patching import swap
from lmfast.training.conv1d import classes_in_use

_LAYER = "low_rank"  # the submodule of a linear layer


@dataclass(frozen=True, eq=False)
class Site:
    """A matrix, or some columns of one, that can be updated.

    Attributes:
        name: dotted, as targets name it.
        owner, weight: the module and the name of its parameter.
        part: the last name within the owner; "" where the owner is a linear layer itself.
        start, size: columns of the weight read as (in, out).
        in_features, out_features: of the whole weight.
        bare: its module multiplies by it on its own.
        layer: part of the blocks of a model: updated by default.
    """

    name: str
    owner: nn.Module
    weight: str
    part: str
    start: int
    size: int
    in_features: int
    out_features: int
    bare: bool = False
    layer: bool = True


def find(model: nn.Module, targets: Sequence[str] | None) -> list[Site]:
    """The sites that targets name, or all that are updated by default.

    Raises:
        ValueError: a target names nothing that can be updated.
    """
    everything = list(_sites(model))
    if targets is None:
        head = _output_layer(model)
        found = [s for s in everything if s.layer and s.owner is not head]
        if not found:
            raise ValueError(
                f"the model has no linear layer: name targets, of {_known(everything)}"
            )
        return found
    if not targets:
        raise ValueError("targets must name at least one matrix, got none")
    chosen: dict[int, Site] = {}
    for target in targets:
        matches = [i for i, s in enumerate(everything) if _ends_with(s.name, target)]
        if not matches:
            raise ValueError(f"target {target!r} {_why_not(model, everything, target)}")
        chosen.update((i, everything[i]) for i in matches)
    return [chosen[i] for i in sorted(chosen)]


def named(model: nn.Module, name: str) -> Site:
    """The site of one dotted name; ValueError where there is none."""
    found = [site for site in _sites(model) if site.name == name]
    if not found:
        raise ValueError(f"{name!r} is no matrix of the model that can be updated")
    return found[0]


def attach(site: Site, updates: Sequence[Update], dropout: float) -> None:
    """Put updates of one weight into the model."""
    value = getattr(site.owner, site.weight)
    sizes = (site.in_features, site.out_features)
    placed = {"dtype": value.dtype, "device": value.device}
    if site.bare:
        low_rank: LowRank = LowRankParameter(*sizes, updates, **placed)
        parametrize.register_parametrization(site.owner, site.weight, low_rank, unsafe=True)
        return
    low_rank = LowRank(*sizes, updates, dropout=dropout, **placed)
    low_rank.train(site.owner.training)
    if isinstance(site.owner, Projections):
        site.owner.add_module(low_rank_name(site.weight), low_rank)
    else:
        site.owner.add_module(_LAYER, low_rank)
        swap.undo(site.owner)  # what lmfast.patch gave it, the updates' products do as well
        site.owner.__class__ = _layer_classes()[type(site.owner)]


def detach(owner: nn.Module, weight: str) -> None:
    """Take the updates of one weight out of the model; its values stay as they are."""
    if parametrize.is_parametrized(owner, weight):
        kept = owner.parametrizations[weight].original  # type: ignore[index, union-attr]
        parametrize.remove_parametrizations(owner, weight, leave_parametrized=False)
        assert getattr(owner, weight) is kept
    elif isinstance(owner, Projections):
        del owner._modules[low_rank_name(weight)]
    else:
        del owner._modules[_LAYER]
        plain = {updated: plain for plain, updated in _layer_classes().items()}
        owner.__class__ = plain[type(owner)]


def updates_in(module: nn.Module) -> Iterator[tuple[LowRank, str]]:
    """The updates of a module's own weights, each with the name of its weight."""
    if isinstance(module, Projections):
        for weight in module._parameters:
            low_rank = low_rank_of(module, weight)
            if low_rank is not None:
                yield low_rank, weight
    elif isinstance(module._modules.get(_LAYER), LowRank):
        yield module._modules[_LAYER], "weight"  # type: ignore[misc]
    for weight, chain in _parametrizations(module):
        for entry in chain:
            if isinstance(entry, LowRankParameter):
                yield entry, weight


def matrix(owner: nn.Module, weight: str) -> Tensor:
    """A weight, without its updates, read as (in, out)."""
    for name, chain in _parametrizations(owner):
        if name == weight:
            return chain.original
    value = owner._parameters[weight]
    assert value is not None
    return value.t() if isinstance(owner, nn.Linear) else value


def dotted(*parts: str) -> str:
    """Join names by dots, leaving out empty ones."""
    return ".".join(part for part in parts if part)


def _parametrizations(module: nn.Module) -> list[tuple[str, Any]]:
    chains = getattr(module, "parametrizations", None)
    return list(chains.items()) if isinstance(chains, nn.ModuleDict) else []


def _own_class(module: nn.Module) -> type:
    """A module's class as it was before `lmfast.patch`."""
    found = swap.swap_of(module)
    return type(module) if found is None else found[0]


def _layer_classes() -> dict[type, type]:
    """Linear layer -> the class of one with updates. transformers' layers, if it is in use."""
    return {nn.Linear: LowRankLinear, **classes_in_use()}


def _sites(model: nn.Module) -> Iterator[Site]:
    layers = _layer_classes()
    for name, module in model.named_modules():
        if isinstance(module, Projections):
            yield from _projections(name, module)
        elif _own_class(module) in layers:
            if module.weight is None:  # that of an embedding takes its place
                continue
            columns, rows = module.weight.shape  # type: ignore[union-attr, misc]
            if not isinstance(module, nn.Linear):
                columns, rows = rows, columns
            yield Site(name, module, "weight", "", 0, columns, rows, columns)
        elif not isinstance(module, (nn.Linear, nn.Embedding, nn.RNNBase, LowRank)):
            # nn.RNNBase keeps its weights in a list besides, where no update would be seen.
            for weight, value in module._parameters.items():
                if value is not None and value.ndim == 2:
                    full, (rows, columns) = dotted(name, weight), value.shape
                    at = (full, module, weight, weight, 0, columns, rows, columns)
                    yield Site(*at, bare=True, layer=False)


def _projections(name: str, module: Projections) -> Iterator[Site]:
    packed = module.parts() if isinstance(module, PackedParameters) else {}
    for weight, value in module._parameters.items():
        if value is None or value.ndim != 2:
            continue
        start = 0
        for part, size in _runs(packed.get(weight, [(weight, value.shape[1])])):
            full = dotted(name, part)
            yield Site(full, module, weight, part, start, size, value.shape[0], value.shape[1])
            start += size


def _runs(parts: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Parts of one last name, such as the heads' W_Q, as one."""
    found: dict[str, int] = {}
    for name, size in parts:
        last = name.rpartition(".")[2]
        found[last] = found.get(last, 0) + size
    return list(found.items())


def _output_layer(model: nn.Module) -> nn.Module | None:
    find_head = getattr(model, "get_output_embeddings", None)
    return find_head() if callable(find_head) else getattr(model, "fc", None)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _why_not(model: nn.Module, everything: Sequence[Site], target: str) -> str:
    for name, module in model.named_modules():
        if _ends_with(name, target):
            return (
                f"names {name}, a {type(module).__name__}: only torch.nn.Linear, transformers' "
                "Conv1D, lmfast's projections and bare matrices can be updated"
            )
    for name, parameter in model.named_parameters():
        if _ends_with(name, target):
            return f"names a parameter of shape {tuple(parameter.shape)} that cannot be updated"
    return f"names nothing in the model; it has {_known(everything)}"


def _known(everything: Sequence[Site]) -> str:
    return ", ".join(sorted({s.name.rpartition(".")[2] for s in everything})) or "none"
