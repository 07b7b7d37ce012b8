"""Every registered op inside torch.func's transforms, on meta tensors and on FakeTensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_all_ops import (
    EVERY_OP,
    OPS,
    differentiable,
    named_arguments,
    outputs,
    samples,
    substituted,
    upstream,
    with_gradients,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from lmfast import _dispatch


@EVERY_OP
def test_functional_transform(op: str) -> None:
    differentiable(op)
    arguments, leaves = with_gradients(op, samples(op, torch.float32)[0])

    def loss(*tensors: Tensor) -> Tensor:
        results = outputs(OPS[op].public(**substituted(arguments, leaves, tensors)))
        return sum((r.float() * upstream(r)).sum() for r in results)

    found = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


@EVERY_OP
def test_forward_mode_derivative(op: str) -> None:
    """A kernel without tangents would give zeros."""
    differentiable(op)
    arguments, leaves = with_gradients(op, samples(op, torch.float32)[0])
    tangents = tuple(upstream(t) for t in leaves)

    def results(*tensors: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
        new = substituted(arguments, leaves, tensors)
        return outputs(OPS[op].public(**new, backend=backend))

    found = torch.func.jvp(results, tuple(leaves), tangents)[1]
    slopes = torch.autograd.grad([r.sum() for r in results(*leaves)], leaves)
    expected = sum((s * t).sum() for s, t in zip(slopes, tangents, strict=True))
    torch.testing.assert_close(sum(f.sum() for f in found), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, tangents, strict=True)]
        for result, tangent in zip(results(*duals), found, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(result).tangent, tangent)
        if "cpu" in OPS[op].implementations:
            with pytest.raises(_dispatch.BackendError, match="cannot run"):
                results(*duals, backend="cpu")


def weights(result: Tensor) -> Tensor:
    """Not random, as ``upstream`` is, which vmap does not allow."""
    return torch.linspace(0.5, -1.5, result.numel()).view(result.shape)


def loss_of(op: str, arguments: dict[str, Any], leaves: list[Tensor]) -> Any:
    def loss(*tensors: Tensor) -> Tensor:
        results = outputs(OPS[op].public(**substituted(arguments, leaves, tensors)))
        return sum((r * weights(r)).sum() for r in results)

    return loss


@EVERY_OP
def test_gradients_of_every_element_of_a_batch(op: str) -> None:
    """``vmap(grad(...))``, which a kernel's autograd function cannot take part in."""
    differentiable(op)
    arguments, leaves = with_gradients(op, samples(op, torch.float32)[0])
    loss, places = loss_of(op, arguments, leaves), tuple(range(len(leaves)))
    batch = [torch.stack((t, t * 0.5)).detach() for t in leaves]
    found = torch.func.vmap(torch.func.grad(loss, places))(*batch)
    values = torch.func.vmap(loss)(*batch)
    for i in range(2):
        row = [t[i].clone().requires_grad_() for t in batch]
        expected = torch.autograd.grad(loss(*row), row)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f[i], e, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values[i], loss(*row), rtol=1e-4, atol=1e-5)


@EVERY_OP
def test_compiled_transforms(op: str) -> None:
    """In a graph being made no tensor says that a transform takes its gradient."""
    differentiable(op)
    arguments, leaves = with_gradients(op, samples(op, torch.float32)[0])
    loss, places = loss_of(op, arguments, leaves), tuple(range(len(leaves)))
    given = [t.detach() for t in leaves]
    torch.compiler.reset()  # every operator's graph is of the same function of torch.func
    slopes = torch.compile(torch.func.grad(loss, places), backend="eager", fullgraph=True)
    for f, e in zip(slopes(*given), torch.func.grad(loss, places)(*given), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
    batch = [torch.stack((t, t * 0.5)) for t in given]
    values = torch.compile(torch.func.vmap(loss), backend="eager", fullgraph=True)(*batch)
    torch.testing.assert_close(values, torch.func.vmap(loss)(*batch), rtol=1e-4, atol=1e-5)


@EVERY_OP
def test_jacobian_and_gradient_of_a_gradient(op: str) -> None:
    """``jacrev`` runs the backward of what it was recorded with, a kernel's, inside vmap."""
    differentiable(op)
    arguments, leaves = with_gradients(op, samples(op, torch.float32)[0])
    loss, places = loss_of(op, arguments, leaves), tuple(range(len(leaves)))
    slopes = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    curved = [s for s in slopes if s.requires_grad]
    given = [t.detach() for t in leaves]
    for f, e in zip(torch.func.jacrev(loss, places)(*given), slopes, strict=True):
        torch.testing.assert_close(f, e.detach(), rtol=1e-4, atol=1e-5)

    def steepness(*tensors: Tensor) -> Tensor:
        return sum(g.square().sum() for g in torch.func.grad(loss, places)(*tensors))

    found = torch.func.grad(steepness, places)(*given)
    expected = [torch.zeros_like(t) for t in leaves]  # of a linear operator
    if curved:
        steep = sum(s.square().sum() for s in curved)
        expected = torch.autograd.grad(steep, leaves, materialize_grads=True)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


@EVERY_OP
def test_shapes_without_values(op: str) -> None:
    """What a model's memory is planned by: tensors on "meta", and FakeTensors."""
    sample = samples(op, torch.float32)[0]
    results = outputs(OPS[op].public(**named_arguments(op, sample)))
    plain = [(r.shape, r.dtype) for r in results]

    def check(arguments: dict[str, Any]) -> None:
        assert [(r.shape, r.dtype) for r in outputs(OPS[op].public(**arguments))] == plain

    check(tree_map_only(Tensor, lambda t: t.to("meta"), named_arguments(op, sample)))
    mode = FakeTensorMode()
    arguments = tree_map_only(Tensor, mode.from_tensor, named_arguments(op, sample))
    with mode:
        check(arguments)
