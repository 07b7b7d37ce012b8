"""What every registered op says of its backends, and of arguments it cannot take."""

from __future__ import annotations

import inspect

import pytest
import torch
from test_all_ops import EVERY_OP, OPS, call, named_arguments, samples
from torch import Tensor

import lmfast
from lmfast import _dispatch
from lmfast.ops.sample import SETTINGS


@EVERY_OP
def test_explain_names_every_backend(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    sample = samples(op, torch.float32)[0]
    chosen = lmfast.explain(op, *sample.args, **sample.kwargs)
    printed = capsys.readouterr().out
    assert chosen in _dispatch.BACKENDS
    assert all(backend in printed for backend in _dispatch.BACKENDS)


@EVERY_OP
def test_a_request_that_cannot_be_met_raises(op: str) -> None:
    sample = samples(op, torch.float32)[0]
    with pytest.raises(lmfast.BackendError, match=op):
        call(op, sample, "cuda")
    with pytest.raises(ValueError, match="backend must be one of"):
        call(op, sample, "fpga")


@EVERY_OP
def test_non_tensor_and_integer_tensors_are_type_errors(op: str) -> None:
    sample = samples(op, torch.float32)[0]
    first, *rest = sample.args
    name = next(iter(inspect.signature(OPS[op].public).parameters))
    with pytest.raises(TypeError, match=name):
        OPS[op].public(first.tolist(), *rest, **sample.kwargs)
    with pytest.raises(TypeError, match=name):
        OPS[op].public(first.long(), *rest, **sample.kwargs)


# Small tensors that are read on the host, and may lie there or on the device.
ANYWHERE = {
    **{op: {"lengths"} for op in ("elman_rnn", "lstm", "gru")},
    "sample": {"suppress", *SETTINGS},
}


@EVERY_OP
def test_a_tensor_on_another_device_is_named(op: str) -> None:
    tried = set(ANYWHERE.get(op, ()))
    for sample in samples(op, torch.float32):
        arguments = named_arguments(op, sample)
        first = next(iter(arguments))
        for name, value in arguments.items():
            if name == first or name in tried or not isinstance(value, Tensor):
                continue
            tried.add(name)
            with pytest.raises(ValueError, match=f"{name} must be on .* device cpu, got meta"):
                OPS[op].public(**{**arguments, name: value.to("meta")})
