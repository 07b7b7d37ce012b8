"""Generation: the key/value cache, sampling, and the loop over tokens."""

from lmfast.generation.cache import KVCache
from lmfast.generation.generate import generate
from lmfast.generation.sampling import sample, sampling_probabilities

__all__ = ["KVCache", "generate", "sample", "sampling_probabilities"]
