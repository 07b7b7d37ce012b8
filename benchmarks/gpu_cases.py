"""What is measured on a GPU: operators, sizes, peers, and the floor of each call."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import lmfast
from benchmarks.gpu_case import Case, Variants, operand, our_variants, with_peers
from benchmarks.gpu_layer_cases import linear_cases, recurrent_cases, sample_cases, scan_cases
from lmfast._dispatch import ops


def norm_cases() -> Iterator[Case]:
    def eager_add(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + r
        return F.rms_norm(total, w.shape, w, 1e-6), total

    for rows, width in ((1, 4096), (64, 4096), (32768, 1024), (16384, 4096), (8192, 8192)):
        size = rows * width * 2
        for grad in (False, True) if rows > 64 else (False,):
            kind = "fwd+bwd" if grad else "fwd"
            yield Case(
                f"rms_norm {kind} {rows}x{width}",
                lambda r=rows, w=width, g=grad: (operand(r, w, grad=g), operand(w, grad=g)),
                with_peers(
                    "rms_norm",
                    lambda x, w, backend: lmfast.ops.rms_norm(x, w, backend=backend),
                    lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
                ),
                moved=size * (2 + 3 * grad),
                backward=grad,
                call_time=rows == 1,
            )
            yield Case(
                f"add_rms_norm {kind} {rows}x{width}",
                lambda r=rows, w=width, g=grad: (
                    operand(r, w, grad=g),
                    operand(r, w, grad=g),
                    operand(w, grad=g),
                ),
                with_peers(
                    "add_rms_norm",
                    lambda x, r, w, backend: lmfast.ops.add_rms_norm(x, r, w, backend=backend),
                    eager_add,
                ),
                moved=size * (4 + 4 * grad),
                backward=grad,
                call_time=rows == 1,
            )
    yield Case(
        "rms_norm fwd per head 8x32x4096x128",
        lambda: (operand(8, 4096, 32, 128).transpose(1, 2), operand(128)),
        with_peers(
            "rms_norm",
            lambda x, w, backend: lmfast.ops.rms_norm(x, w, backend=backend),
            lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        ),
        moved=8 * 32 * 4096 * 128 * 2 * 2,
    )


def rope_cases() -> Iterator[Case]:
    reference = ops()["rope"].reference
    for batch, heads, kv_heads, length in ((1, 32, 8, 1), (64, 32, 8, 1), (4, 32, 8, 4096)):
        for interleaved in (False, True):
            for grad in (False, True) if length > 1 else (False,):
                style = "interleaved" if interleaved else "half"
                kind = "fwd+bwd" if grad else "fwd"

                def make(
                    b: int = batch,
                    h: int = heads,
                    k: int = kv_heads,
                    t: int = length,
                    g: bool = grad,
                ) -> tuple[Any, ...]:
                    query = operand(b, t, h, 128).transpose(1, 2).requires_grad_(g)
                    key = operand(b, t, k, 128).transpose(1, 2).requires_grad_(g)
                    return query, key, *lmfast.ops.rope_tables(8192, 128, device="cuda")

                yield Case(
                    f"rope {style} {kind} {batch}x{heads}/{kv_heads}x{length}x128",
                    make,
                    with_peers(
                        "rope",
                        lambda q, k, c, s, backend, i=interleaved: lmfast.ops.rope(
                            q, k, c, s, interleaved=i, positions=7, backend=backend
                        ),
                        lambda q, k, c, s, i=interleaved: reference(q, k, c, s, None, 7, i, False),
                    ),
                    moved=batch * (heads + kv_heads) * length * 128 * 2 * 2 * (1 + grad),
                    backward=grad,
                    call_time=batch == 1 and length == 1,
                )


def glu_cases() -> Iterator[Case]:
    for grad in (False, True):
        yield Case(
            f"swiglu {'fwd+bwd' if grad else 'fwd'} 8192x14336",
            lambda g=grad: (operand(8192, 14336, grad=g), operand(8192, 14336, grad=g)),
            with_peers(
                "swiglu",
                lambda g, u, backend: lmfast.ops.swiglu(g, u, backend=backend),
                lambda g, u: F.silu(g) * u,
            ),
            moved=8192 * 14336 * 2 * (3 + 5 * grad),
            backward=grad,
        )


SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa_variants(causal: bool) -> Variants:
    """PyTorch's attention by each of its backends, and flash-attn's where it is installed."""

    def by(backend: SDPBackend) -> Callable[..., Any]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            grouped = q.shape[1] != k.shape[1]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

        return run

    found = {name: by(backend) for name, backend in SDPA.items()}
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        found["flash-attn"] = lambda q, k, v: flash_attn_func(
            *(t.transpose(1, 2) for t in (q, k, v)), causal=causal
        ).transpose(1, 2)
    return found


def attention_cases() -> Iterator[Case]:
    ours = our_variants(
        "attention", lambda q, k, v, backend: lmfast.ops.attention(q, k, v, backend=backend)
    )
    for head_dim in (64, 128):
        for grad in (False, True):
            shape = (4, 16, 4096, head_dim)
            yield Case(
                f"attention causal {'fwd+bwd' if grad else 'fwd'} {'x'.join(map(str, shape))}",
                lambda s=shape, g=grad: tuple(operand(*s, grad=g) for _ in range(3)),
                {**ours, **sdpa_variants(True)},
                moved=4 * 4 * 16 * 4096 * head_dim * 2,
                flops=2 * 4 * 16 * 4096**2 * head_dim * (7 if grad else 2) // 2,
                backward=grad,
            )


def cache_cases() -> Iterator[Case]:
    def run(q: Tensor, k: Tensor, v: Tensor, n: Tensor, backend: str, **more: Any) -> Tensor:
        return lmfast.ops.cached_attention(q, k, v, n, backend=backend, **more)

    sdpa = sdpa_variants(False)
    for batch, keys in ((1, 8192), (32, 8192), (8, 65536)):

        def make(b: int = batch, s: int = keys) -> tuple[Any, ...]:
            lengths = torch.full((b,), s, device="cuda")
            return operand(b, 32, 1, 128), operand(b, 8, s, 128), operand(b, 8, s, 128), lengths

        peers = {name: lambda q, k, v, n, f=f: f(q, k, v) for name, f in sdpa.items()}
        yield Case(
            f"decode attention {batch}x32/8x{keys}x128",
            make,
            {**our_variants("cached_attention", run), **peers},
            moved=2 * batch * 8 * keys * 128 * 2,
            call_time=batch == 1,
        )

    def quantised() -> tuple[Any, ...]:
        stored = (torch.randint(-127, 128, (32, 8, 8192, 128), device="cuda") for _ in range(2))
        scales = (torch.rand(32, 8, 8192, device="cuda") for _ in range(2))
        table = torch.arange(32, device="cuda", dtype=torch.int32)[:, None].repeat(1, 128)
        lengths = torch.full((32,), 8192, device="cuda")
        return operand(32, 32, 1, 128), *(t.to(torch.int8) for t in stored), lengths, table, *scales

    yield Case(
        "decode attention int8, paged 32x32/8x8192x128",
        quantised,
        our_variants(
            "cached_attention",
            lambda q, k, v, n, t, ks, vs, backend: run(
                q, k, v, n, backend, table=t, key_scales=ks, value_scales=vs
            ),
        ),
        moved=2 * 32 * 8 * 8192 * (128 + 4),
    )

    def float8() -> tuple[Any, ...]:
        q, k, v, lengths = make(32, 8192)
        return q, *(t.to(torch.float8_e4m3fn) for t in (k, v)), lengths

    yield Case(
        "decode attention float8 32x32/8x8192x128",
        float8,
        our_variants("cached_attention", run),
        moved=2 * 32 * 8 * 8192 * 128,
    )

    def append_operands(batch: int) -> tuple[Any, ...]:
        q, k = operand(batch, 32, 1, 128), operand(batch, 8, 1, 128)
        keys = operand(batch, 8, 4096, 128)
        slots = torch.arange(batch, device="cuda") * 4096 + 17
        tables = lmfast.ops.rope_tables(8192, 128, device="cuda")
        return q, k, k.clone(), keys, keys.clone(), slots, *tables

    def step_operands(batch: int, heads: int, kv_heads: int, keys: int) -> tuple[Any, ...]:
        new = operand(batch, heads, 1, 128), *(operand(batch, kv_heads, 1, 128) for _ in "kv")
        stored = (operand(batch, kv_heads, keys, 128) for _ in "kv")
        lengths = torch.full((batch,), keys, device="cuda")
        return *new, *stored, lengths, *lmfast.ops.rope_tables(keys, 128, device="cuda")

    # Seven heads of a group are two blocks' rows.
    for batch, heads, kv_heads, keys in (
        (1, 32, 8, 512),
        (1, 32, 8, 8192),
        (32, 32, 8, 8192),
        (1, 28, 4, 512),
        (1, 28, 4, 8192),
    ):
        yield Case(
            f"decode_attention {batch}x{heads}/{kv_heads}x{keys}x128",
            lambda sizes=(batch, heads, kv_heads, keys): step_operands(*sizes),
            our_variants("decode_attention", lmfast.ops.decode_attention),
            moved=2 * batch * kv_heads * keys * 128 * 2,
            call_time=batch == 1,
        )
    for batch in (1, 256):
        yield Case(
            f"rope_append {batch}x32/8x1x128",
            lambda b=batch: append_operands(b),
            our_variants(
                "rope_append",
                lambda *args, backend: lmfast.ops.rope_append(
                    *args, positions=17, interleaved=False, backend=backend
                ),
            ),
            moved=batch * (2 * 32 + 4 * 8) * 128 * 2,
            call_time=batch == 1,
        )


def loss_cases() -> Iterator[Case]:
    def eager(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).float(), t)

    for rows, width, classes in ((8192, 4096, 128256), (16384, 768, 50257), (3712, 128, 32011)):
        peers: Variants = {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
        if hasattr(F, "linear_cross_entropy"):
            peers["F.linear_cross_entropy"] = lambda h, w, t: F.linear_cross_entropy(h, w, t)
        if importlib.util.find_spec("liger_kernel"):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            peers["liger"] = lambda h, w, t: liger_fused_linear_cross_entropy(h, w, t)
        yield Case(
            f"linear_cross_entropy fwd+bwd {rows}x{width}x{classes}",
            lambda n=rows, e=width, v=classes: (
                operand(n, e, grad=True),
                (operand(v, e).detach() / e**0.5).requires_grad_(),
                torch.randint(v, (n,), device="cuda"),
            ),
            {
                **our_variants(
                    "linear_cross_entropy",
                    lambda h, w, t, backend: lmfast.ops.linear_cross_entropy(
                        h, w, t, backend=backend
                    ),
                ),
                **peers,
            },
            moved=2 * (rows + classes) * width * 2,
            flops=6 * rows * width * classes,
            backward=True,
            memory=True,
        )
    for grad in (False, True):
        rows, classes = 8192, 128256
        yield Case(
            f"cross_entropy {'fwd+bwd' if grad else 'fwd'} {rows}x{classes}",
            lambda n=rows, v=classes, g=grad: (
                operand(n, v, grad=g),
                torch.randint(v, (n,), device="cuda"),
            ),
            with_peers(
                "cross_entropy",
                lambda x, t, backend: lmfast.ops.cross_entropy(x, t, backend=backend),
                lambda x, t: F.cross_entropy(x.float(), t),
            ),
            moved=rows * classes * 2 * (1 + 2 * grad),
            backward=grad,
        )


CASES = (
    norm_cases,
    rope_cases,
    glu_cases,
    attention_cases,
    cache_cases,
    loss_cases,
    scan_cases,
    recurrent_cases,
    linear_cases,
    sample_cases,
)
