"""Running the causal language models of Hugging Face transformers token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lmfast.generation.module_runner import step_rows_with_tokens
from lmfast.generation.transformers import static

# Types of layers that keep keys and values alone.
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}


class TransformersState:
    """Keys and values as transformers keep them, with rows of different length.

    All layers keep all tokens, also those with a window, whose masks do the rest. In every row the
    tokens stand side by side at the end: windows count columns.

    Attributes:
        cache: of the model.
        lengths: tokens of each row, on the host.
    """

    def __init__(self, batch: int) -> None:
        self.cache = Cache(layer_class_to_replicate=DynamicLayer)
        self.lengths = [0] * batch

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def reorder(self, rows: Any) -> None:
        """Keep the given rows in the given order; one may be dropped or occur several times."""
        chosen = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        self.lengths = [self.lengths[row] for row in chosen]
        self._map(lambda t: t[torch.tensor(chosen, dtype=torch.int64, device=t.device)])
        self._trim()

    def fork(self, copies: int = 1) -> TransformersState:
        """Return a state with every row `copies` times, next to each other."""
        other = TransformersState(0)
        other.lengths = [length for length in self.lengths for _ in range(copies)]
        for index, (keys, values) in enumerate(self._layers()):
            other.cache.update(
                keys.repeat_interleave(copies, 0), values.repeat_interleave(copies, 0), index
            )
        return other

    def sibling(self, batch: int) -> TransformersState:
        """Return a state of `batch` empty rows."""
        return TransformersState(batch)

    def append_rows(self, other: TransformersState) -> None:
        """Take over the rows of another state, behind the own ones."""
        width = max(*self.lengths, *other.lengths, 0, 0)
        mine, theirs = list(self._layers()), list(other._layers())
        lengths = [*self.lengths, *other.lengths]
        whole = TransformersState(0)
        for index in range(max(len(mine), len(theirs))):
            # Either may be empty: a state before its first token has no layers.
            some = (mine or theirs)[index]
            pair = []
            for part in (0, 1):
                a = _widened(mine[index][part] if mine else None, self.batch, width, some[part])
                b = _widened(
                    theirs[index][part] if theirs else None, other.batch, width, some[part]
                )
                pair.append(torch.cat((a, b)))
            whole.cache.update(pair[0], pair[1], index)
        self.cache, self.lengths = whole.cache, lengths

    def truncate(self, lengths: int | list[int]) -> None:
        """Forget everything behind the given lengths."""
        wanted = [lengths] * self.batch if isinstance(lengths, int) else list(lengths)
        wanted = [min(a, b) for a, b in zip(wanted, self.lengths, strict=True)]
        width = max(self.lengths, default=0)
        drop = [a - b for a, b in zip(self.lengths, wanted, strict=True)]
        self.lengths = wanted
        if len(set(drop)) == 1:
            self._map(lambda t: t[:, :, : width - drop[0]])
        else:  # back to the end of the columns
            self._map(lambda t: torch.stack([r.roll(d, 1) for r, d in zip(t, drop, strict=True)]))
        self._trim()

    def _layers(self) -> Any:
        return ((layer.keys, layer.values) for layer in self._filled())

    def _filled(self) -> Iterator[Any]:
        return (layer for layer in self.cache.layers if getattr(layer, "is_initialized", False))

    def _map(self, function: Any) -> None:
        for layer in self._filled():
            layer.keys, layer.values = function(layer.keys), function(layer.values)

    def _trim(self) -> None:
        """Drop columns in front that no row uses."""
        width = max(self.lengths, default=0)
        if width == 0:
            self.cache = Cache(layer_class_to_replicate=DynamicLayer)
        else:
            self._map(lambda t: t[:, :, t.shape[2] - width :])


def _widened(t: Tensor | None, batch: int, width: int, like: Tensor) -> Tensor:
    """(B, H, width, D) with zeros in front."""
    if t is None:
        return like.new_zeros(batch, like.shape[1], width, like.shape[3])
    missing = width - t.shape[2]
    return torch.nn.functional.pad(t, (0, 0, missing, 0)) if missing else t


def cache_name(model: Any) -> str:
    """What a model's forward calls its cache: `cache` in newer versions of transformers."""
    accepted = inspect.signature(model.forward).parameters
    return "cache" if "cache" in accepted else "past_key_values"


