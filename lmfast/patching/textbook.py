"""Attention and feed-forward layers on bare parameters, as textbooks write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmfast import ops
from lmfast.nn.attend import attend
from lmfast.patching.probe import Call, random_input
from lmfast.patching.rules import Plan, is_leaf, own_weights, takes, untouched
from lmfast.patching.swap import recipe


def _head_weights(head: nn.Module) -> tuple[str, str, str] | None:
    """Names of the query, key and value matrices (E, D) of a head."""
    weights = own_weights(head)
    if len(weights) != 3 or len({w.shape for w in weights.values()}) != 1:
        return None
    if next(iter(weights.values())).dim() != 2 or not is_leaf(head):
        return None
    found: dict[str, str] = {}
    for name in weights:
        letter = name.replace("W", "").replace("w", "").strip("_").lower()[:1]
        found[letter] = name
    return tuple(found[x] for x in "qkv") if set(found) == set("qkv") else None  # type: ignore[return-value]


def plan_attention(module: nn.Module) -> Plan | str | None:
    """Heads with `W_Q`, `W_K`, `W_V` each, in a list, and `W_O` beside it."""
    lists = [(n, c) for n, c in module.named_children() if isinstance(c, nn.ModuleList)]
    weights = own_weights(module)
    if len(lists) != 1 or len(list(module.children())) != 1 or len(weights) > 1:
        return None
    name, heads = lists[0]
    names = _head_weights(heads[0]) if len(heads) else None
    if names is None or any(
        _head_weights(h) != names or type(h) is not type(heads[0]) for h in heads
    ):
        return None
    width, size = own_weights(heads[0])[names[0]].shape
    output = next(iter(weights), None)
    if output is not None and weights[output].shape[0] != len(heads) * size:
        return f"{output} does not have one row for each of the heads' values"
    with_mask = takes(type(module), 2)
    if not with_mask and not takes(type(module), 1):
        return None
    together = "attention over all heads at once"
    pairings: tuple[Any, ...] = (True, False, None) if size % 2 == 0 else (None,)

    def calls() -> list[Call]:
        x = random_input(module, 2, 5, width)
        if not with_mask:
            return [Call((x,))]
        causal = torch.tril(torch.ones(5, 5, device=x.device))
        # Every query sees a key: what happens otherwise is not the same anywhere.
        other = causal.clone()
        other[3, 1] = 0
        return [Call((x, causal)), Call((x, other))]

    return Plan(
        "heads",
        [
            {
                "parts": name,
                "weights": names,
                "output": output,
                "masked": with_mask,
                "pairs": pairs,
                "label": f"lmfast.ops.{'' if pairs is None else 'rope and '}{together}",
            }
            for pairs in pairings
        ],
        calls,
        f"lmfast.ops.{together}",
    )


@recipe("heads")
def _heads(
    original: type,
    parts: str,
    weights: tuple[str, str, str],
    output: str | None,
    masked: bool,
    pairs: bool | None,
    backend: str | None = None,
) -> dict[str, Any]:
    own = original.forward  # type: ignore[attr-defined]

    def attention(self: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        each = list(getattr(self, parts))
        if not untouched(each):
            return own(self, x, mask) if masked else own(self, x)
        batch, steps, _ = x.shape
        count, size = len(each), getattr(each[0], weights[0]).shape[1]
        packed = torch.cat([getattr(head, name) for name in weights for head in each], 1)
        # One product for all heads' queries, keys and values: (B, T, 3 H D).
        qkv = ops.linear(x, packed.t(), backend=backend).view(batch, steps, 3, count, size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, D] each
        if pairs is not None:
            cos, sin = ops.rope_tables(steps, size, device=x.device)
            if x.dtype == torch.float64:
                cos, sin = cos.double(), sin.double()
            q, k = ops.rope(q, k, cos, sin, interleaved=pairs, backend=backend)
        out = attend(q, k, v, mask=mask)
        out = out.transpose(1, 2).reshape(batch, steps, count * size)
        if output is None:
            return out
        return ops.linear(out, getattr(self, output).t(), backend=backend)

    if masked:

        def forward(self: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
            return attention(self, x, mask)
    else:

        def forward(self: nn.Module, x: Tensor) -> Tensor:  # type: ignore[misc]
            return attention(self, x, None)

    return {"forward": forward}


def plan_mlp(module: nn.Module) -> Plan | str | None:
    """`relu(x W_1 + B_1) W_2 + B_2` on bare parameters."""
    weights = own_weights(module)
    if not is_leaf(module) or not takes(type(module), 1):
        return None
    matrices = [n for n, w in weights.items() if w.dim() == 2]
    biases = [n for n, w in weights.items() if w.dim() == 1]
    if len(matrices) != 2 or len(biases) not in (0, 2) or len(weights) != 2 + len(biases):
        return None
    first, second = matrices
    if weights[first].shape != weights[second].shape[::-1]:
        return None
    width, hidden = weights[first].shape
    if biases and [len(weights[b]) for b in biases] != [hidden, width]:
        return None
    b_1, b_2 = biases or (None, None)
    return Plan(
        "bare_mlp",
        [{"first": first, "second": second, "b_1": b_1, "b_2": b_2}],
        lambda: [
            Call((random_input(module, 2, 3, width),)),
            Call((random_input(module, 2, 131, width),)),
        ],
        "lmfast.ops.linear with bias and ReLU",
    )


@recipe("bare_mlp")
def _bare_mlp(
    original: type,
    first: str,
    second: str,
    b_1: str | None,
    b_2: str | None,
    backend: str | None = None,
) -> dict[str, Any]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        bias_1 = None if b_1 is None else getattr(self, b_1)
        bias_2 = None if b_2 is None else getattr(self, b_2)
        hidden = ops.linear(x, getattr(self, first).t(), bias_1, relu=True, backend=backend)
        return ops.linear(hidden, getattr(self, second).t(), bias_2, backend=backend)

    return {"forward": forward}
