"""Recurrent language models as the engine knows them: `RecurrentLanguageModel`, and its program."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from lmfast.generation.engine.packing import Matrix, Packer, Storage
from lmfast.generation.engine.plan import CannotPack, Linear, check_parameters
from lmfast.generation.engine.program import (
    Packed,
    double_word,
    embedding_words,
    matrix,
    shape_of,
    stacked,
)
from lmfast.models.recurrent import RecurrentLanguageModel
from lmfast.nn.elman import ElmanRNN
from lmfast.nn.low_rank import LowRank
from lmfast.nn.stack import GatedStack, MinStack
from lmfast.ops._rounding import Quantised

_MAGIC = 0x6C6D656E67433032
_NONE = -1
# In the order of EngineCellKind in csrc/cpu/kernels/engine.h.
KINDS = ("tanh", "lstm", "gru", "gru_textbook", "min_gru", "min_lstm")
_KIND_OF = {"elman": "tanh", "rnn": "tanh"}


@dataclass(frozen=True, eq=False)
class CellLayer:
    """One recurrent layer; all matrices (E, E), by gate in torch.nn's order.

    Attributes:
        input: what x is multiplied with.
        state: what the state is; of "gru_textbook" the two gates, of minimal cells nothing.
        candidate: of "gru_textbook".
    """

    input: tuple[Linear, ...]
    state: tuple[Linear, ...] = ()
    candidate: Linear | None = None


@dataclass(frozen=True, eq=False)
class CellPlan:
    """A whole recurrent model.

    Attributes:
        width, vocab: E and V.
        cell: one of `KINDS`.
        head: (V, E).
        embedding: (V, E), of integers int8 with a scale per row; None when it is the head's matrix.
        parameters: what the plan was made of.
    """

    width: int
    vocab: int
    cell: str
    layers: tuple[CellLayer, ...]
    head: Linear
    embedding: Tensor | Quantised | None
    pad_idx: int | None
    parameters: tuple[Tensor, ...]
    max_positions: None = None


def recurrent_plan(model: RecurrentLanguageModel) -> CellPlan:
    """The plan of a recurrent model of ours.

    Raises:
        CannotPack: parameters of a type or on a device the engine does not take, dropout in
            training mode, a module in the place of one it knows.
    """
    parameters = tuple(model.parameters())
    check_parameters(parameters)
    if any(isinstance(m, LowRank) and not m.merged for m in model.modules()):
        raise CannotPack("it has low-rank updates beside its matrices; merge() them")
    cell = model.options["cell"]
    rnn: Any = model.rnn
    if type(rnn) is ElmanRNN:
        layers = [
            CellLayer((Linear(unit.Wh.t(), unit.b),), (Linear(unit.Uh.t()),))
            for unit in rnn.units()
        ]
    elif type(rnn) is MinStack:
        minimal: list[Any] = [m.linear for m in rnn.layers]
        layers = [CellLayer(_gates(m.weight, m.bias)) for m in minimal]
    elif type(rnn) is GatedStack:
        if model.training and rnn.layers.dropout:
            raise CannotPack("the model is in training mode and has dropout; call eval()")
        if getattr(rnn.layers, "nonlinearity", "tanh") != "tanh":
            raise CannotPack("its layers have relu in the place of tanh")
        layers = [_gated(rnn.layers, index, cell) for index in range(rnn.layers.num_layers)]
    else:
        raise CannotPack(f"it has a {type(rnn).__name__} in the place of its recurrent layers")
    model.embedding.clear_padding()
    tied = model.tie_weights
    return CellPlan(
        width=model.emb_dim,
        vocab=model.vocab_size,
        cell=_KIND_OF.get(cell, cell),
        layers=tuple(layers),
        head=Linear(model.embedding.weight if tied else model.fc.weight, model.fc.bias),
        embedding=None if tied else model.embedding.weight,
        pad_idx=model.pad_idx,
        parameters=parameters,
    )


def _gates(weight: Tensor, bias: Tensor | None) -> tuple[Linear, ...]:
    """(G E, E) as one matrix for each gate."""
    width = weight.shape[1]
    parts = weight.split(width)
    biases = [None] * len(parts) if bias is None else bias.split(width)
    return tuple(Linear(w, b) for w, b in zip(parts, biases, strict=True))


def _gated(layers: Any, index: int, cell: str) -> CellLayer:
    w_ih, w_hh, b_ih, b_hh = (
        getattr(layers, f"{name}_l{index}")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    state = _gates(w_hh, b_hh)
    if cell == "gru_textbook":
        return CellLayer(_gates(w_ih, b_ih), state[:2], state[2])
    return CellLayer(_gates(w_ih, b_ih), state)


def pack_cells(plan: CellPlan, weights: str, group: int | None) -> Packed:
    """Pack a recurrent model's weights as "fp32", "bf16", "int8" or "int4".

    With int4 the output layer and the embeddings are int8: their errors reach every logit.
    """
    packer, storage = Packer(), Storage(weights, group)
    rest = Storage("int8") if weights == "int4" else storage
    embedding = embedding_words(packer, plan.embedding, rest.kind)
    layers: list[int] = []
    for layer in plan.layers:
        for gates in (layer.input, layer.state, (layer.candidate,) if layer.candidate else ()):
            layers.extend(astuple(_gates_matrix(packer, gates, storage)))
        layers.append(KINDS.index(plan.cell))
    head = matrix(packer, plan.head, rest)
    words = [
        *(_MAGIC, len(plan.layers), plan.width),
        *(1, 1, 1, 1),  # heads, key heads, their size, feed-forward width: of decoders
        *(plan.vocab, 0, 1),  # rotations, groups
        *embedding,
        *(_NONE, 0),  # positions
        *(0, _NONE, _NONE, 0),  # norm
        *astuple(head),
        *(double_word(1.0), double_word(0.0)),  # factor of embeddings, softcap
        *layers,
    ]
    return Packed(packer.finish(), torch.tensor(words, dtype=torch.int64), (None,), (0,))


def _gates_matrix(packer: Packer, gates: tuple[Linear, ...], storage: Storage) -> Matrix:
    if not gates:
        return Matrix(_NONE, _NONE, _NONE, 0, 0, 0, 0)
    widths = [shape_of(gate)[0] for gate in gates]
    return stacked(packer, [*gates], widths, storage, True)
