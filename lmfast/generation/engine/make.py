"""From a model to its engine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from lmfast import _extension
from lmfast._dispatch import against_engine
from lmfast.generation.engine.cell_runner import CellRunner
from lmfast.generation.engine.cells import CellPlan, recurrent_plan
from lmfast.generation.engine.from_lmfast import decoder_plan
from lmfast.generation.engine.from_transformers import plan_maker
from lmfast.generation.engine.packing import WEIGHTS, check_group
from lmfast.generation.engine.plan import CannotPack, Plan
from lmfast.generation.engine.quantised import QuantisedWeights
from lmfast.generation.engine.runner import EngineRunner
from lmfast.models.decoder import DecoderLanguageModel
from lmfast.models.recurrent import RecurrentLanguageModel

P = TypeVar("P", bound=Plan | CellPlan)


def make_engine(
    model: Any,
    weights: str | QuantisedWeights = "fp32",
    *,
    group: int | None = None,
    cache_dtype: torch.dtype | None = None,
) -> EngineRunner | CellRunner:
    """Pack a model for the CPU.

    Args:
        model: a `lmfast.models.DecoderLanguageModel` or `RecurrentLanguageModel`, or transformers'
            GPT-2, GPT-NeoX, Llama, Mistral, Qwen 2 or 3, Gemma 2 or 3, Phi-3 or OLMo 2 with a
            language model's head; in float32 or bfloat16 on the CPU.
        weights: "fp32", "bf16", "int8", "int4" (the output layer and embeddings are int8), or what
            `lmfast.quantise` made. bf16 and integers are multiplied in float32's accuracy, but for
            prompts of 32 tokens and more, and in batches of as many rows: these are rounded to bf16
            where the processor has products of such.
        group: inputs that share a scale, 32, 64 or 128; None: all of int8, 32 of int4.
        cache_dtype: of keys and values, of decoders; float32 for "fp32", else bfloat16 by default.

    Returns:
        What `lmfast.Generator` drives: `new_state` and `step`.

    Raises:
        ValueError: there are no such weights.
        CannotPack: a ValueError whose `reason` says what about the model the engine does not know.

    Example:
        >>> import torch
        >>> from lmfast.models import DecoderLanguageModel
        >>> runner = make_engine(DecoderLanguageModel(50, 16, 2, 1, 0))
        >>> logits, state = runner.step(torch.tensor([[7, 8]]), runner.new_state(1))
        >>> logits.shape, state.lengths.tolist()
        (torch.Size([1, 50]), [2])
    """
    if isinstance(weights, QuantisedWeights):
        if group is not None:
            raise ValueError(
                f"group is that of the quantised weights, {weights.group}: leave it out"
            )
        kind: str = weights.kind
        group = weights.group
    elif weights in WEIGHTS:
        kind, group = weights, check_group(weights, group)
    else:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if not _extension.cpu.loaded:
        raise CannotPack(str(_extension.cpu.reason))
    if (reason := against_engine()) is not None:
        raise CannotPack(reason)
    if is_recurrent(model):
        cells = _planner(recurrent_plan, model)
        if isinstance(weights, QuantisedWeights):
            cells = _with_matrices(cells, weights)
        return CellRunner(cells, kind, group)
    plan = _planner(_decoder_maker(model), model)
    if isinstance(weights, QuantisedWeights):
        plan = _with_matrices(plan, weights)
    return EngineRunner(plan, kind, group, cache_dtype)


def is_recurrent(model: Any) -> bool:
    """Whether it is a recurrent language model of ours."""
    return type(model) is RecurrentLanguageModel


def plan_of(model: Any) -> Plan | CellPlan:
    """The plan of a model; CannotPack if the engine does not know it."""
    _check_hooks(model)
    return recurrent_plan(model) if is_recurrent(model) else _decoder_maker(model)(model)


def _check_hooks(model: Any) -> None:
    for name, module in model.named_modules():
        if not name and hasattr(model, "step"):
            continue  # those of its forward, which does not run here
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # transformers leaves its own behind once hidden states were asked for: they only look.
        if any(not str(getattr(h, "__module__", "")).startswith("transformers.") for h in hooks):
            where = repr(name) if name else "the model"
            raise CannotPack(f"{where} has forward hooks, which the engine would not call")


def _decoder_maker(model: Any) -> Callable[[Any], Plan]:
    make_plan = decoder_plan if type(model) is DecoderLanguageModel else plan_maker(model)
    if make_plan is None:
        raise CannotPack(f"a {type(model).__name__} is not a model the engine knows")
    return make_plan


def _planner(make_plan: Callable[[Any], P], model: Any) -> Callable[[], P]:
    """Plans of the model as long as it lives: a runner alone does not keep it in memory."""
    reference = weakref.ref(model)

    def plan() -> P:
        alive = reference()
        if alive is None:
            raise ValueError("the model this engine was packed from is gone: make a new engine")
        _check_hooks(alive)
        return make_plan(alive)

    return plan


def _with_matrices(make_plan: Callable[[], P], matrices: QuantisedWeights) -> Callable[[], P]:
    """The same plans with quantised matrices, which are not kept in memory either."""
    reference = weakref.ref(matrices)

    def plan() -> P:
        alive = reference()
        if alive is None:
            raise ValueError("the quantised weights of this engine are gone: make a new engine")
        return alive.into(make_plan())

    return plan
