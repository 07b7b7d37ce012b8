"""Key/value cache: contents, growth, lengths, rows, sharing, windows, memory, errors."""

import copy

import pytest
import torch

from lmfast import ops
from lmfast.cache._window import ROLLBACK, columns_for
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
    with pytest.raises(ValueError, match="rows must be at least the batch 2, got 1"):
        KVCache(1, 2, 1, 2, rows=1)
    with pytest.raises(TypeError, match=r"dtype must be one of .*, got torch\.int64"):
        KVCache(1, 1, 1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="window must be at least 1 or None, got 0"):
        KVCache(1, 1, 1, 2, window=0)
    with pytest.raises(ValueError, match="window must have 2 entries, got 1"):
        KVCache(2, 1, 1, 2, window=[4])
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
    with pytest.raises(ValueError, match="length must be from 0 to the source's 0, got 1"):
        KVCache(1, 2, 1, 2).share_prefix(0, [1], 1)
    with pytest.raises(ValueError, match="row 0 cannot be source and target"):
        KVCache(1, 2, 1, 2).share_prefix(0, [0, 1], 0)
    with pytest.raises(ValueError, match=r"counts must be 1 numbers from 0 to T = 1, got \[2\]"):
        cache.append(0, one, one, counts=[2])
    with pytest.raises(ValueError, match='padding must be "right" or "left"'):
        cache.append(0, one, one, counts=[1], padding="middle")


@pytest.mark.parametrize(
    "given",
    [{"batch": True}, {"batch": 2.0}, {"window": 1.5}, {"max_length": 2.5}, {"head_dim": 2.0}],
)
def test_sizes_must_be_integers(given):
    sizes = {"num_layers": 1, "batch": 2, "num_kv_heads": 1, "head_dim": 2} | given
    (name, value), *_ = given.items()
    with pytest.raises(TypeError, match=f"{name} must be an integer, got {value}"):
        KVCache(**sizes)


def test_rows_lengths_and_counts_must_be_integers():
    cache = KVCache(1, 2, 1, 2)
    k = torch.zeros(2, 1, 3, 2)
    with pytest.raises(TypeError, match=r"every entry of counts must be an integer, got 1\.5"):
        cache.append(0, k, k, counts=[1.5, 3])
    with pytest.raises(ValueError, match='padding must be "right" or "left", got \'x\''):
        cache.append(0, k, k, padding="x")
    with pytest.raises(TypeError, match=r"k must have a floating-point dtype, got torch\.int64"):
        cache.append(0, k.long(), k)
    cache.append(0, k, k)
    with pytest.raises(TypeError, match=r"every entry of lengths must be an integer, got 1\.5"):
        cache.truncate([1.5, 1])
    with pytest.raises(TypeError, match="lengths must be a sequence or 1-d tensor of integers"):
        cache.truncate(1.5)
    for rows in (torch.tensor([1.0, 0.0]), torch.tensor([True, False])):
        with pytest.raises(TypeError, match="every entry of rows must be an integer"):
            cache.reorder(rows)
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.0, got 3"):
        cache.attend(3, k)
    cache.truncate(9)
    assert cache.lengths.tolist() == [3, 3]
    cache.truncate(torch.tensor([1, 2]))
    assert cache.lengths.tolist() == [1, 2]


def test_a_step_in_progress():
    cache = KVCache(2, 1, 1, 2, window=[3, None])
    one, two = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 2, 2)
    cache.append(0, one, one)
    assert cache.lengths.tolist() == [0]
    with pytest.raises(ValueError, match="k must have the 1 tokens of this step's first layer"):
        cache.append(1, two, two)
    with pytest.raises(ValueError, match="layer 1 is the next to append, got layer 0"):
        cache.append(0, one, one)
    with pytest.raises(ValueError, match="layer 1 has not appended the tokens of this step"):
        cache.attend(1, one)
    with pytest.raises(ValueError, match="layer 0 keeps the last 3 tokens, which is less than"):
        cache.attend(0, one, window=4)
    assert torch.equal(cache.attend(0, one), one)
    cache.truncate(0)
    for layer in range(2):
        cache.append(layer, two, two)
    assert cache.lengths.tolist() == [2]


