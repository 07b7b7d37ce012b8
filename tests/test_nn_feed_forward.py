"""MLP, SwiGLU and GeGLU against their formulas, in the layouts of their files, and in a block."""

import copy

import pytest
import torch
import torch.nn.functional as F
from golden import fill
from torch.nn.utils.parametrize import register_parametrization

from lmfast.nn import MLP, DecoderBlock, GeGLU, MultiHeadAttention, SwiGLU


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_is_the_formula(activation, bias):
    mlp = MLP(3, 7, activation=activation, bias=bias).double()
    state = {"W_1": fill(1, (3, 7)), "W_2": fill(3, (7, 3))}
    if bias:
        state |= {"B_1": fill(2, (7,)), "B_2": fill(4, (3,))}
    mlp.load_state_dict(state)
    x = fill(5, (2, 5, 3), 2.0).requires_grad_()
    act = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
        "silu": F.silu,
    }[activation]
    expected = act(x @ state["W_1"] + state.get("B_1", 0)) @ state["W_2"] + state.get("B_2", 0)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-13, atol=1e-14)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (mlp(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["silu", "tanh", "none"])
def test_gated_layers_are_the_formula(kind, bias):
    layer = SwiGLU(3, 7, bias=bias) if kind == "silu" else GeGLU(3, 7, bias=bias, approximate=kind)
    layer = layer.double()
    state = {"W_G": fill(1, (3, 7)), "W_U": fill(2, (3, 7)), "W_D": fill(3, (7, 3))}
    if bias:
        state |= {"B_G": fill(4, (7,)), "B_U": fill(5, (7,)), "B_D": fill(6, (3,))}
    layer.load_state_dict(state)
    x = fill(7, (2, 5, 3), 2.0).requires_grad_()
    gate, up = x @ state["W_G"] + state.get("B_G", 0), x @ state["W_U"] + state.get("B_U", 0)
    act = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate=kind)
    expected = (act * up) @ state["W_D"] + state.get("B_D", 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-14)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (layer(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_gated_files_hold_gate_and_up():
    layer = SwiGLU(4, 6, bias=True)
    torch.nn.init.normal_(layer.B_GU)
    state = layer.state_dict()
    assert list(state) == ["W_G", "W_U", "B_G", "B_U", "W_D", "B_D"]
    assert state["W_G"].data_ptr() == layer.W_GU.data_ptr()
    other = SwiGLU(4, 6, bias=True)
    other.load_state_dict(copy.deepcopy(state))
    assert torch.equal(other.W_GU, layer.W_GU)
    assert torch.equal(other.B_GU, layer.B_GU)
    other.load_state_dict({"W_GU": 2 * layer.W_GU, "B_GU": layer.B_GU, **{
        name: state[name] for name in ("W_D", "B_D")
    }})  # fmt: skip
    assert torch.equal(other.state_dict()["W_U"], 2 * state["W_U"])
    with pytest.raises(RuntimeError, match=r"Missing key.*W_U"):
        layer.load_state_dict({name: value for name, value in state.items() if name != "W_U"})
    with pytest.raises(RuntimeError, match=r"B_G must have shape \(6,\), .* has \(5,\)"):
        layer.load_state_dict({**state, "B_G": torch.zeros(5)})


def test_default_widths():
    assert MLP(8).W_1.shape == (8, 32)
    assert SwiGLU(48).W_GU.shape == (48, 2 * 128)
    assert SwiGLU(72).W_GU.shape == (72, 2 * 192)
    assert GeGLU(73).W_D.shape == (256, 73)


def test_a_block_passes_on_a_pair():
    torch.manual_seed(0)
    first, second = (DecoderBlock(8, 2, mlp="swiglu", post_norms=True).double() for _ in range(2))
    x = fill(1, (2, 5, 8), 1.0)
    update, residual = first(x, None, None, None, True)
    assert torch.equal(update + residual, first(x))
    torch.testing.assert_close(second((update, residual)), second(first(x)), rtol=1e-13, atol=0)


def test_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"activation must be one of relu, .*, got 'tanh'"):
        MLP(8, activation="tanh")
    with pytest.raises(ValueError, match=r"activation must be one of relu, .*, got \['relu'\]"):
        MLP(8, activation=["relu"])
    with pytest.raises(ValueError, match="approximate must be 'tanh' or 'none', got 'exact'"):
        GeGLU(8, approximate="exact")
    with pytest.raises(ValueError, match="hidden_dim must be at least 1, got 0"):
        SwiGLU(8, 0)
    with pytest.raises(TypeError, match="windw"):
        DecoderBlock(8, 2, windw=3)
    with pytest.raises(ValueError, match="window must be positive, got 0"):
        DecoderBlock(8, 2, window=0)
    with pytest.raises(ValueError, match="rope_dim must be at most head_dim 4, got 6"):
        DecoderBlock(8, 2, rope_dim=6)


@pytest.mark.parametrize("make", [MLP, SwiGLU, lambda width: MultiHeadAttention(width, 2)])
def test_parametrised_matrices_are_used(make):
    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = make(8)
    x, name = torch.randn(2, 3, 8), next(iter(layer._parameters))
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        getattr(doubled, name).mul_(2)
    register_parametrization(layer, name, Doubled())
    found, expected = layer(x), doubled(x)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    original = layer.parametrizations[name].original.grad
    torch.testing.assert_close(original, 2 * getattr(doubled, name).grad)
    copied = copy.deepcopy(layer)
    copied.load_state_dict(layer.state_dict())
    assert torch.equal(copied(x), found)
