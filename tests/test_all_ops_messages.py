"""What every registered op says of its backends, and of arguments it cannot take."""

from __future__ import annotations

import inspect

import pytest
import torch
from test_all_ops import EVERY_OP, OPS, call, samples

import lmfast
from lmfast import _dispatch


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
