"""What linear_cross_entropy and its relatives accept: checks, and samples of arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lmfast.ops._library import (
    check_same_device,
    check_tensor,
    is_autocast,
    is_readable,
    with_unit_last_stride,
)
from lmfast.ops._precision import bf16_products_allowed
from lmfast.testing import Sample

REDUCTIONS = ("none", "mean", "sum")  # in the order of torch's own enumeration


def check_loss_settings(
    targets: object, ignore_index: object, reduction: object, label_smoothing: float, z_loss: float
) -> None:
    """The checks that the operators with a cross-entropy share."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a torch.Tensor, got {type(targets).__name__}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must have dtype torch.int64, got {targets.dtype}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")


def check_target_range(targets: Tensor, classes: int, ignore_index: int) -> None:
    """ValueError for a target outside the vocabulary, where targets can be read."""
    if targets.numel() == 0 or not is_readable(targets):
        return
    bad = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
    if bad.any():
        raise ValueError(
            f"targets must be in [0, {classes}) or ignore_index {ignore_index}, "
            f"got {targets[bad][0].item()}"
        )


def check_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Any, ...]:
    check_tensor("hidden", hidden)
    check_tensor("weight", weight)
    check_loss_settings(targets, ignore_index, reduction, label_smoothing, z_loss)
    if hidden.dim() == 0:
        raise ValueError("hidden must have at least one dimension, got a scalar tensor")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape (V, {hidden.shape[-1]}), the last dimension that of hidden, "
            f"got {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one row, got none")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have hidden's leading dimensions {tuple(hidden.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    check_same_device("weight", weight, "hidden", hidden)
    check_same_device("targets", targets, "hidden", hidden)
    if bias is not None:
        check_tensor("bias", bias)
        check_same_device("bias", bias, "hidden", hidden)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias must have shape ({weight.shape[0]},), one value per row of weight, "
                f"got {tuple(bias.shape)}"
            )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    check_target_range(targets, weight.shape[0], ignore_index)
    hidden = with_unit_last_stride(hidden)
    if weight.stride(0) != 1:
        weight = with_unit_last_stride(weight)
    device = hidden.device.type
    bf16 = False
    if torch.float64 not in (hidden.dtype, weight.dtype):
        if is_autocast(hidden):
            lower = torch.get_autocast_dtype(device)
            if lower == torch.bfloat16:
                bf16 = True
            else:
                hidden, weight = hidden.to(lower), weight.to(lower)
        elif device == "cpu":
            bf16 = bf16_products_allowed()
    return (
        hidden,
        weight,
        targets,
        bias,
        ignore_index,
        reduction,
        float(label_smoothing),
        float(z_loss),
        float(softcap or 0.0),
        bf16,
    )


def with_shape(t: Tensor, shape: torch.Size) -> Tensor:
    """A contiguous tensor under another shape that autograd does not know as a view: views that
    leave a ``torch.autograd.Function`` must not be changed in place."""
    return torch.ops.aten._unsafe_view.default(t, shape)


def linear_cross_entropy_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def ids(classes: int, *shape: int) -> Tensor:
        return torch.randint(classes, shape, generator=generator, device=device)

    # One, primes, a vector more or less, sizes around the kernels' blocks.
    for n, e, v in ((1, 1, 1), (3, 7, 5), (7, 33, 17), (67, 16, 131), (130, 40, 257), (5, 131, 67)):
        yield Sample(f"{n}x{e}x{v}", (normal(n, e), normal(v, e) / e**0.5, ids(v, n)))
    some = ids(19, 2, 9)
    some[:, 5:] = -100
    yield Sample("ignored", (normal(2, 9, 8), normal(19, 8), some))
    yield Sample(
        "all ignored",
        (normal(3, 8), normal(19, 8), torch.full((3,), 4, device=device)),
        {"ignore_index": 4},
    )
    yield Sample("no rows", (normal(0, 8), normal(19, 8), ids(19, 0)))
    yield Sample("bias", (normal(9, 8), normal(19, 8), ids(19, 9)), {"bias": normal(19)})
    yield Sample("transposed weight", (normal(9, 24), normal(24, 35).t(), ids(35, 9)))
    yield Sample(
        "strided", (normal(9, 2, 12)[:, :, 1:9].transpose(0, 1), normal(38, 8)[::2], ids(19, 2, 9))
    )
    yield Sample("sum", (normal(9, 8), normal(19, 8), ids(19, 9)), {"reduction": "sum"})
    yield Sample("none", (normal(2, 9, 8), normal(19, 8), some), {"reduction": "none"})
    yield Sample(
        "smoothing",
        (normal(9, 8), normal(19, 8), ids(19, 9)),
        {"label_smoothing": 0.1, "bias": normal(19)},
    )
    yield Sample("z-loss", (normal(9, 8), normal(19, 8), ids(19, 9)), {"z_loss": 0.01})
    yield Sample(
        "softcap", (normal(9, 8), normal(19, 8), ids(19, 9)), {"softcap": 3.0, "bias": normal(19)}
    )
    yield Sample("large logits", (normal(9, 8) * 40, normal(19, 8) * 40, ids(19, 9)))
