"""Triton kernels for NVIDIA GPUs: one file per op with its kernels and launchers.

This file only registers. Each op ``lmfast::triton_<name>`` has the schema and the fake function of
``lmfast::<name>``, so it exists wherever PyTorch does; triton itself is imported, and a kernel
compiled, at the first call. Under TRITON_INTERPRET=1 the kernels also take CPU tensors, when asked
for by name: that is how they are tested without a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import lmfast.ops.add_rms_norm
import lmfast.ops.geglu
import lmfast.ops.lora_linear
import lmfast.ops.quantised_linear
import lmfast.ops.sample
import lmfast.ops.swiglu  # noqa: F401  (these define the operators twinned below)
from lmfast._dispatch import register
from lmfast.ops._attention_reference import Options
from lmfast.ops._glu import launchers
from lmfast.ops._library import is_autocast, needs_grad, with_unit_last_stride
from lmfast.ops._storage import FLOAT8
from lmfast.ops.additive_attention import launchers as additive_launchers
from lmfast.ops.additive_attention import unsupported_by_kernels as additive_unsupported_by
from lmfast.ops.attention import kernel_options, sink_gradient
from lmfast.ops.cached_attention import launcher as cached_attention_launcher
from lmfast.ops.cached_attention import unsupported_by_kernels as cache_unsupported_by
from lmfast.ops.cross_entropy import launcher as cross_entropy_launcher
from lmfast.ops.decode_attention import register_two_calls
from lmfast.ops.linear import library_backward
from lmfast.ops.linear_cross_entropy import launcher as linear_cross_entropy_launcher
from lmfast.ops.linear_recurrence import launcher as linear_recurrence_launcher
from lmfast.ops.rope import launchers as rope_launchers
from lmfast.ops.rope import unsupported_by_kernels as rope_unsupported_by
from lmfast.ops.rope_append import launcher as rope_append_launcher
from lmfast.ops.rope_append import unsupported_by_kernels as append_unsupported_by
from lmfast.triton._launch import DEVICES, twin, unsupported

_MOST_LORA_RANK = 128
# Longest row the kernels are tested with. They hold a row, or walk it in blocks.
MAX_WIDTH = 65536

_rms_norm = twin("rms_norm", "rms_norm")
_add_rms_norm_op = twin("add_rms_norm", "rms_norm")
_rms_norm_backward = twin("rms_norm_backward", "rms_norm_backward")


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


# Its second result is the log-sum-exp in base 2, (B, H, T); inf for a row that sees no key.
_attention = twin("attention", "attention", _attention_fake)
_attention_grads = twin("attention_backward", "attention_backward")


_cross_entropy = cross_entropy_launcher(
    twin("cross_entropy", "cross_entropy"), twin("cross_entropy_", "cross_entropy")
)
_linear_cross_entropy = linear_cross_entropy_launcher(
    twin("linear_cross_entropy", "linear_cross_entropy"), takes_mean=False
)
_linear = twin("linear", "linear")
_sample = twin("sample", "sample")
_quantised_linear = twin("quantised_linear", "quantised_linear")
_quantised_linear_backward = twin("quantised_linear_backward", "quantised_linear")
_glu_launchers = {
    name: launchers(twin(name, "swiglu"), twin(f"{name}_backward", "swiglu"))
    for name in ("swiglu", "geglu")
}


def _glu_unsupported(gate: Tensor, up: Tensor | None, *options: Any) -> str | None:
    if gate.dim() > 4:
        return f"{gate.dim() - 1} leading dimensions; the kernel takes up to 3"
    return unsupported(gate, up)


def _quantised_unsupported(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None
) -> str | None:
    if needs_grad(scales):
        return "no kernel for the gradient of scales"
    return unsupported(x, scales, bias)


def _linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rounded: bool
) -> Tensor:
    rows = with_unit_last_stride(x.reshape(-1, x.shape[-1]))
    y = _linear(rows, weight, _contiguous(bias), relu, None, None, 1.0)
    return y.view(*x.shape[:-1], weight.shape[0])


def _linear_unsupported(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> str | None:
    if is_autocast(x):
        return "PyTorch's product is taken under autocast"
    return unsupported(x, weight, bias)


def _lora_forward(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    low: Tensor | None,
) -> Tensor:
    rows = with_unit_last_stride(x.reshape(-1, x.shape[-1]))
    y = _linear(rows, weight, _contiguous(bias), False, a, b, scale)
    return y.view(*x.shape[:-1], weight.shape[0])


def _lora_unsupported(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    low: Tensor | None,
) -> str | None:
    if low is not None:
        return "no kernel for an update of another input than x"
    if a.shape[1] > _MOST_LORA_RANK:
        return f"the kernel takes ranks to {_MOST_LORA_RANK}, got {a.shape[1]}"
    return _linear_unsupported(x, weight, bias) or unsupported(a, b)


def _norm_forward(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _rms_norm(with_unit_last_stride(x), _contiguous(weight), eps)


def _add_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x, residual = with_unit_last_stride(x), with_unit_last_stride(residual)
    return _add_rms_norm_op(x, residual, _contiguous(weight), eps)


def _norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dsum: Tensor | None,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dsum = None if dsum is None else with_unit_last_stride(dsum)
    dy, x = with_unit_last_stride(dy), with_unit_last_stride(x)
    return _rms_norm_backward(dy, x, _contiguous(weight), eps, dsum, need_dweight)


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _norm_unsupported(x: Tensor, weight: Tensor | None) -> str | None:
    if weight is not None and weight.dtype not in (x.dtype, torch.float32):
        return f"weight is {weight.dtype}; the kernel takes x's dtype {x.dtype} or float32"
    if x.shape[-1] > MAX_WIDTH:
        return f"rows of {x.shape[-1]} elements; the kernel takes up to {MAX_WIDTH}"
    if x.dim() > 4:
        return f"{x.dim() - 1} leading dimensions; the kernel takes up to 3"
    return unsupported(x, weight)


def _rope_unsupported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *options: Any) -> str | None:
    reason = rope_unsupported_by(q, k, cos, sin, *options)
    return reason or unsupported(q, k, cos, sin)


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    q, k, v = (with_unit_last_stride(t) for t in (q, k, v))
    return _attention(q, k, v, *kernel_options(options))


def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dout, q, k, v = (with_unit_last_stride(t) for t in (dout, q, k, v))
    grads = _attention_grads(dout, q, k, v, out, lse, *kernel_options(options))
    natural = lse * math.log(2)
    return *grads, sink_gradient(Options(*options).sinks, dout, out, natural, 1.0)


def _attention_unsupported(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> str | None:
    o = Options(*options)
    if needs_grad(o.mask, o.alibi):
        return "no kernel for the gradient of mask or alibi"
    if q.shape[3] > 256:
        return f"the kernel takes head sizes to 256, got {q.shape[3]}"
    if o.mask is not None and o.mask.dtype == torch.float64:
        return "no kernel for a torch.float64 mask"
    return unsupported(q, k, v)


def _cached_unsupported(q: Tensor, keys: Tensor, *rest: Any) -> str | None:
    if keys.dtype != FLOAT8:
        return _cached_unsupported_but_float8(q, keys, *rest)
    if keys.is_cuda and torch.cuda.get_device_capability(keys.device) < (8, 9):
        return f"this GPU has no conversions from {keys.dtype}"
    # What else there is to refuse does not depend on the storage.
    return _cached_unsupported_but_float8(q, keys.view(torch.int8), *rest)


_cached_unsupported_but_float8 = cache_unsupported_by(unsupported)

register(
    "rms_norm",
    "triton",
    DEVICES,
    _norm_forward,
    _norm_backward,
    lambda x, weight, eps: _norm_unsupported(x, weight),
)
register(
    "add_rms_norm",
    "triton",
    DEVICES,
    _add_norm_forward,
    _norm_backward,
    lambda x, residual, weight, eps: _norm_unsupported(x, weight),
)
register(
    "rope",
    "triton",
    DEVICES,
    *rope_launchers(twin("rope", "rope"), twin("rope_", "rope")),
    _rope_unsupported,
)
register(
    "attention", "triton", DEVICES, _attention_forward, _attention_backward, _attention_unsupported
)
register(
    "cached_attention",
    "triton",
    DEVICES,
    cached_attention_launcher(twin("cached_attention", "attention")),
    None,
    _cached_unsupported,
)
register(
    "cross_entropy",
    "triton",
    DEVICES,
    lambda *args: _cross_entropy(None, *args, want_dlogits=False)[0],
    _cross_entropy,
    lambda logits, *settings: unsupported(logits),
)
register(
    "linear_cross_entropy",
    "triton",
    DEVICES,
    lambda *args: _linear_cross_entropy(None, *args)[0],
    _linear_cross_entropy,
    lambda hidden, weight, targets, bias, *settings: unsupported(hidden, weight, bias),
)
register(
    "linear_recurrence",
    "triton",
    DEVICES,
    linear_recurrence_launcher(
        twin("linear_recurrence", "linear_recurrence"), "triton", widen=False
    ),
    twin("linear_recurrence_backward", "linear_recurrence"),
    unsupported,
)
register(
    "additive_attention",
    "triton",
    DEVICES,
    *additive_launchers(
        twin("additive_attention", "additive_attention"),
        twin("additive_attention_backward", "additive_attention"),
        "triton",
    ),
    additive_unsupported_by(unsupported),
)
register(
    "rope_append",
    "triton",
    DEVICES,
    rope_append_launcher(twin("rope_append", "rope_append")),
    None,
    append_unsupported_by(unsupported, float8=True),
)
register_two_calls("triton", DEVICES)
register("sample", "triton", DEVICES, _sample, None, lambda logits, *rest: unsupported(logits))
register("linear", "triton", DEVICES, _linear_forward, library_backward, _linear_unsupported)
# The gradients are products of the same form: ops/lora_linear.py.
register("lora_linear", "triton", DEVICES, _lora_forward, _lora_forward, _lora_unsupported)
register(
    "quantised_linear",
    "triton",
    DEVICES,
    lambda x, codes, scales, bias: _quantised_linear(
        with_unit_last_stride(x), with_unit_last_stride(codes), scales.contiguous(), bias
    ),
    lambda dy, codes, scales: _quantised_linear_backward(
        with_unit_last_stride(dy), with_unit_last_stride(codes), scales.contiguous()
    ),
    _quantised_unsupported,
)
for _name, _pair in _glu_launchers.items():
    register(_name, "triton", DEVICES, *_pair, _glu_unsupported)
