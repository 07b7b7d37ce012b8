"""Fused kernels and drop-in layers for fast PyTorch language models."""

from lmfast import ops
from lmfast._dispatch import BackendError, explain, use_backend

__version__ = "0.1.0"

__all__ = ["BackendError", "explain", "ops", "use_backend"]
