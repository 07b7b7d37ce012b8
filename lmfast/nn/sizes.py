"""Sizes that no layer can have, told by name."""

from __future__ import annotations


def check_ints(**values: object) -> None:
    """Raise TypeError, which names it, for a value that is no int."""
    for name, value in values.items():
        if not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an int, got {value!r}")


def check_sizes(**sizes: int) -> None:
    """Raise TypeError for a size that is no int, ValueError for one below 1."""
    check_ints(**sizes)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
