"""From (B, T, D) batches to the rows of one recurrent layer and back; argument checks; samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lmfast._dispatch import Op, register, register_op, select
from lmfast.ops._library import KERNEL_DTYPES, check_same_device, check_tensor
from lmfast.ops._recurrent import (
    backward_op,
    cpu_layer,
    is_one_step,
    one_step,
    unsupported_by_recurrent_kernels,
)
from lmfast.ops._recurrent_bf16 import runs_in_bf16
from lmfast.ops._recurrent_cudnn import cudnn_layer, unsupported_by_cudnn
from lmfast.ops._recurrent_gpu import persistent_layer, unsupported_by_persistent_kernels
from lmfast.ops._recurrent_lengths import Run, are_hidden, named_run, over_lengths
from lmfast.ops._recurrent_reference import GATES, Layer, Loop, reference_layer
from lmfast.ops._recurrent_stack import cpu_stack, runs_as_wavefront
from lmfast.testing import Sample

named_run("reference", reference_layer)
named_run("cpu", cpu_layer)
named_run("cudnn", cudnn_layer)
named_run("cuda", persistent_layer)


def _loop_in(dtype: torch.dtype) -> Run:
    def run(x: Tensor, layer: Layer, loop: Loop) -> tuple[Tensor, Tensor, Tensor]:
        return reference_layer(x, layer, loop, wide=dtype)

    return named_run(f"reference in {dtype}", run)


_PEER = {dtype: _loop_in(dtype) for dtype in KERNEL_DTYPES}


def _over_batch(run: Run, x: Tensor, *args: Any) -> tuple[Tensor, Any]:
    """``run`` on x (B, T, D) and an op's other arguments; y (B, T, H) and the final state."""
    layer, (lengths, cell, reverse) = Layer(*args[:6]), args[6:]
    batch, steps, width = x.shape
    hidden = layer.w_hh.shape[1]
    if lengths is None:
        rows = x.transpose(0, 1).reshape(steps * batch, width)
        y, h_n, c_n = run(rows, layer, Loop(None, batch, cell, reverse))
        y = y.view(steps, batch, hidden).transpose(0, 1)
        return y, (h_n, c_n) if cell == "lstm" else h_n
    y, h_n, c_n = over_lengths(run, x, layer, lengths, cell, reverse)
    return y, (h_n, c_n) if cell == "lstm" else h_n


def as_under_autocast(t: Any, dtype: torch.dtype) -> Any:
    """``t`` in the weights' dtype if it is a tensor that autocast casts: any of its dtypes do."""
    casts = isinstance(t, Tensor) and t.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return t.to(dtype) if casts else t


def sequence_under_autocast(value: Any, dtype: torch.dtype) -> Any:
    """``value``, whose parts may be packed or tuples, as `as_under_autocast` makes them."""
    if isinstance(value, PackedSequence):
        return value._replace(data=as_under_autocast(value.data, dtype))
    if isinstance(value, (tuple, list)):
        return tuple(sequence_under_autocast(v, dtype) for v in value)
    return as_under_autocast(value, dtype)


