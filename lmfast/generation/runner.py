"""What runs a model token by token: the contract, and the choice between engine and modules."""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from lmfast.generation.engine import CannotPack, make_engine
from lmfast.generation.engine.quantised import QuantisedWeights
from lmfast.generation.module_runner import ModuleRunner

Weights = Literal["fp32", "bf16", "int8", "int4"]
WEIGHTS = ("fp32", "bf16", "int8", "int4")

S = TypeVar("S", bound="State")


class State(Protocol):
    """What a model remembers of each row; a `KVCache` is one, and `RecurrentState`.

    Those that can also go back have `truncate(lengths)` and `share_prefix(source, rows, length)`,
    as `KVCache` has them.
    """

    @property
    def batch(self) -> int:
        """Number of rows."""

    def reorder(self, rows: Any) -> None:
        """Keep the given rows in the given order; one may be dropped or occur several times."""

    def fork(self: S, copies: int = 1) -> S:
        """Return a state with every row `copies` times, next to each other, that goes on alone."""

    def sibling(self: S, batch: int) -> S:
        """Return a state of `batch` empty rows that `append_rows` can take."""

    def append_rows(self: S, other: S) -> None:
        """Take over the rows of a sibling or fork, behind the own ones; `other` is used up."""


class Runner(Protocol):
    """A model that takes tokens and gives logits.

    Attributes:
        vocab_size: V.
        pad_idx: id for padding, or None.
        max_positions: how many tokens a row may have, or None for any number.
    """

    vocab_size: int
    pad_idx: int | None
    max_positions: int | None

    @property
    def device(self) -> torch.device:
        """Where ids and logits are."""

    def memory(self) -> int:
        """Bytes of the weights."""

    def new_state(self, batch: int, capacity: int | None = None) -> Any:
        """Return the state before the first token, with room for `capacity` tokens if it grows."""

    def step(
        self,
        ids: Tensor,
        state: Any,
        lengths: Tensor | None = None,
        *,
        all_positions: bool = False,
    ) -> tuple[Tensor, Any]:
        """Feed the next tokens.

        Args:
            ids: (B, T) int64, T >= 1.
            state: from `new_state` or the previous call; may be changed in place.
            lengths: (B,) int64, number of real tokens of each right-padded row, 0 to T; None =
                all T. The logits of a row with 0 mean nothing.
            all_positions: logits of all tokens rather than of each row's last real one.

        Returns:
            Logits (B, V), or (B, T, V) with `all_positions`, and the state to pass next.
        """


def make_runner(
    model: Any, weights: Weights | QuantisedWeights = "fp32", group: int | None = None
) -> tuple[Runner, str | None]:
    """Return the fastest runner for a model, and why it is not the compiled engine (None: it is).

    Args:
        model: an `lmfast.models.LanguageModel`, a causal language model of transformers, anything
            with `step`, `new_state` and `vocab_size`, or a `Runner` itself.
        weights: how the engine stores weights; the modules have what they have, for "fp32".
        group: numbers that share a scale, of integers.

    Raises:
        TypeError: the model is none of these.
        ValueError: unknown weights, or weights other than "fp32" for a model that the engine
            cannot pack.
    """
    if not isinstance(weights, QuantisedWeights) and weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    runner, reason = _engine(model, weights, group)
    if runner is not None:
        return runner, None
    if weights != "fp32":
        wrong = repr(weights) if isinstance(weights, str) else "quantised ones"
        raise ValueError(f"weights must be 'fp32' for this model, got {wrong}: {reason}")
    if hasattr(model, "config") and hasattr(model, "get_input_embeddings"):
        from lmfast.generation.transformers.runner import TransformersRunner

        return TransformersRunner(model), reason
    return ModuleRunner(model), reason


def _engine(
    model: Any, weights: Weights | QuantisedWeights, group: int | None
) -> tuple[Runner | None, str | None]:
    try:
        return make_engine(model, weights, group=group), None
    except CannotPack as error:
        return None, str(error)
