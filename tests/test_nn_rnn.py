"""lmfast.nn.RNN, LSTM, GRU: what torch.nn's layers give, for every option and input form."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import lmfast
import lmfast.nn
from lmfast.testing import assert_within_error_rule

MODES = ["RNN", "LSTM", "GRU"]
EVERY_MODE = pytest.mark.parametrize("mode", MODES)

# Float32 sums in another order, over six steps and two layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def pair(mode: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """torch.nn's layer and ours with the same weights."""
    theirs, ours = getattr(nn, mode)(*args, **kwargs), getattr(lmfast.nn, mode)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors(v)]
    return [value]


def results(layer: nn.Module, inputs: list[Tensor], packed: bool, states: list[Tensor]) -> list:
    """Outputs, and gradients of inputs, states and parameters."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    states = [s.clone().requires_grad_() for s in states]
    x = pack_sequence(inputs, enforce_sorted=False) if packed else inputs[0]
    hx = None if not states else tuple(states) if len(states) == 2 else states[0]
    found = tensors(layer(x, hx))
    loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in found)
    return [*found, *torch.autograd.grad(loss, [*inputs, *states, *layer.parameters()])]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@EVERY_MODE
def test_values_and_gradients_are_torchs(
    mode: str, bidirectional: bool, packed: bool, needs_cpu_kernels: None
) -> None:
    for layers, batch_first, bias, with_state in itertools.product((1, 2), *[(False, True)] * 3):
        theirs, ours = pair(
            *(mode, 5, 7, layers),
            bias=bias,
            batch_first=batch_first,
            bidirectional=bidirectional,
        )
        inputs = [torch.randn(n, 5) for n in (3, 6, 1, 6)] if packed else [torch.randn(4, 6, 5)]
        batch = 4 if batch_first or packed else 6
        count = (2 if mode == "LSTM" else 1) if with_state else 0
        states = [torch.randn(layers * (1 + bidirectional), batch, 7) for _ in range(count)]
        found, expected = (results(m, inputs, packed, states) for m in (ours, theirs))
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, **CLOSE)


@EVERY_MODE
def test_runs_the_fused_operator(
    mode: str, needs_cpu_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the comparisons with torch.nn would compare it with itself."""
    _, ours = pair(mode, 5, 7)

    def refuse(*args: Any) -> None:
        raise AssertionError("left to torch.nn")

    monkeypatch.setattr(getattr(nn, mode), "forward", refuse)
    ours(torch.randn(4, 6, 5))
    ours(torch.randn(4, 5))
    ours(pack_sequence([torch.randn(4, 5), torch.randn(2, 5)]))
    with pytest.raises(AssertionError, match="left to"):
        ours.double()(torch.randn(4, 6, 5).double())
    with lmfast.use_backend("torch"), pytest.raises(AssertionError, match="left to"):
        ours.float()(torch.randn(4, 6, 5))


@EVERY_MODE
def test_unbatched_input(mode: str) -> None:
    theirs, ours = pair(mode, 5, 7, 2)
    x = torch.randn(4, 5)
    for f, e in zip(tensors(ours(x)), tensors(theirs(x)), strict=True):
        torch.testing.assert_close(f, e, **CLOSE)
    states = [torch.randn(2, 7) for _ in range(2)]
    hx = tuple(states) if mode == "LSTM" else states[0]
    for f, e in zip(tensors(ours(x, hx)), tensors(theirs(x, hx)), strict=True):
        torch.testing.assert_close(f, e, **CLOSE)


@EVERY_MODE
def test_what_torch_rejects_is_rejected_with_its_words(mode: str) -> None:
    theirs, ours = pair(mode, 5, 7, 2)
    state = torch.zeros(2, 3, 7)
    hx = (state, state) if mode == "LSTM" else state
    wrong = [
        (torch.zeros(2, 2, 2, 5), None),
        (torch.zeros(6, 3, 4), None),
        (torch.zeros(6, 4, 5), hx),
        (torch.zeros(6, 5), hx),
        (torch.zeros(6, 3, 5).double(), None),
        (torch.zeros(0, 3, 5), None),
    ]
    for x, given in wrong:
        with pytest.raises((RuntimeError, ValueError)) as expected:
            theirs(x, given)
        with pytest.raises(expected.type) as found:
            ours(x, given)
        assert str(found.value) == str(expected.value)


