"""Layers of recurrent and Transformer language models on the ops of `lmfast.ops`."""

from lmfast.nn.attention import MultiHeadAttention
from lmfast.nn.block import DecoderBlock
from lmfast.nn.elman import ElmanRNN, ElmanUnit
from lmfast.nn.embedding import Embedding
from lmfast.nn.mlp import MLP, GeGLU, SwiGLU
from lmfast.nn.norm import RMSNorm
from lmfast.nn.rnn import GRU, LSTM, RNN
from lmfast.nn.rotary import RotaryEmbedding

__all__ = [
    "GRU",
    "LSTM",
    "MLP",
    "RNN",
    "DecoderBlock",
    "ElmanRNN",
    "ElmanUnit",
    "Embedding",
    "GeGLU",
    "MultiHeadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
]
