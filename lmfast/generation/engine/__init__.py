"""The decoding engine: a model packed once, and one call of C++ per step."""

from lmfast.generation.engine.make import make_engine
from lmfast.generation.engine.plan import CannotPack
from lmfast.generation.engine.runner import EngineRunner

__all__ = ["CannotPack", "EngineRunner", "make_engine"]
