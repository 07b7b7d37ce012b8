"""rope_append: against rope and a plain copy, int8 storage, strided storage, threads, errors."""

from __future__ import annotations

import pytest
import torch

from lmfast import ops
from lmfast.ops.rope_append import quantised

BACKENDS = pytest.mark.parametrize("backend", ["torch", "cpu"])


def new_tokens(dtype=torch.float32, batch=2, heads=4, kv_heads=2, steps=3, dim=24):
    """q, k and v as views of one packed projection, as attention layers have them."""
    total = heads + 2 * kv_heads
    packed = torch.randn(batch, steps, total * dim).to(dtype)
    split = packed.view(batch, steps, total, dim).transpose(1, 2)
    return split.split([heads, kv_heads, kv_heads], dim=1)


@BACKENDS
@pytest.mark.parametrize("interleaved", [True, False])
def test_is_rope_and_two_copies(backend, interleaved, cpu_isa):
    q, k, v = new_tokens()
    cos, sin = ops.rope_tables(64, 16)
    starts = torch.tensor([40, 7])
    rotated_q, rotated_k = ops.rope(
        q, k, cos, sin, positions=starts, interleaved=interleaved, backend=backend
    )
    before = k.clone()
    # Storage rows 2 and 0 of a strided view, row 1 left alone.
    room = torch.full((2, 3, 2, 50, 2 * 24), 7.0)
    keys, values = room[..., :24].unbind(0)
    slots = torch.tensor([2 * 50 + 40 + t for t in range(3)] + [7 + t for t in range(3)])
    result = ops.rope_append(
        q, k, v, keys, values, slots, cos, sin,
        positions=starts, interleaved=interleaved, backend=backend,
    )  # fmt: skip
    assert result is q
    assert torch.equal(q, rotated_q)
    assert torch.equal(k, before)
    for stored, expected in ((keys, rotated_k), (values, v)):
        assert torch.equal(stored[2, :, 40:43], expected[0])
        assert torch.equal(stored[0, :, 7:10], expected[1])
        stored[2, :, 40:43] = stored[0, :, 7:10] = 7.0
    assert (room == 7.0).all(), "wrote elsewhere"


@BACKENDS
def test_padding_is_not_stored(backend):
    q, k, v = new_tokens()
    storage = torch.zeros(2, 2, 2, 4, 24)
    ops.rope_append(
        q, k, v, *storage, torch.tensor([1, 4, 5]), tokens=torch.tensor([2, 3, 4]), backend=backend
    )
    for stored, given in zip(storage, (k, v), strict=True):
        assert torch.equal(stored[0, :, 1], given[0, :, 2])
        assert torch.equal(stored[1, :, 0:2], given[1, :, 0:2])
        assert stored.count_nonzero() == 3 * 2 * 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotary", [24, 10, None])
def test_int8_is_the_references_and_near(dtype, rotary, cpu_isa):
    q, k, v = new_tokens(dtype)
    k[0, 0, 1] = 0.0
    k[1, 1, 2] = 1e-35
    v[0, 1, 0, 5] = torch.nan
    v[1, 0, 1, 3] = -torch.inf
    tables = () if rotary is None else ops.rope_tables(9, rotary)
    exact = k.double()
    if rotary is not None:
        exact, _ = ops.rope(exact, exact, *tables)
    found = []
    for backend in ("cpu", "torch"):
        storage = torch.full((2, 2, 2, 6, 24), 99, dtype=torch.int8)
        scales = torch.full((2, 2, 2, 6), 99.0)
        where = torch.tensor([0, 1, 2, 6, 7, 8])
        ops.rope_append(
            q.clone(), k, v, *storage, where, *tables,
            key_scales=scales[0], value_scales=scales[1], backend=backend,
        )  # fmt: skip
        found.append((storage[..., :3, :], scales[..., :3]))
        assert (storage[..., 3:, :] == 99).all()
        assert (scales[..., 3:] == 99).all()
    (codes, scales), (plain_codes, plain_scales) = found
    torch.testing.assert_close(scales, plain_scales, rtol=1e-6, atol=0, equal_nan=True)
    # A product on the border between two codes may fall on either side.
    assert (codes.int() - plain_codes.int()).abs().max() <= 1
    assert (codes != plain_codes).float().mean() < 0.01
    restored = codes.double() * scales[..., None].double()
    # Half a step of 1/127 of the largest number of the vector.
    error = (restored[0] - exact).abs()
    assert (error <= exact.abs().amax(-1, keepdim=True) / 254 * (1 + 1e-5) + 1e-30).all()
    assert restored[1, 0, 1, 0].isnan().all()
    assert restored[1, 1, 0, 1].isnan().all()
    assert restored[1].isnan().sum() == 2 * 24
    assert codes[0, 0, 0, 1].count_nonzero() == codes[0, 1, 1, 2].count_nonzero() == 0


def test_quantised_uses_the_whole_range():
    codes, scales = quantised(torch.tensor([[-2.0, 1.0, 0.5, 2.0]]))
    assert codes.tolist() == [[-127, 64, 32, 127]]
    assert scales.item() == pytest.approx(2 / 127)


