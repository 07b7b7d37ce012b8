"""Rounding a model's matrices to integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmfast.generation.engine.calibration import calibrated, calibrated_cells
from lmfast.generation.engine.cells import CellPlan
from lmfast.generation.engine.make import plan_of
from lmfast.generation.engine.packing import check_group
from lmfast.generation.engine.plan import Plan
from lmfast.generation.engine.quantised import QuantisedWeights, with_matrices
from lmfast.generation.text import encode
from lmfast.ops._rounding import Quantised, quantise_groups, quantise_rows


@torch.no_grad()
def quantise(
    model: Any,
    weights: Literal["int8", "int4"] = "int8",
    *,
    group: int | None = None,
    texts: Sequence[Any] | None = None,
    tokenizer: Any = None,
) -> QuantisedWeights:
    """Round a model's matrices to integers, to nearest or as it suits some texts.

    ``weight[n, k] = codes[n, k] * scale``, a scale for each row or for `group` numbers of it. With
    texts, a number's error is left to those that are rounded after it, such that the products with
    what the texts make of the matrix's inputs change least (GPTQ).

    With "int4" the output layer and the embeddings are int8: their errors reach every logit.

    Args:
        model: what `Generator` packs for the engine, decoders of this package and of transformers
            and `RecurrentLanguageModel`; its weights stay as they are.
        weights: "int8" or "int4".
        group: 32, 64 or 128; None: a scale per row of int8, groups of 32 of int4.
        texts: for calibration: strings, or ids (T,) or (B, T) int64; a few thousand tokens of the
            kind that will be generated. None: round to nearest.
        tokenizer: for texts that are strings; a `BPETokenizer` or one of transformers.

    Raises:
        ValueError: a model that the engine cannot pack or whose numbers are not finite, impossible
            `weights` or `group`, texts without a token, longer than the model's context, or ids
            outside the vocabulary.
        TypeError: texts that are neither; the model is no module.

    Source: Frantar et al. 2022, "GPTQ", arXiv:2210.17323.
    """
    if weights not in ("int8", "int4"):
        raise ValueError(f'weights must be "int8" or "int4", got {weights!r}')
    group = check_group(weights, group)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    plan = plan_of(model)
    bits: Literal[8, 4] = 8 if weights == "int8" else 4
    found: dict[str, Quantised] = {}
    if texts is not None:
        ids = _ids_of(texts, tokenizer, plan)
        if isinstance(plan, CellPlan):
            found = calibrated_cells(plan, ids, bits, group)
        else:
            found = calibrated(plan, ids, bits, group)

    def integers(name: str, weight: Tensor | Quantised) -> Quantised:
        if name not in found:
            assert isinstance(weight, Tensor)
            if name == "embedding":
                found[name] = rounded(weight, 8, None)
            elif name == "head":
                found[name] = rounded(weight, 8, group if bits == 8 else None)
            else:
                found[name] = rounded(weight, bits, group)
        return found[name]

    with_matrices(plan, integers)
    return QuantisedWeights(weights, group, found)


def rounded(weight: Tensor, bits: Literal[8, 4], group: int | None) -> Quantised:
    """A matrix as integers, each number to the nearest."""
    if group is None:
        return quantise_rows(weight)
    return quantise_groups(weight, group, bits)


def _ids_of(texts: Sequence[Any], tokenizer: Any, plan: Plan | CellPlan) -> list[Tensor]:
    """Texts as ids (T,), checked."""
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"texts must be a list of at least one text, got {texts!r}")
    rows: list[Tensor] = []
    for text in texts:
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError("tokenizer must be given with texts that are strings")
            text = torch.tensor(encode(tokenizer, text), dtype=torch.int64)
        if not isinstance(text, Tensor) or text.dtype != torch.int64 or text.ndim not in (1, 2):
            raise TypeError(f"texts must be strings or int64 tensors (T,) or (B, T), got {text!r}")
        rows.extend(text.unbind() if text.ndim == 2 else [text])
    rows = [row for row in rows if len(row)]
    if not rows:
        raise ValueError("texts must have at least one token, they are all empty")
    low, high = (int(v) for v in torch.aminmax(torch.cat(rows)))
    if low < 0 or high >= plan.vocab:
        wrong = low if low < 0 else high
        raise ValueError(f"texts must have ids in 0..{plan.vocab - 1}, got {wrong}")
    longest = max(len(row) for row in rows)
    if plan.max_positions is not None and longest > plan.max_positions:
        raise ValueError(
            f"a text has {longest} tokens, the model has {plan.max_positions} positions: cut it"
        )
    return rows
