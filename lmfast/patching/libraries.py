"""Parts of `lmfast.patch` that know another library; `lmfast.integrations` registers them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn


class Integration(Protocol):
    """What is done for models of a library beside the rules for all modules."""

    def refusal(self, model: nn.Module, /) -> str | None:
        """Why no module of a model is replaced, or None."""

    def patch(self, model: nn.Module, worker: Any, /) -> None:
        """Replaces what only this part recognises; `worker` tries plans."""

    def unpatch(self, model: nn.Module, /) -> None:
        """Takes back what `patch` did beside giving modules another forward."""


@dataclass(frozen=True)
class Library:
    """A library, known without being imported.

    Attributes:
        owns: whether a module is one of its models or holds one.
        load: imports the part for it, which registers its recipes.
    """

    owns: Callable[[nn.Module], bool]
    load: Callable[[], Integration]


LIBRARIES: list[Library] = []


def integration_of(model: nn.Module) -> Integration | None:
    """The part for a model's library, if it is of one."""
    return next((library.load() for library in LIBRARIES if library.owns(model)), None)


def load_all() -> None:
    """Imports all parts, as a pickle with a recipe of one of them needs."""
    for library in LIBRARIES:
        library.load()
