"""What tests and benchmarks share: samples of an op's arguments, and the error rule.

The rule, for every implementation: its error against fp64 is at most 1.5 times the error of plain
PyTorch in the same dtype, plus one unit in the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

# fp64 is compared with a reference that is fp64 itself: both differ from the exact value by a few
# roundings, so the rule has no exact side and a fixed multiple of eps takes its place.
FP64_TOLERANCE = 64 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Sample:
    """One call of an op: ``public(*args, **kwargs)``, under a name for test ids."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> Sample:
        """The sample with ``function`` applied to every tensor, also inside tuples."""
        args, kwargs = tree_map_only(Tensor, function, (self.args, self.kwargs))
        return Sample(self.name, args, kwargs)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor argument, also inside tuples."""
        return (t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor))

    def to_fp64(self) -> Sample:
        """The same values with every floating-point tensor in float64."""
        return self.map(lambda t: t.detach().double() if t.is_floating_point() else t)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of ``exact``; 0 for empty tensors."""
    if exact.numel() == 0:
        return 0.0
    exact = exact.double()
    scale = exact.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return ((value.double() - exact).norm() / scale).item()


def unit_in_last_place(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of ``dtype`` at each value of ``exact``."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(exact.double().abs().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps


def assert_within_error_rule(
    value: Tensor,
    plain: Tensor,
    exact: Tensor,
    what: str = "",
    largest: float = 1.5,
    whole: float = 1.5,
) -> None:
    """Asserts the error rule, for the largest error and for the whole tensor.

    Args:
        value: the implementation's result.
        plain: PyTorch's own result in the same dtype.
        exact: the result in float64.
        what: said in the message.
        largest: times PyTorch's largest error that the largest error may be.
        whole: times PyTorch's relative error that the whole tensor's may be. More than 1.5 in
            either is an exception to the rule.

    Raises:
        AssertionError: another shape or dtype than ``plain``, other NaN or infinite elements, or
            a larger error than the rule allows.
    """
    assert value.shape == plain.shape, f"{what}: shape {value.shape} != {plain.shape}"
    assert value.dtype == plain.dtype, f"{what}: dtype {value.dtype} != {plain.dtype}"
    dtype = value.dtype
    if not dtype.is_floating_point:  # a choice is right or wrong
        assert torch.equal(value, exact), f"{what}: {value.tolist()} != {exact.tolist()}"
        return
    finite = plain.isfinite() & exact.isfinite()
    torch.testing.assert_close(
        value[~finite], plain[~finite], rtol=0, atol=0, equal_nan=True, msg=f"{what}: NaN or inf"
    )
    value, plain, exact = value[finite].double(), plain[finite].double(), exact[finite].double()
    if exact.numel() == 0:
        return
    if dtype == torch.float64:
        scale = exact.abs().max().clamp_min(1.0)
        assert (value - exact).abs().max() <= FP64_TOLERANCE * scale, f"{what}: fp64 differs"
        return
    error, plain_error = (value - exact).abs(), (plain - exact).abs()
    # Largest error against largest error, so the unit is that of the largest element: sums of
    # larger terms round as those do.
    allowed = largest * plain_error.max() + unit_in_last_place(exact.abs().max(), dtype)
    assert error.max() <= allowed, (
        f"{what}: error {error.max():.3e}, PyTorch's {plain_error.max():.3e}"
    )
    # Over the whole tensor a unit in the last place of a narrow dtype would hide a systematic
    # loss; one of fp32, in which all of them accumulate, is what remains of it.
    relative, plain_relative = relative_error(value, exact), relative_error(plain, exact)
    assert relative <= whole * plain_relative + torch.finfo(torch.float32).eps, (
        f"{what}: relative error {relative:.3e}, PyTorch's {plain_relative:.3e}"
    )
