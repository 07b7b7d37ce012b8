"""One operator, one contract, several implementations: the registry and the choice.

An ``Op`` is a name, a public function, a ``reference`` in plain PyTorch (also the ``torch``
backend), the ``check`` that validates and normalises arguments, and ``sample_inputs``. An
``Implementation`` is (op, backend) with a ``supports`` that returns None or the reason why not.

The choice, strongest first: the ``backend=`` argument, ``with use_backend(...)``, the variable
LMFAST_BACKEND, the op's own order for the device. A request that cannot be met raises; the
automatic choice passes over what does not fit, and ``explain`` prints why.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lmfast import _measured, _variables
from lmfast._sharding import prepare_sharding
from lmfast._transforms import transform_of

BACKENDS = ("torch", "cpu", "triton", "cuda")

# Best first. An op whose measurements say otherwise overrides this with `order=`.
DEFAULT_ORDER = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}

_ALL_OPS = "*"


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run this call."""


@dataclass(frozen=True)
class Implementation:
    """One op on one backend.

    Attributes:
        forward, backward: called with the op's normalised arguments; backward is None for an op
            without one.
        supports: normalised arguments -> None, or the reason why this backend cannot run them.
    """

    op: str
    backend: str
    devices: tuple[str, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    supports: Callable[..., str | None]


@dataclass
class Op:
    """A name, its contract and its implementations.

    Attributes:
        public: the function users call.
        reference: plain PyTorch on normalised arguments; differentiable by autograd.
        check: the public arguments without ``backend`` -> normalised positional arguments, the
            first of which is a tensor that names the device. Raises TypeError or ValueError.
        sample_inputs: (device, dtype) -> samples for tests and benchmarks.
        differentiable: the tensor arguments that get gradients.
        mutates: the tensor arguments it writes to, by name.
        peer: PyTorch's own op in the same dtype, on normalised arguments: the measure of the
            error rule. None: the reference, which is at least as exact.
        prefer: normalised arguments -> (backend, why), where sizes decide and not the order.
        order: device type -> backends, best first.
    """

    name: str
    public: Callable[..., Any]
    reference: Callable[..., Any]
    check: Callable[..., tuple[Any, ...]]
    sample_inputs: Callable[..., Any]
    differentiable: tuple[str, ...]
    mutates: tuple[str, ...] = ()
    peer: Callable[..., Any] | None = None
    prefer: Callable[..., tuple[str, str] | None] | None = None
    order: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(DEFAULT_ORDER))
    implementations: dict[str, Implementation] = field(default_factory=dict)


_ops: dict[str, Op] = {}


def register_op(op: Op, forward: Callable[..., Any] | None = None) -> Op:
    """Adds an op; its ``torch`` backend is ``forward``, by default the reference."""
    if op.name in _ops:
        raise ValueError(f"op {op.name!r} is registered twice")
    _ops[op.name] = op
    register(op.name, "torch", (), forward or op.reference, None, lambda *args: None)
    return op


def register(
    op: str,
    backend: str,
    devices: tuple[str, ...],
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None,
    supports: Callable[..., str | None],
) -> None:
    """Adds an implementation. ``devices`` empty means any."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend in _ops[op].implementations:
        raise ValueError(f"{op} has a {backend} implementation already")
    _ops[op].implementations[backend] = Implementation(
        op, backend, devices, forward, backward, supports
    )


def ops() -> dict[str, Op]:
    """The registered ops by name."""
    return dict(_ops)


def implementation(op: str, backend: str) -> Implementation:
    """The implementation of ``op`` on ``backend``; KeyError when there is none."""
    return _ops[op].implementations[backend]


def _parse(request: str) -> dict[str, str]:
    """'triton' or 'rms_norm=triton,attention=torch' -> {op or '*': backend}."""
    wanted: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in request.split(","))):
        op, _, backend = part.rpartition("=")
        op, backend = op.strip() or _ALL_OPS, backend.strip()
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r} in {request!r}")
        wanted[op] = backend
    return wanted


# What use_backend() or LMFAST_BACKEND ask for; replaced as a whole, never changed in place.
_requested: dict[str, str] = {}


def _check_ops(wanted: dict[str, str]) -> None:
    for op in wanted:
        if op != _ALL_OPS and op not in _ops:
            raise ValueError(f"no op named {op!r}; the ops are {', '.join(sorted(_ops))}")


def read_variable() -> None:
    """Follow LMFAST_BACKEND from here on, once all ops are registered.

    Raises:
        ValueError: an unknown backend or op.
    """
    global _requested
    try:
        _requested = _parse(os.environ.get("LMFAST_BACKEND", ""))
        _check_ops(_requested)
    except ValueError as error:
        _variables.refuse(f"LMFAST_BACKEND: {error}")


@contextmanager
def use_backend(request: str) -> Iterator[None]:
    """Runs every op, or the ops named, on one backend inside a ``with`` block.

    The choice holds for the whole process, like ``torch.set_num_threads``: other threads see it.
    A ``Generator`` made meanwhile runs the model's modules, unless all is asked to run on ``cpu``:
    its engine is C++.

    Args:
        request: a backend (``"torch"``) or a list (``"rms_norm=triton,rope=torch"``).

    Raises:
        TypeError: request is no str.
        ValueError: an unknown backend or op.

    Example:
        >>> import lmfast, torch
        >>> with lmfast.use_backend("torch"):
        ...     y = lmfast.ops.rms_norm(torch.ones(2, 4))
    """
    global _requested
    if not isinstance(request, str):
        raise TypeError(f"request must be a str such as 'torch' or 'rope=torch', got {request!r}")
    wanted = _parse(request)
    _check_ops(wanted)
    before = _requested
    _requested = {**before, **wanted} if _ALL_OPS not in wanted else wanted
    try:
        yield
    finally:
        _requested = before


def is_requested(op: str) -> bool:
    """Whether ``use_backend`` or LMFAST_BACKEND name a backend for ``op``."""
    return bool(_requested) and (op in _requested or _ALL_OPS in _requested)


def against_engine() -> str | None:
    """Why compiled code that stands for many operators at once must not run, or None."""
    wanted = _requested.get(_ALL_OPS)
    if wanted in (None, "cpu"):
        return None
    return f"use_backend or LMFAST_BACKEND ask for {wanted}, and the engine is C++ on the CPU"


def _reason_against(candidate: Implementation, device: str, args: tuple[Any, ...]) -> str | None:
    if candidate.devices and device not in candidate.devices:
        return f"runs on {' and '.join(candidate.devices)} tensors, not {device}"
    if candidate.backend != "torch" and (transform := transform_of(*args)):
        return f"no kernel for {transform}"
    return candidate.supports(*args)


def _preferred(op: Op, args: tuple[Any, ...]) -> tuple[str, str] | None:
    """(backend, why): what was measured on this GPU, else the op's own rule for these sizes."""
    measured = _measured.choice(op.name, args) if args[0].is_cuda else None
    if measured is not None or op.prefer is None:
        return measured
    return op.prefer(*args)