def check_recurrent_arguments(
    x: object, h0: object, c0: object, weights: object, lengths: object, cell: str, reverse: bool
) -> tuple[Any, ...]:
    """The checks the recurrent ops share; returns the normalised arguments."""
    x = check_tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"x must have 3 dimensions (B, T, D), got {tuple(x.shape)}")
    if not isinstance(weights, (tuple, list)) or not 2 <= len(weights) <= 4:
        raise TypeError(
            "weights must be a tuple (w_ih, w_hh), (w_ih, w_hh, b_ih) or (w_ih, w_hh, b_ih, b_hh), "
            "got "
            + (f"{len(weights)} of them" if isinstance(weights, (tuple, list)) else repr(weights))
        )
    w_ih, w_hh, b_ih, b_hh = (*weights, None, None)[:4]
    for name, t in (("w_ih", w_ih), ("w_hh", w_hh)):
        if check_tensor(name, t).dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, got {tuple(t.shape)}")
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        x = check_tensor("x", as_under_autocast(x, w_ih.dtype))
        h0, c0 = (as_under_autocast(s, w_ih.dtype) for s in (h0, c0))
    gates, hidden = GATES[cell], w_hh.shape[1]
    shapes = {
        "w_ih": (w_ih, (gates * hidden, x.shape[2])),
        "w_hh": (w_hh, (gates * hidden, hidden)),
        "b_ih": (b_ih, (gates * hidden,)),
        "b_hh": (b_hh, (gates * hidden,)),
        "the hidden state": (h0, (x.shape[0], hidden)),
        "the cell state": (c0, (x.shape[0], hidden)),
    }
    if hidden == 0:
        raise ValueError(f"w_hh must have at least one column, got {tuple(w_hh.shape)}")
    for name, (t, shape) in shapes.items():
        if t is None:
            continue
        check_same_device(name, check_tensor(name, t), "x", x)
        if t.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
        if t.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {t.dtype}")
    if lengths is not None:
        _check_lengths(lengths, x)
    return x, h0, c0, w_ih, w_hh, b_ih, b_hh, lengths, cell, bool(reverse)


def _check_lengths(lengths: object, x: Tensor) -> None:
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths must be an integer tensor, got {lengths!r}")
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"lengths must have shape ({x.shape[0]},), got {tuple(lengths.shape)}")
    if lengths.numel() == 0 or are_hidden(lengths):
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > x.shape[1]:
        raise ValueError(
            f"lengths must be between 0 and T = {x.shape[1]}, got values from {low} to {high}"
        )


def reference(*args: Any) -> Any:
    """The op in plain PyTorch on normalised arguments."""
    return _over_batch(reference_layer, *args)


def peer(*args: Any) -> Any:
    """The op as a loop of PyTorch's operators in x's dtype, a narrow state included."""
    return _over_batch(_PEER[args[0].dtype], *args)


def cpu_forward(*args: Any) -> Any:
    """The op with the C++ loop on normalised arguments; differentiable."""
    tensors, (lengths, cell, _) = args[:7], args[7:]
    x, w_hh = args[0], args[4]
    batch, steps, _ = x.shape
    # One row through a GRU with H = 128: 13 us, and 22 by the way of sequences.
    if steps == 1 and lengths is None and x.dtype is torch.float32 and is_one_step(tensors, batch):
        if not runs_in_bf16(x, w_hh, batch, cell):
            y, h_n, c_n = one_step(tensors, cell)
            return y, (h_n, c_n) if cell == "lstm" else h_n
    return _over_batch(cpu_layer, *args)


def cudnn_forward(*args: Any) -> Any:
    """The op with cuDNN's layer on normalised arguments; differentiable."""
    return _over_batch(cudnn_layer, *args)


def stack_forward(
    op: Op, x: Tensor, layers: Sequence[Layer], cell: str
) -> tuple[Tensor, Tensor] | None:
    """All layers of a stack in one call where that is the fastest way, else None.

    Args:
        op: the op that one layer is.
        x: (B, T, D).
        layers: the lowest first, all of one width.
        cell: "tanh", "relu", "gru" or "gru_textbook".

    Returns:
        y (B, T, H) of the highest layer and the final states (L, B, H).
    """
    batch, steps, width = x.shape
    if select(op, (x, *layers[0], None, cell, False)).backend != "cpu":
        return None
    rows = x.transpose(0, 1).reshape(steps * batch, width)
    loop = Loop(None, batch, cell, False)
    if not runs_as_wavefront(rows, layers, loop):
        return None
    y, finals = cpu_stack(rows, layers, loop)
    return y.view(steps, batch, -1).transpose(0, 1), torch.stack([h for h, _ in finals])


