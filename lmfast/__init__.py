"""Fused kernels and drop-in layers for fast PyTorch language models."""

__version__ = "0.1.0"
