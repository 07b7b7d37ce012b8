"""Plans of `lmfast.models.DecoderLanguageModel`."""

from __future__ import annotations

from typing import Any

from torch import nn

from lmfast.generation.engine.plan import (
    Activation,
    CannotPack,
    Layer,
    Linear,
    Norm,
    Plan,
    Rope,
    check_parameters,
)
from lmfast.models.decoder import DecoderLanguageModel
from lmfast.nn.attention import MultiHeadAttention
from lmfast.nn.block import DecoderBlock
from lmfast.nn.low_rank import LowRank
from lmfast.nn.mlp import MLP, GeGLU, SwiGLU
from lmfast.nn.norm import RMSNorm
from lmfast.nn.rotary import RotaryEmbedding


def decoder_plan(model: DecoderLanguageModel) -> Plan:
    """The plan of a decoder of ours.

    Raises:
        CannotPack: a module was replaced by one the engine does not know, or the parameters are of
            a type or on a device it does not take.
    """
    parameters = tuple(model.parameters())
    check_parameters(parameters)
    if any(isinstance(m, LowRank) and not m.merged for m in model.modules()):
        raise CannotPack("it has low-rank updates beside its matrices; merge() them")
    if model.training and any(p > 0 for p in _dropouts(model)):
        raise CannotPack("the model is in training mode and has dropout; call eval()")
    blocks: list[Any] = list(model.layers)
    ropes: list[Rope] = []
    layers = tuple(_layer(block, ropes) for block in blocks)
    hidden = {layer.up.weight.shape[0] for layer in layers}  # type: ignore[union-attr]
    if len(hidden) != 1:
        raise CannotPack("the layers have feed-forward layers of different widths")
    attention = blocks[0].attn
    model.embedding.clear_padding()
    tied = model.output is None
    weight = model.embedding.weight if model.output is None else model.output.t()
    return Plan(
        width=model.emb_dim,
        heads=attention.num_heads,
        kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        hidden=hidden.pop(),
        vocab=model.vocab_size,
        layers=layers,
        head=Linear(weight, model.output_bias),
        embedding=None if tied else model.embedding.weight,
        ropes=tuple(ropes),
        embedding_factor=1.0 if model.embedding_scale is None else model.embedding_scale,
        final_norm=_norm(model.norm),
        logit_softcap=model.logit_softcap,
        pad_idx=model.pad_idx,
        parameters=parameters,
    )


def _dropouts(model: nn.Module) -> list[float]:
    return [m.p for m in model.modules() if isinstance(m, nn.Dropout)]


def _exactly(module: nn.Module, *kinds: type[nn.Module]) -> None:
    if type(module) not in kinds:
        raise CannotPack(f"it has a {type(module).__name__} in the place of {kinds[0].__name__}")


def _norm(norm: Any) -> Norm | None:
    if norm is None:
        return None
    _exactly(norm, RMSNorm)
    return Norm("rms", norm.scale, norm.eps)


def _rope(rope: RotaryEmbedding, ropes: list[Rope]) -> int:
    """The index of a rotation; layers with equal settings share one."""
    _exactly(rope, RotaryEmbedding)
    kind = (rope.scaling or {}).get("rope_type", (rope.scaling or {}).get("type"))
    if kind == "dynamic":
        raise CannotPack("its rotation is scaled by the length of the text (dynamic)")
    tables = rope.tables
    for index, known in enumerate(ropes):
        other = known.tables.__self__  # type: ignore[attr-defined]
        if (other.dim, other.base, other.interleaved, other.scaling) == (
            rope.dim,
            rope.base,
            rope.interleaved,
            rope.scaling,
        ):
            return index
    ropes.append(Rope(tables, rope.interleaved))
    return len(ropes) - 1


def _layer(block: DecoderBlock, ropes: list[Rope]) -> Layer:
    _exactly(block, DecoderBlock)
    a: Any = block.attn
    mlp: Any = block.mlp
    _exactly(a, MultiHeadAttention)
    _exactly(mlp, MLP, SwiGLU, GeGLU)
    sizes = [a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim, a.num_kv_heads * a.head_dim]
    biases = [None] * 3 if a.B_QKV is None else a.B_QKV.split(sizes)
    weights = a.W_QKV.t().split(sizes)
    q, k, v = (Linear(w, b) for w, b in zip(weights, biases, strict=True))
    gate: Linear | None = None
    activation: Activation
    if type(mlp) is MLP:
        activation = mlp.activation  # type: ignore[assignment]
        up, down = Linear(mlp.W_1.t(), mlp.B_1), Linear(mlp.W_2.t(), mlp.B_2)
    else:
        activation = _gate_activation(mlp)
        parts = [None] * 2 if mlp.B_GU is None else mlp.B_GU.chunk(2)
        gate, up = (Linear(w, b) for w, b in zip(mlp.W_GU.t().chunk(2), parts, strict=True))
        down = Linear(mlp.W_D.t(), mlp.B_D)
    return Layer(
        q=q,
        k=k,
        v=v,
        o=Linear(a.W_O.t(), a.B_O),
        gate=gate,
        up=up,
        down=down,
        activation=activation,
        scale=a.head_dim**-0.5 if a.scale is None else a.scale,
        attention_norm=_norm(block.norm1),
        attention_post_norm=_norm(block.post_norm1),
        mlp_norm=_norm(block.norm2),
        mlp_post_norm=_norm(block.post_norm2),
        q_norm=_norm(a.q_norm),
        k_norm=_norm(a.k_norm),
        rope=_rope(a.rope, ropes),
        window=a.window,
        softcap=a.softcap,
    )


def _gate_activation(mlp: SwiGLU) -> Activation:
    if not isinstance(mlp, GeGLU):
        return "silu"
    return "gelu_tanh" if mlp.approximate == "tanh" else "gelu"
