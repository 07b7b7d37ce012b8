"""Plans of transformers' causal language models, read from their modules; nothing is imported.

Known by the name of their class: GPT-2, GPT-NeoX, and the families that are built like Llama. A
model whose projections were replaced, by adapters or quantised layers, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
from lmfast.patching.swap import swap_of

_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
# Frequencies that do not depend on how long the text is.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


def plan_maker(model: Any) -> Callable[[Any], Plan] | None:
    """The function that makes the plan of such a model, or None where the engine has none."""
    if not type(model).__module__.startswith("transformers."):
        return None
    return _MAKERS.get(type(model).__name__)


def activation_of(name: Any) -> Activation:
    """The engine's name of a transformers activation."""
    if name not in _ACTIVATIONS:
        raise CannotPack(f"its activation is {name!r}; the engine has {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def kind_of(module: Any) -> type:
    """The class of a module, of one that `lmfast.patch` made faster its own."""
    swapped = swap_of(module)
    return type(module) if swapped is None else swapped[0]


def linear_of(module: Any) -> Linear:
    """A projection: `nn.Linear`, or transformers' `Conv1D`, which is transposed."""
    if kind_of(module) is nn.Linear:
        return Linear(module.weight, module.bias)
    if kind_of(module).__name__ == "Conv1D":
        return Linear(module.weight.t(), module.bias)
    raise CannotPack(f"it has a {type(module).__name__} in the place of a plain linear layer")


def rows_of(linear: Linear, sizes: list[int]) -> list[Linear]:
    """One projection as several, by its outputs."""
    assert isinstance(linear.weight, Tensor)
    weights = linear.weight.split(sizes)
    biases = [None] * len(sizes) if linear.bias is None else linear.bias.split(sizes)
    return [Linear(w, b) for w, b in zip(weights, biases, strict=True)]


def layer_norm_of(module: Any) -> Norm:
    """A LayerNorm."""
    if kind_of(module) is not nn.LayerNorm:
        raise CannotPack(f"it has a {type(module).__name__} in the place of LayerNorm")
    return Norm("layer", module.weight, module.eps, module.bias)


def rms_norm_of(module: Any) -> Norm:
    """An RMSNorm by any of transformers' names; Gemma's multiply by 1 + weight."""
    name = type(module).__name__
    if not name.endswith("RMSNorm"):
        raise CannotPack(f"it has a {name} in the place of RMSNorm")
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    weight = module.weight
    return Norm("rms", 1.0 + weight.detach().float() if "Gemma" in name else weight, eps)


def rope_of(module: Any, layer_type: str | None = None) -> Rope:
    """A rotation, by the tables that the model's own module makes."""
    kind = getattr(module, "rope_type", "default")
    kind = kind.get(layer_type, "default") if isinstance(kind, dict) else kind
    if kind not in _FIXED_ROPE:
        raise CannotPack(f"its rotation depends on the length of the text ({kind})")
    options = {} if layer_type is None else {"layer_type": layer_type}

    def tables(length: int) -> tuple[Tensor, Tensor]:
        length = max(256, 1 << (length - 1).bit_length())
        with torch.inference_mode(False), torch.no_grad():
            cos, sin = module(torch.zeros(1), torch.arange(length)[None], **options)
        half = cos.shape[-1] // 2  # both halves are the same
        return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()

    return Rope(tables, interleaved=False)


def finish(
    model: Any, embedding: Any, final_norm: Norm, layers: list[Layer], **options: Any
) -> Plan:
    """The plan, from what all families have in common."""
    config = model.config
    head = linear_of(model.get_output_embeddings())
    assert isinstance(head.weight, Tensor)
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    heads = config.num_attention_heads
    return Plan(
        width=config.hidden_size,
        heads=heads,
        vocab=len(head.weight),
        layers=tuple(layers),
        head=head,
        embedding=None if tied else embedding.weight,
        final_norm=final_norm,
        pad_idx=getattr(config, "pad_token_id", None),
        max_positions=getattr(config, "max_position_embeddings", None),
        parameters=tuple(model.parameters()),
        **options,
    )


def check(model: Any) -> None:
    """CannotPack for what no family may have."""
    check_parameters(tuple(model.parameters()))
    if model.training and any(m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout)):
        raise CannotPack("the model is in training mode and has dropout; call eval()")


def _gpt2(model: Any) -> Plan:
    check(model)
    config, base = model.config, model.transformer
    if config.add_cross_attention:
        raise CannotPack("it has cross-attention")
    layers = []
    for block in base.h:
        a, mlp = block.attn, block.mlp
        q, k, v = rows_of(linear_of(a.c_attn), [config.hidden_size] * 3)
        layers.append(
            Layer(
                *(q, k, v, linear_of(a.c_proj)),
                up=linear_of(mlp.c_fc),
                down=linear_of(mlp.c_proj),
                activation=activation_of(config.activation_function),
                scale=a.scaling,
                attention_norm=layer_norm_of(block.ln_1),
                mlp_norm=layer_norm_of(block.ln_2),
            )
        )
    return finish(
        *(model, base.wte, layer_norm_of(base.ln_f), layers),
        kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        hidden=config.n_inner or 4 * config.hidden_size,
        positions=base.wpe.weight,
    )


