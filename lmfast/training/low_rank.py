"""LoRA: training low-rank updates of a model's matrices, the matrices themselves frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lmfast.nn.low_rank import LowRank, Update, updates_from
from lmfast.training import low_rank_sites as sites
from lmfast.training.files import CheckpointError, read_pair, write_pair
from lmfast.training.low_rank_sites import Site


def lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] | None = None,
    *,
    dropout: float = 0.0,
) -> LoRA:
    """Put trainable low-rank updates beside a model's matrices, in place, and freeze the rest.

        y = x W + (alpha / rank) (x A) B,   A (in, rank) random, B (rank, out) zero

    Linear layers (`torch.nn.Linear`, transformers' `Conv1D`) and the packed projections of
    `lmfast.nn` multiply by both at once (`lmfast.ops.lora_linear`); a bare parameter (in, out) that
    its module multiplies by on its own reads as W + (alpha / rank) A B.

    Args:
        model: changed in place: its matrices stay where they are, under their names.
        rank: columns of A.
        alpha: alpha / rank scales the updates.
        targets: names, or ends of dotted names, of layers and parameters, such as "q_proj", "W_Q"
            or "layers.0.attn.W_O". By default all matrices of the model's layers: linear layers
            and projections, but neither the embedding nor the output layer. In the packed
            projections of `lmfast.nn`, W_Q, W_K and W_V are those of all heads, W_G and W_U the
            gate's and the other half.
        dropout: share of the input's features that the updates do not see while training; bare
            parameters, which have no input, take none.

    Returns:
        The updates, with `merge`, `save` and the rest. `LoRA.of(model)` finds them again.

    Raises:
        TypeError: `targets` is one string.
        ValueError: a number out of range, a model that has updates already, or a target that
            names nothing, or something that cannot be updated; then nothing has changed.

    Backends: those of `lmfast.ops.lora_linear`.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.

    Example:
        >>> from lmfast.models import DecoderLanguageModel
        >>> model = DecoderLanguageModel(50, 32, 4, 2, 0)
        >>> adapter = lora(model, rank=4, targets=["W_Q", "W_V"])
        >>> adapter.num_parameters()  # 2 blocks, 2 matrices: 4 * (32 + 32) each
        1024
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if isinstance(targets, str):
        raise TypeError(f"targets must be a list of names, got the string {targets!r}")
    found = sites.find(model, targets)
    wanted = dict.fromkeys(found, (rank, alpha / rank))
    return attach(model, wanted, dropout)


@dataclass(frozen=True)
class _Attached:
    """One module of updates in a model, with the place of its weight."""

    prefix: str  # dotted name of the layer; of a bare parameter, the parameter's
    low_rank: LowRank
    owner: nn.Module
    weight: str

    def matrix(self) -> Tensor:
        """The weight read as (in, out)."""
        return sites.matrix(self.owner, self.weight)

    def name(self, update: Update) -> str:
        """The dotted name of one update."""
        return _joined(self.prefix, update.name)


class LoRA:
    """The low-rank updates of a model: to train, merge, save, load and take away.

    Made by `lora`, found again by `LoRA.of`. The updates are submodules of the model: they are in
    its state dict, move with it, and are copied and pickled with it. `save_model` writes them and
    `load_model` makes them again.

    Args:
        model: a model with updates.

    Raises:
        ValueError: it has none.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> adapter = lora(model, rank=2)
        >>> print(adapter)
        LoRA of 16 parameters: 0 (rank 2, scale 8)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._attached = list(_attached(model))
        self._frozen: list[nn.Parameter] = []
        if not self._attached:
            raise ValueError("the model has no low-rank updates: make them with lmfast's lora()")

    @classmethod
    def of(cls, model: nn.Module) -> LoRA:
        """Find the updates of a model that was copied, loaded or changed elsewhere."""
        return cls(model)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Give every factor, as `NAME.A` (in, rank) and `NAME.B` (rank, out)."""
        for place in self._attached:
            for update in place.low_rank.updates:
                yield f"{place.name(update)}.A", place.low_rank.A[update.name]
                yield f"{place.name(update)}.B", place.low_rank.B[update.name]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give what is trained: all factors."""
        return (parameter for _, parameter in self.named_parameters())

    def num_parameters(self) -> int:
        """Return the number of trainable values."""
        return sum(p.numel() for p in self.parameters())

    @property
    def dropout(self) -> float:
        """Share of the input's features that the updates do not see while training."""
        return max(place.low_rank.dropout for place in self._attached)

    def updates(self) -> dict[str, Update]:
        """Return the updates by dotted name of the matrix."""
        return {p.name(u): u for p in self._attached for u in p.low_rank.updates}

    @property
    def merged(self) -> bool:
        """Whether the matrices hold the updates."""
        return any(place.low_rank.merged for place in self._attached)

    def merge(self) -> None:
        """Add the updates to the matrices: the model then costs what it did without them.

        The matrices as they were are kept for `unmerge`, which needs their memory once more.
        """
        for place in self._attached:
            place.low_rank.merge(place.matrix())

    def unmerge(self) -> None:
        """Give the matrices the values back that they had, bit for bit."""
        for place in self._attached:
            place.low_rank.unmerge(place.matrix())

    def remove(self, *, merge: bool = False) -> nn.Module:
        """Take the updates away and let all parameters be trained that could be before.

        Args:
            merge: leave what was learnt in the matrices.

        Returns:
            The model, an ordinary one; this object is of no further use.
        """
        if merge:
            self.merge()
        else:
            self.unmerge()
        for place in self._attached:
            sites.detach(place.owner, place.weight)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._attached = []
        return self.model

    def save(self, directory: str | Path) -> None:
        """Write the updates, and nothing else of the model, as safetensors and JSON.

        Raises:
            OSError: the directory cannot be written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach() for name, p in self.named_parameters()}
        write_pair(directory, "adapter", "adapter", tensors, {"adapter": settings_of(self.model)})

    @classmethod
    def load(cls, directory: str | Path, model: nn.Module) -> LoRA:
        """Put saved updates on a model: one without any, or with updates of the same matrices.

        Raises:
            CheckpointError: the files are missing or damaged, or belong to another model.
        """
        tensors, content = read_pair(Path(directory), "adapter", "adapter")
        try:
            made = not any(_attached(model))
            adapter = attach_settings(model, content["adapter"]) if made else cls(model)
            try:
                adapter.load_tensors(tensors)
            except ValueError:
                if made:
                    adapter.remove()
                raise
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{directory} does not fit this model: {error}") from error
        return adapter

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Set all factors from `NAME.A` and `NAME.B`.

        Raises:
            ValueError: a name or a shape is not that of a factor here, or the updates are merged.
        """
        if self.merged:
            raise ValueError("the updates are merged: unmerge() them first")
        own = dict(self.named_parameters())
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            side = "absent from the file" if odd[0] in own else "not in the model"
            raise ValueError(f"{odd[0]} is {side}")
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(
                    f"{name} must have shape {tuple(parameter.shape)}, "
                    f"got {tuple(tensors[name].shape)}"
                )
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    def __str__(self) -> str:
        named = [f"{n} (rank {u.rank}, scale {u.scale:g})" for n, u in self.updates().items()]
        state = ", merged" if self.merged else ""
        return f"LoRA of {self.num_parameters():,} parameters{state}: {', '.join(named)}"


def settings_of(model: nn.Module) -> list[dict[str, Any]] | None:
    """What makes the same updates on an equal model, JSON-ready; None for a model without any."""
    found = [{"layer": p.prefix, **p.low_rank.settings} for p in _attached(model)]
    return found or None


def attach_settings(model: nn.Module, settings: list[dict[str, Any]]) -> LoRA:
    """Make the updates that `settings_of` described.

    Raises:
        ValueError: the model has no such matrices.
    """
    wanted: dict[Site, tuple[int, float]] = {}
    dropout = 0.0
    for entry in settings:
        dropout = float(entry["dropout"]) or dropout
        for update in updates_from(entry):
            site = sites.named(model, _joined(entry["layer"], update.name))
            wanted[site] = (update.rank, update.scale)
    return attach(model, wanted, dropout)


def attach(model: nn.Module, wanted: dict[Site, tuple[int, float]], dropout: float) -> LoRA:
    """Put updates of given rank and scale at some sites, and freeze everything else.

    Raises:
        ValueError: the model has updates already, or dropout for a bare parameter.
    """
    if any(_attached(model)):
        raise ValueError("the model has low-rank updates already: remove() them first")
    if dropout and any(site.bare for site in wanted):
        bare = next(site.name for site in wanted if site.bare)
        raise ValueError(f"dropout must be 0 for a bare parameter, got {dropout} for {bare}")
    frozen = [p for p in model.parameters() if p.requires_grad]
    groups: dict[tuple[int, str], list[Site]] = {}
    for site in wanted:
        groups.setdefault((id(site.owner), site.weight), []).append(site)
    for group in groups.values():
        group.sort(key=lambda site: site.start)
        updates = [Update(s.part or "weight", s.start, s.size, *wanted[s]) for s in group]
        sites.attach(group[0], updates, dropout)
    for parameter in frozen:
        parameter.requires_grad_(False)
    adapter = LoRA(model)
    adapter._frozen = frozen
    return adapter


def _joined(prefix: str, part: str) -> str:
    """The dotted name of a part; that of a layer or a bare parameter is its prefix."""
    return prefix if part in ("weight", prefix.rpartition(".")[2]) else sites.dotted(prefix, part)


def _attached(model: nn.Module) -> Iterator[_Attached]:
    for name, module in model.named_modules():
        for low_rank, weight in sites.updates_in(module):
            bare = parametrize.is_parametrized(module, weight)
            prefix = sites.dotted(name, weight) if bare else name
            yield _Attached(prefix, low_rank, module, weight)
