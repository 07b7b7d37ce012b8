"""Embedding: one-hot product, the padding row, sparse gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel
from lmfast.nn import Embedding

TABLE = [[0.2, -0.4, 0.1], [-0.3, 0.8, -0.5], [0.7, 0.1, -0.2], [-0.6, 0.5, 0.4], [0.9, -0.7, 0.3]]


def test_rows_of_the_table():
    embedding = Embedding(5, 3)
    embedding.load_state_dict({"weight": torch.tensor(TABLE)})
    ids = torch.tensor([[0, 2], [4, 0]])
    assert torch.equal(embedding(ids), F.one_hot(ids, 5).float() @ torch.tensor(TABLE))
    padded = Embedding(5, 3, 0)
    padded.load_state_dict({"weight": torch.tensor(TABLE)})
    assert torch.equal(padded(ids)[1], torch.tensor([TABLE[4], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_padding_row_stays_zero(dtype, sparse):
    embedding = Embedding(7, 4, padding_idx=3, sparse=sparse).to(dtype)
    optimizer = torch.optim.SGD(embedding.parameters(), 0.5)
    ids = torch.tensor([[3, 1, 3, 6]])
    for _ in range(2):
        torch.nn.init.normal_(embedding.weight)
        embedding.apply(lambda m: torch.nn.init.normal_(m.weight))
        assert embedding(ids)[0, ::2].abs().sum() == 0
        before = embedding.weight.detach().clone()
        embedding(ids).float().square().sum().backward()
        assert embedding.weight.grad.is_sparse == sparse
        optimizer.step()
        optimizer.zero_grad()
        changed = (embedding.weight != before).any(1)
        assert changed.nonzero().flatten().tolist() == [1, 6]
        assert embedding.weight[3].abs().sum() == 0
    clone = copy.deepcopy(embedding)
    torch.nn.init.ones_(clone.weight)
    assert clone(ids)[0, 0].abs().sum() == 0


def test_two_passes_before_a_backward_with_tied_weights():
    model = DecoderLanguageModel(13, 8, 2, 1, 3, tie_weights=True)
    torch.nn.init.normal_(model.embedding.weight)
    ids, targets = torch.tensor([[1, 3, 2]]), torch.tensor([[3, 4, 5]])
    first, second = model.loss(ids, targets), model.loss(ids, targets)
    (first + second).backward()
    assert model.embedding.weight.grad[3].abs().sum() == 0
    assert model.embedding.weight[3].abs().sum() == 0


@pytest.mark.parametrize("kind", ["decoder", "recurrent"])
def test_models_survive_any_initialisation(kind):
    model = (
        DecoderLanguageModel(11, 8, 2, 1, 2)
        if kind == "decoder"
        else RecurrentLanguageModel(11, 8, 1, 2)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.tensor([[2, 2, 5]])
    with torch.inference_mode():
        model(ids)
    assert model.embedding(ids)[0, :2].abs().sum() == 0
    assert model.embedding(ids)[0, 2].abs().sum() > 0


@pytest.mark.parametrize("make", [DecoderLanguageModel, RecurrentLanguageModel])
def test_ids_that_do_not_fit_are_named(make):
    """The commonest mistake: a tokenizer with more tokens than the model."""
    sizes = (8, 2, 1, 0) if make is DecoderLanguageModel else (8, 1, 0)
    model = make(11, *sizes)
    for ids, got in (([[3, 11]], 11), ([[-1, 3]], -1)):
        for call in (model, lambda x: model.loss(x, x.clamp(0, 1))):
            with pytest.raises(IndexError, match=rf"ids must lie in 0\.\.10, .*, got {got}"):
                call(torch.tensor(ids))
    with pytest.raises(TypeError, match=r"ids must be int64 or int32, got torch\.float32"):
        model(torch.ones(1, 3))
    with pytest.raises(TypeError, match="ids must be a tensor, got list"):
        model.embedding([1, 2])
    with pytest.raises(TypeError, match="vocab_size must be an int, got '11'"):
        make("11", *sizes)