@EVERY_MODE
def test_constructor_takes_torchs_arguments_and_rejects_with_its_words(mode: str) -> None:
    given = (5, 7, 2, *(["relu"] if mode == "RNN" else []), False, True, 0.25, True)
    theirs, ours = pair(mode, *given)
    assert repr(ours) == repr(theirs)
    assert ours.__getstate__().keys() == theirs.__getstate__().keys()
    wrong: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((5,), {"hidden_size": 0}),
        ((5, 7.0), {}),
        ((5, 7), {"dropout": 2.0}),
        ((5, 7), {"proj_size": 9}),
        ((5, 7), {"nonlinearity": "sine"}),
    ]
    for args, options in wrong:
        with pytest.raises((TypeError, ValueError)) as expected:
            getattr(nn, mode)(*args, **options)
        with pytest.raises(expected.type) as found:
            getattr(lmfast.nn, mode)(*args, **options)
        assert str(found.value) == str(expected.value)


@EVERY_MODE
def test_dropout_acts_between_layers_in_training_only(mode: str) -> None:
    theirs, ours = pair(mode, 5, 7, 3, dropout=0.5)
    x = torch.randn(4, 6, 5)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], **CLOSE)
    ours.train()
    torch.manual_seed(1)
    first = ours(x)[0]
    assert not torch.equal(first, ours(x)[0])
    torch.manual_seed(1)
    assert torch.equal(first, ours(x)[0])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
def test_lstm_projections(
    bidirectional: bool, packed: bool, needs_cpu_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layers, bias, with_state in itertools.product((1, 2), (False, True), (False, True)):
        theirs, ours = pair(
            "LSTM", 5, 9, layers, bias, batch_first=True, bidirectional=bidirectional, proj_size=3
        )
        inputs = [torch.randn(n, 5) for n in (3, 6, 1, 6)] if packed else [torch.randn(4, 6, 5)]
        count = layers * (1 + bidirectional)
        states = [torch.randn(count, 4, n) for n in (3, 9)] if with_state else []
        expected = results(theirs, inputs, packed, states)
        with monkeypatch.context() as patched:
            patched.setattr(nn.LSTM, "forward", None)  # ours is not left to it
            found = results(ours, inputs, packed, states)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, **CLOSE)
    x, h, c = torch.randn(6, 5), torch.randn(count, 3), torch.randn(count, 9)
    for f, e in zip(tensors(ours(x, (h, c))), tensors(theirs(x, (h, c))), strict=True):
        torch.testing.assert_close(f, e, **CLOSE)
    for wrong in ((h, h), (c, c), (h[:0], c)):
        with pytest.raises(RuntimeError) as error:
            theirs(x, wrong)
        with pytest.raises(RuntimeError) as refused:
            ours(x, wrong)
        assert str(refused.value) == str(error.value)


def test_lstm_projections_are_as_exact_as_torchs(cpu_isa: str) -> None:
    draws = []
    for seed in range(12):
        torch.manual_seed(seed)
        theirs, ours = pair("LSTM", 24, 48, 1, proj_size=12)
        exact = copy.deepcopy(theirs).double()
        x, state = torch.randn(100, 3, 24), [torch.randn(1, 3, n) for n in (12, 48)]
        found, plain = (results(m, [x], False, state) for m in (ours, theirs))
        wide = results(exact, [x.double()], False, [s.double() for s in state])
        draws.append((found, plain, wide))
    pooled = (map(torch.stack, zip(*kind, strict=True)) for kind in zip(*draws, strict=True))
    for i, (f, p, e) in enumerate(zip(*pooled, strict=True)):
        assert_within_error_rule(f, p, e, f"{i}")


