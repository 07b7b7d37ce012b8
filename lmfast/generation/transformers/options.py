"""`model.generate(..., custom_generate=lmfast.generate)`: what transformers passes, as our options.

transformers has prepared everything by then: prompts are repeated for every beam or draw, the
configuration is complete, and there are objects for every processor of logits and every criterion
to stop. Those that stand for entries of the configuration are read from it; others cannot be
honoured and are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Made from entries of the configuration that we have, too.
_PROCESSORS = {
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "MinPLogitsWarper",
    "RepetitionPenaltyLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
}
_CRITERIA = {"EosTokenCriteria", "MaxLengthCriteria"}
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_ALL_TOKENS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "temperature": 1.0}


def options_from_transformers(
    ids: Tensor,
    config: Any,
    *,
    max_new_tokens: int | None = None,
    logits_processor: Any = (),
    stopping_criteria: Any = (),
    attention_mask: Tensor | None = None,
    **model_kwargs: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """The prompts and the arguments of `Generator.generate` for a call by transformers.

    Args:
        ids: (B * R, T) int64, repeated for R beams or draws.
        config: the prepared `GenerationConfig`.
        max_new_tokens: as the user gave it.
        logits_processor, stopping_criteria: prepared lists.
        attention_mask: (B * R, T).
        model_kwargs: what the model would be called with.

    Raises:
        ValueError: something was asked for that `Generator` does not do; names it.
    """
    _refuse_objects("logits_processor", logits_processor, _PROCESSORS)
    _refuse_objects("stopping_criteria", stopping_criteria, _CRITERIA)
    for name in ("cache", "past_key_values"):  # the new name and the old one
        if (cache := model_kwargs.get(name)) is not None and cache.get_seq_length() > 0:
            raise ValueError(f"{name} must be empty: use lmfast.Generator's prefix instead")
    _refuse_positions(model_kwargs.get("position_ids"), attention_mask)
    for name in ("return_dict_in_generate", "output_scores", "output_logits"):
        if getattr(config, name, None):
            raise ValueError(f"{name} must be False with custom_generate=lmfast.generate")
    beams, draws = config.num_beams or 1, config.num_return_sequences or 1
    if beams > 1 and config.do_sample:
        raise ValueError("num_beams must be 1 with do_sample=True")
    options: dict[str, Any] = {"do_sample": bool(config.do_sample)}
    repeats = max(beams, draws)
    if beams > 1:
        ids = ids[::repeats]
        attention_mask = None if attention_mask is None else attention_mask[::repeats]
        options.update(num_beams=beams, num_return_sequences=draws)
        options.update(length_penalty=config.length_penalty, early_stopping=config.early_stopping)
    elif config.do_sample:
        for name in _DRAWING:
            value = getattr(config, name, None)
            options[name] = _ALL_TOKENS[name] if value is None else value
    if config.repetition_penalty is not None:
        options["repetition_penalty"] = config.repetition_penalty
    options["suppress_tokens"] = list(config.suppress_tokens or ())
    options["eos_token_id"] = config.eos_token_id
    options["pad_token_id"] = config.pad_token_id
    new = config.max_length - ids.shape[1] if max_new_tokens is None else max_new_tokens
    least = max(config.min_new_tokens or 0, (config.min_length or 0) - ids.shape[1])
    options.update(max_new_tokens=new, min_new_tokens=min(least, new))
    # Without a cache the same is found more slowly, and not by beam search.
    options.update(use_cache=config.use_cache is not False or beams > 1)
    options.update(attention_mask=attention_mask)
    return ids, options


def _refuse_positions(positions: Tensor | None, mask: Tensor | None) -> None:
    """transformers passes the positions that follow from the mask, or the user's own."""
    if positions is None or positions.dim() != 2:
        return
    seen = torch.ones_like(positions) if mask is None else mask
    if bool(((positions != seen.cumsum(-1) - 1) & seen.bool()).any()):
        raise ValueError(
            "position_ids must count the tokens that attention_mask shows, from 0, with "
            "custom_generate=lmfast.generate: leave them out"
        )


def _refuse_objects(argument: str, objects: Any, known: set[str]) -> None:
    for entry in objects or ():
        name = type(entry).__name__
        if name not in known:
            raise ValueError(
                f"{argument} has a {name}, which lmfast.generate cannot honour: leave it out, or "
                "custom_generate"
            )
