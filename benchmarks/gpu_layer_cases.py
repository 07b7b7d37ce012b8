"""What is measured on a GPU besides norms, attention and losses: layers and the draw."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lmfast
from benchmarks.gpu_case import Case, Switched, operand, our_variants, with_peers
from lmfast._dispatch import ops

STEPS = 128  # of recurrent layers


def recurrent_cases() -> Iterator[Case]:
    kinds = {"lstm": (torch.lstm, 4), "gru": (torch.gru, 3), "elman_rnn": (torch.rnn_tanh, 1)}
    for dtype in (torch.bfloat16, torch.float32):
        for name, (run, gates) in kinds.items():
            steps = STEPS
            for hidden, batch in ((256, 64), (512, 64), (1024, 16)):

                def make(
                    n: int = gates, h: int = hidden, b: int = batch, t: int = steps, d: Any = dtype
                ) -> tuple[Any, ...]:
                    shapes = ((b, t, h), (n * h, h), (n * h, h), (n * h,), (n * h,))
                    made = (torch.randn(s, device="cuda") / h**0.5 for s in shapes)
                    return tuple(m.to(d).requires_grad_() for m in made)

                def ours(x: Tensor, *w: Tensor, backend: str, op: str = name) -> Tensor:
                    return getattr(lmfast.ops, op)(x, None, w, backend=backend)[0]

                def cudnn(x: Tensor, *w: Tensor, run: Any = run, h: int = hidden) -> Tensor:
                    zero = x.new_zeros(1, x.shape[0], h)
                    state = (zero, zero) if run is torch.lstm else zero
                    return run(x, state, w, True, 1, 0.0, True, False, True)[0]

                by_grid = Switched(partial(ours, backend="cuda"), "LMFAST_RECURRENT_CLUSTERS", "0")
                yield Case(
                    f"{name} fwd+bwd {batch}x{steps}x{hidden} {str(dtype).removeprefix('torch.')}",
                    make,
                    {**our_variants(name, ours), "cuda, no clusters": by_grid, "cudnn": cudnn},
                    moved=2 * 2 * batch * steps * hidden * (torch.finfo(dtype).bits // 8),
                    flops=3 * 2 * 2 * batch * steps * gates * hidden**2,
                    backward=True,
                )


def scan_cases() -> Iterator[Case]:
    reference = ops()["linear_recurrence"].reference
    for grad in (False, True):
        yield Case(
            f"linear_recurrence {'fwd+bwd' if grad else 'fwd'} 16x4096x1024",
            lambda g=grad: tuple(
                torch.rand(16, 4096, 1024, device="cuda").bfloat16().requires_grad_(g)
                for _ in range(2)
            ),
            with_peers(
                "linear_recurrence",
                lambda a, b, backend: lmfast.ops.linear_recurrence(a, b, backend=backend)[0],
                lambda a, b: reference(a, b, None)[0],
            ),
            moved=16 * 4096 * 1024 * 2 * (3 + 5 * grad),
            backward=grad,
        )


def linear_cases() -> Iterator[Case]:
    """Decoding: one and sixteen rows through the matrices of a model of 7 billion parameters."""
    width, classes = 4096, 11008
    for rows in (1, 16, 2048):
        shape = f"{rows}x{width}x{classes}"
        yield Case(
            f"linear {shape}",
            lambda n=rows: (operand(n, width), operand(classes, width)),
            our_variants("linear", lambda x, w, backend: lmfast.ops.linear(x, w, backend=backend)),
            moved=2 * (rows * (width + classes) + width * classes),
            flops=2 * rows * width * classes if rows > 256 else 0,
        )
        if rows > 64:
            continue

        def eager(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return F.linear(x, w) + 0.5 * (x @ a @ b)

        yield Case(
            f"lora_linear R 16 {shape}",
            lambda n=rows: (
                *(operand(n, width), operand(classes, width)),
                *(operand(width, 16), operand(16, classes)),
            ),
            {
                **our_variants(
                    "lora_linear",
                    lambda x, w, a, b, backend: lmfast.ops.lora_linear(
                        x, w, a, b, scale=0.5, backend=backend
                    ),
                ),
                "eager": eager,
            },
            moved=2 * (rows * (width + classes) + width * classes + 16 * (width + classes)),
        )
        for bits in (8, 4):

            def make(n: int = rows, bits: int = bits) -> tuple[Any, ...]:
                codes = torch.randint(0, 256, (classes, width * bits // 8), device="cuda")
                x = operand(n, width)
                if bits == 8:
                    return x, codes.to(torch.int8), torch.rand(classes, device="cuda")
                scales = torch.rand(classes, width // 32, device="cuda")
                return x, codes.to(torch.uint8), scales.half()

            yield Case(
                f"quantised_linear int{bits} {shape}",
                make,
                our_variants(
                    "quantised_linear",
                    lambda x, c, s, backend: lmfast.ops.quantised_linear(x, c, s, backend=backend),
                ),
                moved=width * classes * bits // 8 + (classes * width // 16 if bits == 4 else 0),
            )


def sample_cases() -> Iterator[Case]:
    """One token of 50 k and 128 k, by the filters people use."""

    def eager(logits: Tensor, uniform: Tensor) -> Tensor:
        values, ids = logits.float().sort(dim=-1, descending=True)
        weights = values.softmax(-1)
        weights = weights.masked_fill(weights.cumsum(-1) - weights >= 0.9, 0.0)
        return ids.gather(-1, torch.multinomial(weights, 1))[:, 0]

    for rows, size in ((1, 50257), (32, 128256)):
        for name, options in (
            ("top-k 50, top-p 0.9", {"top_k": 50, "top_p": 0.9}),
            ("top-p 0.9", {"top_p": 0.9}),
        ):

            def run(x: Tensor, u: Tensor, backend: str, options: Any = options) -> Tensor:
                return lmfast.ops.sample(x, uniform=u, backend=backend, **options)

            yield Case(
                f"sample {name} {rows}x{size}",
                lambda n=rows, v=size: (
                    operand(n, v),
                    torch.rand(n, device="cuda", dtype=torch.float64),
                ),
                {**our_variants("sample", run), "eager": eager},
                moved=2 * rows * size,
                call_time=rows == 1,
            )
