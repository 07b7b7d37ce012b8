"""Models of transformers on static buffers: one captured step per token, see `static_step`.

Keys and values lie in layers of transformers' own static kind, which every model that compiles
into one graph takes: their lengths are tensors. All rows have their newest token in the same
column, shorter ones padding in front, as `TransformersState` keeps them; layers with a window keep
all tokens, and the masks do the rest.

There is room for every token from the start. Attention of this package on rows of one length reads
only those that there are; any other reads the room, under a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from lmfast.generation.transformers.experts import expert_parameters, why_experts_wait

# Rotations whose tables follow from positions alone.
_ROTATIONS = ("default", "linear", "llama3", "yarn", "proportional")


class StaticTransformer:
    """A causal language model of transformers with the state of its prompts.

    Args:
        model: the model.
        state: `TransformersState` after the prompts, used up: its keys and values go layer by
            layer while the static ones come.
        steps: most steps there may be.
        takes_positions: the model's forward takes `position_ids`.
        takes_last_only: it takes `logits_to_keep`.
        cache_name: what it calls the cache.
    """

    def __init__(
        self,
        model: Any,
        state: Any,
        steps: int,
        *,
        takes_positions: bool,
        takes_last_only: bool,
        cache_name: str,
    ) -> None:
        self._model = model
        lengths = state.lengths
        width = max(lengths)
        capacity = width + steps
        layers: list[Any] = []
        for old in state.cache.layers:
            layer: Any = StaticLayer(max_cache_len=capacity)
            layer.lazy_initialization(old.keys, old.values)
            layer.keys[:, :, :width] = old.keys
            layer.values[:, :, :width] = old.values
            layer.cumulative_length.fill_(width)
            old.keys = old.values = None  # not both caches at once
            old.is_initialized = False
            layers.append(layer)
        self._layers = layers
        device = layers[0].keys.device
        self._options: dict[str, Any] = {cache_name: Cache(layers=layers)}
        if takes_last_only:
            self._options["logits_to_keep"] = 1
        self._positions = torch.tensor(lengths, device=device)[:, None]
        if takes_positions:
            self._options["position_ids"] = self._positions
        if min(lengths) != width:
            front = width - self._positions
            self._options["attention_mask"] = torch.arange(capacity, device=device) >= front
        elif _sees_all(model):
            # Rows of one length and no window: attention takes the length for the whole mask.
            self._ends = torch.full((len(lengths),), width, device=device)
            for layer in layers:
                layer.keys.lmfast_ends = self._ends

    def __call__(self, ids: Tensor) -> Tensor:
        if hasattr(self, "_ends"):
            self._ends += 1
        result = self._model(input_ids=ids[:, None], use_cache=True, **self._options)
        self._positions += 1
        return result.logits[:, -1]

    def state(self) -> list[Tensor]:
        """The counts of tokens: a token stored twice is the same token."""
        counts = [layer.cumulative_length for layer in self._layers]
        return [self._positions, *counts, *((self._ends,) if hasattr(self, "_ends") else ())]


def why_not_static(model: Any) -> str | None:
    """Why a model of transformers has no step on static buffers, or None."""
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"{type(model).__name__} does not run in one graph, says transformers"
    for kind in _rotations(model.config.get_text_config()):
        if kind not in _ROTATIONS:
            return f"the rotation ({kind}) depends on the length of the text"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "its layers lie on several devices (hf_device_map)"
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        return f"its parameters lie on several devices ({', '.join(devices)})"
    experts = expert_parameters(model)
    if experts and experts[0].is_cuda:
        implementation = getattr(model.config.get_text_config(), "_experts_implementation", None)
        capability = torch.cuda.get_device_capability(experts[0].device)
        return why_experts_wait(implementation, experts[0].dtype, capability)
    return None


def may_be_static(state: Any, steps: int) -> bool:
    """Whether all layers keep keys and values alone, and there is memory for so many steps."""
    layers = state.cache.layers
    if not layers or not all(getattr(layer, "is_initialized", False) for layer in layers):
        return False
    free, width = _free_bytes(layers[0].keys.device), max(state.lengths)
    sizes = [layer.keys.nbytes + layer.values.nbytes for layer in layers]
    # An old layer goes when its new one is there: never more than one is kept twice.
    return free is None or sum(sizes) * steps // width + max(sizes) <= free


def _free_bytes(device: torch.device) -> int | None:
    """What PyTorch may still allocate on a GPU; None on a CPU: not known."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _rotations(config: Any) -> Iterator[str]:
    """The kinds of rotation that a configuration names, for all layers or by their types."""
    given = getattr(config, "rope_parameters", None) or {}
    for parameters in (given, *(v for v in given.values() if isinstance(v, dict))):
        if "rope_type" in parameters:
            yield parameters["rope_type"]


def _sees_all(model: Any) -> bool:
    """Whether every layer attends to all tokens before, by this package's attention."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = [getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size")]
    name = getattr(config, "_attn_implementation", None) or ""
    return (
        (name == "lmfast" or name.startswith("lmfast_"))  # or with a backend
        and kinds == {"full_attention"}
        and (not any(windows) or getattr(config, "layer_types", None) is not None)
        and getattr(config, "is_causal", True)
    )
