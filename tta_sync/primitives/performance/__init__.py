"""Answering faster: the cache."""

from tta_sync.primitives.performance.cache import CachePrimitive as CachePrimitive

__all__ = ["CachePrimitive"]
