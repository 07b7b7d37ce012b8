"""From a model to its engine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from lmfast import _extension
from lmfast.generation.engine.from_lmfast import decoder_plan
from lmfast.generation.engine.from_transformers import plan_maker
from lmfast.generation.engine.packing import WEIGHTS
from lmfast.generation.engine.plan import CannotPack, Plan
from lmfast.generation.engine.runner import EngineRunner
from lmfast.models.decoder import DecoderLanguageModel


def make_engine(
    model: Any, weights: str = "fp32", *, cache_dtype: torch.dtype | None = None
) -> EngineRunner:
    """Pack a model for the CPU.

    Args:
        model: a `lmfast.models.DecoderLanguageModel`, or transformers' GPT-2, GPT-NeoX, Llama,
            Mistral, Qwen 2 or 3, Gemma 2 or 3, Phi-3 or OLMo 2 with a language model's head; in
            float32 or bfloat16 on the CPU.
        weights: "fp32", "bf16" (products in float32), "int8" (a scale per output channel) or "int4"
            (a scale per 32 inputs; the output layer and embeddings are int8).
        cache_dtype: of keys and values; float32 for "fp32", else bfloat16 by default.

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
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if not _extension.cpu.loaded:
        raise CannotPack(str(_extension.cpu.reason))
    if type(model) is DecoderLanguageModel:
        return EngineRunner(_planner(decoder_plan, model), weights, cache_dtype)
    make_plan = plan_maker(model)
    if make_plan is not None:
        return EngineRunner(_planner(make_plan, model), weights, cache_dtype)
    raise CannotPack(f"a {type(model).__name__} is not a model the engine knows")


def _planner(make_plan: Callable[[Any], Plan], model: Any) -> Callable[[], Plan]:
    """Plans of the model as long as it lives: a runner alone does not keep it in memory."""
    reference = weakref.ref(model)

    def plan() -> Plan:
        alive = reference()
        if alive is None:
            raise ValueError("the model this engine was packed from is gone: make a new engine")
        return make_plan(alive)

    return plan
