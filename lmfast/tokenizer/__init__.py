"""Byte-pair encoding: training, encoding, decoding, and the file formats of others."""

from .model import Model
from .streaming import Appender, StreamDecoder
from .tokenizer import BPETokenizer
from .training import WordCounts, count_words

__all__ = ["Appender", "BPETokenizer", "Model", "StreamDecoder", "WordCounts", "count_words"]
