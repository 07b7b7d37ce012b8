"""Making existing models faster in place: `lmfast.patch`, `lmfast.unpatch`."""

from lmfast.patching.model import patch, unpatch
from lmfast.patching.report import PatchReport

__all__ = ["PatchReport", "patch", "unpatch"]
