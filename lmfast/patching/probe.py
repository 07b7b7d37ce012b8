"""Running a module and its replacement on the same small random input, and comparing.

Both are copies that share the weights and nothing else: no hooks run, no gradients, buffers or
random numbers of the model change. One-dimensional weights are disturbed in the copies, because a
fresh bias of zeros or scale of ones would hide that it was forgotten.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lmfast.patching import swap

# Of the largest number in the result. fp32 sums of a few thousand terms in another order differ by
# some 1e-6; bf16 and fp16 results that were rounded once more, by one or two units in the last
# place (2^-8, 2^-11), and gradients sum such results. A wrong epsilon, sign, pairing or base gives
# differences above 1e-2 on the inputs used.
_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}
_HOOKS = tuple(
    name for name, value in vars(nn.Module()).items() if isinstance(value, OrderedDict)
)  # fmt: skip


@dataclass
class Call:
    """Arguments of one call, and what of its result is to be compared.

    Attributes:
        args, kwargs: floating-point tensors among them that require a gradient get one.
        select: the part of the result that means something; all of it by default.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    select: Callable[[Any], Any] = lambda result: result


def bare_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a module tree without hooks, on the same weight matrices."""
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    new = module.__class__.__new__(module.__class__)
    memo[id(module)] = new
    state = dict(vars(module))
    for name in _HOOKS:
        if name in state:
            state[name] = OrderedDict()
    state["_parameters"] = {
        name: None if p is None else _weight(p, memo) for name, p in module._parameters.items()
    }
    state["_buffers"] = {
        name: None if b is None else b.detach().clone() for name, b in module._buffers.items()
    }
    state["_modules"] = {
        name: None if child is None else bare_copy(child, memo)
        for name, child in module._modules.items()
    }
    vars(new).update(state)
    if isinstance(new, nn.RNNBase):
        vars(new)["_flat_weights"] = [getattr(new, name) for name in new._flat_weights_names]
    return new


def _weight(p: Tensor, memo: dict[int, Any]) -> nn.Parameter:
    if id(p) not in memo:
        value = p.detach()
        if p.dim() == 1 and p.is_floating_point():
            size = 0.1 * float(value.float().abs().mean()) + 0.05
            value = value + size * torch.randn_like(value, dtype=torch.float32).to(p.dtype)
        memo[id(p)] = nn.Parameter(value, requires_grad=p.requires_grad)
    return memo[id(p)]


def two_copies(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Two copies without hooks on the same weights."""
    first = bare_copy(module)
    second = bare_copy(first)
    # The second copy must not be disturbed again.
    for ours, theirs in zip(second.modules(), first.modules()):
        ours._parameters = theirs._parameters
        if isinstance(ours, nn.RNNBase):
            vars(ours)["_flat_weights"] = theirs._flat_weights
    return first, second


@contextmanager
def own_randomness(module: nn.Module) -> Iterator[None]:
    """Random numbers drawn inside are the same every time and none of the program's own."""
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
        torch.manual_seed(0)
        yield


def tensors_of(value: Any) -> list[Tensor]:
    """All floating-point tensors in a nest of containers, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in tensors_of(part)]
    return []


def run(module: nn.Module, call: Call) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results and gradients (inputs first, then parameters) of one call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # the same dropout on both sides
        out = tensors_of(call.select(module.forward(*call.args, **call.kwargs)))
    if not out:
        raise TypeError("it returns no floating-point tensor")
    inputs = [t for t in tensors_of([*call.args, call.kwargs]) if t.requires_grad]
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    used = [t for t in out if t.requires_grad]
    if not used or not wanted:
        return [t.detach() for t in out], []
    generator = torch.Generator().manual_seed(2)
    weights = [
        torch.randn(t.shape, generator=generator).to(t.device, t.dtype) / math.sqrt(t.numel() or 1)
        for t in used
    ]
    grads = torch.autograd.grad(used, wanted, weights, allow_unused=True)
    return [t.detach() for t in out], list(grads)


def difference(expected: Sequence[Tensor | None], got: Sequence[Tensor | None]) -> str | None:
    """Where two lists of tensors differ by more than rounding, or None."""
    if len(expected) != len(got):
        return f"{len(got)} tensors in the place of {len(expected)}"
    for a, b in zip(expected, got):
        if a is None or b is None:
            other = b if a is None else a
            if other is not None and bool(other.any()):
                return "a gradient is missing"
            continue
        if a.shape != b.shape:
            return f"shape {tuple(b.shape)} in the place of {tuple(a.shape)}"
        if a.dtype != b.dtype:
            return f"dtype {b.dtype} in the place of {a.dtype}"
        if a.numel() == 0:
            continue
        x, y = a.double(), b.double()
        if not torch.isfinite(x).all() or not torch.isfinite(y).all():
            return "numbers that are not finite"
        off, largest = float((x - y).abs().max()), float(x.abs().max())
        if off > _TOLERANCE.get(a.dtype, 0.0) * largest:
            return f"off by {off / max(largest, 1e-300):.1e} of the largest value"
    return None


def compare(original: nn.Module, candidate: nn.Module, calls: Sequence[Call]) -> str | None:
    """Why the candidate is not the same function as the original, or None if it is.

    Both are copies; they are run in training and evaluation mode, forwards and backwards.
    """
    for training in (True, False):
        original.train(training)
        candidate.train(training)
        mode = "training" if training else "evaluation"
        for call in calls:
            try:
                values, grads = run(original, call)
            except Exception as error:
                return f"it could not be run by itself: {_short(error)}"
            try:
                new_values, new_grads = run(candidate, call)
            except Exception as error:
                return f"the replacement fails: {_short(error)}"
            found = difference(values, new_values)
            if found is not None:
                return f"other values in {mode}: {found}"
            found = difference(grads, new_grads)
            if found is not None:
                return f"other gradients in {mode}: {found}"
    return None


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}"


def verify(
    module: nn.Module, name: str, options: swap.Options, calls: Callable[[], list[Call]]
) -> str | None:
    """Why a recipe may not replace a module's forward, or None if it may."""
    with own_randomness(module):
        try:
            original, candidate = two_copies(module)
            swap.apply(candidate, name, options)
            made = calls()
        except Exception as error:
            return f"it could not be checked: {_short(error)}"
        reason = compare(original, candidate, made)
        low = {p.dtype for p in module.parameters()} & {torch.bfloat16, torch.float16}
        if reason is None and low:
            # Rounded results hide small differences: once more in fp32.
            original, candidate = original.float(), candidate.float()
            reason = compare(original, candidate, [_in_float32(call) for call in made])
        if reason is None and not all(map(torch.equal, original.buffers(), candidate.buffers())):
            return "it changes its buffers otherwise"
        return reason


def _in_float32(call: Call) -> Call:
    def convert(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().float().requires_grad_(value.requires_grad)
        if isinstance(value, PackedSequence):
            return value._replace(data=convert(value.data))
        if isinstance(value, tuple):
            return tuple(convert(part) for part in value)
        if isinstance(value, list):
            return [convert(part) for part in value]
        if isinstance(value, dict):
            return {key: convert(part) for key, part in value.items()}
        return value

    return Call(convert(call.args), convert(call.kwargs), call.select)


def random_input(module: nn.Module, *shape: int) -> Tensor:
    """A normal tensor on a module's device in its dtype, requiring a gradient."""
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    x = torch.randn(shape)
    if like is not None:
        x = x.to(like.device, like.dtype)
    return x.requires_grad_()
