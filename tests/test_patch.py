"""`lmfast.patch` on torch.nn's, one's own and the textbook's modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfast
from lmfast.models import textbook


class ScaledNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6, wrong: str = "") -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.norm_eps, self.wrong = eps, wrong

    def forward(self, x: Tensor) -> Tensor:
        if self.wrong == "eps outside":
            return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.norm_eps) * self.gain
        if self.wrong == "another eps":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 3 * self.norm_eps) * self.gain
        if self.wrong == "detached":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6).detach() * self.gain
        if self.wrong == "in training":
            x = x * 1.001 if self.training else x
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.norm_eps) * self.gain


class OnePlusNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(dim)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        h = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (h * (1 + self.weight.float())).type_as(x)


class HandLayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + 1e-5) * self.gamma + self.beta


class HandGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Gated(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], swapped: bool = False) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act, self.swapped = act, swapped

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.w3, self.w1) if self.swapped else (self.w1, self.w3)
        return self.w2(self.act(a(x)) * b(x))


class SpelledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class CountingLinear(nn.Linear):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        CountingLinear.count += 1
        return x @ self.weight.T + self.bias


class NormOfSum(ScaledNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return super().forward(x if residual is None else x + residual) * scale


def outcome(model: nn.Module, **options: str) -> str | None:
    (entry,) = [e for e in lmfast.patch(model, **options).entries if e.name == ""]
    return entry.replaced_by


@pytest.mark.parametrize(
    ("make", "label"),
    [
        (lambda: nn.RMSNorm(8), "lmfast.ops.rms_norm"),
        (lambda: nn.RMSNorm(8, eps=1e-3), "lmfast.ops.rms_norm"),
        (lambda: ScaledNorm(8), "lmfast.ops.rms_norm"),
        (lambda: OnePlusNorm(8), "lmfast.ops.rms_norm"),
        (lambda: textbook.TextbookRMSNorm(8), "lmfast.ops.rms_norm"),
        (lambda: HandLayerNorm(8), "torch's fused layer_norm"),
        (lambda: HandGelu(), "torch's fused gelu_tanh"),
        (lambda: Gated(F.silu), "lmfast.ops.swiglu"),
        (lambda: Gated(F.gelu), "lmfast.ops.geglu"),
        (lambda: Gated(nn.GELU(approximate="tanh"), True), "lmfast.ops.geglu"),
        (lambda: textbook.TextbookMLP(8), "lmfast.ops.linear with bias and ReLU"),
        (lambda: textbook.TextbookElman(8, 2), "lmfast.ops.elman_rnn"),
        (lambda: nn.Linear(8, 8), "lmfast.ops.linear"),
        (lambda: SpelledLinear(8, 8), "lmfast.ops.linear"),
        (lambda: nn.LSTM(8, 4, 2, bidirectional=True), "lmfast.nn.LSTM"),
        (lambda: nn.GRU(8, 4, batch_first=True), "lmfast.nn.GRU"),
        (lambda: nn.RNN(8, 4, nonlinearity="relu"), "lmfast.nn.RNN"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recognised(make: Callable[[], nn.Module], label: str, dtype: torch.dtype) -> None:
    module = make().to(dtype)
    x = torch.randn(3, 5, 8, dtype=dtype)
    before = module(x)
    assert outcome(module) == label
    after = module(x)
    a, b = (t[0] if isinstance(t, tuple) else t for t in (before, after))
    assert a.dtype == b.dtype
    # Sums in another order; in bf16 results rounded once instead of after every operator.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (a.float() - b.float()).abs().max() <= tolerance * a.float().abs().max()


@pytest.mark.parametrize("wrong", ["eps outside", "another eps", "detached", "in training"])
def test_a_look_alike_is_left_with_the_reason(wrong: str) -> None:
    module = ScaledNorm(8, wrong=wrong)
    report = lmfast.patch(module)
    assert type(module) is ScaledNorm
    (entry,) = report.kept
    part = "gradients" if wrong == "detached" else "values"
    assert f"other {part} in training" in entry.reason
    assert entry.reason in str(report)


def test_a_gated_layer_of_another_activation_stays() -> None:
    module = Gated(torch.tanh)
    assert outcome(module) is None
    assert type(module) is Gated


def test_a_linear_layer_that_does_more_stays() -> None:
    assert outcome(CountingLinear(8, 8)) is None
    assert outcome(nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)) is None


def decoder() -> textbook.TextbookDecoder:
    return textbook.TextbookDecoder(50, 16, 4, 2, 0)


@pytest.mark.parametrize(
    "make",
    [decoder, lambda: textbook.TextbookRecurrent(50, 16, 2, 0)],
    ids=["decoder", "recurrent"],
)
def test_textbook_models_compute_the_same_and_learn_the_same(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    twin = copy.deepcopy(model)
    names = {n: id(p) for n, p in model.named_parameters()}
    kinds = {e.kind for e in lmfast.patch(model).replaced}
    assert kinds & {"TextbookAttention", "TextbookElman"}
    assert {n: id(p) for n, p in model.named_parameters()} == names
    ids = torch.randint(1, 50, (3, 9))
    losses = []
    for m in (twin, model):
        optimizer = torch.optim.SGD(m.parameters(), 0.5)
        for _ in range(4):
            loss = textbook.textbook_loss(m, ids[:, :-1], ids[:, 1:], -100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # four steps of rounding
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_patching_twice_and_unpatching() -> None:
    model = decoder()
    classes = [type(m) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    first = str(lmfast.patch(model))
    patched = [type(m) for m in model.modules()]
    assert str(lmfast.patch(model)) == first
    assert [type(m) for m in model.modules()] == patched
    lmfast.unpatch(model)
    lmfast.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_another_backend_replaces_the_first() -> None:
    model = nn.Sequential(nn.RMSNorm(8))
    x = torch.randn(2, 8)
    lmfast.patch(model, backend="torch")
    expected = F.rms_norm(x, (8,), eps=torch.finfo(torch.float32).eps)
    torch.testing.assert_close(model(x), expected)
    lmfast.patch(model)
    assert dict(type(model[0])._lmfast_swap[2])["backend"] is None


def test_patching_changes_nothing_else() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), ScaledNorm(8), nn.Dropout())
    calls: list[str] = []
    for name, m in model.named_modules():
        m.register_forward_hook(lambda *_, name=name: calls.append(name))
    model[0].weight.grad = torch.ones(8, 8)
    model.eval()
    model[3].train()
    random = torch.get_rng_state()
    state = copy.deepcopy(model.state_dict())
    lmfast.patch(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert not calls
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(8, 8))
    assert [m.training for m in model] == [False, False, False, True]
    model(torch.randn(4, 8))
    assert calls == ["0", "1", "2", "3", ""]


def test_hooks_on_parts_of_a_replaced_layer_still_run() -> None:
    model = textbook.TextbookElman(8, 1)
    lmfast.patch(model)
    x = torch.randn(2, 3, 8)
    expected = model(x)
    seen: list[int] = []
    handle = model.rnn_units[0].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), expected)
    assert len(seen) == 3
    handle.remove()
    model(x)
    assert len(seen) == 3


def test_copies_and_pickles_stay_patched_and_can_be_unpatched() -> None:
    model = decoder()
    lmfast.patch(model)
    ids = torch.randint(1, 50, (2, 5))
    expected = model(ids)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(twin(ids), expected)
        lmfast.unpatch(twin)
        assert type(twin.layers[0].mlp) is textbook.TextbookMLP
    assert type(model.layers[0].mlp) is not textbook.TextbookMLP


def test_moves_to_another_dtype() -> None:
    model = nn.Sequential(Gated(F.silu), ScaledNorm(8), nn.GRU(8, 8, batch_first=True))
    lmfast.patch(model)
    twin = copy.deepcopy(model)
    lmfast.unpatch(twin)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        x = torch.randn(2, 3, 8, dtype=dtype)
        a, b = model.to(dtype)(x)[0], twin.to(dtype)(x)[0]
        assert a.dtype == dtype
        tolerance = {torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float32: 1e-5}[dtype]
        assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max()


def test_an_uncommon_dtype_of_the_input_goes_the_old_way() -> None:
    module = OnePlusNorm(8)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    expected = module(x)
    lmfast.patch(module)
    assert torch.equal(module(x), expected)


def test_compiles_in_one_graph() -> None:
    model = decoder()
    lmfast.patch(model)
    ids = torch.randint(1, 50, (2, 5))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids))


def test_what_cannot_be_given_another_forward() -> None:
    replaced = nn.RMSNorm(8)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    assert "on the instance" in lmfast.patch(replaced).kept[0].reason
    meta = nn.RMSNorm(8, device="meta")
    assert "meta" in lmfast.patch(meta).kept[0].reason
    projected = nn.LSTM(8, 8, proj_size=4)
    assert "proj_size" in lmfast.patch(projected).kept[0].reason
    assert "fused kernel already" in lmfast.patch(nn.LayerNorm(8)).kept[0].reason
    assert "own layer already" in lmfast.patch(lmfast.nn.RMSNorm(8)).kept[0].reason


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        lmfast.patch("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got list"):
        lmfast.unpatch([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be one of"):
        lmfast.patch(nn.Linear(2, 2), backend="gpu")


def test_a_class_made_from_a_patched_one_is_unpatched_within() -> None:
    model = nn.Sequential(nn.Linear(8, 8), ScaledNorm(8))
    lmfast.patch(model)
    x = torch.randn(2, 8)
    nn.utils.parametrizations.weight_norm(model[0])
    expected = model(x)
    with pytest.raises(RuntimeError, match="parametrized modules"):
        pickle.dumps(model)
    lmfast.unpatch(model)
    assert [type(m).__name__ for m in model] == ["ParametrizedLinear", "ScaledNorm"]
    assert not any(hasattr(type(m), "_lmfast_swap") for m in model.modules())
    torch.testing.assert_close(model(x), expected)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear


def test_arguments_by_name_and_optional_ones() -> None:
    module, mlp = NormOfSum(8), Gated(F.silu)
    x = torch.randn(2, 3, 8)
    calls = [
        lambda: module(x),
        lambda: module(x=x),
        lambda: module(x, x),
        lambda: module(x, residual=x, scale=2.0),
        lambda: mlp(x=x),
    ]
    expected = [call() for call in calls]
    assert outcome(module) == "lmfast.ops.rms_norm"
    assert outcome(mlp) == "lmfast.ops.swiglu"
    for call, value in zip(calls, expected, strict=True):
        torch.testing.assert_close(call(), value)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        module(x, other=1)
