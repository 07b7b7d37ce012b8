"""A plan as the kernel reads it: the words of csrc/cpu/kernels/engine.h, and the weights."""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from lmfast.generation.engine.packing import PANEL, Matrix, Packer, Storage, storage_of
from lmfast.generation.engine.plan import CannotPack, Layer, Linear, Norm, Plan
from lmfast.ops._rounding import Quantised, quantise_rows

_MAGIC = 0x6C6D656E67303032
_NONE = -1
_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
_MOST_HEAD_DIM = 256


@dataclass(frozen=True)
class Packed:
    """A packed model: `weights` (bytes) and `program` (words), which the operator takes.

    Attributes:
        windows: the window of each group of layers, in the order the program numbers them.
        layer_of_group: a layer of each.
    """

    weights: Tensor
    program: Tensor
    windows: tuple[int | None, ...]
    layer_of_group: tuple[int, ...]


def double_word(x: float) -> int:
    """The bits of a double."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _norm(packer: Packer, norm: Norm | None) -> list[int]:
    if norm is None:
        return [0, _NONE, _NONE, 0]
    bias = _NONE if norm.bias is None else packer.floats(norm.bias)
    kind = {"rms": 1, "layer": 2}[norm.kind]
    return [kind, packer.floats(norm.weight), bias, double_word(norm.eps)]


def shape_of(linear: Linear) -> tuple[int, int]:
    """Rows and depth of a matrix."""
    w = linear.weight
    rows, depth = (w.codes if isinstance(w, Quantised) else w).shape
    return rows, depth


def matrix(packer: Packer, linear: Linear, storage: Storage) -> Matrix:
    """One matrix."""
    rows, depth = shape_of(linear)
    storage = storage_of(linear.weight, storage)
    return packer.matrix(rows, depth, lambda: linear.weight, linear.bias, storage)


def stacked(
    packer: Packer, parts: list[Linear], lengths: list[int], storage: Storage, interleave: bool
) -> Matrix:
    """Several matrices of one depth as one.

    Rows come in pieces of `lengths[i]`, each filled up to whole panels: one part after the other,
    or with `interleave` a panel of each in turn.
    """
    depth = shape_of(parts[0])[1]
    wide = [-(-n // PANEL) * PANEL for n in lengths]
    total = sum(shape_of(p)[0] // n * w for p, n, w in zip(parts, lengths, wide, strict=True))

    def arrange(rows: list[Tensor]) -> Tensor:
        """Rows (N_i, ...) of each part, as one tensor."""
        pieces = []
        for t, n, w in zip(rows, lengths, wide, strict=True):
            t = t.detach().reshape(len(t) // n, n, *t.shape[1:])
            padding = [0, 0] * (t.ndim - 2) + [0, w - n]
            pieces.append(torch.nn.functional.pad(t, padding).flatten(0, 1))
        if not interleave:
            return torch.cat(pieces)
        panels = [p.view(-1, 1, PANEL, *p.shape[1:]) for p in pieces]
        return torch.cat(panels, 1).flatten(0, 2)

    def weight() -> Tensor | Quantised:
        found = [p.weight for p in parts]
        plain = [w for w in found if isinstance(w, Tensor)]
        if len(plain) == len(found):
            return arrange(plain)
        quantised = [w for w in found if isinstance(w, Quantised)]
        if len(quantised) != len(found):
            raise CannotPack("only some of the matrices that are packed together are quantised")
        first = quantised[0]
        codes = arrange([q.codes for q in quantised])
        return Quantised(codes, arrange([q.scales for q in quantised]), first.bits, first.group)

    bias = None
    if any(p.bias is not None for p in parts):
        none = [torch.zeros(shape_of(p)[0]) for p in parts]
        found = [n if p.bias is None else p.bias.float() for p, n in zip(parts, none, strict=True)]
        bias = arrange(found)
    return packer.matrix(total, depth, weight, bias, storage_of(parts[0].weight, storage))


def _layer(packer: Packer, plan: Plan, layer: Layer, group: int, storage: Storage) -> list[int]:
    d, hidden = plan.head_dim, plan.hidden
    qkv = stacked(packer, [layer.q, layer.k, layer.v], [d, d, d], storage, False)
    if layer.gate is None:
        up = stacked(packer, [layer.up], [hidden], storage, False)
    else:
        up = stacked(packer, [layer.gate, layer.up], [hidden, hidden], storage, True)
    norms = (
        layer.attention_norm,
        layer.q_norm,
        layer.k_norm,
        layer.attention_post_norm,
        layer.mlp_norm,
        layer.mlp_post_norm,
    )
    words = [word for norm in norms for word in _norm(packer, norm)]
    o, down = matrix(packer, layer.o, storage), matrix(packer, layer.down, storage)
    for packed in (qkv, o, up, down):
        words.extend(astuple(packed))
    rope = _NONE if layer.rope is None else layer.rope
    interleaved = layer.rope is not None and plan.ropes[layer.rope].interleaved
    return [
        *words,
        int(layer.whole_qk_norm),
        rope,
        int(interleaved),
        layer.window or 0,
        group,
        _NONE if layer.sinks is None else packer.floats(layer.sinks),
        _ACTIVATIONS.index(layer.activation),
        int(layer.gate is not None),
        int(layer.parallel),
        double_word(layer.scale),
        double_word(layer.softcap or 0.0),
    ]


def embedding_words(packer: Packer, rows: Tensor | Quantised | None, kind: str) -> list[int]:
    """Offsets of embeddings and their scales, and how they are stored."""
    if rows is None:
        return [_NONE, _NONE, 0]
    if isinstance(rows, Tensor) and kind == "fp32":
        return [packer.floats(rows), _NONE, 0]
    if isinstance(rows, Tensor) and kind == "bf16":
        whole = rows.detach()
        return [packer.add(2 * rows.numel(), lambda: whole.bfloat16()), _NONE, 1]
    made: list[Tensor] = []

    def codes() -> Tensor:
        q = rows if isinstance(rows, Quantised) else quantise_rows(rows)
        made.append(q.scales)
        return q.codes

    count, width = (rows.codes if isinstance(rows, Quantised) else rows).shape
    at = packer.add(count * width, codes)
    return [at, packer.add(4 * count, made.pop), 2]


def pack(plan: Plan, weights: str, group: int | None = None) -> Packed:
    """Pack a plan's weights as "fp32", "bf16", "int8" or "int4", or as they are quantised.

    With int4 the output layer and the embeddings are int8: their errors reach every logit.

    Args:
        group: numbers of a row of integers that share a scale; None: all.

    Raises:
        CannotPack: a size that the kernels do not have.
    """
    if plan.head_dim > _MOST_HEAD_DIM:
        raise CannotPack(f"its heads have {plan.head_dim} features, the kernels take 256")
    windows = tuple(dict.fromkeys(plan.windows))
    packer = Packer()
    storage = Storage(weights, group)
    rest = Storage("int8") if weights == "int4" else storage
    embedding = embedding_words(packer, plan.embedding, rest.kind)
    positions = _NONE if plan.positions is None else packer.floats(plan.positions)
    layers = [
        _layer(packer, plan, layer, windows.index(layer.window), storage) for layer in plan.layers
    ]
    final = _norm(packer, plan.final_norm)
    head = matrix(packer, plan.head, rest)
    words = [
        _MAGIC,
        len(plan.layers),
        plan.width,
        plan.heads,
        plan.kv_heads,
        plan.head_dim,
        plan.hidden,
        plan.vocab,
        len(plan.ropes),
        len(windows),
        *embedding,
        positions,
        0 if plan.positions is None else len(plan.positions),
        *final,
        *astuple(head),
        double_word(plan.embedding_factor),
        double_word(plan.logit_softcap or 0.0),
        *(word for layer in layers for word in layer),
    ]
    program = torch.tensor(words, dtype=torch.int64)
    first = tuple(plan.windows.index(w) for w in windows)
    return Packed(packer.finish(), program, windows, first)
