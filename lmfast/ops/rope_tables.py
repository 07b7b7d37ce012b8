"""Cosine and sine tables for rotary position embeddings, with the usual context extensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def rope_tables(
    length: int,
    dim: int,
    base: float = 10000.0,
    *,
    scaling: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The angles ``position * base^(-2p / dim)``, as cosines and sines.

    Computed in float64 and rounded once, so that late positions keep their phase.

    Args:
        length: number of positions, from 0.
        dim: how many dimensions of a head are rotated; even. Smaller than the head size for
            partial rotary embeddings.
        base: of the geometric series of frequencies.
        scaling: None, or a mapping with ``rope_type`` and its settings, by the names
            transformers' configurations use:
            ``linear``: factor. ``dynamic`` (NTK-aware): factor,
            original_max_position_embeddings; the base grows with ``length``.
            ``yarn``: factor, original_max_position_embeddings, optional beta_fast (32),
            beta_slow (1), attention_factor, mscale, mscale_all_dim, truncate (True).
            ``llama3``: factor, low_freq_factor, high_freq_factor,
            original_max_position_embeddings.
        device: where the tables are made.

    Returns:
        (cos, sin), each (length, dim / 2) float32.

    Raises:
        TypeError: length is no integer.
        ValueError: odd or non-positive dim, negative length, unknown or incomplete scaling.

    Source:
        Su et al. 2021, arXiv:2104.09864; Peng et al. 2023 (YaRN), arXiv:2309.00071; Llama 3.1.

    Example:
        >>> import lmfast
        >>> cos, sin = lmfast.ops.rope_tables(4, 8)
        >>> cos.shape
        torch.Size([4, 4])
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"dim must be a positive even number, got {dim}")
    if not hasattr(length, "__index__"):
        raise TypeError(f"length must be an int, got {length!r}")
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    if base <= 0:
        raise ValueError(f"base must be positive, got {base}")
    kind, settings = _check_scaling(scaling)
    pairs = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
    magnitude = 1.0
    if kind == "dynamic":
        base = _dynamic_base(length, dim, base, settings)
    frequencies = base ** (-pairs / dim)
    if kind == "linear":
        frequencies = frequencies / settings["factor"]
    elif kind == "yarn":
        frequencies, magnitude = _yarn(frequencies, dim, base, settings)
    elif kind == "llama3":
        frequencies = _llama3(frequencies, settings)
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = positions[:, None] * frequencies  # [L, dim / 2]
    return (angles.cos() * magnitude).float(), (angles.sin() * magnitude).float()


def _check_scaling(scaling: Mapping[str, Any] | None) -> tuple[str, Mapping[str, Any]]:
    if scaling is None:
        return "default", {}
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling must be a mapping with rope_type, or None, got {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in _REQUIRED:
        raise ValueError(f"scaling['rope_type'] must be one of {sorted(_REQUIRED)}, got {kind!r}")
    missing = [key for key in _REQUIRED[kind] if scaling.get(key) is None]
    if missing:
        raise ValueError(f"scaling of type {kind!r} needs {', '.join(missing)}")
    for key in _REQUIRED[kind]:
        if scaling[key] <= 0:
            raise ValueError(f"scaling[{key!r}] must be positive, got {scaling[key]}")
    if kind != "default" and scaling["factor"] < 1:
        raise ValueError(f"scaling['factor'] must be at least 1, got {scaling['factor']}")
    return kind, scaling


def _dynamic_base(length: int, dim: int, base: float, s: Mapping[str, Any]) -> float:
    trained = s["original_max_position_embeddings"]
    if dim <= 2:
        return base
    stretch = s["factor"] * max(length, trained) / trained - (s["factor"] - 1)
    return base * stretch ** (dim / (dim - 2))


def _yarn(frequencies: Tensor, dim: int, base: float, s: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Fast pairs as they are, slow ones divided by the factor, a ramp between (paper, 3.2)."""
    factor, trained = s["factor"], s["original_max_position_embeddings"]

    def pair_with(rotations: float) -> float:
        turns = trained / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(base))

    low, high = pair_with(s.get("beta_fast") or 32), pair_with(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float64, device=frequencies.device)
    slow = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    blended = frequencies / factor * slow + frequencies * (1 - slow)
    return blended, _yarn_magnitude(factor, s)


def _yarn_magnitude(factor: float, s: Mapping[str, Any]) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if s.get("attention_factor") is not None:
        return float(s["attention_factor"])
    if s.get("mscale") and s.get("mscale_all_dim"):
        return grown(s["mscale"]) / grown(s["mscale_all_dim"])
    return grown(1.0)


def _llama3(frequencies: Tensor, s: Mapping[str, Any]) -> Tensor:
    factor, trained = s["factor"], s["original_max_position_embeddings"]
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    if high <= low:
        raise ValueError(f"scaling['high_freq_factor'] must exceed low_freq_factor, got {high}")
    turns = trained * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor)
