"""Attention layers of transformers' models that write the scores out themselves.

Bloom, Falcon, GPT-Neo and MPT do not ask transformers' AttentionInterface, so a name for it changes
nothing there. Each recipe below is the forward of one such layer with `lmfast.ops.attention`
between the layer's own projections: no scores, no weights and no softmax in memory. Whatever needs
the weights themselves (dropout of them, `output_attentions`) goes the layer's own way.

Biases by distance (ALiBi): Bloom and Falcon count positions from the padding mask, which may have
holes, so the bias of every key is added to the mask as it is, once for all layers of a pass. MPT
counts from the last key: one slope per head says it all, and the kernel adds it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfast import ops
from lmfast.integrations._attention import attention_forward, in_autocast_dtype
from lmfast.integrations._rotary import own_function, replacement, rotary_candidates
from lmfast.patching.probe import Call
from lmfast.patching.rules import Plan
from lmfast.patching.swap import recipe, swap_of

LABEL = "lmfast.ops.attention"
LABEL_WITH_ROPE = "lmfast.ops.rope and attention"

# Recipe -> the arguments of a layer's forward and the names in the layer that it is made for.
_FORMS: dict[str, tuple[set[str], set[str]]] = {
    "attention_alibi": (
        {"hidden_states", "residual", "alibi", "attention_mask", "layer_past"},
        {"query_key_value", "_reshape", "dense", "attention_dropout", "inv_norm_factor"},
    ),
    "attention_multi_query": (
        {"hidden_states", "alibi", "attention_mask", "position_embeddings", "layer_past"},
        {"query_key_value", "_split_heads", "dense", "attention_dropout", "inv_norm_factor"},
    ),
    "attention_unscaled": (
        {"hidden_states", "attention_mask", "layer_past", "output_attentions"},
        {"q_proj", "k_proj", "v_proj", "out_proj", "bias", "attn_dropout", "_split_heads"},
    ),
    "attention_biased": (
        {"hidden_states", "position_bias", "attention_mask"},
        {"Wqkv", "out_proj", "softmax_scale", "clip_qkv", "attn_dropout_p"},
    ),
    "attention_block": (
        {"hidden_states", "position_bias", "attention_mask", "layer_past", "output_attentions"},
        {"norm_1", "attn", "resid_attn_dropout", "norm_2", "ffn"},
    ),
}


def form_of(module: nn.Module) -> str | None:
    """The recipe that a layer looks made for, or None."""
    try:
        arguments = set(inspect.signature(type(module).forward).parameters)
    except (TypeError, ValueError):
        return None
    for name, (wanted, attributes) in _FORMS.items():
        if wanted <= arguments and all(hasattr(module, a) for a in attributes):
            return name
    return None


def plan_own_attention(module: nn.Module, calls: Callable[[], list[Call]]) -> Plan | None:
    """A plan for a layer of one of the forms, with the calls that it gets in its model."""
    form = form_of(module)
    if form is None:
        return None
    label = LABEL
    options: list[dict[str, Any]] = [{}]
    if form == "attention_multi_query":
        options = [r for r in rotary_candidates(module) if r.pop("form") == "pair"] or [{}]
        if calls()[0].kwargs.get("alibi") is None:
            label = LABEL_WITH_ROPE
    elif form == "attention_unscaled":
        seen = module.bias  # (1, 1, L, L): which keys a query sees
        if not isinstance(seen, Tensor) or seen.dim() != 4 or seen.dtype != torch.bool:
            return None
        last = int(seen[0, 0, -1].sum())
        options = [{"window": None if last == seen.shape[-1] else last}]
    elif form == "attention_block":
        label = "itself, telling its attention whether weights are wanted"
        attention: Any = type(module.attn)
        taken = inspect.signature(attention.forward).parameters
        options = [{"cache": "cache" if "cache" in taken else "past_key_values"}]
    return Plan(form, options, calls, label)


def calls_attention(module: nn.Module) -> bool:
    """Whether a layer has the forward of one of the recipes."""
    found = swap_of(module)
    return found is not None and found[1] in _FORMS and found[1] != "attention_block"


def _added(mask: Tensor | None, bias: Tensor, scale: float = 1.0) -> Tensor:
    """Mask and (B, H, 1, S) or (B H, 1, S) biases, scaled, as one tensor to add to the scores.

    Made once for all layers of a pass, which are given the same two tensors.
    """
    if mask is None:
        return bias * scale
    compiling = torch.compiler.is_compiling()
    kept = None if compiling else getattr(mask, "_lmfast_biased", None)
    if kept is not None and kept[0] is bias:
        return kept[1]
    wide = bias if bias.dim() == 4 else bias.view(mask.shape[0], -1, *bias.shape[1:])
    total = mask + (wide if scale == 1.0 else wide * scale)
    if not compiling:
        mask._lmfast_biased = (bias, total)  # type: ignore[attr-defined]
    return total


def _attended(*args: Any, **options: Any) -> Tensor:
    """The result of `attention_forward` as (B, T, H D)."""
    return attention_forward(*args, **options)[0].flatten(2)


@recipe("attention_alibi")
def _alibi(original: Any, backend: str | None = None) -> dict[str, Any]:
    own = original.forward

    def forward(
        self: Any,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        drops = self.training and self.attention_dropout.p > 0
        sliced = self.pretraining_tp > 1 and self.slow_but_exact
        if output_attentions or drops or sliced or attention_mask is None:
            return own(
                *(self, hidden_states, residual, alibi, attention_mask, layer_past),
                *(use_cache, output_attentions),
                **kwargs,
            )
        q, k, v = self._reshape(self.query_key_value(hidden_states))  # [B, H, T, D] each
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        mask = _added(attention_mask, alibi)
        out = _attended(self, q, k, v, mask, scaling=self.inv_norm_factor, backend=backend)
        return residual + F.dropout(self.dense(out), self.hidden_dropout, self.training), None

    return {"forward": forward}


@recipe("attention_multi_query")
def _multi_query(
    original: Any,
    function: str | None = None,
    tables: str = "",
    interleaved: bool = False,
    backend: str | None = None,
) -> dict[str, Any]:
    own = original.forward
    rotate = None
    if function is not None:
        code = own_function(own)
        assert code is not None
        rotate = replacement(code.__globals__[function], tables, interleaved, backend)

    def forward(
        self: Any,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        drops = self.training and self.attention_dropout.p > 0
        cannot_rotate = alibi is None and (rotate is None or position_embeddings is None)
        if output_attentions or drops or cannot_rotate or attention_mask is None:
            return own(
                *(self, hidden_states, alibi, attention_mask, position_ids, layer_past),
                *(use_cache, output_attentions, position_embeddings),
                **kwargs,
            )
        split = self._split_heads(self.query_key_value(hidden_states))  # [B, T, H or Hkv, D]
        q, k, v = (t.transpose(1, 2) for t in split)
        mask = attention_mask
        if alibi is None:
            q, k = rotate(q, k, *position_embeddings)  # type: ignore[misc]
        elif self.config._attn_implementation != "sdpa":
            # The model has added it once; without SDPA, the layer does so again.
            mask = _added(mask, alibi, self.inv_norm_factor)
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        out = _attended(self, q, k, v, mask, scaling=self.inv_norm_factor, backend=backend)
        return self.dense(out), None

    return {"forward": forward}


@recipe("attention_unscaled")
def _unscaled(
    original: Any, window: int | None = None, backend: str | None = None
) -> dict[str, Any]:
    own = original.forward

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if output_attentions or (self.training and self.attn_dropout.p > 0):
            return own(
                *(self, hidden_states, attention_mask, layer_past, use_cache, output_attentions),
                **kwargs,
            )
        q, k, v = (
            self._split_heads(layer(hidden_states), self.num_heads, self.head_dim)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, H, T, D] each
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_id)
        q, k, v = in_autocast_dtype(q, k, v)
        # The last query stands at the last key, as in the layer's own matrix of what is seen.
        out = ops.attention(
            q, k, v, causal=True, mask=attention_mask, window=window, scale=1.0, backend=backend
        )
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return self.resid_dropout(out), None

    return {"forward": forward}


@recipe("attention_biased")
def _biased(original: Any, backend: str | None = None) -> dict[str, Any]:
    own = original.forward

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_bias: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        output_attentions: bool = True,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # The weights are in the result, so whoever does not say otherwise gets them.
        drops = self.training and self.attn_dropout_p > 0
        caches = [kwargs[name] for name in ("cache", "past_key_values") if name in kwargs]
        line = position_bias is not None and position_bias.shape[-1] > 1
        if output_attentions or drops or args or not line or len(caches) > 1:
            return own(
                self, hidden_states, position_bias, *args, attention_mask=attention_mask, **kwargs
            )
        batch, steps, _ = hidden_states.shape
        packed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            packed = packed.clamp(-self.clip_qkv, self.clip_qkv)
        packed = packed.view(batch, steps, 3, self.n_heads, self.head_dim)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, D] each
        if caches and caches[0] is not None:
            k, v = caches[0].update(k, v, self.layer_idx)
        if k.shape[2] > position_bias.shape[-1]:
            raise ValueError(
                f"there are biases for {position_bias.shape[-1]} positions, got {k.shape[2]} keys: "
                "config.max_seq_len must be larger"
            )
        q, k, v = in_autocast_dtype(q, k, v)
        out = ops.attention(
            *(q, k, v),
            causal=False,
            # There, True is what is hidden.
            mask=None if attention_mask is None else ~attention_mask,
            # (H, 1, L): a straight line per head, of which a constant changes no weight.
            alibi=(position_bias[:, 0, -1] - position_bias[:, 0, -2]).float(),
            scale=self.softmax_scale,
            backend=backend,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2)), None

    return {"forward": forward}


@recipe("attention_block")
def _block(original: Any, cache: str, backend: str | None = None) -> dict[str, Any]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_bias: Tensor,
        attention_mask: Tensor,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attn(
            self.norm_1(hidden_states),
            position_bias=position_bias,
            attention_mask=attention_mask,
            **{cache: layer_past},
            output_attentions=output_attentions,
        )
        hidden_states = self.resid_attn_dropout(attended) + hidden_states
        return self.ffn(self.norm_2(hidden_states), hidden_states), weights

    return {"forward": forward}
