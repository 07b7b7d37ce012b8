"""decode_attention: equal to its two parts, through tables and int8, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lmfast import ops
from lmfast.ops.decode_attention import OP, launch, slots_of


def inputs(batch: int = 2, heads: int = 4, kv_heads: int = 2, steps: int = 1, dim: int = 16) -> Any:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(batch, heads, steps, dim, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, steps, dim, generator=generator).unbind()
    keys, values = torch.randn(2, 3, kv_heads, 150, dim, generator=generator).unbind()
    return q, k, v, keys, values


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("int8", [False, True])
def test_is_append_and_attend(backend: str | None, int8: bool) -> None:
    q, k, v, keys, values = inputs(steps=2)
    table = torch.tensor([[0, 2, 1], [1, 0, 7]], dtype=torch.int32)
    lengths = torch.tensor([140, 66])
    cos, sin = ops.rope_tables(150, 16)
    scales: dict[str, Tensor] = {}
    if int8:
        keys, values = (t.mul(40).to(torch.int8) for t in (keys, values))
        shape = keys.shape[:3]
        scales = {"key_scales": torch.full(shape, 0.02), "value_scales": torch.full(shape, 0.03)}
    expected_storage = [keys.clone(), values.clone(), *(s.clone() for s in scales.values())]
    columns = [138, 139, 64, 65]
    slots = torch.tensor([150 * r + c for r, c in zip([1, 1, 0, 0], columns, strict=True)])
    rotated = ops.rope_append(
        *(q.clone(), k, v, *expected_storage[:2], slots, cos, sin),
        positions=lengths - 2,
        backend=backend,
        **dict(zip(scales, expected_storage[2:], strict=True)),
    )
    expected = ops.cached_attention(
        *(rotated, *expected_storage[:2], lengths),
        table=table,
        window=90,
        backend=backend,
        **dict(zip(scales, expected_storage[2:], strict=True)),
    )
    before = q.clone()
    out = ops.decode_attention(
        *(q, k, v, keys, values, lengths, cos, sin),
        table=table,
        window=90,
        backend=backend,
        **scales,
    )
    assert torch.equal(q, before)
    assert torch.equal(out, expected)
    for found, wanted in zip([keys, values, *scales.values()], expected_storage, strict=True):
        assert torch.equal(found, wanted)


def test_a_token_at_a_time_is_the_whole_at_once() -> None:
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(1, 4, 70, 16, generator=generator)
    k, v = torch.randn(2, 1, 2, 70, 16, generator=generator).unbind()
    keys, values = torch.zeros(2, 1, 2, 70, 16).unbind()
    cos, sin = ops.rope_tables(70, 16)
    rotated_q, rotated_k = ops.rope(q, k, cos, sin)
    expected = ops.attention(rotated_q, rotated_k, v)
    lengths = torch.zeros(1, dtype=torch.int64)
    for t in range(70):
        lengths += 1
        new = (x[:, :, t : t + 1] for x in (q, k, v))
        out = ops.decode_attention(*new, keys, values, lengths, cos, sin)
        # Sums of at most 70 terms of size one in fp32.
        torch.testing.assert_close(out, expected[:, :, t : t + 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(keys, rotated_k)


def test_the_operator_of_the_kernel_takes_what_the_checks_return() -> None:
    """Its schema, with tensors that have no values: the kernel itself needs a GPU."""
    for dtype in (torch.float32, torch.bfloat16):
        for sample in OP.sample_inputs("cpu", dtype):
            args = OP.check(*sample.args, **sample.kwargs)
            with FakeTensorMode(allow_non_fake_inputs=True):
                out = launch(*args)
            assert (out.shape, out.dtype) == (args[0].shape, dtype)


def test_tokens_without_a_place_get_no_slot() -> None:
    keys = torch.zeros(3, 1, 100, 4)
    assert slots_of(torch.tensor([2, 1, 101]), 2, keys, None).tolist() == [0, 1, -1, 100, 299, -1]
    table = torch.tensor([[2, 0], [3, -1], [0, 1]], dtype=torch.int32)
    assert slots_of(torch.tensor([65, 70, 64]), 2, keys, table).tolist() == [
        263,
        64,
        -1,
        -1,
        62,
        63,
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(2, 2, 2, 16)}, ValueError, r"k must have shape .*\(2, 2, 1, 16\), got"),
        ({"v": torch.zeros(2, 2, 1, 16).half()}, TypeError, "v must have q's dtype"),
        ({"lengths": torch.tensor([0, 3])}, ValueError, r"lengths must lie in 1..40, .*\[0, 3\]"),
        ({"lengths": torch.tensor([1, 41])}, ValueError, r"lengths must lie in 1..40"),
        ({"sin": None}, ValueError, "cos and sin must both be given"),
        ({"keys": torch.zeros(1, 1, 1, 16).expand(2, 2, 150, 16)}, ValueError, "expanded"),
        ({"k": torch.zeros(2, 2, 1, 16, requires_grad=True)}, ValueError, "no gradient"),
        ({"key_scales": torch.ones(3, 2, 150)}, ValueError, "key_scales is for int8 storage"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v, keys, values = inputs()
    cos, sin = ops.rope_tables(40, 16)
    call = {"q": q, "k": k, "v": v, "keys": keys[:2], "values": values[:2], "cos": cos, "sin": sin}
    with pytest.raises(error, match=message):
        ops.decode_attention(**{**call, "lengths": torch.tensor([3, 9]), **change})
