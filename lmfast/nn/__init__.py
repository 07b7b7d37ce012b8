"""Layers of recurrent and Transformer language models on the ops of `lmfast.ops`."""

from lmfast.nn.attention import MultiHeadAttention
from lmfast.nn.block import DecoderBlock
from lmfast.nn.cells import GRUCell, LSTMCell, RNNCell
from lmfast.nn.elman import ElmanRNN, ElmanUnit
from lmfast.nn.embedding import Embedding
from lmfast.nn.min_rnn import MinGRU, MinLSTM
from lmfast.nn.mlp import MLP, GeGLU, SwiGLU
from lmfast.nn.norm import RMSNorm
from lmfast.nn.onnx_export import export_onnx
from lmfast.nn.rnn import GRU, LSTM, RNN
from lmfast.nn.rotary import RotaryEmbedding
from lmfast.nn.source_attention import BahdanauAttention, LuongAttention, length_mask
from lmfast.nn.textbook_gru import TextbookGRU
from lmfast.nn.textbook_weights import (
    elman_from_torch,
    elman_to_torch,
    gru_from_textbook,
    gru_to_textbook,
    lstm_from_textbook,
    lstm_to_textbook,
)

__all__ = [
    "GRU",
    "LSTM",
    "MLP",
    "RNN",
    "BahdanauAttention",
    "DecoderBlock",
    "ElmanRNN",
    "ElmanUnit",
    "Embedding",
    "GRUCell",
    "GeGLU",
    "LSTMCell",
    "LuongAttention",
    "MinGRU",
    "MinLSTM",
    "MultiHeadAttention",
    "RMSNorm",
    "RNNCell",
    "RotaryEmbedding",
    "SwiGLU",
    "TextbookGRU",
    "elman_from_torch",
    "elman_to_torch",
    "export_onnx",
    "gru_from_textbook",
    "gru_to_textbook",
    "length_mask",
    "lstm_from_textbook",
    "lstm_to_textbook",
]
