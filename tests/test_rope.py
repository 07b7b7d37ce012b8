"""Rotary embedding beyond what every op must do: golden numbers, tables, positions, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmfast import ops

VECTOR = [0.8, 0.6, 0.7, 0.3, 0.5, 0.4]
GOLDEN = [
    (
        100,
        True,
        [0.9936744825, 0.1122988105, 0.2497297065, -0.7194686051, 0.4029285762, 0.4976430071],
    ),
    (
        1,
        True,
        [-0.0726407462, 0.9973581714, 0.6853263162, 0.3321563492, 0.4991370664, 0.4010762882],
    ),
    (
        100,
        False,
        [0.8417647902, 0.4563027509, 0.5983049132, -0.1463968512, -0.6338673359, 0.5403991403],
    ),
]


def rotate(x: Tensor, position: int, interleaved: bool, backend: str | None) -> Tensor:
    cos, sin = ops.rope_tables(position + 1, x.shape[-1])
    x = x.reshape(1, 1, 1, -1)
    q, k = ops.rope(x, x, cos, sin, interleaved=interleaved, positions=position, backend=backend)
    assert torch.equal(q, k)
    return q.flatten()


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize(("position", "interleaved", "expected"), GOLDEN)
def test_golden_numbers(
    position: int, interleaved: bool, expected: list[float], backend: str | None
) -> None:
    found = rotate(torch.tensor(VECTOR), position, interleaved, backend)
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-6, rtol=0)


def test_quarter_circle_halved() -> None:
    c = torch.tensor([[math.sqrt(0.5)]])
    x = torch.tensor([2.0, 1.0]).reshape(1, 1, 1, 2)
    q, _ = ops.rope(x, x, c, c)
    torch.testing.assert_close(q.flatten(), torch.tensor([0.7071067812, 2.1213203436]))


def test_scores_depend_on_the_distance_only() -> None:
    cos, sin = ops.rope_tables(50, 32)
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def score(i: int, j: int) -> float:
        qi, _ = ops.rope(q, k, cos, sin, positions=i)
        _, kj = ops.rope(q, k, cos, sin, positions=j)
        return (qi * kj).sum().item()

    assert score(7, 3) == pytest.approx(score(44, 40), abs=1e-4)


def test_in_place_overwrites_and_equals(cpu_isa: str) -> None:
    for interleaved in (True, False):
        cos, sin = ops.rope_tables(9, 12)
        q, k = torch.randn(2, 3, 5, 17), torch.randn(2, 1, 5, 17)
        expected = ops.rope(q, k, cos, sin, positions=4, interleaved=interleaved)
        found = ops.rope(q, k, cos, sin, positions=4, interleaved=interleaved, inplace=True)
        assert found[0] is q
        assert found[1] is k
        assert torch.equal(q, expected[0])
        assert torch.equal(k, expected[1])


def test_in_place_through_the_view_of_a_projection(cpu_isa: str) -> None:
    cos, sin = ops.rope_tables(5, 8)
    qkv = torch.randn(2, 5, 3, 4, 8)
    before = qkv.clone()
    q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    expected = ops.rope(q.clone(), k.clone(), cos, sin, backend="torch")
    ops.rope(q, k, cos, sin, inplace=True)
    torch.testing.assert_close(q, expected[0])
    torch.testing.assert_close(k, expected[1])
    assert torch.equal(qkv[:, :, 2], before[:, :, 2])


def test_output_keeps_the_layout_of_a_transposed_projection() -> None:
    q = torch.randn(2, 7, 4, 16).transpose(1, 2)
    cos, sin = ops.rope_tables(7, 16)
    rotated, _ = ops.rope(q, q, cos, sin)
    assert rotated.stride() == q.stride()


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(0, 3),
    h=st.integers(1, 5),
    hkv=st.integers(1, 3),
    t=st.integers(0, 6),
    half=st.integers(1, 20),
    rest=st.integers(0, 5),
    interleaved=st.booleans(),
    heads_last=st.booleans(),
    kind=st.sampled_from(["none", "int", "row", "token"]),
)
def test_any_shape(
    b: int,
    h: int,
    hkv: int,
    t: int,
    half: int,
    rest: int,
    interleaved: bool,
    heads_last: bool,
    kind: str,
) -> None:
    d, length = 2 * half + rest, 40

    def make(heads: int) -> Tensor:
        if heads_last:
            return torch.randn(b, t, heads, d).transpose(1, 2)
        return torch.randn(b, heads, t, d)

    positions = {
        "none": None,
        "int": 11,
        "row": torch.randint(0, length - t, (b,)),
        "token": torch.randint(0, length, (b, t)),
    }[kind]
    q, k, tables = make(h), make(hkv), ops.rope_tables(length, 2 * half)
    options = {"interleaved": interleaved, "positions": positions}
    found = ops.rope(q, k, *tables, **options)
    plain = ops.rope(q, k, *tables, **options, backend="torch")
    for f, p in zip(found, plain):
        torch.testing.assert_close(f, p, atol=1e-5, rtol=1e-5)


def test_int32_positions() -> None:
    cos, sin = ops.rope_tables(9, 4)
    x = torch.randn(2, 1, 1, 4)
    found = ops.rope(x, x, cos, sin, positions=torch.tensor([3, 8], dtype=torch.int32))
    expected = ops.rope(x, x, cos, sin, positions=torch.tensor([3, 8]))
    assert torch.equal(found[0], expected[0])


TRANSFORMERS_SCALING = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.25,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("scaling", TRANSFORMERS_SCALING, ids=lambda s: s["rope_type"])
def test_scaled_tables_are_transformers(scaling: dict[str, float]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    length, trained = 256, scaling.get("original_max_position_embeddings", 64)
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=trained if scaling["rope_type"] == "dynamic" else 256,
        rope_parameters={**scaling, "rope_theta": 10000.0},
    )
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](
        config, torch.device("cpu"), seq_len=length
    )
    angles = torch.arange(length).double()[:, None] * frequencies.double()
    cos, sin = ops.rope_tables(length, 64, scaling=scaling)
    # Their frequencies are rounded to fp32, so the angle of position 255 is off by up to 255 ulp.
    tolerance = 256 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(cos.double(), angles.cos() * magnitude, atol=tolerance, rtol=0)
    torch.testing.assert_close(sin.double(), angles.sin() * magnitude, atol=tolerance, rtol=0)


def test_tables_keep_the_phase_of_late_positions() -> None:
    cos, _ = ops.rope_tables(200_001, 4)
    assert cos[200_000, 0].item() == pytest.approx(math.cos(200_000.0), abs=1e-6)


TABLES = ops.rope_tables(8, 4)
GOOD = torch.ones(2, 1, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ops.rope(GOOD[0], GOOD, *TABLES), ValueError, "4 dimensions"),
        (lambda: ops.rope(GOOD, GOOD.half(), *TABLES), TypeError, "k must have q's dtype"),
        (lambda: ops.rope(GOOD, GOOD[:1], *TABLES), ValueError, "agree with q"),
        (
            lambda: ops.rope(GOOD[..., :3], GOOD[..., :3], *TABLES),
            ValueError,
            "rotate 4.*size is 3",
        ),
        (
            lambda: ops.rope(GOOD, GOOD, TABLES[0], TABLES[1][:4]),
            ValueError,
            "cos and sin must both",
        ),
        (lambda: ops.rope(GOOD, GOOD, *(t.half() for t in TABLES)), TypeError, "lose their phase"),
        (lambda: ops.rope(GOOD, GOOD, *TABLES, positions=6), ValueError, "reach from 6 to 8"),
        (lambda: ops.rope(GOOD, GOOD, *TABLES, positions=-1), ValueError, "reach from -1"),
        (
            lambda: ops.rope(GOOD, GOOD, *TABLES, positions=1.5),
            TypeError,
            "positions must be an int",
        ),
        (
            lambda: ops.rope(GOOD, GOOD, *TABLES, positions=torch.tensor([0, 6])),
            ValueError,
            "reach from 0 to 8",
        ),
        (
            lambda: ops.rope(GOOD, GOOD, *TABLES, positions=torch.zeros(3).long()),
            ValueError,
            r"shape \(B,\)",
        ),
        (
            lambda: ops.rope(GOOD, GOOD, *TABLES, positions=torch.zeros(2)),
            TypeError,
            "must be integers",
        ),
        (
            lambda: ops.rope(GOOD.clone().requires_grad_(), GOOD, *TABLES, inplace=True),
            ValueError,
            "for inference",
        ),
        (
            lambda: ops.rope(GOOD[:, :1].expand(-1, 2, -1, -1), GOOD, *TABLES, inplace=True),
            ValueError,
            "q is expanded",
        ),
        (lambda: ops.rope(GOOD, GOOD, *TABLES, inplace=True), ValueError, "k must not be q"),
        (lambda: ops.rope(GOOD, GOOD[:], *TABLES, inplace=True), ValueError, "k must not be q"),
        (lambda: ops.rope_tables(4.5, 4), TypeError, "length must be an int, got 4.5"),
        (lambda: ops.rope_tables(4, 3), ValueError, "positive even number, got 3"),
        (lambda: ops.rope_tables(-1, 4), ValueError, "length must not be negative"),
        (lambda: ops.rope_tables(4, 4, 0.0), ValueError, "base must be positive"),
        (lambda: ops.rope_tables(4, 4, scaling={"rope_type": "ntk"}), ValueError, "must be one of"),
        (lambda: ops.rope_tables(4, 4, scaling="yarn"), TypeError, "must be a mapping.*got 'yarn'"),
        (lambda: ops.rope_tables(4, 4, scaling={"rope_type": "yarn"}), ValueError, "needs factor"),
        (
            lambda: ops.rope_tables(4, 4, scaling={"rope_type": "linear", "factor": 0.5}),
            ValueError,
            "at least 1",
        ),
    ],
)
def test_errors_name_the_argument(call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_memory_past_the_tables_is_never_read(needs_cpu_kernels: None) -> None:
    op = torch.ops.lmfast.rope.default
    with pytest.raises(RuntimeError, match="positions reach from"):
        op(GOOD, GOOD, *TABLES, torch.tensor([0, 6]), 0, True, False)
