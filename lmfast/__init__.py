"""Fused kernels and drop-in layers for fast PyTorch language models."""

from lmfast import models, nn, ops, training
from lmfast._allocator import tune_allocator
from lmfast._dispatch import BackendError, explain, use_backend
from lmfast._info import info
from lmfast.generation import Generator, KVCache, QuantisedWeights, generate, quantise
from lmfast.patching import PatchReport, patch, unpatch
from lmfast.tokenizer import BPETokenizer

__version__ = "0.1.0"

__all__ = [
    "BPETokenizer",
    "BackendError",
    "Generator",
    "KVCache",
    "PatchReport",
    "QuantisedWeights",
    "explain",
    "generate",
    "info",
    "models",
    "nn",
    "ops",
    "patch",
    "quantise",
    "training",
    "tune_allocator",
    "unpatch",
    "use_backend",
]