def test_large_lstm_projections_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair("LSTM", 5, 300, proj_size=3)
    calls: list[int] = []
    of_torch = nn.LSTM.forward
    monkeypatch.setattr(nn.LSTM, "forward", lambda *a: calls.append(1) or of_torch(*a))
    ours(torch.randn(4, 2, 5))
    _, narrow = pair("LSTM", 5, 9, proj_size=3)
    narrow.bfloat16()(torch.randn(4, 2, 5).bfloat16())
    assert len(calls) == 2


@EVERY_MODE
def test_narrow_dtypes(mode: str) -> None:
    for dtype, close in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        theirs, ours = pair(mode, 5, 7, 2)
        x = torch.randn(4, 6, 5)
        y, *_ = ours.to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        # A state rounded at each step is what PyTorch has; fp32 is the common reference.
        torch.testing.assert_close(y.float(), theirs(x)[0], rtol=0, atol=close)


@EVERY_MODE
def test_copies_pickles_and_functional_calls(mode: str) -> None:
    theirs, ours = pair(mode, 5, 7)
    x = torch.randn(4, 6, 5)
    expected = ours(x)[0]
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(clone(x)[0], expected)
    doubled = {k: 2 * v for k, v in ours.state_dict().items()}
    found = torch.func.functional_call(ours, doubled, (x,))[0]
    torch.testing.assert_close(found, torch.func.functional_call(theirs, doubled, (x,))[0], **CLOSE)
    assert isinstance(ours, nn.RNNBase)
    assert repr(ours) == repr(theirs)


@EVERY_MODE
def test_sorted_packs_keep_their_order(mode: str) -> None:
    theirs, ours = pair(mode, 5, 7, bidirectional=True)
    x = pack_padded_sequence(torch.randn(6, 3, 5), [6, 4, 1])
    (found, _), (expected, _) = ours(x), theirs(x)
    assert torch.equal(found.batch_sizes, expected.batch_sizes)
    assert found.sorted_indices is None
    torch.testing.assert_close(found.data, expected.data, **CLOSE)


@pytest.mark.parametrize("training", [True, False])
@EVERY_MODE
def test_torchs_own_module_inputs(mode: str, training: bool) -> None:
    """The calls, right and wrong, that PyTorch's test-suite makes of its recurrent modules."""
    pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
    from torch.testing._internal import common_modules

    kind = "LSTM" if mode == "LSTM" else "RNN_GRU"
    options = {"device": "cpu", "dtype": torch.float32, "requires_grad": True}
    options |= {"module_info": None, "training": training, "is_rnn": mode == "RNN"}
    calls = getattr(common_modules, f"module_inputs_torch_nn_{kind}")
    for sample in calls(**options):
        made, called = sample.constructor_input, sample.forward_input
        theirs, ours = pair(mode, *made.args, **made.kwargs)
        theirs.train(training), ours.train(training)
        found, expected = (tensors(m(*called.args, **called.kwargs)) for m in (ours, theirs))
        for f, e in zip(found, expected, strict=True):
            assert f.shape == e.shape
            torch.testing.assert_close(f, e, **CLOSE)
    if mode == "LSTM":
        return
    for wrong in common_modules.module_error_inputs_torch_nn_RNN_GRU(**options):
        made, called = (
            wrong.module_error_input.constructor_input,
            wrong.module_error_input.forward_input,
        )
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            getattr(lmfast.nn, mode)(*made.args, **made.kwargs)(*called.args, **called.kwargs)


@EVERY_MODE
def test_infinite_inputs_saturate_the_gates(mode: str, cpu_isa: str) -> None:
    theirs, ours = pair(mode, 1, 20)
    x = torch.zeros(3, 2, 1)
    x[1] = torch.tensor([[torch.inf], [-torch.inf]])
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], **CLOSE)
