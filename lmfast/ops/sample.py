"""Drawing the next token: penalties, temperature, top-k, top-p, min-p, typical, in this order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from lmfast._dispatch import Op, register, register_op, select
from lmfast.ops._library import (
    accumulation_dtype,
    check_range,
    check_same_device,
    check_tensor,
    define,
    is_readable,
    unsupported_by_cpu_kernels,
    with_unit_last_stride,
)
from lmfast.ops._sample_reference import SETTINGS, reference
from lmfast.testing import Sample

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OFF = {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0}


class Options(TypedDict, total=False):
    """The keywords of `sample` that do not change what it returns, for type checkers."""

    temperature: float | Tensor
    top_k: int | Tensor
    top_p: float | Tensor
    min_p: float | Tensor
    typical_p: float | Tensor
    frequency_penalty: float | Tensor
    presence_penalty: float | Tensor
    repetition_penalty: float | Tensor
    counts: Tensor | None
    prompt_mask: Tensor | None
    logit_bias: Tensor | None
    suppress: Sequence[int] | Tensor | None
    generator: torch.Generator | None
    uniform: Tensor | None
    backend: str | None


@overload
def sample(
    logits: Tensor, *, return_log_probs: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...


@overload
def sample(
    logits: Tensor, *, return_log_probs: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...


@overload
def sample(
    logits: Tensor, *, return_log_probs: bool, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, Tensor]: ...


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    typical_p: float | Tensor = 1.0,
    frequency_penalty: float | Tensor = 0.0,
    presence_penalty: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    counts: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    logit_bias: Tensor | None = None,
    suppress: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    return_log_probs: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draws one token per row.

    Bias, penalties, then ``softmax(logits / temperature)``, top-k, top-p, min-p, typical, each over
    what the one before left, and the draw: the first id, in order of ids, at which the cumulated
    probability passes a uniform number in [0, 1).

    Args:
        logits: (B, V), float32, bfloat16, float16 or float64; -inf = impossible.
        temperature: above 0. Below 1 sharpens, above 1 flattens. For the likeliest token take
            ``top_k=1``; 0 is not accepted as a name for it.
        top_k: keep the k likeliest, ties by lower id; 0 = all, and so does k >= V.
        top_p: in (0, 1]; keep the smallest number of likeliest tokens that together reach p.
        min_p: in [0, 1]; keep tokens at least min_p times as likely as the likeliest.
        typical_p: in (0, 1]; keep the smallest number of tokens that together reach this
            probability, those first whose ``-log p`` is nearest to the entropy.
        frequency_penalty, presence_penalty: subtracted from the logit of a token for every time,
            and once if, ``counts`` has it.
        repetition_penalty: divides positive and multiplies negative logits of tokens in ``counts``
            or ``prompt_mask``.
        counts: (B, V) integers, occurrences so far; without them two penalties do nothing.
        prompt_mask: (B, V) bool, tokens of the prompt, for ``repetition_penalty`` alone.
        logit_bias: (V,) or (B, V), added to the logits first.
        suppress: ids that are never drawn.
        generator: source of randomness, PyTorch's default one if None.
        uniform: (B,) float64 in [0, 1), the random numbers themselves, in the generator's place.
        return_log_probs: also return how likely the drawn tokens were.
        backend: overrides the choice of implementation, see ``lmfast.use_backend``.
        The eight numbers may be (B,) tensors, one value per row.

    Returns:
        ids (B,) int64; with ``return_log_probs`` also the logarithms (B,) of their probabilities
        in the distribution they were drawn from, float32 (float64 for float64 logits).

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a number out of range, shapes that do not fit.
        RuntimeError: on a CPU, a row with NaN or inf, or in which no token is left.
        BackendError: the backend asked for cannot run this call.

    Backends:
        cpu (C++), triton (not for float64), torch. For inference only.

    Source:
        Holtzman et al. 2019 (top-p), arXiv:1904.09751; Keskar et al. 2019 (repetition),
        arXiv:1909.05858; Meister et al. 2022 (typical), arXiv:2202.00666; Nguyen et al. 2024
        (min-p), arXiv:2407.01082.

    Example:
        >>> import lmfast, torch
        >>> lmfast.ops.sample(torch.tensor([[0.0, 9.0, 0.0]]), top_k=1)
        tensor([1])
    """
    args = _check(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        repetition_penalty=repetition_penalty,
        counts=counts,
        prompt_mask=prompt_mask,
        logit_bias=logit_bias,
        suppress=suppress,
        generator=generator,
        uniform=uniform,
        return_log_probs=return_log_probs,
    )
    if uniform is None:
        args = (args[0], uniform_numbers(logits, generator), *args[2:])
    ids, log_probs = select(OP, args, backend).forward(*args)
    return (ids, log_probs) if return_log_probs else ids


