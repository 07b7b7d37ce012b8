"""Calls on a GPU's tensors without a GPU: FakeTensors, which have a device and no numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_checks import call, ops_with
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lmfast
from lmfast import _dispatch, _extension

GPU_BACKENDS = ("triton", "cuda") if _extension.cuda.loaded else ("triton",)
RECURRENT = ("elman_rnn", "lstm", "gru")
PAIRS = [(op, b) for b in GPU_BACKENDS for op in ops_with(b) if op.name not in RECURRENT]


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


class Kernels(TorchDispatchMode):
    """Names of the operations that start a kernel: neither views nor new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if not func.is_view and "empty" not in name and func.namespace in ("aten", "lmfast"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def on_gpu(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")


@pytest.mark.parametrize(("op", "backend"), PAIRS, ids=[f"{op.name}-{b}" for op, b in PAIRS])
def test_outputs_are_what_they_will_be(op: _dispatch.Op, backend: str) -> None:
    """Shapes and dtypes of the reference's on numbers, all on the GPU, by that backend."""
    taken = 0
    for sample in op.sample_inputs("cpu", torch.bfloat16):
        expected = call(op, sample, "torch")
        with FakeTensorMode():
            fake = sample.map(on_gpu)
            if op.implementations[backend].supports(*op.check(*fake.args, **fake.kwargs)):
                continue
            try:
                found = call(op, fake, backend)
            except RuntimeError as error:  # a PyTorch without CUDA cannot index nor copy there
                if "not linked with support for cuda" in str(error):
                    continue
                raise
            taken += 1
            for value, e in zip(found, expected, strict=True):
                assert (value.shape, value.dtype) == (e.shape, e.dtype), sample.name
                assert value.device.type == "cuda"
    if not taken and torch.version.cuda is None:
        pytest.skip("nothing without a PyTorch for CUDA")
    assert taken


@pytest.mark.parametrize("paged", [False, True])
def test_a_step_of_decoding_starts_one_kernel(paged: bool) -> None:
    """What checks of arguments would compute is not computed where they cannot look at it."""
    op = _dispatch.ops()["cached_attention"]
    with FakeTensorMode(), Kernels() as kernels:
        q = torch.empty(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
        keys = torch.empty(2, 2, 256, 64, device="cuda", dtype=torch.bfloat16)
        lengths = torch.empty(2, device="cuda", dtype=torch.int64)
        table = torch.empty(2, 4, device="cuda", dtype=torch.int32) if paged else None
        kernels.names.clear()
        out = op.public(q, keys, keys, lengths, table=table, backend="triton")
        assert kernels.names == ["triton_cached_attention"]
        assert out.shape == q.shape
        new = keys.narrow(2, 0, 1)
        kernels.names.clear()
        _dispatch.ops()["decode_attention"].check(q, new, new, keys, keys, lengths, table=table)
        assert kernels.names == []


def test_the_choice_without_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    """PyTorch's libraries where they are known to win, and the reason in words."""

    def chosen(op: str, *args: Any, **options: Any) -> tuple[str, str]:
        capsys.readouterr()
        return lmfast.explain(op, *args, **options), capsys.readouterr().out.splitlines()[0]

    def gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype)

    kernels = GPU_BACKENDS[::-1]
    with FakeTensorMode():
        long = gpu(2, 8, 1024, 64)
        backend, line = chosen("attention", long, long, long)
        assert backend == "torch"
        assert "scaled_dot_product_attention: long, plain, 16 bit" in line
        assert chosen("attention", long, long, long, window=5)[0] == "triton"
        assert chosen("attention", long.narrow(2, 0, 64), long, long)[0] == "triton"
        assert "cuBLAS" in chosen("linear", gpu(4, 64), gpu(32, 64))[1]
        assert (
            "cuBLAS"
            in chosen("lora_linear", *(gpu(4096, 64), gpu(32, 64), gpu(64, 8), gpu(8, 32)))[1]
        )
        assert chosen("rms_norm", gpu(4, 64))[0] == kernels[0]
        assert chosen("swiglu", gpu(4, 64), gpu(4, 64))[0] == "triton"
        assert chosen("rms_norm", gpu(4, 64, dtype=torch.float64))[0] == "torch"
