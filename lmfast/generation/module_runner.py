"""Running a model by its own modules."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lmfast.generation import static_models
from lmfast.generation.states import RecurrentState
from lmfast.nn.hooks import has_forward_hooks


class ModuleRunner:
    """A `Runner` over a model's own `step` and `new_state`.

    Args:
        model: an `lmfast.models.LanguageModel`, or anything with `vocab_size`, `step` and
            `new_state`. Without `step(..., all_positions=True)` there is no speculative decoding,
            and states without the methods of `State` cannot be searched over.

    Raises:
        TypeError: the model has no `step` or `new_state`.
    """

    def __init__(self, model: Any) -> None:
        missing = [n for n in ("vocab_size", "step", "new_state") if not hasattr(model, n)]
        if missing:
            raise TypeError(
                "model must be an lmfast language model, a causal language model of transformers, "
                f"or have vocab_size, step and new_state; {type(model).__name__} has no "
                f"{' and no '.join(missing)}"
            )
        _warn_of_forward(type(model))
        self._model = model
        self.vocab_size: int = model.vocab_size
        self.pad_idx: int | None = getattr(model, "pad_idx", None)
        self.max_positions: int | None = getattr(model, "max_positions", None)

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        if isinstance(self._model, nn.Module):
            parameter = next(self._model.parameters(), None)
            if parameter is not None:
                return parameter.device
        return torch.device("cpu")

    def memory(self) -> int:
        """Bytes of the model's parameters."""
        parameters = self._model.parameters() if isinstance(self._model, nn.Module) else ()
        return sum(p.nbytes for p in parameters)

    def new_state(self, batch: int, capacity: int | None = None) -> Any:
        """Return the state before the first token."""
        state = self._model.new_state(batch, capacity)
        return RecurrentState(state) if isinstance(state, Tensor) else state

    def step(
        self,
        ids: Tensor,
        state: Any,
        lengths: Tensor | None = None,
        *,
        all_positions: bool = False,
    ) -> tuple[Tensor, Any]:
        """Feed the next tokens, see `Runner.step`."""
        if lengths is not None and not bool(lengths.all()):
            return step_rows_with_tokens(self, ids, state, lengths, all_positions)
        recurrent = isinstance(state, RecurrentState)
        given = state.tensor if recurrent else state
        options = {"all_positions": True} if all_positions else {}
        logits, after = self._model.step(ids, given, lengths, **options)
        if recurrent:
            state.tensor = after
            return logits, state
        return logits, after

    def why_not_static(self) -> str | None:
        """Why the model has no step on static buffers, or None."""
        return static_models.why_not_static(self._model)

    def may_be_static(self, state: Any, steps: int) -> bool:
        """Whether a state can be brought onto static buffers; it has room for its steps."""
        return static_models.may_be_static(state)

    def static_model(self, state: Any, steps: int) -> static_models.StaticModel:
        """The model on static buffers, with room for so many steps; the state is used up."""
        return static_models.static_model(self._model, state, steps)


def uncalled_hooks(model: Any) -> str:
    """What `Generator.explain` adds for forward hooks that no runner calls."""
    if not isinstance(model, nn.Module) or not hasattr(model, "step"):
        return ""
    places = ["the model itself"] if has_forward_hooks(model) else []
    layer = getattr(model, "fc", None) if getattr(model, "tie_weights", False) else None
    if isinstance(layer, nn.Module) and has_forward_hooks(layer):
        places.append("'fc', whose matrix is the embedding's")
    if not places:
        return ""
    return (
        f"; the hooks of {' and of '.join(places)} are not called: step runs, no forward of these"
    )


def step_rows_with_tokens(
    runner: Any, ids: Tensor, state: Any, lengths: Tensor, all_positions: bool
) -> tuple[Tensor, Any]:
    """Step only the rows that have tokens; the others stay as they are, their logits are 0."""
    some = lengths.nonzero().flatten()
    part = state.fork()
    part.reorder(some)
    shape = (*ids.shape, runner.vocab_size) if all_positions else (len(ids), runner.vocab_size)
    if len(some) == 0:
        return torch.zeros(shape, device=ids.device), state
    logits, part = runner.step(ids[some], part, lengths[some], all_positions=all_positions)
    out = logits.new_zeros(shape)
    out[some] = logits
    # The rows that went on take the places of what they were.
    place = torch.arange(len(ids), device=ids.device)
    place[some] = len(ids) + torch.arange(len(some), device=ids.device)
    state.append_rows(part)
    state.reorder(place)
    return out, state


def _warn_of_forward(kind: type) -> None:
    """Say so if a user's class changes what a model of this package computes, but not its steps."""
    forward, step = (
        next((c for c in kind.__mro__ if name in vars(c)), object) for name in ("forward", "step")
    )
    own = step.__module__.startswith("lmfast.") and not forward.__module__.startswith("lmfast.")
    if own and issubclass(forward, step):
        warnings.warn(
            f"{forward.__name__} overrides forward, but generation calls the step of "
            f"{step.__name__}: override step as well",
            stacklevel=5,
        )
