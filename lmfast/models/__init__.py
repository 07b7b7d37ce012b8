"""Models: a Transformer decoder, recurrent networks, counts, and sequence to sequence."""

from lmfast.models.base import LanguageModel, build_model
from lmfast.models.classifier import SequenceClassifier
from lmfast.models.decoder import DecoderLanguageModel
from lmfast.models.ngram import CountLanguageModel
from lmfast.models.recurrent import RecurrentLanguageModel
from lmfast.models.seq2seq import Seq2Seq, Translation
from lmfast.models.tagger import Tagger

__all__ = [
    "CountLanguageModel",
    "DecoderLanguageModel",
    "LanguageModel",
    "RecurrentLanguageModel",
    "Seq2Seq",
    "SequenceClassifier",
    "Tagger",
    "Translation",
    "build_model",
]
