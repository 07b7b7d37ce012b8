"""Recurrent language model: count, names, equality with the textbook, steps, initialisation."""

import pytest
import torch
import torch.nn.functional as F

from lmfast.models import RecurrentLanguageModel, build_model
from lmfast.models.textbook import TextbookRecurrent, textbook_loss


def test_parameter_count():
    model = RecurrentLanguageModel(32_011, 128, 2, 0)
    assert model.num_parameters() == 8_292_619


def test_state_dict_names():
    names = list(RecurrentLanguageModel(11, 4, 2, 0).state_dict())
    assert sorted(names) == [
        "embedding.weight", "fc.bias", "fc.weight",
        "rnn.rnn_units.0.Uh", "rnn.rnn_units.0.Wh", "rnn.rnn_units.0.b",
        "rnn.rnn_units.1.Uh", "rnn.rnn_units.1.Wh", "rnn.rnn_units.1.b",
    ]  # fmt: skip


def test_logits_loss_and_gradients_equal_the_textbook():
    torch.manual_seed(0)
    ours = RecurrentLanguageModel(19, 6, 2, 0).double()
    textbook = TextbookRecurrent(19, 6, 2, 0).double()
    textbook.load_state_dict(ours.state_dict())
    ids, targets = torch.randint(0, 19, (3, 7)), torch.randint(0, 19, (3, 7))
    torch.testing.assert_close(ours(ids), textbook(ids), rtol=1e-12, atol=1e-13)
    loss = ours.loss(ids, targets, ignore_index=0)
    expected = textbook_loss(textbook, ids, targets, 0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    theirs = dict(textbook.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-9, atol=1e-13)


def test_loss_is_the_cross_entropy_of_the_logits():
    torch.manual_seed(0)
    model = RecurrentLanguageModel(19, 6, 2, 0)
    ids, targets = torch.randint(0, 19, (3, 7)), torch.randint(0, 19, (3, 7))
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(ids, targets), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [3, 4]])
def test_steps_give_the_logits_of_every_prefix(chunks):
    torch.manual_seed(0)
    model = RecurrentLanguageModel(19, 6, 2, 0).double()
    ids = torch.randint(1, 19, (2, 7))
    full, state, end = model(ids), model.new_state(2), 0
    for part in ids.split(chunks, 1):
        logits, state = model.step(part, state)
        end += part.shape[1]
        torch.testing.assert_close(logits, full[:, end - 1], rtol=1e-12, atol=1e-14)


def test_ragged_step_equals_single_rows():
    torch.manual_seed(0)
    model = RecurrentLanguageModel(19, 6, 2, 0).double()
    ids = torch.tensor([[4, 5, 6], [7, 0, 0]])
    logits, state = model.step(ids, model.new_state(2), torch.tensor([3, 1]))
    logits2, _ = model.step(torch.tensor([[8], [9]]), state)
    with pytest.raises(ValueError, match=r"ids must be \(B, T\)"):
        model.step(torch.tensor([8, 9]), state)
    for row, text in enumerate(([4, 5, 6], [7])):
        torch.testing.assert_close(logits[row], model(torch.tensor([text]))[0, -1])
        longer = torch.tensor([text + [8 + row]])
        torch.testing.assert_close(logits2[row], model(longer)[0, -1])


def test_initialisation():
    torch.manual_seed(0)
    model = RecurrentLanguageModel(500, 32, 2, 7)
    assert model.embedding.weight[7].abs().sum() == 0
    # Standard error of the deviation of 16,000 normal values is 5.6e-3.
    assert abs(model.embedding.weight.std().item() - 1) < 0.03
    bound = (6 / 64) ** 0.5
    assert 0.95 * bound < model.rnn.rnn_units[0].Wh.abs().max() <= bound
    assert all((unit.b == 0).all() for unit in model.rnn.rnn_units)
    model.reset_parameters_legacy()
    biases = torch.stack([unit.b for unit in model.rnn.rnn_units])
    assert 0 <= biases.min() < biases.max() < 1
    assert model.embedding.weight[7].abs().sum() == 0
    assert model.embedding.weight[8].abs().max() <= (6 / 532) ** 0.5


def test_config_makes_an_equal_model():
    model = RecurrentLanguageModel(19, 6, 2, None)
    clone = build_model(model.config)
    clone.load_state_dict(model.state_dict())
    ids = torch.tensor([[0, 1, 2]])
    assert torch.equal(clone(ids), model(ids))