def _gpt_neox(model: Any) -> Plan:
    check(model)
    config, base = model.config, model.gpt_neox
    layers = []
    for block in base.layers:
        a, mlp = block.attention, block.mlp
        packed = linear_of(a.query_key_value)  # heads of query, key and value, in turn
        assert isinstance(packed.weight, Tensor)
        shape = (config.num_attention_heads, 3, a.head_size)
        weights = packed.weight.view(*shape, -1).unbind(1)
        biases = [None] * 3 if packed.bias is None else packed.bias.view(shape).unbind(1)
        q, k, v = (
            Linear(w.flatten(0, 1), None if b is None else b.flatten())
            for w, b in zip(weights, biases, strict=True)
        )
        layers.append(
            Layer(
                *(q, k, v, linear_of(a.dense)),
                up=linear_of(mlp.dense_h_to_4h),
                down=linear_of(mlp.dense_4h_to_h),
                activation=activation_of(config.hidden_act),
                scale=a.scaling,
                attention_norm=layer_norm_of(block.input_layernorm),
                mlp_norm=layer_norm_of(block.post_attention_layernorm),
                rope=0,
                parallel=block.use_parallel_residual,
            )
        )
    return finish(
        *(model, base.embed_in, layer_norm_of(base.final_layer_norm), layers),
        kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        hidden=config.intermediate_size,
        ropes=(rope_of(base.rotary_emb),),
    )


def _llama_like(model: Any) -> Plan:
    """Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, Phi-3, OLMo 2."""
    check(model)
    config, base = model.config, model.model
    if getattr(config, "use_bidirectional_attention", False):
        raise CannotPack("its attention also looks ahead")
    types = [getattr(b.self_attn, "layer_type", None) for b in base.layers]
    by_type = isinstance(getattr(base.rotary_emb, "rope_type", None), dict)
    kinds = list(dict.fromkeys(types)) if by_type else [None]
    layers = [
        _llama_layer(block, config, kinds.index(kind) if by_type else 0)
        for block, kind in zip(base.layers, types, strict=True)
    ]
    factor = getattr(base.embed_tokens, "embed_scale", 1.0)
    if isinstance(factor, Tensor):  # rounded to the weights' type, as the model has it
        factor = float(factor.to(base.embed_tokens.weight.dtype))
    return finish(
        *(model, base.embed_tokens, rms_norm_of(base.norm), layers),
        kv_heads=config.num_key_value_heads,
        head_dim=base.layers[0].self_attn.head_dim,
        hidden=config.intermediate_size,
        ropes=tuple(rope_of(base.rotary_emb, kind) for kind in kinds),
        embedding_factor=factor,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _llama_layer(block: Any, config: Any, rope: int) -> Layer:
    a, mlp = block.self_attn, block.mlp
    if hasattr(a, "qkv_proj"):
        queries, keys = (
            n * a.head_dim for n in (config.num_attention_heads, a.num_key_value_heads)
        )
        q, k, v = rows_of(linear_of(a.qkv_proj), [queries, keys, keys])
        gate, up = rows_of(linear_of(mlp.gate_up_proj), [config.intermediate_size] * 2)
    else:
        q, k, v = (linear_of(p) for p in (a.q_proj, a.k_proj, a.v_proj))
        gate, up = linear_of(mlp.gate_proj), linear_of(mlp.up_proj)

    def norm(module: Any, name: str) -> Norm | None:
        return rms_norm_of(getattr(module, name)) if hasattr(module, name) else None

    # `post_attention_layernorm` is behind attention where the feed-forward layer has a norm of its
    # own before or behind it, else before the feed-forward layer.
    middle, last = (
        norm(block, "post_attention_layernorm"),
        norm(block, "post_feedforward_layernorm"),
    )
    own = getattr(a, "sliding_window", None)
    # Of these, all layers have the configuration's window.
    everywhere = type(a).__name__ in ("MistralAttention", "Phi3Attention")
    q_norm = norm(a, "q_norm")
    return Layer(
        *(q, k, v, linear_of(a.o_proj)),
        up=up,
        down=linear_of(mlp.down_proj),
        gate=gate,
        activation=activation_of(
            getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
        ),
        scale=a.scaling,
        attention_norm=norm(block, "input_layernorm"),
        attention_post_norm=None if last is None else middle,
        mlp_norm=norm(block, "pre_feedforward_layernorm") if last is not None else middle,
        mlp_post_norm=last,
        q_norm=q_norm,
        k_norm=norm(a, "k_norm"),
        whole_qk_norm=q_norm is not None and len(q_norm.weight) != a.head_dim,
        rope=rope,
        window=config.sliding_window if everywhere else own,
        softcap=getattr(a, "attn_logit_softcapping", None),
    )


_LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3", "Olmo2")
_MAKERS: dict[str, Callable[[Any], Plan]] = {
    "GPT2LMHeadModel": _gpt2,
    "GPTNeoXForCausalLM": _gpt_neox,
    **{f"{family}ForCausalLM": _llama_like for family in _LLAMA_LIKE},
}
