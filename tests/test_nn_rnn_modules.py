"""lmfast.nn.RNN, LSTM, GRU where torch.nn's are changed, wrapped or transformed: norms and pruning
of weights, tied weights, hooks, autocast, torch.func, TorchScript, torch.compile."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_nn_rnn import CLOSE, EVERY_MODE, pair, tensors
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import lmfast
import lmfast.nn


def assert_same(ours: nn.Module, theirs: nn.Module, x: Any, hx: Any = None) -> None:
    """Results, of a sequence and of its first step alone without gradients, and gradients."""
    found, expected = (tensors(m(x, hx)) for m in (ours, theirs))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, **CLOSE)
    if isinstance(x, Tensor):
        first = x[:, :1] if ours.batch_first else x[:1]
        with torch.no_grad():
            for f, e in zip(tensors(ours(first, hx)), tensors(theirs(first, hx)), strict=True):
                torch.testing.assert_close(f, e, **CLOSE)
    for m, results in ((ours, found), (theirs, expected)):
        m.zero_grad()
        sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in results).backward()
    for (name, p), (other, q) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == other
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, **CLOSE)


def weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer, "weight_hh_l0")


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": weight_norm,
    "parametrization": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "pruned": lambda m: prune.ln_structured(m, "weight_ih_l1", 0.5, n=2, dim=0),
    "frozen": lambda m: m.weight_hh_l0.requires_grad_(False),
    "another parameter": lambda m: setattr(m, "bias_hh_l0", nn.Parameter(m.bias_hh_l0 * 2)),
    "other data": lambda m: setattr(m.weight_hh_l1, "data", m.weight_hh_l1.data * 2),
    "dropout set later": lambda m: setattr(m, "dropout", 0.0),
    "shared memory": lambda m: m.share_memory(),
    "flattened": lambda m: m.flatten_parameters(),
}


@pytest.mark.parametrize("change", list(CHANGES))
@EVERY_MODE
def test_weights_that_are_changed(mode: str, change: str) -> None:
    theirs, ours = pair(mode, 5, 7, 2, dropout=0.5 if "dropout" in change else 0.0)
    x = torch.randn(4, 3, 5)
    ours(x)  # so that a change is one of a layer in use
    for m in (ours, theirs):
        CHANGES[change](m)
    assert_same(ours, theirs, x)
    with torch.no_grad():
        for m in (ours, theirs):
            for p in m.parameters():
                p.mul_(1.25)
    assert_same(ours, theirs, x)


@EVERY_MODE
def test_tied_directions_train_as_torchs(mode: str) -> None:
    theirs, ours = pair(mode, 5, 7, bidirectional=True)
    for m in (ours, theirs):
        m.weight_hh_l0_reverse, m.weight_ih_l0_reverse = m.weight_hh_l0, m.weight_ih_l0
    x = torch.randn(4, 3, 5)
    assert_same(ours, theirs, x)
    for m in (ours, theirs):
        torch.optim.SGD(m.parameters(), 0.5).step()
    assert_same(ours, theirs, x)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [[6, 4, 4, 1], [4, 1, 6, 4], [1, 1, 1, 1]], ids=str)
@EVERY_MODE
def test_packs_in_any_order(mode: str, lengths: list[int], batch_first: bool) -> None:
    theirs, ours = pair(mode, 5, 7, 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(4, max(lengths), 5) if batch_first else torch.randn(max(lengths), 4, 5)
    ordered = lengths == sorted(lengths, reverse=True)
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=ordered)
    state = torch.randn(4, 4, 7)
    assert_same(ours, theirs, packed, (state, -state) if mode == "LSTM" else state)
    results = [pad_packed_sequence(m(packed)[0], batch_first) for m in (ours, theirs)]
    torch.testing.assert_close(results[0][0], results[1][0], **CLOSE)
    assert results[0][1].tolist() == lengths


@EVERY_MODE
def test_dropout_draws_torchs_numbers_and_at_one_leaves_nothing(mode: str) -> None:
    x = torch.randn(4, 3, 5)
    for dropout in (0.4, 1.0):
        theirs, ours = pair(mode, 5, 7, 3, dropout=dropout)
        found = []
        for m in (ours, theirs):
            torch.manual_seed(5)
            found.append(m(x)[0])
        torch.testing.assert_close(found[0], found[1], **CLOSE)


@EVERY_MODE
def test_an_empty_batch_and_one_backward_after_another(mode: str) -> None:
    theirs, ours = pair(mode, 5, 7, 2)
    empty = ours(torch.zeros(4, 0, 5))
    for f, e in zip(tensors(empty), tensors(theirs(torch.zeros(4, 0, 5))), strict=True):
        assert f.shape == e.shape
    empty[0].sum().backward()
    x = torch.randn(4, 3, 5, requires_grad=True)
    y = ours(x)[0].square().sum()
    leaves = [x, *ours.parameters()]
    first, second = (torch.autograd.grad(y, leaves, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    z = checkpoint(lambda t: ours(t)[0].square().sum(), x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(z, x)[0], first[0])


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
@EVERY_MODE
def test_a_parameter_without_memory_is_torchs_error(mode: str, name: str) -> None:
    theirs, ours = pair(mode, 5, 7)
    messages = []
    for m in (ours, theirs):
        setattr(m, name, nn.Parameter(getattr(m, name).to("meta")))
        with torch.no_grad(), pytest.raises(RuntimeError) as error:
            m(torch.randn(1, 2, 5))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@EVERY_MODE
def test_hooks_run(mode: str) -> None:
    _, ours = pair(mode, 5, 7)
    calls: list[str] = []
    ours.register_forward_pre_hook(lambda *_: calls.append("before"))
    ours.register_forward_hook(lambda *_: calls.append("after"))
    ours.register_full_backward_hook(lambda *_: calls.append("back"))
    ours(torch.randn(4, 3, 5, requires_grad=True))[0].sum().backward()
    assert calls == ["before", "after", "back"]
    with torch.no_grad():
        ours(torch.randn(1, 3, 5))
    assert calls[3:] == ["before", "after"]


@pytest.mark.parametrize("steps", [1, 4])
@EVERY_MODE
def test_autocast_gives_torchs_dtypes(mode: str, steps: int) -> None:
    if mode == "LSTM" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("PyTorch has no LSTM in bf16 for this processor")
    theirs, ours = pair(mode, 32, 32, 2)
    state = torch.randn(2, 20, 32)
    given = (state, state) if mode == "LSTM" else state
    for dtype in (torch.float32, torch.bfloat16):
        x, hx = torch.randn(steps, 20, 32).to(dtype), given
        for grad in (True, False):
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
                found, expected = tensors(ours(x, hx)), tensors(theirs(x, hx))
                for f, e in zip(found, expected, strict=True):
                    assert f.dtype == e.dtype
                    # Weights, inputs and theirs' states in bf16: a few roundings of 2^-9.
                    torch.testing.assert_close(f.float(), e.float(), rtol=0, atol=4e-2)
                if mode != "GRU":  # a result handed back, as a stream does
                    hx = tuple(found[1:]) if mode == "LSTM" else found[1]
                    again = zip(tensors(ours(x, hx)), tensors(theirs(x, hx)), strict=True)
                    assert all(f.dtype == e.dtype for f, e in again)
            hx = given


@EVERY_MODE
def test_packs_under_autocast(mode: str) -> None:
    theirs, ours = pair(mode, 5, 7)
    packed = pack_padded_sequence(torch.randn(4, 3, 5).bfloat16(), [4, 2, 1])
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(packed)[0], theirs(packed)[0]
    assert torch.equal(found.batch_sizes, expected.batch_sizes)
    assert found.data.dtype == expected.data.dtype
    torch.testing.assert_close(found.data.float(), expected.data.float(), rtol=0, atol=4e-2)


@EVERY_MODE
def test_jacobians_and_hessians_of_torch_func(mode: str) -> None:
    theirs, ours = pair(mode, 3, 4, 2)
    x = torch.randn(3, 2, 3)
    expected = torch.autograd.functional.jacobian(lambda t: theirs(t)[0], x)
    found = torch.func.jacrev(lambda t: ours(t)[0])(x)
    torch.testing.assert_close(found, expected, **CLOSE)

    def loss(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda t: layer(t)[0].square().sum()

    twice = torch.func.jacrev(torch.func.jacrev(loss(ours)))(x)
    torch.testing.assert_close(
        twice, torch.autograd.functional.hessian(loss(theirs), x), rtol=1e-3, atol=1e-4
    )
    weights = {n: p.detach() for n, p in ours.named_parameters()}

    def by_weights(layer: nn.Module) -> Callable[..., Tensor]:
        return lambda w: torch.func.functional_call(layer, w, (x,))[0].square().sum(2)[:, 0]

    by_ours, by_theirs = (torch.func.jacrev(by_weights(m))(weights) for m in (ours, theirs))
    for name, expected in by_theirs.items():
        torch.testing.assert_close(by_ours[name], expected, **CLOSE)
    if mode != "LSTM":  # torch's has no rule for tangents
        tangent = torch.randn_like(x)
        for f, e in zip(
            torch.func.jvp(lambda t: ours(t)[0], (x,), (tangent,)),
            torch.func.jvp(lambda t: theirs(t)[0], (x,), (tangent,)),
            strict=True,
        ):
            torch.testing.assert_close(f, e, **CLOSE)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("steps", [1, 3])
@EVERY_MODE
def test_vmap_without_gradients(mode: str, steps: int) -> None:
    """Over inputs, and over the weights of an ensemble; torch.nn's layers have no rule for it."""
    theirs, ours = pair(mode, 5, 7, 2)
    x = torch.randn(4, steps, 2, 5)
    weights = {n: torch.stack([p, 2 * p]) for n, p in ours.named_parameters()}
    with torch.no_grad():
        found = torch.vmap(lambda t: ours(t)[0])(x)
        torch.testing.assert_close(found, torch.stack([theirs(t)[0] for t in x]), **CLOSE)
        found = torch.vmap(lambda w: torch.func.functional_call(ours, w, (x[0],))[0])(weights)
        torch.testing.assert_close(found[0], theirs(x[0])[0], **CLOSE)
        if mode != "RNN":
            extra = {"proj_size": 3} if mode == "LSTM" else {}
            theirs, ours = pair(mode, 5, 7, bidirectional=True, **extra)
            found = torch.vmap(lambda t: ours(t)[0])(x)
            torch.testing.assert_close(found, torch.stack([theirs(t)[0] for t in x]), **CLOSE)
        if mode == "GRU":
            cell = lmfast.nn.GRUCell(5, 7)
            torch.testing.assert_close(torch.vmap(cell)(x[:, 0, 0]), cell(x[:, 0, 0]), **CLOSE)


