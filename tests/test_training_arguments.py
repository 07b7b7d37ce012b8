"""Arguments of another type: `perplexity`, `evaluate` and `Trainer` name them."""

import pytest
import torch
from torch import nn

from lmfast.models import RecurrentLanguageModel
from lmfast.training import PackedBatches, Trainer, evaluate, perplexity

MODEL = RecurrentLanguageModel(13, 8, 1, 0)
BATCHES = PackedBatches(torch.arange(100) % 13, 8, context=10)


def test_what_evaluation_cannot_use_is_named():
    pair = (torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))
    for args, options, message in (
        ((MODEL, None), {}, r"batches must be an iterable of \(inputs, targets\), got None"),
        ((MODEL, pair[0]), {}, r"batches must be an iterable of \(inputs, targets\), got tensor"),
        ((MODEL, pair), {}, r"batches must give pairs of tensors .*; \[0\] is a Tensor"),
        ((MODEL, [pair, ([1], [2])]), {}, r"batches must give pairs of tensors .*; \[1\] is a tup"),
        ((None, [pair]), {}, "model must be a torch.nn.Module, got NoneType"),
        ((nn.Linear(2, 2), [pair]), {}, "model must have loss.*; Linear has none"),
        ((MODEL, [pair]), {"ignore_index": None}, "ignore_index must be an int, got None"),
    ):
        with pytest.raises(TypeError, match=message):
            perplexity(*args, **options)
    with pytest.raises(TypeError, match="max_batches must be an int, got '3'"):
        evaluate(MODEL, [pair], max_batches="3")
    assert MODEL.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 3.5}, "max_steps must be an int, got 3.5"),
        ({"schedule": "cosine"}, "schedule must be a Schedule or None, got 'cosine'"),
        ({"optimizer": "adam"}, "optimizer must be one of torch.optim or None, got 'adam'"),
        ({"logs": "log.csv"}, "logs must be a list of Log, got 'log.csv'"),
        ({"loss": None}, "loss must be a function of .*, got None"),
        ({"clip_norm": "1"}, "clip_norm must be a number or None, got '1'"),
    ],
)
def test_settings_of_another_type_are_named(options, message):
    with pytest.raises(TypeError, match=message):
        Trainer(MODEL, BATCHES, **{"max_steps": 3, **options})
