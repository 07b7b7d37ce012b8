"""Sizes of layers and models that are no ints, or below 1: told by name, in every constructor."""

import pytest

from lmfast import models, nn
from lmfast.models.textbook import TextbookDecoder

MAKERS = {
    "dim": [nn.RMSNorm, nn.RotaryEmbedding],
    "emb_dim": [
        nn.MLP,
        nn.SwiGLU,
        nn.GeGLU,
        lambda size: nn.MultiHeadAttention(size, 2),
        lambda size: nn.ElmanRNN(size, 2),
        lambda size: models.RecurrentLanguageModel(9, size, 1, 0),
    ],
    "hidden_dim": [lambda size: nn.MLP(8, size), lambda size: nn.SwiGLU(8, size)],
    "num_heads": [
        lambda size: nn.MultiHeadAttention(8, size),
        lambda size: models.DecoderLanguageModel(9, 8, size, 1, 0),
    ],
    "num_blocks": [lambda size: models.DecoderLanguageModel(9, 8, 2, size, 0)],
    "num_layers": [
        lambda size: nn.ElmanRNN(8, size),
        lambda size: models.RecurrentLanguageModel(9, 8, size, 0),
    ],
    "attention_dim": [lambda size: nn.BahdanauAttention(8, 8, size)],
}


@pytest.mark.parametrize(
    ("name", "make"), [(name, make) for name, makers in MAKERS.items() for make in makers]
)
def test_a_size_is_an_int_of_at_least_1(name, make):
    for size in (8.0, "8", None):
        if (name, size) != ("hidden_dim", None):  # the default there
            with pytest.raises(TypeError, match=f"{name} must be an int, got {size!r}"):
                make(size)
    for size in (0, -8):
        with pytest.raises(ValueError, match=f"{name} must be .*at least .*, got {size}"):
            make(size)


def test_textbook_heads_have_pairs():
    """An odd width of a head went through the rotation by broadcasting."""
    with pytest.raises(ValueError, match=r"emb_dim / num_heads must be even.*, got 6 / 2"):
        TextbookDecoder(9, 6, 2, 1, 0)
