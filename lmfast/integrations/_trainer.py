"""The callback that patches a Trainer's model."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from lmfast.patching import PatchReport, patch, unpatch


class use_lmfast(TrainerCallback):
    """Patches the model of a `transformers.Trainer` when the Trainer is made.

    Args:
        backend: as in `lmfast.patch`.
        keep: leave the model patched when training ends.

    The report is in the attribute `report`. It happens before accelerate wraps the model, and holds
    with peft's adapters, mixed precision, gradient accumulation and checkpointing.

    Example:
        >>> from lmfast.integrations.transformers import use_lmfast
        >>> callbacks = [use_lmfast()]  # of a Trainer
    """

    def __init__(self, backend: str | None = None, keep: bool = True) -> None:
        self.backend, self.keep = backend, keep
        self.report: PatchReport | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Patches the model before anything is wrapped around it."""
        self.report = patch(kwargs["model"], backend=self.backend)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the patch back unless it is to stay."""
        if not self.keep:
            unpatch(kwargs["model"])
