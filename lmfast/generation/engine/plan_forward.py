"""A plan in plain PyTorch, layer by layer: what its matrices are multiplied with.

Slow and readable; calibration runs it, and tests compare the kernels with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lmfast import ops
from lmfast.generation.engine.plan import Layer, Linear, Norm, Plan
from lmfast.ops._rounding import Quantised

# Takes the names of matrices that read the same rows, those matrices, and the rows (N, K); returns
# a product for each.
Products = Callable[[Sequence[str], Sequence[Linear], Tensor], Sequence[Tensor]]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


def matrix_of(weight: Tensor | Quantised, depth: int) -> Tensor:
    """A matrix (N, depth) in float32, whatever it is stored as."""
    if isinstance(weight, Quantised):
        return weight.dequantised()[:, :depth]
    return weight.detach().float()


def plain_products(names: Sequence[str], linears: Sequence[Linear], x: Tensor) -> list[Tensor]:
    """``x weight^T + bias`` of each matrix."""
    found = []
    for linear in linears:
        y = x @ matrix_of(linear.weight, x.shape[1]).t()
        found.append(y if linear.bias is None else y + linear.bias.detach().float())
    return found


class PlanForward:
    """Runs texts through a plan.

    Args:
        plan: of the model.
        texts: of (T,) int64 each.
        products: what multiplies rows with matrices.
    """

    def __init__(
        self, plan: Plan, texts: Sequence[Tensor], products: Products = plain_products
    ) -> None:
        self._plan, self._products = plan, products
        self._lengths = [len(t) for t in texts]
        self._ids = torch.cat([*texts])
        longest = max(self._lengths)
        self._ropes = [rope.tables(longest) for rope in plan.ropes]

    def logits(self) -> Tensor:
        """After every token of all texts, (N, V)."""
        x = self.embed()
        for index, layer in enumerate(self._plan.layers):
            x = self.layer(x, layer, f"layers.{index}.")
        x = _norm(self._plan.final_norm, x)
        (logits,) = self._products(["head"], [self._plan.head], x)
        cap = self._plan.logit_softcap
        return logits if not cap else cap * torch.tanh(logits / cap)

    def embed(self) -> Tensor:
        """What the first layer reads, (N, E)."""
        plan = self._plan
        table = plan.head.weight if plan.embedding is None else plan.embedding
        x = matrix_of(table, plan.width)[self._ids] * plan.embedding_factor
        if plan.positions is None:
            return x
        places = torch.cat([torch.arange(n) for n in self._lengths])
        return x + plan.positions.detach().float()[places]

    def layer(self, x: Tensor, layer: Layer, name: str) -> Tensor:
        """One layer, (N, E) to (N, E)."""
        h = _norm(layer.attention_norm, x)
        parts = [layer.q, layer.k, layer.v]
        q, k, v = self._products([f"{name}{p}" for p in "qkv"], parts, h)
        joined = self._attention(layer, q, k, v)
        (out,) = self._products([f"{name}o"], [layer.o], joined)
        after = x + _norm(layer.attention_post_norm, out)
        h = _norm(layer.mlp_norm, x if layer.parallel else after)
        activate = _ACTIVATIONS[layer.activation]
        if layer.gate is None:
            (up,) = self._products([f"{name}up"], [layer.up], h)
            hidden = activate(up)
        else:
            names = [f"{name}gate", f"{name}up"]
            gate, up = self._products(names, [layer.gate, layer.up], h)
            hidden = activate(gate) * up
        (down,) = self._products([f"{name}down"], [layer.down], hidden)
        return after + _norm(layer.mlp_post_norm, down)

    def _attention(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan = self._plan
        if layer.whole_qk_norm:
            q, k = _norm(layer.q_norm, q), _norm(layer.k_norm, k)
        out = []
        for one_q, one_k, one_v in zip(*(t.split(self._lengths) for t in (q, k, v)), strict=True):
            heads = [
                t.view(1, len(t), -1, plan.head_dim).transpose(1, 2) for t in (one_q, one_k, one_v)
            ]
            a, b = heads[:2]  # (1, H, T, D)
            if not layer.whole_qk_norm:
                a, b = _norm(layer.q_norm, a), _norm(layer.k_norm, b)
            if layer.rope is not None:
                cos, sin = self._ropes[layer.rope]
                interleaved = plan.ropes[layer.rope].interleaved
                a, b = ops.rope(a, b, cos, sin, interleaved=interleaved)
            y = ops.attention(
                *(a, b, heads[2]),
                window=layer.window,
                softcap=layer.softcap or None,
                sinks=None if layer.sinks is None else layer.sinks.detach().float(),
                scale=layer.scale,
            )
            out.append(y.transpose(1, 2).flatten(2)[0])
        return torch.cat(out)


def _norm(norm: Norm | None, x: Tensor) -> Tensor:
    """The norm over the last dimension; none is the identity."""
    if norm is None:
        return x
    weight = norm.weight.detach().float()
    if norm.kind == "rms":
        return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * weight
    bias = None if norm.bias is None else norm.bias.detach().float()
    return functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
