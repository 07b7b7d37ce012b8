"""Attention layer: golden values, per-head layout, masks, groups and the cache."""

import copy

import pytest
import torch
from golden import fill
from op_checks import LargestTensor

from lmfast.cache import KVCache
from lmfast.nn import MultiHeadAttention, RotaryEmbedding
from lmfast.nn.attend import attend, is_causal_mask

PRINTED = {"atol": 6e-10, "rtol": 0}


def written_out(q, k, v, visible):
    """softmax(q k^T / sqrt(D)) v over the visible keys, zeros where there is none."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1).nan_to_num(0.0)
    return weights @ v


def golden_qkv():
    return tuple(fill(n, (1, 1, 4, 6), 1.0) for n in (60, 61, 62))


def test_attend_golden():
    out = attend(*golden_qkv())[0, 0]
    row1 = [-0.739180697, -0.131471354, 0.53807102, 0.954550186, 0.922089485, 0.45595569]
    row4 = [-0.525708258, -0.20289355, 0.215345166, 0.532303685, 0.598911464, 0.383841823]
    torch.testing.assert_close(out[0], torch.tensor(row1, dtype=torch.float64), **PRINTED)
    torch.testing.assert_close(out[3], torch.tensor(row4, dtype=torch.float64), **PRINTED)


@pytest.mark.parametrize("start", [0, 1])
def test_attend_after_rotation_golden(start):
    q, k, v = golden_qkv()
    q, k = RotaryEmbedding(6)(q, k, start)
    row4 = [-0.420060379, -0.28294458, -0.012755523, 0.263432655, 0.415724339, 0.372494371]
    # fp32 tables: 6e-8 per cosine.
    torch.testing.assert_close(
        attend(q, k, v)[0, 0, 3], torch.tensor(row4, dtype=torch.float64), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (3, 7), (5, 5), (7, 7)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend_queries_are_the_last_positions(queries, keys, kv_heads):
    q = fill(1, (2, 4, queries, 6), 1.0)
    k, v = fill(2, (2, kv_heads, keys, 6), 1.0), fill(3, (2, kv_heads, keys, 6), 1.0)
    visible = torch.arange(keys) <= (keys - queries + torch.arange(queries))[:, None]
    expected = written_out(q, k, v, visible)
    torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-12, atol=1e-14)


def test_attend_offset_per_row():
    q, k, v = fill(1, (2, 2, 3, 4), 1.0), fill(2, (2, 2, 9, 4), 1.0), fill(3, (2, 2, 9, 4), 1.0)
    offsets = torch.tensor([6, 1])
    visible = torch.arange(9) <= (offsets[:, None] + torch.arange(3))[:, None, :, None]
    expected = written_out(q, k, v, visible)
    torch.testing.assert_close(attend(q, k, v, q_offset=offsets), expected, rtol=1e-12, atol=1e-14)


def test_attend_query_without_a_key_gives_zeros_and_no_gradient():
    q, k, v = (fill(n, (1, 2, 3, 4), 1.0).requires_grad_() for n in (1, 2, 3))
    mask = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 1]])
    out = attend(q, k, v, mask=mask)
    torch.testing.assert_close(out, written_out(q, k, v, mask.bool()), rtol=1e-12, atol=1e-14)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert out[:, :, 0].abs().sum() == 0
    assert grads[0][:, :, 0].abs().sum() == 0
    assert all(torch.isfinite(grad).all() for grad in grads)


def reference_attention(layer, x, visible):
    """The layer from its state dict, one head at a time."""
    state = layer.state_dict()
    groups = layer.num_heads // layer.num_kv_heads
    heads = []
    for h in range(layer.num_heads):
        q = (x @ state[f"heads.{h}.W_Q"])[:, None]
        k = (x @ state[f"heads.{h // groups}.W_K"])[:, None]
        v = (x @ state[f"heads.{h // groups}.W_V"])[:, None]
        q, k = layer.rope(q, k)
        heads.append(written_out(q, k, v, visible)[:, 0])
    return torch.cat(heads, -1) @ state["W_O"]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, None), (4, 2, None), (4, 1, 6)])
def test_layer_equals_its_heads_one_by_one(heads, kv_heads, head_dim):
    torch.manual_seed(0)
    layer = MultiHeadAttention(16, heads, num_kv_heads=kv_heads, head_dim=head_dim).double()
    x = fill(1, (2, 7, 16), 1.0)
    visible = torch.ones(7, 7).tril().bool()
    torch.testing.assert_close(
        layer(x), reference_attention(layer, x, visible), rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_layer_takes_a_lower_triangular_mask(dtype):
    layer = MultiHeadAttention(8, 2)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x, torch.ones(5, 5).tril().to(dtype)), layer(x))


def test_other_square_masks_are_told_from_the_causal_one_by_their_edges():
    t = 64
    causal = torch.ones(t, t).tril().bool()
    padded = causal.clone()
    padded[:, :3] = False
    for mask in (causal.tril().triu(-7), torch.ones(t, t).bool(), padded, ~causal, causal.t()):
        with LargestTensor() as largest:
            assert not is_causal_mask(mask)
        assert largest.elements <= t
    assert is_causal_mask(causal)
    causal[40, 3] = False
    assert not is_causal_mask(causal)


def test_layer_takes_any_mask():
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 2).double()
    x = fill(1, (2, 4, 8), 1.0)
    mask = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]])
    expected = reference_attention(layer, x, mask.bool())
    torch.testing.assert_close(layer(x, mask), expected, rtol=1e-11, atol=1e-13)
    batched = mask.expand(2, 4, 4)
    torch.testing.assert_close(layer(x, batched), expected, rtol=1e-11, atol=1e-13)
    with pytest.raises(ValueError, match="mask must have 2, 3 or 4 dimensions"):
        layer(x, mask[0])


@pytest.mark.parametrize("window", [None, 3])
def test_layer_with_cache_takes_a_mask_of_rows_of_different_length(window):
    torch.manual_seed(0)
    layer = MultiHeadAttention(32, 4, window=window)
    x, token = torch.randn(2, 4, 32), torch.randn(2, 1, 32)
    results = []
    mask = torch.tensor([[[1, 1, 1, 1, 1]], [[1, 1, 1, 0, 0]]])
    for given in (None, mask):
        cache = KVCache(1, 2, 4, 8)
        with torch.no_grad():
            layer(x, cache=cache.layer(0, counts=[4, 2]))
            results.append(layer(token, given, cache=cache.layer(0)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_layer_with_cache_reads_nothing_behind_a_row():
    torch.manual_seed(0)
    layer = MultiHeadAttention(32, 4)
    x, token = torch.randn(2, 4, 32), torch.randn(2, 1, 32)
    mask = torch.tensor([[[1, 1, 1, 1, 1]], [[1, 0, 1, 0, 0]]])
    results = []
    for value in (0.0, float("nan")):
        x[1, 2:] = value
        cache = KVCache(1, 2, 4, 8)
        with torch.no_grad():
            layer(x, cache=cache.layer(0))
            cache.truncate([4, 2])
            results.append(layer(token, mask, cache=cache.layer(0)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_layer_refuses_a_mask_where_the_cache_keeps_a_window():
    layer = MultiHeadAttention(32, 4, window=3)
    cache = KVCache(1, 1, 4, 8, window=3)
    with torch.no_grad(), pytest.raises(ValueError, match="whose layer 0 keeps only the last 3"):
        layer(torch.zeros(1, 2, 32), torch.ones(2, 2), cache.layer(0))
    assert cache.longest == 0
    with torch.no_grad():
        layer(torch.zeros(1, 2, 32), torch.ones(2, 2).tril(), cache.layer(0))
    assert cache.longest == 2


def test_layer_refuses_a_mask_that_would_be_added():
    layer, x = MultiHeadAttention(8, 2), torch.randn(1, 3, 8)
    added = torch.full((3, 3), float("-inf")).triu(1)
    with pytest.raises(ValueError, match=r"must hold only 1 .* got -inf; .* give mask == 0"):
        layer(x, added)
    torch.testing.assert_close(layer(x, added == 0), layer(x))


def test_window_of_a_mask_has_two_sides():
    layer, x = MultiHeadAttention(8, 2, window=2).double(), torch.randn(1, 5, 8).double()
    band = torch.ones(5, 5).tril(1).triu(-1)
    torch.testing.assert_close(
        layer(x, torch.ones(5, 5)), reference_attention(layer, x, band.bool())
    )


def test_state_dict_is_per_head_and_lossless():
    torch.manual_seed(0)
    layer = MultiHeadAttention(12, 3, num_kv_heads=1)
    state = layer.state_dict()
    assert list(state) == [
        "heads.0.W_Q", "heads.1.W_Q", "heads.2.W_Q", "heads.0.W_K", "heads.0.W_V", "W_O",
    ]  # fmt: skip
    other = MultiHeadAttention(12, 3, num_kv_heads=1)
    other.load_state_dict(state)
    assert torch.equal(other.W_QKV, layer.W_QKV)
    assert torch.equal(other.W_O, layer.W_O)
    packed = {"W_QKV": layer.W_QKV.detach() * 2, "W_O": layer.W_O.detach()}
    other.load_state_dict(packed)
    assert torch.equal(other.state_dict()["heads.1.W_Q"], 2 * state["heads.1.W_Q"])
    assert torch.equal(copy.deepcopy(layer).state_dict()["heads.2.W_Q"], state["heads.2.W_Q"])


def test_loading_a_wrong_state_dict_names_the_entry():
    layer = MultiHeadAttention(12, 3)
    state = dict(layer.state_dict())
    del state["heads.1.W_K"]
    with pytest.raises(RuntimeError, match=r"Missing key.*heads\.1\.W_K") as error:
        layer.load_state_dict(state)
    assert "Unexpected" not in str(error.value)
    state = dict(layer.state_dict())
    state["heads.1.W_V"] = torch.zeros(12, 5)
    with pytest.raises(RuntimeError, match=r"heads\.1\.W_V must have shape \(12, 4\)"):
        layer.load_state_dict(state)
    state = dict(layer.state_dict())
    state["heads.3.W_Q"] = torch.zeros(12, 4)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*heads\.3\.W_Q"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [3, 1, 1, 2]])
def test_layer_with_cache_equals_one_call(chunks):
    torch.manual_seed(0)
    layer = MultiHeadAttention(16, 4, num_kv_heads=2).double()
    x = fill(1, (3, 7, 16), 1.0)
    cache = KVCache(1, 3, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        parts = [layer(part, cache=cache.layer(0)) for part in x.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=1e-11, atol=1e-13)
    assert cache.lengths.tolist() == [7, 7, 7]


def test_layer_rejects_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="emb_dim 10 must be a multiple of num_heads 4"):
        MultiHeadAttention(10, 4)
    with pytest.raises(ValueError, match="num_heads 4 must be a multiple of num_kv_heads 3"):
        MultiHeadAttention(12, 4, num_kv_heads=3)
    with pytest.raises(ValueError, match="dim must be even"):
        MultiHeadAttention(12, 4)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"softcap": -1}, ValueError, "softcap must be positive, got -1"),
        ({"window": 2.5}, TypeError, "window must be int or None, got float"),
        ({"scale": "a"}, TypeError, "scale must be a float, got str"),
        ({"head_dim": -8}, ValueError, "head_dim must be at least 1, got -8"),
    ],
)
def test_layer_rejects_options(option, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttention(8, 2, **option)


def test_layer_rejects_inputs_of_another_kind():
    layer, x = MultiHeadAttention(8, 2), torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match=r"x must be \(B, T, 8\), got \(3, 8\)"):
        layer(x[0])
    with pytest.raises(TypeError, match=r"positions must be an int .*, got 1\.5"):
        layer(x, positions=1.5)
    with pytest.raises(TypeError, match=r"cache must be one layer of a KVCache, cache\.layer\(i\)"):
        layer(x, cache=KVCache(1, 1, 2, 4))
