"""Attention layers over a source sequence against their formulas."""

import pytest
import torch
from golden import fill

from lmfast.nn import BahdanauAttention, LuongAttention, length_mask


def test_bahdanau_gives_the_golden_numbers():
    source = torch.tensor(
        [
            [0.1, 0.2, 0.6],
            [0.2, 0.1, 0.4],
            [0.1, 0.3, 0.3],
            [0, 0.7, 0.1],
            [0.5, 0.2, 0.7],
            [0] * 3,
        ],
        dtype=torch.float64,
    )[None]
    attention = BahdanauAttention(3, 3, 3).double()
    biases = fill(31, (3,)) + fill(33, (3,))
    names = {"query.weight": fill(30, (3, 3)), "key.weight": fill(32, (3, 3)), "key.bias": biases}
    attention.load_state_dict({**names, "v": fill(34, (3,))})
    query = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)
    expected = torch.tensor([[0.153516463, 0.253105041, 0.355326681]], dtype=torch.float64)
    context, _ = attention(query, source)
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-9)
    keys = attention.project(source)
    masked, weights = attention(
        query[:, None], source, keys=keys, mask=length_mask(torch.tensor([5]), 6)
    )
    expected = torch.tensor([[[0.182235134, 0.300453971, 0.421798444]]], dtype=torch.float64)
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-9)
    assert weights.shape == (1, 1, 6)


@pytest.mark.parametrize("score", ["dot", "general", "scaled"])
def test_luong_is_its_formula(score):
    attention = LuongAttention(5, 7 if score == "general" else 5, score)
    source, query = torch.randn(2, 6, 7 if score == "general" else 5), torch.randn(2, 3, 5)
    weight = torch.eye(5) if attention.weight is None else attention.weight
    scores = torch.einsum("btq,qd,bsd->bts", query, weight, source)
    if score == "scaled":
        scores = scores / 5**0.5
    mask = length_mask(torch.tensor([4, 0]), 6)
    expected = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1).nan_to_num(0)
    context, weights = attention(query, source, mask=mask)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(context, expected @ source)
    assert (context[1] == 0).all()
    fused, none = attention(query, source, mask=mask, need_weights=False)
    assert none is None
    torch.testing.assert_close(fused, context, rtol=1e-5, atol=1e-6)
    one, _ = attention(query[:, 1], source, mask=mask)
    torch.testing.assert_close(one, context[:, 1])
    if score == "general":
        weight.grad = None
        context.square().sum().backward()
        assert weight.grad.isfinite().all()


def test_under_autocast():
    attention = BahdanauAttention(5, 7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        context, weights = attention(torch.randn(2, 5), torch.randn(2, 6, 7))
    assert context.dtype == weights.dtype == torch.bfloat16


def test_hooks_on_the_query_are_called():
    attention = BahdanauAttention(4, 3, 8)
    query, source = torch.randn(2, 5, 4), torch.randn(2, 6, 3)
    expected, seen = attention(query, source), []
    handle = attention.query.register_forward_hook(lambda layer, args, y: seen.append(y))
    for f, e in zip(attention(query, source), expected, strict=True):
        torch.testing.assert_close(f, e)
    torch.testing.assert_close(seen, [query @ attention.query.weight.t()])
    handle.remove()
    attention.query.register_forward_hook(lambda layer, args, y: y + 1)
    assert not torch.allclose(attention(query, source)[1], expected[1])


def test_errors():
    with pytest.raises(ValueError, match="source_dim must be query_dim"):
        LuongAttention(4, 5, "dot")
    with pytest.raises(ValueError, match="score must be one of"):
        LuongAttention(4, 4, "cosine")
    with pytest.raises(ValueError, match="attention_dim must be at least 1"):
        BahdanauAttention(4, 4, 0)
    with pytest.raises(ValueError, match="query must be"):
        LuongAttention(4, 4, "dot")(torch.zeros(2, 5), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="mask must be"):
        LuongAttention(4, 4, "dot")(torch.zeros(2, 4), torch.zeros(2, 3, 4), mask=torch.ones(2, 4))
