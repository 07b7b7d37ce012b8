"""Layers of lmfast.nn: golden values in fp64 and equality with the written-out formulas."""

import pytest
import torch
from golden import fill

from lmfast import ops
from lmfast.models.textbook import TextbookBlock, TextbookElman
from lmfast.nn import DecoderBlock, ElmanRNN, RMSNorm, RotaryEmbedding

# Golden numbers are printed with 9 digits.
PRINTED = {"atol": 6e-10, "rtol": 0}

INPUTS = [
    [0.1, 0.2, 0.6],
    [0.2, 0.1, 0.4],
    [0.1, 0.3, 0.3],
    [0.0, 0.7, 0.1],
    [0.5, 0.2, 0.7],
    [0.0, 0.0, 0.0],
]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_rms_norm_golden():
    norm = RMSNorm(4).double()
    expected = tensor([0.365148371, 0.730296743, 1.095445114, 1.460593486])
    torch.testing.assert_close(norm(tensor([1.0, 2.0, 3.0, 4.0])), expected, **PRINTED)
    norm = RMSNorm(6).double()
    expected = tensor([1.389117771, 1.041838329, 1.21547805, 0.520919164, 0.868198607, 0.694558886])
    torch.testing.assert_close(norm(tensor([0.8, 0.6, 0.7, 0.3, 0.5, 0.4])), expected, **PRINTED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_of_a_zero_row_is_exactly_zero(dtype):
    norm = RMSNorm(5).to(dtype)
    assert torch.equal(norm(torch.zeros(2, 5, dtype=dtype)), torch.zeros(2, 5, dtype=dtype))


def test_rms_norm_add_returns_norm_of_sum_and_sum():
    norm = RMSNorm(6).double()
    norm.load_state_dict({"scale": 1 + fill(3, (6,))})
    x, residual = fill(1, (4, 6)), fill(2, (4, 6))
    y, total = norm.add(x, residual)
    torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(y, norm(x + residual), rtol=1e-14, atol=0)


def test_a_block_calls_the_hooks_and_the_forward_of_its_norms():
    class Doubled(RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    block, x = DecoderBlock(8, 2).double(), torch.randn(1, 3, 8, dtype=torch.float64)
    plain = block(x)
    hook = block.norm2.register_forward_hook(lambda norm, args, out: 2 * out)
    hooked = block(x)
    hook.remove()
    assert torch.equal(block(x), plain)
    norm, block.norm2 = block.norm2, Doubled(8).double()
    block.norm2.load_state_dict(norm.state_dict())
    assert not torch.allclose(hooked, plain)
    torch.testing.assert_close(block(x), hooked)


def test_rms_norm_loads_the_name_weight_too():
    norm = RMSNorm(3)
    norm.load_state_dict({"weight": torch.tensor([1.0, 2.0, 3.0])})
    assert norm.scale.tolist() == [1.0, 2.0, 3.0]
    assert list(norm.state_dict()) == ["scale"]


ROTATED = [0.8, 0.6, 0.7, 0.3, 0.5, 0.4]


@pytest.mark.parametrize(
    ("position", "interleaved", "expected"),
    [
        (100, True, [0.99367448, 0.11229881, 0.24972971, -0.71946861, 0.40292858, 0.49764301]),
        (1, True, [-0.07264075, 0.99735817, 0.68532632, 0.33215635, 0.49913707, 0.40107629]),
        (100, False, [0.84176479, 0.45630275, 0.59830491, -0.14639685, -0.63386734, 0.54039914]),
        (0, True, ROTATED),
    ],
)  # fmt: skip
def test_rotary_golden(position, interleaved, expected):
    rope = RotaryEmbedding(6, interleaved=interleaved)
    x = tensor(ROTATED).view(1, 1, 1, 6)
    for positions in (position, torch.tensor([position]), torch.tensor([[position]])):
        q, k = rope(x.clone(), x.clone(), positions)
        # The tables are fp32: an angle of 100 is a cosine with an error of 6e-8 at most.
        torch.testing.assert_close(q.flatten(), tensor(expected), rtol=0, atol=1.2e-7)
        torch.testing.assert_close(k, q, rtol=0, atol=0)


def test_rotary_tables_survive_inference_mode():
    _, _ = RotaryEmbedding(10, base=777.0).tables(4)
    with torch.inference_mode():
        rope = RotaryEmbedding(10, base=778.0)
        rope.tables(4)
    q = torch.randn(1, 1, 4, 10, requires_grad=True)
    rotated, _ = rope(q, q)
    rotated.square().sum().backward()
    # A rotation keeps the norm, so the gradient of |rotated|^2 is 2q.
    torch.testing.assert_close(q.grad, 2 * q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_rotary_scaling_uses_the_tables_of_its_length(kind):
    scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 8}
    rope = RotaryEmbedding(8, scaling=scaling)
    x = fill(1, (1, 2, 20, 8), 1.0)
    for steps in (5, 20):
        cos, sin = ops.rope_tables(steps, 8, scaling=scaling)
        expected = ops.rope(x[:, :, :steps], x[:, :, :steps], cos, sin)[0]
        assert torch.equal(rope(x[:, :, :steps], x[:, :, :steps])[0], expected)


def test_rotary_rejects_odd_sizes():
    with pytest.raises(ValueError, match=r"dim must be even.*got 5"):
        RotaryEmbedding(5)


def test_block_equals_the_textbook_block():
    block, textbook = DecoderBlock(12, 3).double(), TextbookBlock(12, 3).double()
    textbook.load_state_dict(block.state_dict())
    x = fill(1, (2, 7, 12), 1.0)
    mask = torch.ones(7, 7).tril()
    # The textbook's angles are fp64, ours fp32: 6e-8 per cosine, times a few products.
    torch.testing.assert_close(block(x), textbook(x, mask), rtol=0, atol=5e-7)


def golden_elman():
    rnn = ElmanRNN(3, 2).double()
    rnn.load_state_dict(
        {
            "rnn_units.0.Wh": fill(1, (3, 3)),
            "rnn_units.0.Uh": fill(2, (3, 3)),
            "rnn_units.0.b": fill(3, (3,)),
            "rnn_units.1.Wh": fill(4, (3, 3)),
            "rnn_units.1.Uh": fill(5, (3, 3)),
            "rnn_units.1.b": fill(6, (3,)),
        }
    )
    return rnn


def test_elman_golden():
    y, state = golden_elman().forward_with_state(tensor([INPUTS]))
    expected = tensor(
        [
            [-0.124337478, 0.074656032, 0.23492637],
            [-0.084790309, 0.063955542, 0.180945379],
            [-0.130243666, 0.032940698, 0.179431119],
            [-0.171459465, -0.017074265, 0.145998357],
            [-0.116927972, 0.040306185, 0.177261995],
            [-0.1368125, 0.024785322, 0.173814478],
        ]
    )
    torch.testing.assert_close(y[0], expected, **PRINTED)
    torch.testing.assert_close(
        state[0, 0], tensor([0.101926371, -0.157164989, -0.331670188]), **PRINTED
    )
    torch.testing.assert_close(state[1, 0], y[0, -1], rtol=0, atol=0)


def test_elman_golden_identity_weights():
    rnn = ElmanRNN(3, 2).double()
    half = 0.5 * torch.eye(3, dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    rnn.load_state_dict(
        {
            f"rnn_units.{i}.{n}": zero if n == "b" else half
            for i in (0, 1)
            for n in ("Wh", "Uh", "b")
        }
    )
    y = rnn(tensor([INPUTS]))[0]
    six_digits = {"atol": 6e-7, "rtol": 0}
    torch.testing.assert_close(y[0], tensor([0.024974, 0.049793, 0.144635]), **six_digits)
    torch.testing.assert_close(y[4], tensor([0.170874, 0.278305, 0.314014]), **six_digits)
    torch.testing.assert_close(y[5], tensor([0.151588, 0.210583, 0.255208]), **six_digits)


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_elman_equals_the_textbook_loop(steps):
    rnn, textbook = ElmanRNN(5, 3).double(), TextbookElman(5, 3).double()
    textbook.load_state_dict(rnn.state_dict())
    x = fill(1, (4, steps, 5), 1.0)
    if steps == 0:
        y, state = rnn.forward_with_state(x)
        assert y.shape == (4, 0, 5)
        assert torch.equal(state, torch.zeros(3, 4, 5, dtype=torch.float64))
        return
    torch.testing.assert_close(rnn(x), textbook(x), rtol=1e-13, atol=1e-14)
    ours = torch.autograd.grad(rnn(x).square().sum(), list(rnn.parameters()))
    theirs = torch.autograd.grad(textbook(x).square().sum(), list(textbook.parameters()))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_elman_chunks_with_carried_state_equal_one_call():
    rnn = golden_elman()
    x = fill(7, (2, 11, 3), 1.0)
    whole, end = rnn.forward_with_state(x)
    parts, state = [], None
    for chunk in x.split([4, 1, 6], dim=1):
        y, state = rnn.forward_with_state(chunk, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(state, end, rtol=1e-14, atol=1e-15)


def test_elman_lengths_equal_rows_run_alone():
    rnn = golden_elman()
    x, h0 = fill(7, (3, 6, 3), 1.0), fill(8, (2, 3, 3))
    lengths = torch.tensor([6, 0, 4])
    y, state = rnn.forward_with_state(x, h0, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, end = rnn.forward_with_state(x[row : row + 1, :length], h0[:, row : row + 1])
        torch.testing.assert_close(y[row, :length], alone[0], rtol=1e-13, atol=1e-15)
        assert y[row, length:].abs().sum() == 0
        torch.testing.assert_close(state[:, row : row + 1], end, rtol=1e-13, atol=1e-15)


def test_elman_gradcheck_with_lengths():
    rnn = golden_elman()
    x = fill(7, (2, 4, 3), 1.0).requires_grad_()
    h0 = fill(8, (2, 2, 3)).requires_grad_()
    lengths = torch.tensor([4, 2])
    assert torch.autograd.gradcheck(
        lambda x, h: rnn.forward_with_state(x, h, lengths), (x, h0), atol=1e-8
    )


def test_elman_names_what_does_not_fit():
    rnn = ElmanRNN(3, 2)
    with pytest.raises(ValueError, match=r"x must be \(B, T, 3\), got \(1, 2, 4\)"):
        rnn(torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match=r"h0 must be \(2, 1, 3\), got \(1, 1, 3\)"):
        rnn(torch.zeros(1, 2, 3), torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match=r"lengths must be \(1,\)"):
        rnn(torch.zeros(1, 2, 3), None, torch.tensor([1, 2]))


def test_hooks_on_units_see_every_step():
    torch.manual_seed(0)
    rnn, lengths = ElmanRNN(5, 2), torch.tensor([3, 0, 4])
    x, h0 = torch.randn(3, 4, 5), torch.randn(2, 3, 5)
    plain, ragged = rnn.forward_with_state(x, h0), rnn.forward_with_state(x, h0, lengths)
    seen = []
    handle = rnn.rnn_units[1].register_forward_hook(lambda unit, args, y: seen.append(y))
    for expected, given in ((plain, None), (ragged, lengths)):
        for found, e in zip(rnn.forward_with_state(x, h0, given), expected, strict=True):
            torch.testing.assert_close(found, e, rtol=0, atol=1e-6)  # of states below 1 in fp32
    assert len(seen) == 8
    torch.testing.assert_close(torch.stack(seen[:4], 1), plain[0], rtol=0, atol=1e-6)
    handle.remove()
    rnn.forward_with_state(x, h0)
    assert len(seen) == 8
    rnn.rnn_units[0].register_forward_hook(lambda unit, args, y: torch.zeros_like(y))
    assert not torch.equal(rnn(x), plain[0])
