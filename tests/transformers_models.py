"""Random models of transformers' decoder architectures, small enough to run many of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import lmfast
from lmfast.integrations.transformers import LMFastCache
from lmfast.patching import PatchReport

TABLE = Path(lmfast.__file__).parent / "integrations" / "ARCHITECTURES.md"

_V, _E, _F, _L, _H = 96, 32, 48, 2, 4
_COMMON: dict[str, Any] = {
    "vocab_size": _V,
    "hidden_size": _E,
    "intermediate_size": _F,
    "num_hidden_layers": _L,
    "num_attention_heads": _H,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}

# Model type of transformers -> what its configuration is made with.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "arcee": _GROUPED,
    "bloom": {**_COMMON, "n_layer": _L, "n_head": _H},
    "codegen": {**_COMMON, "n_embd": _E, "n_layer": _L, "n_head": _H, "rotary_dim": 4, "n_ctx": 64},
    "cohere": {**_GROUPED, "use_qk_norm": True, "logit_scale": 0.3},
    "cohere2": {**_GROUPED, "logit_scale": 0.3, "sliding_window": 6},
    "deepseek_v3": {
        **_COMMON,
        "num_key_value_heads": _H,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
    "ernie4_5": _GROUPED,
    "exaone4": {**_GROUPED, "sliding_window": 6},
    "falcon": {**_COMMON, "ffn_hidden_size": 64},
    "gemma": {**_GROUPED, "head_dim": 8},
    "gemma2": {
        **_GROUPED,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
    },
    "gemma3_text": {
        **_GROUPED,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
    },
    "glm": {**_GROUPED, "head_dim": 8},
    "glm4": {**_GROUPED, "head_dim": 8},
    "gpt2": {**_COMMON, "n_embd": _E, "n_layer": _L, "n_head": _H, "n_positions": 64},
    "gpt_bigcode": {**_COMMON, "n_embd": _E, "n_layer": _L, "n_head": _H, "n_positions": 64},
    "gpt_neo": {
        **_COMMON,
        "num_layers": _L,
        "num_heads": _H,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 6,
    },
    "gpt_neox": _COMMON,
    "gpt_oss": {**_GROUPED, **_EXPERTS, "head_dim": 8, "sliding_window": 6},
    "gptj": {
        **_COMMON,
        "n_embd": _E,
        "n_layer": _L,
        "n_head": _H,
        "rotary_dim": 4,
        "n_positions": 64,
    },
    "granite": {
        **_GROUPED,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
    },
    "helium": {**_GROUPED, "head_dim": 8},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 6},
    "mixtral": {**_GROUPED, **_EXPERTS},
    "mpt": {"d_model": _E, "n_heads": _H, "n_layers": _L, "max_seq_len": 64, "vocab_size": _V},
    "nemotron": {**_GROUPED, "head_dim": 8},
    "olmo": {**_GROUPED, "clip_qkv": 2.0},
    "olmo2": _GROUPED,
    "olmo3": {**_GROUPED, "sliding_window": 6},
    "olmoe": {**_GROUPED, **_EXPERTS},
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": _E},
    "persimmon": _COMMON,
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "qwen2": _GROUPED,
    "qwen2_moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": {**_GROUPED, "head_dim": 8},
    "qwen3_moe": {**_GROUPED, **_EXPERTS, "head_dim": 8},
    "seed_oss": {**_GROUPED, "head_dim": 8},
    "smollm3": _GROUPED,
    "stablelm": {**_GROUPED, "use_qkv_bias": True, "qk_layernorm": True},
    "starcoder2": _GROUPED,
}


def make(kind: str, **more: Any) -> transformers.PreTrainedModel:
    """A model of an architecture with random weights, norms and biases that are not trivial."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**ARCHITECTURES[kind], **more})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn(p.shape))
            else:
                p.copy_(torch.randn(p.shape) * min(0.3, p.shape[-1] ** -0.5))
    return model.eval()


IDS = torch.randint(1, _V, (2, 9), generator=torch.Generator().manual_seed(0))
LEFT = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])

CACHES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "none": lambda model: {"use_cache": False},
    "dynamic": lambda model: {},
    "static": lambda model: {"cache_implementation": "static", "disable_compile": True},
    "lmfast": lambda model: {"past_key_values": LMFastCache(model.config)},
    "lmfast, limited": lambda model: {"past_key_values": LMFastCache(model.config, 40)},
}
SEARCHES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
}


def gradients(model: Any, **inputs: Any) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Loss, logits and gradients of a training step."""
    model.zero_grad()
    out = model(IDS, labels=IDS, **inputs)
    out.loss.backward()
    return out.loss, out.logits, [None if p.grad is None else p.grad for p in model.parameters()]


def assert_close(got: Tensor, expected: Tensor, rtol: float = 2e-5) -> None:
    """Equal up to fp32 rounding through a few layers, relative to the largest number."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= rtol * expected.abs().max()


def _cell(report: PatchReport, *labels: str) -> str:
    found = [label for label in labels if any(label == e.replaced_by for e in report.replaced)]
    return ", ".join(label.rsplit(".", 1)[-1].split()[-1] for label in found) or "-"


def row(kind: str, report: PatchReport) -> str:
    """The table's line for an architecture."""
    attention = next((n for n in report.notes if n.startswith("attention")), "")
    cells = [
        kind,
        "-" if "left as it is" in attention else "yes",
        _cell(report, "lmfast.ops.rope", "lmfast.ops.rope and attention").replace(
            "attention", "rope"
        ),
        _cell(report, "lmfast.ops.rms_norm", "torch's fused layer_norm"),
        _cell(
            report,
            "lmfast.ops.swiglu",
            "lmfast.ops.geglu",
            "torch's fused gelu_tanh",
            "torch's fused gelu",
        ),
        "yes" if any(e.replaced_by == "lmfast.ops.linear" for e in report.replaced) else "-",
        "yes" if any("cross_entropy" in e.replaced_by for e in report.replaced) else "-",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = f"""# What `lmfast.patch` accelerates in each architecture of transformers

Made by `python tests/transformers_models.py` from small random models, with transformers
{transformers.__version__}; what is not listed is patched by the same rules. Everything replaced was
run against the original first. torch's own LayerNorm and activations stay: they are one fused
kernel each. Layers of experts stay transformers' own grouped products.

| model type | attention | rotary | norms | feed-forward | linear | loss |
|---|---|---|---|---|---|---|
"""


def write_table() -> None:
    rows = [row(kind, lmfast.patch(make(kind))) for kind in ARCHITECTURES]
    TABLE.write_text(HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    write_table()