class Top(nn.Module):
    """TorchScript takes layers of torch.nn inside other modules."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}], ids=str)
@EVERY_MODE
def test_torchscript_takes_torchs_layer_with_our_weights(
    mode: str, options: dict[str, Any]
) -> None:
    extra = {"LSTM": {"proj_size": 3}, "RNN": {"nonlinearity": "relu"}, "GRU": {"bias": False}}
    ours = Top(getattr(lmfast.nn, mode)(5, 7, 2, **extra[mode], **options))
    x = torch.randn(3, 2, 5)
    expected = ours(x)
    scripted = torch.jit.script(copy.deepcopy(ours))
    torch.testing.assert_close(scripted(x), expected, **CLOSE)
    for grad, piece in ((True, x), (False, x), (False, x[:1])):
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(ours, (piece,))
            torch.testing.assert_close(traced(2 * piece), ours(2 * piece), **CLOSE)
    for name, p in ours.named_parameters():
        assert torch.equal(dict(scripted.named_parameters())[name], p)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_leaves_nothing_out_in_silence() -> None:
    class Scaled(lmfast.nn.GRU):
        def forward(self, input: Any, hx: Any = None) -> Any:
            y, h = super().forward(input, hx)
            return 2 * y, h

    hooked, parametrized = lmfast.nn.GRU(3, 4), lmfast.nn.GRU(3, 4)
    hooked.register_forward_pre_hook(lambda module, args: None)
    torch.nn.utils.parametrizations.weight_norm(parametrized, "weight_hh_l0")
    for layer in (Scaled(3, 4), hooked, parametrized):
        with pytest.raises(NotImplementedError, match="remove them first"):
            torch.jit.script(Top(layer))


@EVERY_MODE
def test_torchs_onnx_exporters_see_torchs_operators(
    mode: str, needs_cpu_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = pair(mode, 5, 7)
    x = torch.randn(1, 2, 5)

    def operators() -> set[str]:
        nodes = torch.export.export(ours, (x,)).graph.nodes
        return {str(n.target) for n in nodes if n.op == "call_function"}

    assert any("lmfast" in name for name in operators())
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert not any("lmfast" in name for name in operators())


@EVERY_MODE
def test_compiled_steps_with_computed_weights(mode: str, needs_cpu_kernels: None) -> None:
    theirs, ours = pair(mode, 5, 7, 2)
    x = torch.randn(1, 2, 5)
    for m in (ours, theirs):
        parametrizations.weight_norm(m, "weight_hh_l1")
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(ours, backend="eager")(x)
        for f, e in zip(tensors(found), tensors(theirs(x)), strict=True):
            torch.testing.assert_close(f, e, **CLOSE)
