"""Generation: the key/value cache, sampling, searches, and the loop over tokens."""

from lmfast.cache import KVCache
from lmfast.generation.engine.quantised import QuantisedWeights
from lmfast.generation.generator import Completion, Generator, generate
from lmfast.generation.options import GenerationOptions
from lmfast.generation.prefill import Prefix
from lmfast.generation.quantisation import quantise
from lmfast.generation.running_batch import RunningBatch
from lmfast.generation.sampling import sample, sampling_probabilities

__all__ = [
    "Completion",
    "GenerationOptions",
    "Generator",
    "KVCache",
    "Prefix",
    "QuantisedWeights",
    "RunningBatch",
    "generate",
    "quantise",
    "sample",
    "sampling_probabilities",
]
