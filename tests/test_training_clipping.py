"""Bounded gradients: dense, sparse, by number and by norm, and no waiting for a device."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lmfast.models import RecurrentLanguageModel
from lmfast.training import PackedBatches, Trainer
from lmfast.training.clipping import clip_gradients

V = 13


def text():
    return torch.randint(1, V, (400,), generator=torch.Generator().manual_seed(0))


def parameters(*, sparse):
    """A table of which rows 1 and 3 were used, 1 twice, and a matrix."""
    embedding = nn.Embedding(5, 3, sparse=sparse)
    matrix = nn.Parameter(torch.arange(6.0).view(3, 2))
    unused = nn.Parameter(torch.zeros(2))
    with torch.no_grad():
        embedding.weight.copy_(torch.arange(15.0).view(5, 3))
    (embedding(torch.tensor([1, 3, 1])) @ matrix).square().sum().backward()
    return [embedding.weight, matrix, unused]


@pytest.mark.parametrize("norm", [None, 0.5, 1e9])
@pytest.mark.parametrize("value", [None, 100.0])
def test_sparse_gradients_are_bounded_as_dense_ones(norm, value):
    dense, sparse = parameters(sparse=False), parameters(sparse=True)
    if value is not None:
        nn.utils.clip_grad_value_(dense, value)
    expected = None if norm is None else nn.utils.clip_grad_norm_(dense, norm)
    total = clip_gradients(sparse, norm=norm, value=value)
    if norm is None:
        assert total is None
    else:
        torch.testing.assert_close(total, expected)
    assert sparse[0].grad.is_sparse
    for a, b in zip(sparse[:2], dense):
        torch.testing.assert_close(a.grad.to_dense(), b.grad)
    assert sparse[2].grad is None
    again = parameters(sparse=False)
    clip_gradients(again, norm=norm, value=value)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(again[:2], dense))


def test_a_sparse_embedding_learns_as_a_dense_one():
    torch.manual_seed(0)
    dense = RecurrentLanguageModel(V, 16, 1, 0)
    sparse = copy.deepcopy(dense)
    sparse.embedding.sparse = True
    losses = []
    for model in (dense, sparse):
        trainer = Trainer(
            model,
            PackedBatches(text(), 8, context=10),
            max_steps=6,
            optimizer=torch.optim.SGD(model.parameters(), 0.5),
            clip_norm=0.3,
            clip_value=0.1,
            accumulate=2,
            progress=False,
        )
        losses.append(trainer.fit().losses)
    assert sparse.embedding.weight.grad.is_sparse
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # another order of summation
    for a, b in zip(dense.parameters(), sparse.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Reads(TorchDispatchMode):
    """Notes where numbers that were computed are looked at."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_clipped_step_does_not_wait_for_the_device():
    """Reading a number is what waits; on a GPU losses are read once in ten steps."""
    torch.manual_seed(0)

    def loss(model, x, y, ignore_index):
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=ignore_index)

    model = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V))
    batches = PackedBatches(text(), 8, context=10)
    trainer = Trainer(
        model, batches, max_steps=25, loss=loss, clip_norm=0.1, clip_value=1.0, progress=False
    )
    stepper = trainer._stepper
    stepper.settles_at_once = False  # as on a GPU
    with Reads() as reads:
        steps = [stepper.step(n, batches, trainer.optimizer) for n in range(1, 6)]
        assert reads.count == 0
        stepper.settle(steps)
    assert all(step.settled and step.norm > 0 for step in steps)
    with Reads() as reads:
        steps[0].loss.item()
    assert reads.count == 1
