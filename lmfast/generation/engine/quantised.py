"""A model's matrices as integers, in memory and in files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lmfast.generation.engine.cells import CellLayer, CellPlan
from lmfast.generation.engine.plan import CannotPack, Layer, Linear, Plan
from lmfast.ops._rounding import Quantised

_FORMAT = "lmfast quantised weights 1"
# Of a layer; those of recurrent models are several, and numbered.
_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_GATES = ("input", "state")

P = TypeVar("P", bound=Plan | CellPlan)


@dataclass(frozen=True, eq=False)
class QuantisedWeights:
    """The matrices of a model as integers, for ``Generator(model, weights=...)``.

    Norms, biases and what else is small stay with the model, which is still needed to make a
    `Generator`, and may go afterwards.

    Attributes:
        kind: "int8" or "int4".
        group: numbers of a row that share a scale; None: all.
        matrices: by place: "layers.0.q", "layers.0.down", "head", "embedding"; of recurrent models
            "layers.0.input.0", a number for each gate, "layers.0.state.0", "layers.0.candidate.0".

    Example:
        >>> import torch
        >>> from lmfast import Generator, quantise
        >>> from lmfast.models import DecoderLanguageModel
        >>> model = DecoderLanguageModel(50, 32, 2, 1, 0)
        >>> weights = quantise(model, "int4", texts=[torch.randint(1, 50, (64,))])
        >>> generator = Generator(model, weights=weights)
        >>> generator.generate(torch.tensor([[3, 4]]), max_new_tokens=5).shape
        torch.Size([1, 7])
    """

    kind: Literal["int8", "int4"]
    group: int | None
    matrices: dict[str, Quantised]

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file; two codes of 4 bits share a byte.

        Raises:
            OSError: it cannot be written, for instance because there is no such directory.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, q in self.matrices.items():
            codes = q.codes
            if q.bits == 4:
                nibbles = (codes + 8).to(torch.uint8)
                codes = nibbles[:, ::2] | (nibbles[:, 1::2] << 4)
            tensors[f"{name}.codes"] = codes.contiguous()
            tensors[f"{name}.scales"] = q.scales.contiguous()
        groups = {name: [q.bits, q.group] for name, q in self.matrices.items()}
        about = {"format": _FORMAT, "kind": self.kind, "group": json.dumps(self.group)}
        try:
            save_file(tensors, path, {**about, "matrices": json.dumps(groups)})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> QuantisedWeights:
        """Read a file that `save` wrote.

        Raises:
            ValueError: another kind of file.
            OSError: there is none.
        """
        from safetensors import SafetensorError, safe_open

        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a directory, and must be a file of `save`")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise ValueError(
                        f"{path} must be a file of QuantisedWeights.save, its format is "
                        f"{about.get('format')!r}"
                    )
                matrices = {}
                for name, (bits, group) in json.loads(about["matrices"]).items():
                    codes = file.get_tensor(f"{name}.codes")
                    if bits == 4:
                        both = torch.stack((codes & 15, codes >> 4), 2).flatten(1)
                        codes = both.to(torch.int8) - 8
                    scales = file.get_tensor(f"{name}.scales")
                    matrices[name] = Quantised(codes, scales, bits, group)
        except SafetensorError as error:
            raise ValueError(f"{path} must be a safetensors file: {error}") from error
        kind: Any = about["kind"]
        return cls(kind, json.loads(about["group"]), matrices)

    def memory(self) -> int:
        """Bytes of codes and scales, as the engine packs them."""
        return sum(q.codes.numel() * q.bits // 8 + q.scales.nbytes for q in self.matrices.values())

    def into(self, plan: P) -> P:
        """A plan with these matrices in the place of its own.

        Raises:
            CannotPack: they are of a model of another shape.
        """
        left = dict(self.matrices)
        made = with_matrices(plan, lambda name, w: _fitting(name, w, left.pop(name, None)))
        if left:
            raise CannotPack(f"the quantised weights have {next(iter(left))}, the model has not")
        return made


def with_matrices(plan: P, change: Callable[[str, Tensor | Quantised], Quantised]) -> P:
    """A plan whose matrices are what `change` makes of a name and the matrix."""

    def changed(name: str, linear: Linear) -> Linear:
        return Linear(change(name, linear.weight), linear.bias)

    def layer_of(layer: Any, prefix: str) -> Any:
        parts: dict[str, Any] = {}
        if isinstance(layer, Layer):
            for name in _MATRICES:
                if getattr(layer, name) is not None:
                    parts[name] = changed(prefix + name, getattr(layer, name))
            return replace(layer, **parts)
        assert isinstance(layer, CellLayer)
        for name in _GATES:
            gates = enumerate(getattr(layer, name))
            parts[name] = tuple(changed(f"{prefix}{name}.{i}", gate) for i, gate in gates)
        if layer.candidate is not None:
            parts["candidate"] = changed(f"{prefix}candidate.0", layer.candidate)
        return replace(layer, **parts)

    layers: Any = tuple(layer_of(m, f"layers.{i}.") for i, m in enumerate(plan.layers))
    head = changed("head", plan.head)
    embedding = None if plan.embedding is None else change("embedding", plan.embedding)
    return replace(plan, layers=layers, head=head, embedding=embedding)


def _fitting(name: str, weight: Tensor | Quantised, found: Quantised | None) -> Quantised:
    shape = tuple((weight.codes if isinstance(weight, Quantised) else weight).shape)
    if found is None:
        raise CannotPack(f"the quantised weights have no {name}, the model has")
    rows, depth = found.codes.shape
    unit = found.group or 1
    if (rows, depth) != (shape[0], -(-shape[1] // unit) * unit):
        raise CannotPack(
            f"{name} of the quantised weights is {(rows, depth)}, of the model {shape}"
        )
    return found
