"""What must be mended in Triton's interpreter before kernels run in it."""

from __future__ import annotations

from typing import Any

import triton.runtime.interpreter as interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_loop_bounds(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes loop bounds ints by ``int(array([n]))``, which numpy 2.4 refuses."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_loop_bounds
