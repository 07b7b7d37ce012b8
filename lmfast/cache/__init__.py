"""Keys and values of the tokens seen so far: `lmfast.KVCache` and what it stands on."""

from lmfast.cache.kv_cache import KVCache, LayerCache

__all__ = ["KVCache", "LayerCache"]