def test_reordering_copies_blocks_and_not_the_cache():
    cache = KVCache(2, 4, 2, 8, max_length=1000)
    k = torch.randn(4, 2, 901, 8)
    for layer in range(2):
        cache.append(layer, k, k)
    before = cache.memory()
    assert before.used == 2 * 2 * 4 * 2 * 901 * 8 * 4
    assert before.allocated == 2 * 2 * 4 * 2 * 1000 * 8 * 4
    places = [t.data_ptr() for s in cache._groups[0].pool.storage.values() for t in s.tensors()]
    cache.reorder([2, 2, 2, 0])
    # One row's 901 tokens are there three times, and counted once.
    assert cache.memory() == (before.allocated, before.used // 2)
    one = torch.zeros(4, 2, 1, 8)
    for layer in range(2):
        cache.append(layer, one, one)
    # Two of the three took copies of the last block, 5 tokens, and all got one token more.
    per_token = 2 * 2 * 2 * 8 * 4
    assert cache.memory().used == before.used // 2 + (2 * 5 + 4) * per_token
    assert cache.memory().allocated == before.allocated
    for s in cache._groups[0].pool.storage.values():
        for t in s.tensors():
            assert t.data_ptr() == places.pop(0)


def test_a_fork_takes_rows_only_when_it_goes_on():
    one = torch.zeros(1, 1, 1, 2)
    cache = KVCache(1, 1, 1, 2, max_length=256)
    cache.append(0, one.expand(1, 1, 100, 2), one.expand(1, 1, 100, 2))
    allocated = cache.memory().allocated
    beams = cache.fork(3)
    assert beams.memory().allocated == allocated
    beams.append(0, one.expand(3, 1, 1, 2), one.expand(3, 1, 1, 2))
    assert beams.memory().allocated == 4 * allocated
    # The block of the first 64 tokens is shared, the second exists three times.
    assert beams.memory().used == (64 + 3 * 37) * 2 * 2 * 4
    reserved = KVCache(1, 1, 1, 2, max_length=256, rows=4)
    reserved.append(0, one, one)
    beams = reserved.fork(3)
    beams.append(0, one.expand(3, 1, 1, 2), one.expand(3, 1, 1, 2))
    assert beams.memory().allocated == reserved.memory().allocated == 4 * allocated


def test_rows_that_stopped_sharing_lie_in_their_places_again():
    cache = KVCache(1, 2, 1, 2)
    k = numbered(2, 1, 70, 2)
    cache.append(0, k, k)
    beams = cache.fork()
    keys, _ = cache.append(0, k[:, :, :1], k[:, :, :1])
    assert keys.data_ptr() != cache._groups[0].pool.storage[0].keys.data_ptr()
    del beams
    cache.truncate(70)
    keys, _ = cache.append(0, k[:, :, :1], k[:, :, :1])
    assert keys.data_ptr() == cache._groups[0].pool.storage[0].keys.data_ptr()
    assert torch.equal(keys[:, :, :70], k)


def test_copies_share_nothing():
    cache = KVCache(1, 1, 1, 2)
    k = numbered(1, 1, 3, 2)
    cache.append(0, k, k)
    twin = cache.fork()
    alone = copy.deepcopy(twin)
    assert len(alone._groups[0].pool.users) == 1
    alone.append(0, k, k)
    twin.append(0, -k, -k)
    assert torch.equal(alone.contents(0)[0], torch.cat((k, k), 2))
    assert torch.equal(twin.contents(0)[0], torch.cat((k, -k), 2))


def test_int8_takes_a_quarter_and_a_scale():
    cache = KVCache(1, 2, 3, 16, dtype=torch.int8, max_length=10)
    k = torch.randn(2, 3, 4, 16)
    keys, values = cache.append(0, k, 2 * k)
    assert keys.dtype == torch.float32
    step = k.abs().amax(-1, keepdim=True) / 127
    assert ((keys - k).abs() <= step * 0.501).all()
    assert ((values - 2 * k).abs() <= 2 * step * 0.501).all()
    assert cache.memory() == (2 * 2 * 3 * 10 * (16 + 4), 2 * 2 * 3 * 4 * (16 + 4))
    assert cache.contents(0, torch.float16)[0].dtype == torch.float16


def test_a_window_bounds_the_memory():
    window = 20
    cache = KVCache(1, 2, 1, 4, window=window)
    allocated = cache.memory().allocated
    assert allocated == 2 * 2 * columns_for(window) * 4 * 4
    k = numbered(2, 1, 1000, 4)
    for step in range(400):
        keys, _ = cache.append(0, k[:, :, step : step + 1], k[:, :, step : step + 1])
        first = cache.first(0).tolist()
        assert first[0] == first[1] <= max(0, step + 1 - window)
        assert torch.equal(keys, k[:, :, first[0] : step + 1])
    assert cache.memory().allocated == allocated
    cache.truncate(400 - ROLLBACK)
    with pytest.raises(ValueError, match="row 0 cannot go back to 3 tokens: with a window of 20"):
        cache.truncate([3, 384])
    # A chunk longer than the storage is kept as long as its layer needs it.
    keys, _ = cache.append(0, k[:, :, 384:], k[:, :, 384:])
    assert torch.equal(keys[:, :, -616 - window :], k[:, :, 384 - window :])
    cache.append(0, k[:, :, :1], k[:, :, :1])
    assert cache.memory().allocated == allocated
    keys, _ = cache.contents(0)
    assert torch.equal(keys[:, :, -window:-1], k[:, :, 1 - window :])
    cache.reset()
    assert cache.append(0, k[:, :, :2], k[:, :, :2])[0].shape[2] == 2


def test_an_interrupted_long_step_of_a_window_must_be_reset():
    cache = KVCache(2, 1, 1, 2, window=4)
    k = numbered(1, 1, 300, 2)
    for layer in range(2):
        cache.append(layer, k[:, :, :5], k[:, :, :5])
    cache.append(0, k, k)
    for forbidden in (lambda: cache.truncate(5), cache.fork, lambda: cache.reorder([0, 0])):
        with pytest.raises(ValueError, match="what they held is lost: reset the cache"):
            forbidden()
    cache.reset()
    for layer in range(2):
        keys, _ = cache.append(layer, k[:, :, :5], k[:, :, :5])
        assert torch.equal(keys, k[:, :, :5])


@pytest.mark.parametrize("window", [None, 4])
def test_a_refused_step_changes_nothing(window):
    cache = KVCache(2, 1, 1, 2, window=window)
    k = numbered(1, 1, 300, 2)
    for layer in range(2):
        cache.append(layer, k[:, :, :5], k[:, :, :5])
    for bad in (k[:, :, :299], k.double(), k.clone().requires_grad_()):
        with pytest.raises((ValueError, TypeError)):
            cache.append(0, k, bad)
        assert torch.equal(cache.contents(0)[0], k[:, :, :5])
        assert torch.equal(cache.attend(0, k[:, :, 5:6]), cache.attend(1, k[:, :, 5:6]))
    for layer in range(2):
        keys, _ = cache.append(layer, k[:, :, 5:], k[:, :, 5:])
        assert torch.equal(keys, k)


def test_a_window_that_always_fits_is_kept_whole_and_shared():
    cache = KVCache(1, 2, 1, 4, window=20, max_length=100)
    k = torch.randn(2, 1, 50, 4)
    cache.append(0, k, k)
    q = torch.randn(2, 1, 1, 4)
    seen = torch.softmax(q @ k[:, :, 30:].mT / 2, -1) @ k[:, :, 30:]
    torch.testing.assert_close(cache.attend(0, q), seen)
    cache.reorder([0, 0])
    assert cache.memory().used == 2 * 50 * 4 * 4


def test_an_empty_batch():
    cache = KVCache(1, 0, 1, 4)
    none = torch.zeros(0, 1, 3, 4)
    keys, _ = cache.append(0, none, none)
    assert keys.shape[0] == 0
    assert cache.attend(0, none).shape == none.shape
    cache.reorder([])
    assert list(cache.add_rows(2)) == [0, 1]
    keys, _ = cache.append(0, torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
    assert keys.sum() == 24


@pytest.mark.gpu
def test_the_same_on_a_gpu_and_no_step_waits_for_it():
    cos, sin = ops.rope_tables(300, 8)
    caches = [KVCache(2, 3, 2, 8, window=[None, 20], device=d) for d in ("cpu", "cuda")]
    results = []
    for cache in caches:
        device = cache.device
        tables, found = (cos.to(device), sin.to(device)), []
        generator = torch.Generator().manual_seed(0)
        for step, (steps, counts) in enumerate([(9, [9, 1, 4]), (1, None), (1, None), (200, None)]):
            new = torch.randn(2, 3, 8, steps, 8, generator=generator).to(device)
            for layer in range(2):
                q, k, v = new[layer].split([4, 2, 2], dim=1)
                if step > 0:
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    q = cache.rope_append(layer, q, k, v, *tables, counts=counts)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                out = cache.attend(layer, q).cpu()
                found += [out[b, :, : None if counts is None else counts[b]] for b in range(3)]
            cache.reorder([1, 1, 0])
        results.append(found)
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-5)