class TransformersRunner:
    """A `Runner` over a causal language model of transformers.

    Args:
        model: with `forward(input_ids, attention_mask, position_ids, cache)`.

    Raises:
        TypeError: the model is an encoder-decoder, or keeps something else than keys and values.
    """

    pad_idx: int | None = None

    def __init__(self, model: Any) -> None:
        if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
            kind = "an encoder-decoder" if model.config.is_encoder_decoder else "recurrent"
            raise TypeError(
                f"model must be a causal language model with keys and values, and "
                f"{type(model).__name__} is {kind}: use its own generate"
            )
        text = model.config.get_text_config()
        others = set(getattr(text, "layer_types", None) or ()) - ATTENDING
        if others:
            raise TypeError(
                f"model must be a causal language model with keys and values, and "
                f"{type(model).__name__} has layers of types {', '.join(sorted(others))}: use its "
                "own generate"
            )
        self._model = model
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        limit = getattr(text, "max_position_embeddings", None)
        self.max_positions: int | None = limit if limit is not None and limit > 0 else None
        accepted = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in accepted
        self._last_only = "logits_to_keep" in accepted
        self._cache_name = cache_name(model)

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return self._model.device

    def memory(self) -> int:
        """Bytes of the model's parameters."""
        return sum(p.nbytes for p in self._model.parameters())

    def new_state(self, batch: int, capacity: int | None = None) -> TransformersState:
        """Return a state without tokens; it grows with them."""
        return TransformersState(batch)

    def step(
        self,
        ids: Tensor,
        state: TransformersState,
        lengths: Tensor | None = None,
        *,
        all_positions: bool = False,
    ) -> tuple[Tensor, TransformersState]:
        """Feed the next tokens, see `Runner.step`."""
        batch, width = ids.shape
        if lengths is not None and not bool(lengths.all()):
            return step_rows_with_tokens(self, ids, state, lengths, all_positions)
        new = [width] * batch if lengths is None else lengths.tolist()
        known = state.lengths
        after = [a + b for a, b in zip(known, new, strict=True)]
        if any(known) and state.cache.get_seq_length() != max(known):
            raise ValueError(
                f"{type(self._model).__name__} does not keep keys and values in the cache it is "
                "given: set use_cache=False"
            )
        if lengths is not None and any(known):
            return self._ragged_step(ids, state, lengths, all_positions)
        if lengths is not None:  # padding goes to the front
            shift = width - lengths
            columns = torch.arange(width, device=ids.device)
            ids = ids.gather(1, (columns - shift[:, None]) % width)
        options: dict[str, Any] = {}
        if len(set(after)) > 1:
            ends = torch.tensor(after, device=ids.device)[:, None]
            total = max(known, default=0) + width
            options["attention_mask"] = (
                torch.arange(total, device=ids.device) >= total - ends
            ).long()
            if self._positions:
                positions = ends - width + torch.arange(width, device=ids.device)
                options["position_ids"] = positions.clamp_min(0)
        elif self._positions:  # as transformers' generate counts, also where a model's own differ
            first = after[0] - width if after else 0
            options["position_ids"] = torch.arange(first, first + width, device=ids.device)[None]
        if self._last_only and not all_positions:
            options["logits_to_keep"] = 1
        options[self._cache_name] = state.cache
        result = self._model(input_ids=ids, use_cache=True, **options)
        state.lengths = after
        state._trim()
        logits = result.logits
        if not all_positions:
            return logits[:, -1], state
        if lengths is not None:  # and back
            columns = (columns + shift[:, None]) % width
            logits = logits.gather(1, columns[..., None].expand_as(logits))
        return logits, state

    def why_not_static(self) -> str | None:
        """Why the model has no step on static buffers, or None."""
        return static.why_not_static(self._model)

    def may_be_static(self, state: TransformersState, steps: int) -> bool:
        """Whether a state can be brought onto static buffers, and there is memory for them."""
        return static.may_be_static(state, steps)

    def static_model(self, state: TransformersState, steps: int) -> static.StaticTransformer:
        """The model on static buffers, with room for so many steps; the state is used up."""
        return static.StaticTransformer(
            *(self._model, state, steps),
            takes_positions=self._positions,
            takes_last_only=self._last_only,
            cache_name=self._cache_name,
        )

    def _ragged_step(
        self, ids: Tensor, state: TransformersState, lengths: Tensor, all_positions: bool
    ) -> tuple[Tensor, TransformersState]:
        """Different numbers of tokens behind rows that have some: rows of one number together.

        Padding between a row's tokens would have to be masked, and windows would count it.
        """
        shape = (*ids.shape, self.vocab_size) if all_positions else (len(ids), self.vocab_size)
        logits: Tensor | None = None
        order: list[int] = []
        whole = TransformersState(0)
        for count in sorted(set(lengths.tolist())):
            rows = (lengths == count).nonzero().flatten()
            part = state.fork()
            part.reorder(rows)
            some, part = self.step(ids[rows, :count], part, all_positions=all_positions)
            if logits is None:
                logits = some.new_zeros(shape)
            if all_positions:
                logits[rows, :count] = some
            else:
                logits[rows] = some
            whole.append_rows(part)
            order += rows.tolist()
        assert logits is not None
        whole.reorder(torch.tensor(order).argsort())
        return logits, whole