def gpu_forward(*args: Any) -> Any:
    """The op with the persistent kernels on normalised arguments; differentiable."""
    return _over_batch(persistent_layer, *args)


def _torch_forward(*args: Any) -> Any:
    """PyTorch's best: cuDNN's layer on a GPU where it takes the call, else the reference."""
    fits = args[0].is_cuda and unsupported_by_cudnn(*args) is None
    return cudnn_forward(*args) if fits else reference(*args)


def _prefer(*args: Any) -> tuple[str, str] | None:
    if args[0].is_cuda and unsupported_by_cudnn(*args) is None:
        return "torch", "cuDNN's layer: the persistent kernel has not been measured on this GPU"
    return None


def register_recurrent_op(
    name: str,
    public: Callable[..., Any],
    check: Callable[..., tuple[Any, ...]],
    samples: Callable[..., Iterator[Sample]],
) -> Op:
    """Registers a recurrent op with its reference and its C++ implementation."""
    op = register_op(
        Op(
            name=name,
            public=public,
            reference=reference,
            check=check,
            sample_inputs=samples,
            differentiable=("x", "state", "weights"),
            peer=peer,
            prefer=_prefer,
        ),
        _torch_forward,
    )
    # The forward differentiates itself: its backward needs what the layers saved.
    register(name, "cpu", ("cpu",), cpu_forward, backward_op, unsupported_by_recurrent_kernels)
    register(name, "cuda", ("cuda",), gpu_forward, None, unsupported_by_persistent_kernels)
    return op


def recurrent_samples(
    device: str, dtype: torch.dtype, gates: int, lstm: bool, options: list[dict[str, Any]]
) -> Iterator[Sample]:
    """Samples of a recurrent op: odd sizes, lengths, reverse, strides, no bias, no state."""
    generator = torch.Generator(device).manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def sample(
        name: str, batch: int, steps: int, width: int, hidden: int, *, state: bool = True,
        bias: bool = True, **options: Any,
    ) -> Sample:  # fmt: skip
        scale = hidden**-0.5
        shapes: list[tuple[int, ...]] = [(gates * hidden, width), (gates * hidden, hidden)]
        shapes += [(gates * hidden,)] * 2 if bias else []
        weights = tuple((normal(*s) * scale).to(dtype) for s in shapes)
        states = [normal(batch, hidden).to(dtype) for _ in range(2 if lstm else 1)]
        given = None if not state else tuple(states) if lstm else states[0]
        x = normal(batch, steps, width).to(dtype)
        return Sample(name, (x, given, weights), options)

    for number, extra in enumerate(options):
        label = " ".join(f"{k}={v}" for k, v in extra.items())
        lengths = torch.tensor([5, 0, 3, 1, 5, 4, 2, 5], device=device)
        yield sample(f"odd {label}", 8, 5, 9, 33, **extra)
        yield sample(f"lengths {label}", 8, 5, 9, 18, lengths=lengths, **extra)
        yield sample(f"reverse {label}", 16, 5, 24, 35, reverse=True, **extra)
        if number == 0:
            yield sample("lengths, reverse", 8, 5, 9, 30, lengths=lengths, reverse=True)
            yield sample("no state", 16, 4, 24, 40, state=False)
            yield sample("no bias", 9, 3, 5, 67, bias=False)
            yield sample("one sequence", 1, 12, 8, 40)
            yield sample("rows", 70, 3, 16, 64)
            yield sample("together", 20, 2, 16, 130)
            yield sample("no steps", 2, 0, 3, 24)
            yield sample("no rows", 0, 2, 3, 24)
            x, given, weights = sample("", 16, 6, 25, 40).args
            strided = tuple(w.t().contiguous().t() for w in weights)
            yield Sample(
                "strided", (x.transpose(0, 1).contiguous().transpose(0, 1), given, strided)
            )
            yield Sample("large", (x * 100, given, weights))
