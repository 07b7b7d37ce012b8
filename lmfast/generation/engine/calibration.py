"""Rounding that knows what a matrix is multiplied with.

Rounded one column of the depth after the other, each leaving its error to the columns behind it,
which make up for it as well as what the rows x have in common allows:

    H = sum x x^T + damping,  U^T U = H^-1,  e = (w_k - round(w_k)) / U_kk,  w_j -= e U_kj  (j > k)

Layers come in order, and see what the rounded ones before them give.

Source: Frantar et al. 2022, "GPTQ", arXiv:2210.17323. Scales of groups are those of least error
weighted by diag H, as in Lin et al. 2023, "AWQ", arXiv:2306.00978, which scales columns instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lmfast.generation.engine.cell_forward import CellForward
from lmfast.generation.engine.cells import CellLayer, CellPlan
from lmfast.generation.engine.plan import Linear, Plan
from lmfast.generation.engine.plan_forward import PlanForward, plain_products
from lmfast.ops._rounding import Bits, Quantised, group_scales, nearest, quantise_rows

# Of the mean of diag H: directions in which the texts say nothing.
_DAMPING = 0.01
_BLOCK = 128


def calibrated(
    plan: Plan, texts: Sequence[Tensor], bits: Bits, group: int | None
) -> dict[str, Quantised]:
    """Every layer's matrices, by name ("layers.0.q"), as they suit some texts.

    Args:
        plan: of the model.
        texts: of (T,) int64 each.
        bits, group: as of `Quantised`.
    """
    found: dict[str, Quantised] = {}

    def products(names: Sequence[str], linears: Sequence[Linear], x: Tensor) -> list[Tensor]:
        solver = Solver(x, group)
        rounded = []
        for name, linear in zip(names, linears, strict=True):
            assert isinstance(linear.weight, Tensor)
            found[name] = solver.round(linear.weight, bits)
            rounded.append(Linear(found[name], linear.bias))
        return plain_products(names, rounded, x)

    forward = PlanForward(plan, texts, products)
    x = forward.embed()
    for index, layer in enumerate(plan.layers):
        x = forward.layer(x, layer, f"layers.{index}.")
    return found


def calibrated_cells(
    plan: CellPlan, texts: Sequence[Tensor], bits: Bits, group: int | None
) -> dict[str, Quantised]:
    """As `calibrated`, of a recurrent model ("layers.0.input.0").

    What multiplies a layer's states is rounded behind what multiplies its inputs, and sees the
    states that those give.
    """
    found: dict[str, Quantised] = {}

    def rounded(name: str, linears: Sequence[Linear], rows: Tensor) -> tuple[Linear, ...]:
        solver, made = Solver(rows, group), []
        for gate, linear in enumerate(linears):
            assert isinstance(linear.weight, Tensor)
            found[f"{name}.{gate}"] = solver.round(linear.weight, bits)
            made.append(Linear(found[f"{name}.{gate}"], linear.bias))
        return tuple(made)

    forward = CellForward(plan, texts)
    x = forward.embed()
    for index, layer in enumerate(plan.layers):
        name = f"layers.{index}."
        layer = replace(layer, input=rounded(f"{name}input", layer.input, x))
        if layer.state:
            before, kept = forward.operands(x, layer)
            state = rounded(f"{name}state", layer.state, before)
            candidate = layer.candidate
            if candidate is not None:
                (candidate,) = rounded(f"{name}candidate", [candidate], kept)
            layer = CellLayer(layer.input, state, candidate)
        x = forward.layer(x, layer)
    return found


class Solver:
    """What the rows x (N, K) say about rounding matrices that are multiplied with them."""

    def __init__(self, x: Tensor, group: int | None) -> None:
        self._group = group
        depth = x.shape[1]
        self._depth = depth if group is None else -(-depth // group) * group
        h = torch.zeros(self._depth, self._depth, dtype=torch.float64)
        h[:depth, :depth] = (x.t() @ x).double()
        diagonal = h.diagonal()
        damping = _DAMPING * float(diagonal.mean())
        diagonal.add_(damping if damping > 0 else 1.0)
        self._importance = diagonal.float()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        self._upper = torch.linalg.cholesky(inverse, upper=True).float()

    def round(self, weight: Tensor, bits: Bits) -> Quantised:
        """The matrix (N, K) as integers."""
        group, upper = self._group, self._upper
        w = weight.detach().float()
        w = torch.nn.functional.pad(w, (0, self._depth - w.shape[1]))
        codes = torch.empty(w.shape, dtype=torch.int8)
        row_scales = quantise_rows(w).scales
        scales: list[Tensor] = []
        block = _BLOCK if group is None else max(_BLOCK, group)
        w = w.t().contiguous()  # (K, N): a column of the depth lies together
        for first in range(0, self._depth, block):
            past = min(first + block, self._depth)
            part = w[first:past]
            errors = torch.empty_like(part)
            for k in range(past - first):
                if group is not None and k % group == 0:
                    columns = part[k : k + group].t()
                    seen = self._importance[first + k : first + k + group]
                    scales.append(group_scales(columns, bits, seen))
                scale = (scales[-1] if scales else row_scales).float()
                codes[:, first + k] = nearest(part[k], scale, bits)
                rest = upper[first + k, first + k : past]
                errors[k] = (part[k] - codes[:, first + k] * scale) / rest[0]
                part[k + 1 :].addr_(rest[1:], errors[k], alpha=-1)
            w[past:].addmm_(upper[first:past, past:].t(), errors, alpha=-1)
        if group is None:
            return Quantised(codes, row_scales, bits)
        return Quantised(codes, torch.stack(scales, 1), bits, group)
