"""Models whose state lies in tensors that never move, for a step that is captured once.

Two kinds are here: decoders on an `lmfast.KVCache`, whose lengths become a tensor, and recurrent
models, whose state is one. Those of transformers are in `lmfast.generation.transformers`.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from lmfast import ops
from lmfast.cache import KVCache, _whole_step
from lmfast.cache._blocks import BlockTable
from lmfast.cache._storage import Storage, on_device
from lmfast.generation.states import RecurrentState
from lmfast.models.decoder import DecoderLanguageModel
from lmfast.models.recurrent import RecurrentLanguageModel


class StaticModel(Protocol):
    """What a static step feeds."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Feed one id per row (B,) and return the logits (B, V); everything on the device."""

    def state(self) -> list[Tensor]:
        """The tensors a step changes that must be put back for it to say the same again."""


class StaticLayer:
    """One layer of a cache whose lengths are a tensor: what attention layers take for a cache.

    `rope_append` only keeps the tokens: `attend` rotates, stores and attends in one operator.
    """

    def __init__(
        self, storage: Storage, lengths: Tensor, table: Tensor | None, capacity: int
    ) -> None:
        self._storage, self._lengths, self._table = storage, lengths, table
        self.longest = capacity - 1  # what rotation tables are made for
        self._new: tuple[Any, ...] = ()

    def rope_append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        interleaved: bool,
        positions: int | Tensor | None,
    ) -> Tensor:
        """Take the tokens of the step."""
        assert positions is None
        self._new = (k, v, cos, sin, interleaved)
        return q

    def attend(self, q: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Rotate, store and attend; the lengths count the new token already."""
        assert mask is None
        k, v, cos, sin, interleaved = self._new
        s = self._storage
        return ops.decode_attention(
            *(q, k, v, s.keys, s.values, self._lengths, cos, sin),
            interleaved=interleaved,
            table=self._table,
            key_scales=s.key_scales,
            value_scales=s.value_scales,
            **options,
        )


class StaticDecoder:
    """A `DecoderLanguageModel` on the storage of a cache.

    Args:
        model: the decoder.
        cache: after the prompts, in blocks: no layer may keep only a window.
        steps: most steps there may be: room is found for all of them now.
    """

    def __init__(self, model: Any, cache: KVCache, steps: int) -> None:
        self._model = model
        start = cache._lengths
        whole = _whole_step.begin(cache, steps, None)
        self.lengths = on_device(start.copy(), cache.device)
        longest = int(whole.new.ends.max())
        self._layers = []
        for group, storage in zip(
            cache._group_of, _whole_step.storage_of(cache, whole), strict=True
        ):
            table = whole.placements[group].table
            self._layers.append(StaticLayer(storage, self.lengths, table, longest))

    def layer(self, index: int, counts: Any = None) -> StaticLayer:
        """Return one layer, as the model asks a cache for it; all rows have one token per step."""
        return self._layers[index]

    def __call__(self, ids: Tensor) -> Tensor:
        self.lengths += 1
        return self._model.step(ids[:, None], self)[0]

    def state(self) -> list[Tensor]:
        """The lengths: a token stored twice is the same token."""
        return [self.lengths]


class StaticRecurrent:
    """A `RecurrentLanguageModel` whose state is written back to where it was.

    Args:
        model: the model.
        state: after the prompts.
    """

    def __init__(self, model: Any, state: RecurrentState) -> None:
        self._model = model
        self._state = state.tensor.clone()

    def __call__(self, ids: Tensor) -> Tensor:
        logits, after = self._model.step(ids[:, None], self._state)
        self._state.copy_(after)
        return logits

    def state(self) -> list[Tensor]:
        """The state itself."""
        return [self._state]


def why_not_static(model: Any) -> str | None:
    """Why a model has no step on static buffers, or None."""
    if isinstance(model, RecurrentLanguageModel):
        return None
    if not isinstance(model, DecoderLanguageModel):
        return "only lmfast's decoders and recurrent models, and those of transformers, have it"
    layers: Any = model.layers
    if any(layer.attn.rope._depends_on_length for layer in layers):
        return "the rotation depends on the length of the text"
    return None


def may_be_static(state: Any) -> bool:
    """Whether a state can be brought onto static buffers: no cache that keeps only a window."""
    if isinstance(state, RecurrentState):
        return True
    return all(isinstance(group, BlockTable) for group in state._groups)


def static_model(model: Any, state: Any, steps: int) -> StaticModel:
    """The model on static buffers, with room for so many steps; the state is used up."""
    if isinstance(state, RecurrentState):
        return StaticRecurrent(model, state)
    return StaticDecoder(model, state, steps)
