"""transformers' continuous batching on a patched model: by the attention the model had before.

It keeps keys and values of all sequences in one row of pages, and takes a few implementations of
attention by name only.
"""

from __future__ import annotations

import functools
from typing import Any

BEFORE = "_lmfast_attention"  # the attribute of a model that keeps the attention it had


def continuous_batching(original: Any) -> dict[str, Any]:
    """What the class of a patched model has in the place of its own, if it has that."""
    own = getattr(original, "init_continuous_batching", None)
    if own is None:
        return {}

    @functools.wraps(own)
    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, now = vars(self).get(BEFORE), self.config._attn_implementation
        if before is None or before == now or not str(now).startswith("lmfast"):
            return own(self, *args, **kwargs)
        self.set_attn_implementation(before)
        try:
            manager = own(self, *args, **kwargs)
        except BaseException:
            self.set_attn_implementation(now)
            raise
        # What a manager gives back to the model when it stops.
        manager._original_attn_impl = now
        return manager

    return {"init_continuous_batching": init_continuous_batching}
