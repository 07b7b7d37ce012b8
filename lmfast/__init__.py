"""Fused kernels and drop-in layers for fast PyTorch language models."""

from lmfast import ops
from lmfast._allocator import tune_allocator
from lmfast._dispatch import BackendError, explain, use_backend
from lmfast._info import info

__version__ = "0.1.0"

__all__ = ["BackendError", "explain", "info", "ops", "tune_allocator", "use_backend"]
