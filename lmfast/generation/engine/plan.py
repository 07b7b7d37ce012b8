"""What a decoder is made of, as far as the engine knows: sizes, layers, and where weights are.

An adapter writes a `Plan` for one family of models (`from_lmfast`, `from_transformers`); packing,
the program and the runner only see plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lmfast.ops._rounding import Quantised

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Tables = Callable[[int], tuple[Tensor, Tensor]]


class CannotPack(ValueError):
    """A model the engine cannot run; `reason` says why in plain words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm ``x / sqrt(mean(x^2) + eps) * weight``, or LayerNorm with ``bias``.

    Attributes:
        weight: (E,); of Gemma's norms 1 + the model's parameter.
    """

    kind: Literal["rms", "layer"]
    weight: Tensor
    eps: float
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Linear:
    """``y = x weight^T + bias``; weight (N, K), any strides."""

    weight: Tensor | Quantised
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotation of positions.

    Attributes:
        tables: length -> (cos, sin), each (at least length, rotary / 2) float32, contiguous.
        interleaved: pairs are neighbours, rather than halves of what is rotated.
    """

    tables: Tables
    interleaved: bool


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer.

        h = x + post(attention(norm(x)));   y = h + post(mlp(norm(h)))

    or, `parallel`, both on x. Absent norms are identities.

    Attributes:
        q, k, v, o: projections, q (H D, E), k and v (Hkv D, E), o (E, H D).
        q_norm, k_norm: of every head before the rotation, or `whole_qk_norm`, of all together.
        rope: index into the plan's rotations, or None.
        window: keys a query sees at most, itself included; None: all.
        sinks: (H,) logits of a key without value, or None.
        gate: of gated layers ``act(gate) * up``; else ``act(up)``.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    up: Linear
    down: Linear
    activation: Activation
    scale: float
    gate: Linear | None = None
    attention_norm: Norm | None = None
    attention_post_norm: Norm | None = None
    mlp_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    whole_qk_norm: bool = False
    rope: int | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    parallel: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole decoder.

    Attributes:
        width, heads, kv_heads, head_dim, hidden, vocab: E, H, Hkv, D, feed-forward width, V.
        embedding: (V, E), of integers int8 with a scale per row; None when it is the head's matrix.
        embedding_factor: what embeddings are multiplied by.
        positions: (P, E) learned ones, or None.
        head: (V, E).
        max_positions: tokens a row may have, or None.
        parameters: what the plan was made of, to notice when one changes.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    head: Linear
    embedding: Tensor | Quantised | None
    ropes: tuple[Rope, ...] = ()
    embedding_factor: float = 1.0
    positions: Tensor | None = None
    final_norm: Norm | None = None
    logit_softcap: float | None = None
    pad_idx: int | None = None
    max_positions: int | None = None
    parameters: tuple[Tensor, ...] = field(default=())

    @property
    def windows(self) -> list[int | None]:
        """The window of every layer."""
        return [layer.window for layer in self.layers]


def check_parameters(parameters: tuple[Tensor, ...]) -> None:
    """CannotPack unless all are float32 or bfloat16 in host memory."""
    for p in parameters:
        if p.device.type != "cpu":
            raise CannotPack(f"the model is on {p.device}; the engine runs on the CPU")
        if p.dtype not in (torch.float32, torch.bfloat16):
            raise CannotPack(f"the model has {p.dtype} parameters, not float32 or bfloat16")
        if type(p) not in (Tensor, torch.nn.Parameter) or p.layout != torch.strided:
            raise CannotPack(f"the model has a parameter of type {type(p).__name__}")
