"""Matrix products of the CPU's kernels: what `linear` and operators made of whole products use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmfast import _extension
from lmfast.ops._library import define, unsupported_by_cpu_kernels
from lmfast.ops._precision import bf16_products_allowed

# Many rows are those from which AMX wins over PyTorch's product, few those up to which reading the
# weights takes most of the time; both measured. A tiny matrix is read faster than an operator is
# called.
_MANY_ROWS, _LEAST_WIDTH = 256, 64
_FEW_ROWS = {torch.float32: 32, torch.float16: 32, torch.bfloat16: 8}
_LEAST_WEIGHT = 1 << 14


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, parts: int) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_product = define(
    "linear_amx(Tensor x, Tensor weight, Tensor? bias, bool relu, int parts) -> Tensor",
    _fake,
)

_plain_product = define(
    "product_f32(Tensor a, Tensor b, Tensor? bias, SymInt chunk) -> Tensor",
    lambda a, b, bias, chunk: a.new_empty((a.shape[0], b.shape[0])),
)


def _few_fake(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_few_rows = define(
    "linear_few_rows(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor",
    _few_fake,
)


def matrix(t: Tensor) -> Tensor:
    """``t`` if its rows or its columns are contiguous, else a copy."""
    return t if t.stride(-1) == 1 or t.stride(0) == 1 else t.contiguous()


def _parts(rounded: bool) -> int:
    return 1 if rounded else 3


# Longest chain of additions: at a depth of 512 one chain has 1.5 times the error of PyTorch's sum.
_CHUNK = 128
# Products of a small depth cost little, and a small layer's gradients hang on them: in chains of 30
# they have 2.1 times PyTorch's largest error, in chains of 16 below 1.8 times.
_SHALLOW, _SHALLOW_CHUNK = 64, 16


def longest_chain(depth: int) -> int:
    """The chunk in which `fp32_product` sums over a depth, unless it is told another."""
    return min(_CHUNK, _SHALLOW_CHUNK) if depth <= _SHALLOW else _CHUNK


def has_plain_product() -> bool:
    """Whether fp32 products are this package's own, at every size, on this processor."""
    return _cpu_isa() in ("avx2", "avx512", "amx") and not bf16_products_allowed()


def fp32_product(a: Tensor, b: Tensor, bias: Tensor | None = None, chunk: int = _CHUNK) -> Tensor:
    """a b^T + bias for fp32 matrices on the CPU, the same for any number of threads; no autograd.

    For operators whose backward is made of whole products: on AMX `linear` without its checks and
    its choice of backend. Sums over the depth are made in chunks of at most ``chunk``. Other
    dtypes, fp32 where rounding to bf16 is allowed and no AMX does it, and fp32 on processors
    without AVX2 are PyTorch's products.
    """
    if a.is_cpu and a.dtype == torch.float32:
        rounded = bf16_products_allowed()
        bias = None if bias is None else bias.contiguous()
        if chunk == _CHUNK and _has_tiles(rounded) and _is_faster(a.shape[0], b.shape):
            return _product(matrix(a), matrix(b), bias, False, _parts(rounded))
        if has_plain_product():
            chunk = min(chunk, longest_chain(a.shape[1]))
            return _plain_product(matrix(a), matrix(b), bias, chunk)
    if chunk == _CHUNK:
        return torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())
    c = torch.mm(a[:, :chunk], b[:, :chunk].t())
    for k in range(chunk, a.shape[1], chunk):
        c.addmm_(a[:, k : k + chunk], b[:, k : k + chunk].t())
    return c if bias is None else c.add_(bias)


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` has a kernel of its own for the rows of x, which are few."""
    size = weight.numel()
    return _LEAST_WEIGHT <= size and x.numel() <= _FEW_ROWS.get(x.dtype, -1) * weight.shape[1]


def worth_asking(x: Tensor, weight: Tensor) -> bool:
    """Whether the number of rows is one that `linear` has a kernel for."""
    many = x.dtype == torch.float32 and x.numel() >= _MANY_ROWS * weight.shape[1]
    return many or few_rows(x, weight)


def linear_of_few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False
) -> Tensor:
    """`linear` for CPU tensors of which `few_rows` holds: no checks, no autograd, no choice."""
    bias = None if bias is None else bias.contiguous()
    return _few_rows(x, matrix(weight), bias, relu)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rounded: bool) -> Tensor:
    if few_rows(x, weight):
        return linear_of_few_rows(x, weight, bias, relu)
    rows = matrix(x.reshape(-1, x.shape[-1]))
    bias = None if bias is None else bias.contiguous()
    y = _product(rows, matrix(weight), bias, relu, _parts(rounded))
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], weight.shape[0]))


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounded: bool,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    rows, flat = matrix(dy.reshape(-1, dy.shape[-1])), matrix(x.reshape(-1, x.shape[-1]))
    parts = _parts(rounded)
    dx = dweight = dbias = None
    few = few_rows(x, weight)
    if wanted[0] and few:
        dx = linear_of_few_rows(dy, weight.t()).view(x.shape)
    elif wanted[0]:
        dx = _product(rows, matrix(weight).t(), None, False, parts).view(x.shape)
    if wanted[1] and few:
        dweight = rows.t() @ flat if weight.stride(-1) == 1 else (flat.t() @ rows).t()
    elif wanted[1]:
        # In the layout of the weight, so that nobody has to transpose it.
        if weight.stride(-1) == 1:
            dweight = _product(rows.t(), flat.t(), None, False, parts)
        else:
            dweight = _product(flat.t(), rows.t(), None, False, parts).t()
    if bias is not None and wanted[2]:
        dbias = rows.sum(0)
    return [dx, dweight, dbias]


def _cpu_isa() -> str | None:
    return _extension.cpu_isa()


# What torch.compiler.assume_constant_result sets: a compiled graph keeps the answer.
_cpu_isa._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _tile_precision() -> str | None:
    """The precision in which there are tiles: "highest" and below, "medium" alone, or none."""
    if _extension.cpu_isa() == "amx":
        return "highest"
    return "medium" if _extension.has_bf16_tiles() else None


_tile_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_tiles(rounded: bool) -> bool:
    """Whether there are tiles for factors rounded once, or for fp32 as sums of bf16 numbers."""
    precision = _tile_precision()
    return precision == "highest" or (rounded and precision == "medium")


def _is_faster(rows: int, weight: Sequence[int]) -> bool:
    return rows >= _MANY_ROWS and min(weight) >= _LEAST_WIDTH


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rounded: bool
) -> str | None:
    if torch.is_autocast_enabled("cpu"):
        return "PyTorch's product is as fast under autocast"
    if few_rows(x, weight):
        return unsupported_by_cpu_kernels(x, weight, bias)
    if x.dtype != torch.float32:
        few = f", and more than {_FEW_ROWS[x.dtype]} rows" if x.dtype in _FEW_ROWS else ""
        return f"PyTorch's product is as fast for {x.dtype}{few}"
    if _extension.cpu.loaded and not _has_tiles(rounded):
        wanted = "AMX or AVX512-BF16" if rounded else "AMX"
        return f"needs {wanted} for more than {_FEW_ROWS[x.dtype]} rows, the level is {_cpu_isa()}"
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if not _is_faster(rows, weight.shape):
        return (
            f"PyTorch's product is as fast for {rows} rows and widths of {tuple(weight.shape)}: "
            f"{_MANY_ROWS} rows and widths of {_LEAST_WIDTH} are the least"
        )
    return unsupported_by_cpu_kernels(x, weight, bias)
