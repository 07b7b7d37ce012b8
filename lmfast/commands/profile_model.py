"""The model that `lmfast profile` runs: one of ours or of transformers', and what its work is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfast
from lmfast.generation.transformers.experts import expert_parameters
from lmfast.models import DecoderLanguageModel, LanguageModel, RecurrentLanguageModel
from lmfast.training import load_model

_ADAMW_PASSES = 7  # reads parameter, gradient and two averages; writes all but the gradient
_TRAINING_PASSES = 3  # read forward and backward, gradient written


@dataclass
class ProfiledModel:
    """A model with the calls and the counts that profiling needs.

    Attributes:
        module: in training mode or not, as the run needs it.
        name: said in the first line.
        vocab_size: ids are drawn below it.
        loss: (inputs, targets), both (B, T) -> scalar.
        generate: (ids, new tokens) -> ids.
        embedding: the input embedding's matrix, of which a step reads a few rows.
        output: the matrix that makes logits; may be the embedding's.
        attention_width: query heads times head size, 0 without attention.
        cache_width: key heads times head size, for keys and values each.
        layers: with attention.
        experts_used: share of the experts that a token meets, of models that have them.
    """

    module: nn.Module
    name: str
    vocab_size: int
    loss: Callable[[Tensor, Tensor], Tensor]
    generate: Callable[[Tensor, int], Tensor]
    embedding: Tensor
    output: Tensor
    attention_width: int
    cache_width: int
    layers: int
    experts_used: float = 1.0

    def parameters(self) -> int:
        """Every value counted once."""
        return sum(p.numel() for p in self.module.parameters())

    def matrix_entries(self) -> int:
        """Entries of the matrices that every token is multiplied with."""
        # By where they lie: the output may be the view of a parameter.
        expert = expert_parameters(self.module)
        inside = {id(p) for p in expert}
        # Of convolutions, too, a token meets every entry once.
        matrices: list[Tensor] = [
            p for p in self.module.parameters() if p.ndim >= 2 and id(p) not in inside
        ]
        given = {m.data_ptr(): m for m in matrices}
        given.pop(self.embedding.data_ptr(), None)
        given[self.output.data_ptr()] = self.output
        experts = sum(p.numel() for p in expert)
        return sum(t.numel() for t in given.values()) + round(experts * self.experts_used)

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of one token's forward pass at the end of training rows.

            2 (matrix entries, the output matrix included) + 2 T E layers

        The second term is causal attention: scores and their product with the values over T / 2
        keys.
        """
        return 2 * self.matrix_entries() + 2 * context * self.attention_width * self.layers

    def training_bytes(self) -> float:
        """Bytes of parameters, gradients and AdamW's averages that one step moves at least."""
        own = sum(p.numel() * p.element_size() for p in self.module.parameters())
        return (_TRAINING_PASSES + _ADAMW_PASSES) * own

    def decoding_work(self, batch: int, length: float) -> tuple[float, float]:
        """(operations, bytes) of one step for every row: matrices once, the cache's keys so far."""
        attention = 4 * length * self.attention_width * self.layers
        size = self.output.element_size()
        cache = 2 * length * self.cache_width * self.layers * size
        entries = self.matrix_entries()
        return batch * (2 * entries + attention), entries * size + batch * cache


def profiled_model(options: argparse.Namespace, device: torch.device) -> ProfiledModel:
    """The model that the command line names: saved by this package, by transformers, or new.

    Raises:
        ValueError: the directory holds no model, or one that needs transformers.
    """
    if options.model is not None and _is_transformers(Path(options.model)):
        return _of_transformers(options.model, device)
    model = _own_model(options).to(device)
    heads = kv_heads = layers = 0
    if isinstance(model, DecoderLanguageModel):
        heads = model.options["num_heads"]
        kv_heads = model.options.get("num_kv_heads") or heads
        layers = len(model.layers)
    head_dim = model.head_dim if isinstance(model, DecoderLanguageModel) else 0

    def generate(ids: Tensor, new_tokens: int) -> Tensor:
        return lmfast.generate(model, ids, new_tokens, eos_token_id=None)

    return ProfiledModel(
        module=model,
        name=model.kind,
        vocab_size=model.vocab_size,
        loss=model.loss,
        generate=generate,
        embedding=model.embedding.weight,
        output=model.head()[0],
        attention_width=heads * head_dim,
        cache_width=kv_heads * head_dim,
        layers=layers,
    )


def _own_model(options: argparse.Namespace) -> LanguageModel:
    if options.model is not None:
        return load_model(options.model)
    if options.kind == "recurrent":
        return RecurrentLanguageModel(options.vocab_size, options.emb_dim, options.layers, None)
    return DecoderLanguageModel(
        options.vocab_size, options.emb_dim, options.heads, options.layers, None
    )


def _is_transformers(path: Path) -> bool:
    try:
        return "model_type" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _of_transformers(path: str, device: torch.device) -> ProfiledModel:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ValueError(f"{path} holds a model of transformers, which is not installed") from error
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    except ValueError as error:  # its text names every architecture there is
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} holds no causal language model: {first}") from error
    model.to(device)
    name = f"{type(model).__name__}"
    patch = getattr(lmfast, "patch", None)
    if patch is not None:
        patch(model)
        name += ", patched"
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 0  # none in state-space models
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    experts = experts or getattr(config, "n_routed_experts", None)
    used = getattr(config, "num_experts_per_tok", None)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def generate(ids: Tensor, new_tokens: int) -> Tensor:
        limits = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **limits)

    return ProfiledModel(
        module=model,
        name=name,
        vocab_size=config.vocab_size,
        loss=loss,
        generate=generate,
        embedding=model.get_input_embeddings().weight,
        output=model.get_output_embeddings().weight,
        attention_width=heads * head_dim,
        cache_width=kv_heads * head_dim,
        layers=config.num_hidden_layers,
        experts_used=used / experts if used and experts else 1.0,
    )
