"""Fused kernels and drop-in layers for fast PyTorch language models."""

# Those that are not in __all__ register what they have with the others.
from lmfast import integrations, models, nn, ops, training, triton  # noqa: F401
from lmfast._allocator import tune_allocator
from lmfast._dispatch import BackendError, explain, use_backend
from lmfast._info import info
from lmfast._version import __version__ as __version__
from lmfast.generation import Generator, KVCache, QuantisedWeights, generate, quantise
from lmfast.patching import PatchReport, patch, unpatch
from lmfast.tokenizer import BPETokenizer

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
