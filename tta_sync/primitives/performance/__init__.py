"""Answering faster: the cache, its stores, and the memory of a conversation; each loads at its first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta_sync.primitives.performance.cache import CachePrimitive as CachePrimitive
    from tta_sync.primitives.performance.memory import (
        InMemoryStore as InMemoryStore,
        MemoryPrimitive as MemoryPrimitive,
        create_memory_key as create_memory_key,
    )
    from tta_sync.primitives.performance.stores import (
        CacheBackend as CacheBackend,
        InMemoryBackend as InMemoryBackend,
        RedisBackend as RedisBackend,
    )

_HOME = {
    "CacheBackend": "stores",
    "CachePrimitive": "cache",
    "InMemoryBackend": "stores",
    "InMemoryStore": "memory",
    "MemoryPrimitive": "memory",
    "RedisBackend": "stores",
    "create_memory_key": "memory",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
