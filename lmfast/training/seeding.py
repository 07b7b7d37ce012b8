"""Random states: set them all from one seed, and save and restore them exactly."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, NumPy and PyTorch on all devices.

    Args:
        seed: 0 or more.
        deterministic: also refuse kernels whose result depends on scheduling, and turn off
            cuDNN's autotuner.

    Raises:
        TypeError: the seed is no int.
        ValueError: the seed is negative.

    Example:
        >>> seed_everything(7)
        >>> first = torch.rand(2)
        >>> seed_everything(7)
        >>> bool((first == torch.rand(2)).all())
        True
    """
    if not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # all CUDA devices included
    if deterministic:
        # cuBLAS needs a fixed workspace for reproducible sums and reads this at its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of all generators as tensors and JSON-ready values."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, values, next_gauss = random.getstate()
    return tensors, {
        "python": [version, list(values), next_gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }


def set_random_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Restore what `random_state` returned; states of absent devices are passed over."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    version, state, next_gauss = values["python"]
    random.setstate((version, tuple(state), next_gauss))
    name, keys, position, has_gauss, gauss = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
