"""Compiles every Triton kernel, as its launcher would launch it, to sm_90 machine code.

A program, run by test_compile_only.py with the interpreter off: ``python triton_aot.py OUT.json``.
It replaces ``JITFunction.run``, calls the launchers on CPU tensors (nothing is executed), compiles
what each of them asks for, and writes one record per kernel, dtype and case with what the
assembler reports.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Case = tuple[str, Callable[[], Any]]


def source(kernel: JITFunction, args: dict[str, Any]) -> ASTSource:
    """What triton's own run time would compile for these arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, args[parameter.name]
        plain = not parameter.do_not_specialize
        one = plain and type(value) is int and value == 1
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if plain and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack bytes (spills live there) and so on of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(number) for key, number in re.findall(r"\b([A-Z]+):(\d+)", text)}


def norm_cases(dtype: torch.dtype) -> Iterator[Case]:
    from lmfast.triton import rms_norm as kernels
    from lmfast.triton.rms_norm_backward import rms_norm_backward

    for rows, width in ((64, 64), (64, 769), (8, 4096), (4, 8192), (4, 16384), (2, 65536)):
        x, weight = torch.empty(rows, width, dtype=dtype), torch.empty(width, dtype=dtype)
        yield f"{width}", lambda x=x, w=weight: kernels.rms_norm(x, w, 1e-6)
        yield f"add {width}", lambda x=x, w=weight: kernels.add_rms_norm(x, x, w, 1e-6)
        yield (
            f"backward {width}",
            lambda x=x, w=weight: rms_norm_backward(x, x, w, 1e-6, x, True),
        )
    heads = torch.empty(2, 8, 4, 64, dtype=dtype).transpose(1, 2)
    yield "heads", lambda: kernels.rms_norm(heads, None, 1e-6)
    yield (
        "heads backward",
        lambda: rms_norm_backward(heads, heads, None, 1e-6, None, False),
    )