@pytest.mark.parametrize("store_as", [torch.bfloat16, torch.float16])
def test_keys_are_rounded_once(store_as, cpu_isa):
    q, k, v = new_tokens()
    cos, sin = ops.rope_tables(3, 24)
    keys, values = torch.zeros(2, 2, 2, 3, 24, dtype=store_as).unbind(0)
    ops.rope_append(q, k, v, keys, values, torch.arange(6), cos, sin, backend="cpu")
    exact, _ = ops.rope(k.double(), k.double(), cos, sin)
    unit = torch.exp2(exact.abs().log2().floor()) * torch.finfo(store_as).eps
    assert ((keys.double() - exact).abs() <= unit * 0.5001 + 1e-6).all()
    assert torch.equal(values, v.to(store_as))


def test_same_for_any_number_of_threads(needs_cpu_kernels):
    q, k, v = new_tokens(torch.float32, 2, 8, 4, 130, 64)
    cos, sin = ops.rope_tables(130, 64)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            storage, scales = (
                torch.zeros(2, 2, 4, 130, 64).to(torch.int8),
                torch.zeros(2, 2, 4, 130),
            )
            mine = q.clone()
            ops.rope_append(
                mine, k, v, *storage, torch.arange(260), cos, sin,
                key_scales=scales[0], value_scales=scales[1], backend="cpu",
            )  # fmt: skip
            found.append((mine, storage, scales))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_errors_name_the_argument():
    q, k, v = new_tokens()
    keys, values = torch.zeros(2, 2, 2, 5, 24).unbind(0)
    slots = torch.arange(6)
    with pytest.raises(TypeError, match="k must have q's dtype"):
        ops.rope_append(q, k.double(), v, keys, values, slots)
    with pytest.raises(ValueError, match="k must agree with q in B, T and D"):
        ops.rope_append(q[:, :, :2], k, v, keys, values, slots)
    with pytest.raises(ValueError, match="v must have the shape of k"):
        ops.rope_append(q, k, v[:, :1], keys, values, slots)
    with pytest.raises(ValueError, match=r"keys must have shape \(R, 2, C, 24\)"):
        ops.rope_append(q, k, v, keys[:, :1], values[:, :1], slots)
    with pytest.raises(
        TypeError, match=r"keys must be float32, .*int8 or float8_e4m3fn, got torch\.int64"
    ):
        ops.rope_append(q, k, v, keys.long(), values.long(), slots)
    with pytest.raises(ValueError, match="key_scales is for int8 storage, and needed there"):
        ops.rope_append(q, k, v, keys.to(torch.int8), values.to(torch.int8), slots)
    with pytest.raises(ValueError, match="key_scales is for int8 storage"):
        ops.rope_append(q, k, v, keys, values, slots, key_scales=torch.zeros(2, 2, 5))
    with pytest.raises(TypeError, match=r"slots must be an int64 tensor, got torch\.int32"):
        ops.rope_append(q, k, v, keys, values, slots.int())
    with pytest.raises(ValueError, match=r"slots must have shape \(6,\), one per token"):
        ops.rope_append(q, k, v, keys, values, slots[:5])
    with pytest.raises(ValueError, match=r"tokens must have shape \(6,\)"):
        ops.rope_append(q, k, v, keys, values, slots, tokens=slots[:2])
    with pytest.raises(ValueError, match="cos and sin must both be given, or neither"):
        ops.rope_append(q, k, v, keys, values, slots, torch.zeros(3, 12))
    with pytest.raises(ValueError, match="rope_append has no gradient"):
        ops.rope_append(q, k.clone().requires_grad_(), v, keys, values, slots)


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("wrong", [-1, 10])
def test_a_slot_outside_the_storage_is_an_error_and_nothing_is_written(wrong, backend):
    q, k, v = new_tokens()
    before = q.clone()
    keys, values = torch.zeros(2, 2, 2, 5, 24).unbind(0)
    slots = torch.tensor([0, 1, 2, 3, 4, wrong])
    tables = ops.rope_tables(8, 24)
    with pytest.raises(ValueError, match=rf"slots must lie in 0\.\.9, got {wrong}"):
        ops.rope_append(q, k, v, keys, values, slots, *tables, backend=backend)
    with pytest.raises(ValueError, match=r"tokens must lie in 0\.\.5, got 6"):
        ops.rope_append(
            q, k, v, keys, values, slots[:1], *tables, tokens=torch.tensor([6]), backend=backend
        )
    assert torch.equal(q, before)
    assert not keys.any()


@pytest.mark.parametrize("backend", [None, "torch"])
def test_tensors_written_to_must_not_be_expanded(backend):
    q, k, v = new_tokens()
    keys, values = torch.zeros(2, 2, 2, 5, 24).unbind(0)
    tables = ops.rope_tables(8, 24)
    heads = q[:, :1].expand(-1, 4, -1, -1)
    with pytest.raises(ValueError, match="q is written to, and must not be expanded"):
        ops.rope_append(heads, k, v, keys, values, torch.arange(6), *tables, backend=backend)
    rows = values[:1].expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="values is written to, and must not be expanded"):
        ops.rope_append(q, k, v, keys, rows, torch.arange(6), *tables, backend=backend)
