"""Key/value cache: contents, growth, per-row lengths, row operations, errors."""

import pytest
import torch

from lmfast.generation import KVCache


def numbered(batch, heads, steps, dim, start=0):
    count = batch * heads * steps * dim
    return torch.arange(start, start + count, dtype=torch.float32).view(batch, heads, steps, dim)


@pytest.mark.parametrize("max_length", [None, 300])
def test_append_returns_everything_so_far(max_length):
    cache = KVCache(2, 3, 2, 4, max_length=max_length)
    k, v = numbered(3, 2, 200, 4), numbered(3, 2, 200, 4, start=7)
    end = 0
    for steps in (1, 60, 4, 1, 134):
        part = slice(end, end + steps)
        end += steps
        for layer in range(2):
            keys, values = cache.append(layer, k[:, :, part] + layer, v[:, :, part])
            assert torch.equal(keys, k[:, :, :end] + layer)
            assert torch.equal(values, v[:, :, :end])
        assert cache.lengths.tolist() == [end] * 3
    assert cache.longest == 200


def test_growth_doubles_and_keeps_the_contents():
    cache = KVCache(1, 1, 1, 2)
    stores = set()
    for step in range(500):
        keys, _ = cache.append(0, torch.full((1, 1, 1, 2), float(step)), torch.zeros(1, 1, 1, 2))
        stores.add(keys.untyped_storage().data_ptr())
    assert torch.equal(keys[0, 0, :, 0], torch.arange(500.0))
    assert len(stores) <= 4  # 64, 128, 256, 512


def test_rows_of_different_length():
    cache = KVCache(1, 2, 1, 2)
    cache.append(0, numbered(2, 1, 5, 2), numbered(2, 1, 5, 2))
    cache.truncate([5, 2])
    assert cache.offset.tolist() == [5, 2]
    new = torch.full((2, 1, 2, 2), -1.0)
    keys, _ = cache.append(0, new, new)
    assert cache.lengths.tolist() == [7, 4]
    assert keys.shape[2] == 7
    first = numbered(2, 1, 5, 2)
    assert torch.equal(keys[0, :, :7], torch.cat((first[0], new[0]), 1))
    assert torch.equal(keys[1, :, :4], torch.cat((first[1, :, :2], new[1]), 1))


def test_truncate_reset_reorder_fork():
    cache = KVCache(1, 3, 1, 2)
    k = numbered(3, 1, 4, 2)
    cache.append(0, k, k)
    cache.truncate(3)
    assert cache.lengths.tolist() == [3, 3, 3]
    cache.truncate(torch.tensor([3, 1, 2]))
    copy = cache.fork(2)
    assert copy.lengths.tolist() == [3, 3, 1, 1, 2, 2]
    cache.reorder([2, 2, 0])
    assert cache.lengths.tolist() == [2, 2, 3]
    cache.truncate(2)
    keys, _ = cache.append(0, k[:, :, :1], k[:, :, :1])
    assert torch.equal(keys[:, :, :2], k[[2, 2, 0], :, :2])
    copy.truncate(1)
    keys, _ = copy.append(0, torch.zeros(6, 1, 1, 2), torch.zeros(6, 1, 1, 2))
    assert torch.equal(keys[:, :, :1], k[[0, 0, 1, 1, 2, 2], :, :1])
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]
    assert cache.offset == 0
    cache.reorder([1])
    assert cache.batch == 1


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        KVCache(1, 1, 1, 0)
    cache = KVCache(2, 1, 1, 2, max_length=3)
    one = torch.zeros(1, 1, 1, 2)
    with pytest.raises(ValueError, match="layer 0 is the next to append, got layer 1"):
        cache.append(1, one, one)
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.1, got 2"):
        cache.append(2, one, one)
    with pytest.raises(ValueError, match=r"k must be \(1, 1, T, 2\), got \(1, 2, 1, 2\)"):
        cache.append(0, torch.zeros(1, 2, 1, 2), one)
    with pytest.raises(ValueError, match="v must have the shape of k"):
        cache.append(0, one, torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="the cache is full: 4 tokens, max_length is 3"):
        cache.append(0, torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    with pytest.raises(ValueError, match="keeps no gradients"):
        cache.append(0, one.clone().requires_grad_(), one)
    with pytest.raises(ValueError, match="row 0 has 0 tokens, not 2"):
        cache.truncate([2])
    with pytest.raises(ValueError, match="lengths must have 1 entries, got 2"):
        cache.truncate([0, 0])
    with pytest.raises(ValueError, match="lengths must not be negative"):
        cache.truncate(-1)
    with pytest.raises(IndexError, match=r"rows must be in 0\.\.0, got \[1\]"):
        cache.reorder([1])
    with pytest.raises(ValueError, match="copies must be at least 1"):
        cache.fork(0)