def rope_cases(dtype: torch.dtype) -> Iterator[Case]:
    from lmfast.triton import rope as kernels

    for interleaved in (True, False):
        style = "interleaved" if interleaved else "half"
        for head_dim, rotary in ((128, 128), (80, 32)):
            q = torch.empty(2, 64, 8, head_dim, dtype=dtype).transpose(1, 2)
            k = torch.empty(2, 64, 2, head_dim, dtype=dtype).transpose(1, 2)
            cos = torch.empty(64, rotary // 2)
            for positions in (None, torch.zeros(2, dtype=torch.int64)):
                yield (
                    f"{style} {head_dim} {'rows' if positions is None else 'starts'}",
                    lambda q=q, k=k, c=cos, p=positions, i=interleaved: kernels.rope(
                        q, k, c, c, p, 3, i, True
                    ),
                )
        q = torch.empty(4, 8, 1, 128, dtype=dtype)
        cos, each = torch.empty(64, 64), torch.zeros(4, 1, dtype=torch.int64)
        yield (
            f"{style} in place",
            lambda q=q, c=cos, p=each, i=interleaved: kernels.rope_(q, q, c, c, p, 0, i),
        )


def glu_cases(dtype: torch.dtype) -> Iterator[Case]:
    from lmfast.triton import swiglu as kernels

    for width in (64, 11008):
        packed = torch.empty(64, 2 * width, dtype=dtype)
        dy = torch.empty(64, width, dtype=dtype)
        yield f"swiglu {width}", lambda x=packed: kernels.swiglu(x, None)
        yield (
            f"swiglu backward {width}",
            lambda x=packed, d=dy: kernels.swiglu_backward(d, x, None),
        )
        for tanh in (True, False):
            kind = f"{'tanh' if tanh else 'exact'} {width}"
            yield f"geglu {kind}", lambda d=dy, t=tanh: kernels.geglu(d, d, t)
            yield (
                f"geglu backward {kind}",
                lambda d=dy, t=tanh: kernels.geglu_backward(d, d, d, t),
            )


def attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    from lmfast.ops._attention_reference import Options
    from lmfast.triton.attention import attention
    from lmfast.triton.attention_backward import attention_backward

    plain = Options(True, None, None, None, None, 0, 0.0, None, None, 0.125)
    starts, heads = torch.zeros(2, dtype=torch.int64), torch.zeros(8)
    every = plain._replace(
        lengths=starts, window=100, softcap=30.0, sinks=heads, alibi=heads, offsets=starts
    )
    for length, head_dim, options in (
        (512, 64, plain),
        (512, 128, plain),
        (512, 256, plain),
        (512, 128, every._replace(mask=torch.ones(2, 8, 512, 512, dtype=torch.bool))),
        (512, 64, every._replace(mask=torch.ones(2, 8, 512, 512, dtype=dtype), causal=False)),
        (1, 64, plain._replace(lengths=starts)),
        (1, 128, plain._replace(lengths=starts)),
        (4, 256, every),
    ):
        # The slowest to compile: float16 compiles like bfloat16, float32 has tiles of its own.
        plainly = options.mask is None and not options.window
        if dtype == torch.float16 and (head_dim != 128 or not plainly):
            continue
        if dtype == torch.float32 and not (plainly and length > 1):
            continue
        q = torch.empty(2, 8, length, head_dim, dtype=dtype)
        k = torch.empty(2, 2, 512, head_dim, dtype=dtype)
        kind = f"{length}x{head_dim}" + (", every option" if options.window else "")
        yield (
            f"attention {kind}",
            lambda q=q, k=k, o=options: attention(q, k, k, *o),
        )
        if length > 4:
            lse = torch.empty(2, 8, length)
            yield (
                f"attention backward {kind}",
                lambda q=q, k=k, o=options, s=lse: attention_backward(q, q, k, k, q, s, *o),
            )


def cache_cases(dtype: torch.dtype) -> Iterator[Case]:
    from lmfast.triton.attention import cached_attention
    from lmfast.triton.rope_append import rope_append

    lengths, table = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 32, dtype=torch.int32)
    heads = torch.zeros(8)
    for name, head_dim, quantised, paged in (
        ("plain", 128, False, False),
        ("paged int8", 128, True, True),
        ("paged", 64, False, True),
    ):
        if dtype != torch.bfloat16 and not quantised:
            continue
        q = torch.empty(2, 8, 1, head_dim, dtype=dtype)
        keys = torch.empty(2, 2, 2048, head_dim, dtype=torch.int8 if quantised else dtype)
        scales = torch.empty(2, 2, 2048) if quantised else None
        options = (table if paged else None, scales, scales, *(None,) * 5)
        yield (
            f"cached attention {name}",
            lambda q=q, k=keys, o=options: cached_attention(q, k, k, lengths, *o),
        )
        if dtype == torch.bfloat16 and head_dim == 64:
            small = keys.to(torch.float8_e4m3fn)
            yield (
                "cached attention float8",
                lambda q=q, k=small, o=options: cached_attention(q, k, k, lengths, *o),
            )
            tables, slots = (torch.empty(64, 32),) * 2, torch.zeros(2, dtype=torch.int64)
            yield (
                "rope_append float8",
                lambda q=q, k=small, s=slots, t=tables: rope_append(
                    q, q[:, :2], q[:, :2], k, k, None, None, s, None, *t, lengths, 0, False
                ),
            )
        if dtype == torch.bfloat16 and quantised:
            every = (table, scales, scales, 100, 30.0, heads, heads, 0.1)
            many = torch.empty(2, 8, 64, head_dim, dtype=dtype)
            yield (
                "cached attention, every option",
                lambda q=many, k=keys, o=every: cached_attention(q, k, k, lengths, *o),
            )
        for steps, rotary in ((1, head_dim), (64, head_dim // 2)):
            x = torch.empty(2, 8, steps, head_dim, dtype=dtype)
            slots = torch.zeros(2 * steps, dtype=torch.int64)
            tables = (torch.empty(64, rotary // 2),) * 2
            yield (
                f"rope_append {name} {steps}",
                lambda x=x, k=keys, c=scales, s=slots, t=tables: rope_append(
                    x, x[:, :2], x[:, :2], k, k, c, c, s, s, *t, lengths, 0, False
                ),
            )


def loss_cases(dtype: torch.dtype) -> Iterator[Case]:
    from lmfast.triton.cross_entropy import cross_entropy, cross_entropy_
    from lmfast.triton.linear_cross_entropy import linear_cross_entropy

    for classes in (257, 128256):
        logits, targets = torch.empty(4, classes, dtype=dtype), torch.zeros(4, dtype=torch.int64)
        settings = (targets, None, -100, 1, 0.0, 0.0)
        yield f"loss {classes}", lambda x=logits, s=settings: cross_entropy(x, *s, False)
        yield f"loss in place {classes}", lambda x=logits, s=settings: cross_entropy_(x, *s)
        every = (targets, torch.zeros(4, dtype=torch.float64), -100, 0, 0.1, 0.01)
        yield (
            f"loss, every option {classes}",
            lambda x=logits, s=every: cross_entropy(x, *s, True),
        )
    hidden, weight = torch.empty(64, 16, dtype=dtype), torch.empty(50257, 16, dtype=dtype)
    targets, bias = torch.zeros(64, dtype=torch.int64), torch.zeros(50257)
    for name, options in (
        ("", (None, None, None, -100, 1, 0.0, 0.0, 0.0, False)),
        (", every option", (bias, None, None, -100, 2, 0.1, 0.01, 30.0, False)),
    ):
        yield (
            f"linear_cross_entropy{name}",
            lambda o=options: linear_cross_entropy(hidden, weight, targets, *o, True, False, False),
        )


def scan_cases(dtype: torch.dtype) -> Iterator[Case]:
    from lmfast.triton import linear_recurrence as kernels

    for steps, width in ((7, 33), (512, 1024)):
        a = torch.empty(2, steps, width, dtype=dtype)
        yield f"scan {steps}", lambda a=a: kernels.linear_recurrence(a, a, a[:, 0])
        yield (
            f"scan backward {steps}",
            lambda a=a: kernels.linear_recurrence_backward(a, a, a, a[:, 0]),
        )


def additive_cases(dtype: torch.dtype) -> Iterator[Case]:
    from lmfast.triton import additive_attention as kernels

    v = torch.empty(256)
    for steps in (1, 30):
        q, keys = torch.empty(2, steps, 256), torch.zeros(2, 40, 256, dtype=dtype)
        weights = torch.zeros(2, steps, 40)
        yield (
            f"additive attention {steps}",
            lambda q=q, k=keys: kernels.additive_attention(q, k, k, v, None),
        )
        yield (
            f"additive attention backward {steps}",
            lambda q=q, k=keys, w=weights: kernels.additive_attention_backward(
                q, w, q, k, k, v, None, w
            ),
        )


def linear_cases(dtype: torch.dtype) -> Iterator[Case]:
    from lmfast.triton import linear as kernels
    from lmfast.triton.quantised_linear import quantised_linear, quantised_linear_backward

    x, weight = torch.empty(16, 512, dtype=dtype), torch.empty(256, 512, dtype=dtype)
    bias, a, b = weight[:, 0].contiguous(), weight[:16].t(), weight[:16, :256]
    yield "linear", lambda: kernels.linear(x, weight, bias, True)
    yield "linear with an update", lambda: kernels.linear(x, weight, None, False, a, b, 0.5)
    codes, bytes_ = torch.zeros(256, 512, dtype=torch.int8), torch.zeros(256, 256).to(torch.uint8)
    for rows in (1, 16):
        yield f"int8 x{rows}", lambda r=rows: quantised_linear(x[:r], codes, weight[:, 0], bias)
        scales = torch.empty(256, 16, dtype=torch.float16)
        yield f"int4 x{rows}", lambda r=rows, s=scales: quantised_linear(x[:r], bytes_, s, None)
    dy = x[:, :256].contiguous()
    yield "int8 backward", lambda: quantised_linear_backward(dy, codes, weight[:, 0])
    yield "int4 backward", lambda: quantised_linear_backward(dy, bytes_, scales)


def sample_cases(dtype: torch.dtype) -> Iterator[Case]:
    from lmfast.triton.sample import sample

    logits, uniform = torch.empty(2, 50257, dtype=dtype), torch.zeros(2, dtype=torch.float64)
    settings = torch.ones(1, 8, dtype=torch.float64)
    yield "sample", lambda: sample(logits, uniform, settings, *(None,) * 4, False)
    counts, mask = torch.zeros(2, 50257, dtype=torch.int32), torch.zeros(2, 50257).bool()
    listed = torch.zeros(9, dtype=torch.int64)
    yield (
        "sample, every option",
        lambda: sample(logits, uniform, settings, counts, mask, logits.float(), listed, True),
    )


CASES = (
    norm_cases,
    rope_cases,
    glu_cases,
    attention_cases,
    cache_cases,
    loss_cases,
    scan_cases,
    additive_cases,
    linear_cases,
    sample_cases,
)


def every_config(name: str, key: Any, configs: Any, device: Any, run: Callable[..., Any]) -> Any:
    """In the place of ``_tuning.pick``: launches all, the last by the launcher itself."""
    for config in configs[:-1]:
        run(config)
    return configs[-1]


def main(out: str) -> None:
    import lmfast.triton
    from lmfast.triton import _tuning

    compiled: dict[str, dict[str, Any]] = {}
    current = ""

    def compile_only(self: JITFunction, *args: Any, grid: Any, **options: Any) -> None:
        del options["warmup"]
        named = dict(zip(self.arg_names, args, strict=False))
        named |= {k: options.pop(k) for k in self.arg_names if k in options}
        ast = source(self, named)
        key = f"{self.fn.__name__} {ast.hash()} {sorted(options.items())}"
        # float16 compiles like bfloat16: one of each kernel is enough.
        half = [r["kernel"] for r in compiled.values() if r["case"].startswith("float16")]
        if key in compiled or (current.startswith("float16") and self.fn.__name__ in half):
            return
        kernel = triton.compile(ast, target=TARGET, options=options)
        compiled[key] = {
            "kernel": self.fn.__name__,
            "case": current,
            "cubin": len(kernel.asm["cubin"]),
            "dynamic_shared": kernel.metadata.shared,
            **resources(kernel.asm["cubin"]),
        }

    JITFunction.run = compile_only
    # Whatever a launcher has of these: an H200's multiprocessors, and every configuration.
    for module in pkgutil.iter_modules(lmfast.triton.__path__, "lmfast.triton."):
        launcher = importlib.import_module(module.name)
        if hasattr(launcher, "multiprocessors"):
            launcher.multiprocessors = lambda device: 132
        if getattr(launcher, "pick", None) is _tuning.pick:
            launcher.pick = every_config
    for dtype in DTYPES:
        for cases in CASES:
            for name, call in cases(dtype):
                current = f"{str(dtype).removeprefix('torch.')} {name}"
                call()
    Path(out).write_text(json.dumps(list(compiled.values())))


if __name__ == "__main__":
    main(sys.argv[1])