def select(op: Op, args: tuple[Any, ...], backend: str | None = None) -> Implementation:
    """The implementation that runs ``op`` on normalised ``args``.

    Raises:
        BackendError: a backend was asked for (argument, context or variable) and cannot run it.
        ValueError: ``backend`` is not a backend's name.
    """
    prepare_sharding(args[0])
    device = args[0].device.type
    if _measured.asked is not None:
        _measured.note(op.name, args)
    wanted = backend or _requested.get(op.name) or _requested.get(_ALL_OPS)
    if wanted is not None:
        return _select_requested(op, wanted, device, args)
    preferred = _preferred(op, args)
    first = () if preferred is None else preferred[:1]
    for name in (*first, *op.order.get(device, ("torch",))):
        candidate = op.implementations.get(name)
        if candidate is not None and _reason_against(candidate, device, args) is None:
            return candidate
    return op.implementations["torch"]


def _select_requested(op: Op, wanted: str, device: str, args: tuple[Any, ...]) -> Implementation:
    if wanted not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {wanted!r}")
    candidate = op.implementations.get(wanted)
    if candidate is None:
        have = ", ".join(op.implementations)
        raise BackendError(f"{op.name} has no {wanted} implementation; it has {have}")
    reason = _reason_against(candidate, device, args)
    if reason is not None:
        raise BackendError(f"{op.name} cannot run on backend {wanted!r}: {reason}")
    return candidate


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Prints, for one call, every backend of an op: chosen, possible, or why not.

    Args:
        op: the op's name, e.g. ``"rms_norm"``.
        *args, **kwargs: what the op would be called with.

    Returns:
        The name of the backend that would run the call.

    Raises:
        ValueError: no such op; TypeError or ValueError as the op itself for bad arguments.

    Example:
        >>> import lmfast, torch
        >>> lmfast.explain("rms_norm", torch.ones(2, 4), backend="torch")
        rms_norm on cpu tensors runs on: torch (asked for)
        ...
    """
    if op not in _ops:
        raise ValueError(f"no op named {op!r}; the ops are {', '.join(sorted(_ops))}")
    entry = _ops[op]
    backend = kwargs.pop("backend", None)
    try:
        inspect.signature(entry.public).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{op}: {error}") from None
    normalised = entry.check(*args, **kwargs)
    device = normalised[0].device.type
    chosen = select(entry, normalised, backend).backend
    asked = backend or _requested.get(op) or _requested.get(_ALL_OPS)
    preferred = None if asked else _preferred(entry, normalised)
    followed = preferred is not None and preferred[0] == chosen
    why = " (asked for)" if asked else f" ({preferred[1]})" if preferred and followed else ""
    lines = [f"{op} on {device} tensors runs on: {chosen}{why}"]
    for name in BACKENDS:
        candidate = entry.implementations.get(name)
        if candidate is None:
            state = "not written for this op"
        else:
            state = _reason_against(candidate, device, normalised) or (
                "chosen" if name == chosen else "possible"
            )
        lines.append(f"  {name:<7} {state}")
    print("\n".join(lines))
    return chosen