def uniform_numbers(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One number per row; of 53 bits, as 24 would miss the unlikeliest of 50 k tokens."""
    return torch.rand(
        logits.shape[0], dtype=torch.float64, device=logits.device, generator=generator
    )


def check_settings(batch: int, **values: float | Tensor) -> Tensor:
    """The numbers of `sample` as settings (1 or B, 8) float64; ValueError for impossible ones.

    Tensors are checked only in host memory: reading them on a GPU would wait for the device.
    """
    columns: list[float | Tensor] = []
    device = None
    for name in SETTINGS:
        value = values.get(name, _OFF.get(name, 0.0))
        valid, wanted = _RANGES[name]
        if isinstance(value, Tensor):
            if value.shape != (batch,):
                raise ValueError(
                    f"{name} must be a number or have shape ({batch},), got {tuple(value.shape)}"
                )
            if is_readable(value) and not bool(valid(value).all()):
                raise ValueError(f"{name} must be {wanted}, got {value.tolist()}")
            device = value.device
        elif not _is_valid(name, value):
            raise ValueError(f"{name} must be {wanted}, got {value}")
        columns.append(value)
    if device is None:
        return torch.tensor([columns], dtype=torch.float64)
    return torch.stack(
        [
            c.double()
            if isinstance(c, Tensor)
            else torch.full((batch,), c, dtype=torch.float64, device=device)
            for c in columns
        ],
        dim=1,
    )


def _is_valid(name: str, value: Any) -> bool:
    try:
        return bool(_RANGES[name][0](value))
    except TypeError:
        raise TypeError(f"{name} must be a number or a tensor of them, got {value!r}") from None


_Range = tuple[Callable[[Any], Any], str]
_PROBABILITY: _Range = (lambda p: (p > 0) & (p <= 1), "in (0, 1]")
_ANY: _Range = (lambda x: (x > -float("inf")) & (x < float("inf")), "finite")
_RANGES: dict[str, _Range] = {
    "temperature": (
        lambda t: (t > 0) & (t < float("inf")),
        "above 0 and finite (top_k=1 is the limit at 0)",
    ),
    "top_k": (lambda k: (k >= 0) & (k % 1 == 0), "0 (off) or a whole number above"),
    "top_p": _PROBABILITY,
    "min_p": (lambda p: (p >= 0) & (p <= 1), "in [0, 1]"),
    "typical_p": _PROBABILITY,
    "frequency_penalty": _ANY,
    "presence_penalty": _ANY,
    "repetition_penalty": (
        lambda r: (r > 0) & (r < float("inf")),
        "above 0 and finite (1 is off)",
    ),
}


def _check(
    logits: Tensor,
    *,
    counts: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    logit_bias: Tensor | None = None,
    suppress: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    return_log_probs: bool = False,
    **numbers: float | Tensor,
) -> tuple[Any, ...]:
    check_tensor("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (B, V) with V >= 1, got {tuple(logits.shape)}")
    batch, vocabulary = logits.shape
    settings = check_settings(batch, **numbers)
    for name, value, shapes in (
        ("counts", counts, (logits.shape,)),
        ("prompt_mask", prompt_mask, (logits.shape,)),
        ("logit_bias", logit_bias, (logits.shape, logits.shape[1:])),
        ("uniform", uniform, (logits.shape[:1],)),
    ):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.shape not in shapes:
            raise ValueError(
                f"{name} must have the shape of logits {' or '.join(map(str, map(tuple, shapes)))},"
                f" got {tuple(value.shape)}"
            )
        check_same_device(name, value, "logits", logits)
    if suppress is not None:
        suppress = torch.as_tensor(suppress, dtype=torch.int64, device=logits.device)
        if suppress.ndim != 1:
            raise ValueError(f"suppress must be one list of ids, got {tuple(suppress.shape)}")
        check_range("suppress", suppress, vocabulary)
    if uniform is not None and is_readable(uniform):
        if not bool(((uniform >= 0) & (uniform < 1)).all()):
            raise ValueError(f"uniform must be in [0, 1), got {uniform.tolist()}")
    return (
        with_unit_last_stride(logits),
        None if uniform is None else uniform.double(),
        settings,
        None if counts is None else counts.to(torch.int32).contiguous(),
        None if prompt_mask is None else prompt_mask.bool().contiguous(),
        None
        if logit_bias is None
        else with_unit_last_stride(logit_bias.to(accumulation_dtype(logits.dtype))),
        suppress,
        return_log_probs,
    )


def _fake(
    logits: Tensor,
    uniform: Tensor,
    settings: Tensor,
    counts: Tensor | None,
    prompt_mask: Tensor | None,
    bias: Tensor | None,
    suppress: Tensor | None,
    want_log_probs: bool,
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    dtype = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty((rows,), dtype=torch.int64),
        logits.new_empty((rows,) if want_log_probs else (0,), dtype=dtype),
    )


sample_op = define(
    "sample(Tensor logits, Tensor uniform, Tensor settings, Tensor? counts, Tensor? prompt_mask, "
    "Tensor? bias, Tensor? suppress, bool want_log_probs) -> (Tensor, Tensor)",
    _fake,
)


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    random = torch.Generator(device).manual_seed(0)

    def call(name: str, rows: int, size: int, scale: float = 3.0, **options: Any) -> Sample:
        logits = torch.randn(rows, size, generator=random, device=device) * scale
        uniform = torch.rand(rows, generator=random, device=device, dtype=torch.float64)
        return Sample(name, (logits.to(dtype),), {"uniform": uniform, **options})

    def rows(*values: float) -> Tensor:
        return torch.tensor(values, device=device, dtype=torch.float64)

    counts = torch.randint(0, 3, (5, 301), generator=random, device=device)
    mask = torch.rand(5, 301, generator=random, device=device) < 0.1
    bias = torch.randn(301, generator=random, device=device)
    for size in (1, 2, 7, 31, 513, 4099):
        yield call(f"plain {size}", 3, size)
    yield call("no rows", 0, 5)
    for size in (3, 130, 2053):
        yield call(f"top-k {size}", 4, size, top_k=min(size, 40))
        yield call(f"top-p {size}", 4, size, top_p=0.9)
    yield call("top-k more than all", 2, 9, top_k=20)
    yield call("flat top-p", 4, 4099, 0.01, top_p=0.75)
    yield call("greedy", 5, 301, top_k=1)
    yield call("min-p", 5, 301, min_p=0.05)
    yield call("typical", 5, 301, typical_p=0.7)
    yield call("all filters", 5, 301, temperature=0.7, top_k=60, top_p=0.9, min_p=0.01,
               typical_p=0.9)  # fmt: skip
    yield call("penalties", 5, 301, counts=counts, prompt_mask=mask, frequency_penalty=0.3,
               presence_penalty=0.4, repetition_penalty=1.3, top_p=0.8)  # fmt: skip
    yield call("bias", 5, 301, logit_bias=bias, suppress=[0, 7, 300], return_log_probs=True)
    yield call("bias per row", 5, 301, logit_bias=bias * rows(0, 1, 2, -1, 1)[:, None].to(dtype))
    yield call("settings per row", 5, 301, temperature=rows(0.5, 1, 2, 1, 0.9),
               top_k=rows(0, 1, 7, 50, 299), top_p=rows(0.9, 1, 0.3, 0.99, 1),
               min_p=rows(0, 0, 0.1, 0.001, 0), typical_p=rows(1, 1, 1, 0.5, 0.9),
               repetition_penalty=rows(1, 2, 0.7, 1, 1.1), counts=counts)  # fmt: skip
    uniform = torch.rand(4, generator=random, device=device, dtype=torch.float64)
    ties = torch.randint(-2, 3, (4, 2000), generator=random, device=device).to(dtype)
    yield Sample("ties top-k", (ties,), {"uniform": uniform, "top_k": 613})
    yield Sample("ties top-p", (ties,), {"uniform": uniform, "top_p": 0.4})
    yield Sample("ties typical", (ties,), {"uniform": uniform, "typical_p": 0.4})
    hidden = torch.where(ties > 0, float("-inf"), ties)
    yield Sample("impossible", (hidden,), {"uniform": uniform, "top_k": 1500, "top_p": 0.99})
    wide = torch.randn(4, 2000, generator=random, device=device).to(dtype)
    strided = {"uniform": uniform, "top_k": 50, "return_log_probs": True}
    yield Sample("strided", (wide[:, 3:1502],), strided)


def _plain(*args: Any) -> Any:
    ids, log_probs = reference(*args)
    return (ids, log_probs) if args[-1] else ids


OP = register_op(
    Op(
        name="sample",
        public=sample,
        reference=reference,
        check=_check,
        sample_inputs=_samples,
        differentiable=(),
        peer=_plain,
    )
)

register(
    "sample",
    "cpu",
    ("cpu",),
    sample_op,
    None,
    lambda logits, *rest: unsupported_by_cpu_kernels(logits),
)
