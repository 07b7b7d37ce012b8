"""Language models: a Transformer decoder, an Elman network, and counts."""

from lmfast.models.base import LanguageModel, build_model
from lmfast.models.decoder import DecoderLanguageModel
from lmfast.models.ngram import CountLanguageModel
from lmfast.models.recurrent import RecurrentLanguageModel

__all__ = [
    "CountLanguageModel",
    "DecoderLanguageModel",
    "LanguageModel",
    "RecurrentLanguageModel",
    "build_model",
]
