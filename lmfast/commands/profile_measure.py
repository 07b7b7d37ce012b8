"""What `lmfast profile` measures besides the run: ceilings, launches, and the time of layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lmfast.nn.elman import ElmanUnit

_REPEATS = 5
# Persistent kernels start cooperatively, Triton's by the driver's functions.
_LAUNCHES = (
    *("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cudaGraphLaunch"),
    *("cuLaunchKernel", "cuLaunchCooperativeKernel"),
)


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at most, measured here.

    Attributes:
        bytes_per_second: read and written together, of a copy too large for the caches.
        flops_per_second: of a square product in the model's dtype.
    """

    bytes_per_second: float
    flops_per_second: float


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def measured_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Times a copy and a matrix product, each the best of five."""
    on_gpu = device.type == "cuda"
    source = torch.zeros(2**30 if on_gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 1536
    a = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    copy = min(seconds_of(lambda: target.copy_(source), device) for _ in range(_REPEATS))
    multiply = min(seconds_of(lambda: torch.mm(a, a, out=product), device) for _ in range(_REPEATS))
    return Ceilings(2 * source.numel() / copy, 2 * size**3 / multiply)


def launches(events: Any) -> tuple[int, int]:
    """(operators called, kernels started on a GPU) among a profiler's events."""
    operators = kernels = 0
    for event in events:
        if event.name.startswith(_LAUNCHES):
            kernels += 1
        elif event.cpu_parent is None and "::" in event.name:
            operators += 1
    return operators, kernels


@contextmanager
def around_layers(
    module: nn.Module, depth: int, before: Callable[[str], None], after: Callable[[str], None]
) -> Iterator[None]:
    """Calls both with the name of every module down to a depth, around its forward."""
    hooks = []
    for name, layer in module.named_modules():
        # Watched units of an Elman network are called step by step, another run than is measured.
        if name and name.count(".") < depth and not isinstance(layer, ElmanUnit):
            hooks += [
                layer.register_forward_pre_hook(lambda *_, name=name: before(name)),
                layer.register_forward_hook(lambda *_, name=name: after(name)),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class LayerTimes:
    """Forward times of a model's layers, by hooks on its modules.

    A layer is a module down to the given depth that is called; what is inside deeper ones counts
    for the one above.
    """

    def __init__(self, depth: int, device: torch.device) -> None:
        self._depth, self._device = depth, device
        self._seconds: dict[str, list[float]] = {}
        self._started: list[float] = []  # of the layers that are running, the inner one last

    def recording(self, module: nn.Module) -> AbstractContextManager[None]:
        """Times every call inside the block."""
        return around_layers(module, self._depth, self._begin, self._end)

    def _begin(self, name: str) -> None:
        self._seconds.setdefault(name, [])  # a layer comes before what is inside it
        synchronize(self._device)
        self._started.append(time.perf_counter())

    def _end(self, name: str) -> None:
        synchronize(self._device)
        self._seconds[name].append(time.perf_counter() - self._started.pop())

    def rows(self) -> list[tuple[str, int, float]]:
        """(layer, calls, median seconds of a call) in the order of the first calls."""
        return [(n, len(s), statistics.median(s)) for n, s in self._seconds.items()]
