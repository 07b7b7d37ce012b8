"""Bridges to other libraries; each module imports its library only when it is itself imported."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lmfast.patching.libraries import LIBRARIES, Library


def _has_transformers_model(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return False
    return any(isinstance(m, transformers.PreTrainedModel) for m in model.modules())


def _for_transformers() -> Any:
    from lmfast.integrations import transformers

    return transformers


LIBRARIES.append(Library(_has_transformers_model, _for_transformers))
