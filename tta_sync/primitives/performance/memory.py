"""What a conversation remembers: small records by key, found again by key or by a word. Source: TTA.dev."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import Any

from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.performance import codec, keys, snapshots
from tta_sync.primitives.performance.snapshots import Snapshot
from tta_sync.primitives.performance.stores import Guard
from tta_sync.primitives.performance.wire import Oversized, RedisDown, Refused

_MAX_BYTES = 1 << 20  # of one record in Redis


class InMemoryStore(Guard):
    """Keep the last *max_size* records, the least recently used first out; everybody gets copies, on any thread."""

    def __init__(self, max_size: int = 1000) -> None:
        super().__init__()
        self._max_size = _size("max_size", max_size)
        self._records: OrderedDict[str, Snapshot] = OrderedDict()  # guarded by the lock

    def add(self, key: str, value: Any) -> None:
        """Remember *value* under *key*, in place of what was there.

        Raises:
            ConfigurationError: *value* cannot be copied.
        """
        snapshot = snapshots.take(value)
        if snapshot is None:
            raise ConfigurationError(f"a {type(value).__qualname__} cannot be copied: remember plain values")
        with self.lock:
            self._records[key] = snapshot
            self._records.move_to_end(key)
            while len(self._records) > self._max_size:
                self._records.popitem(last=False)

    def get(self, key: str) -> Any | None:
        """Return what is remembered under *key*, None if there is nothing; it counts as used."""
        with self.lock:
            snapshot = self._records.get(key)
            if snapshot is not None:
                self._records.move_to_end(key)
        return None if snapshot is None else snapshot.copy()

    def search(self, query: str, limit: int = 5) -> list[Any]:
        """Return at most *limit* records whose key or text holds *query*, whatever the case; the latest used first."""
        with self.lock:
            records = list(reversed(self._records.items()))
        return _matching(((key, snapshot.copy()) for key, snapshot in records), query, limit)

    def discard(self, key: str) -> None:
        """Forget *key*, if there is such a record."""
        with self.lock:
            self._records.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        with self.lock:
            self._records.clear()

    def size(self) -> int:
        """Return how many records there are."""
        return len(self._records)


class MemoryPrimitive:
    """Remember records in Redis, where all processes see them; in this process's memory while there is no Redis.

    What is remembered while Redis is away stays in this process. Nothing here raises because of Redis.

    Args:
        redis_url: where Redis is; None for memory only.
        max_size: records kept; the least recently used goes first.
        enable_redis: False to keep to this process's memory in spite of a URL.
    """

    def __init__(
        self, redis_url: str | None = None, max_size: int = 1000, enable_redis: bool = True, *, prefix: str = "tta:"
    ) -> None:
        self._local = InMemoryStore(max_size)
        self._max_size = max_size
        self._shared: _RedisStore | None = None
        if redis_url is not None and enable_redis:
            self._shared = _RedisStore(redis_url, max_size, prefix)

    async def add(self, key: str, value: Any) -> None:
        """Remember *value* under *key*, in place of what was there.

        Raises:
            ConfigurationError: *value* cannot be copied, or, with Redis, not be carried by JSON.
        """
        if self._shared is not None and await self._shared.add(key, value):
            self._local.discard(key)
        else:
            self._local.add(key, value)

    async def get(self, key: str) -> Any | None:
        """Return what is remembered under *key*, None if there is nothing; it counts as used."""
        if self._shared is not None:
            found, value = await self._shared.get(key)
            if found:
                return value
        return self._local.get(key)

    async def search(self, query: str, limit: int = 5) -> list[Any]:
        """Return at most *limit* records whose key or text holds *query*, whatever the case; the latest used first."""
        if self._shared is not None:
            found = _matching(await self._shared.records(), query, limit)
            return found + self._local.search(query, limit - len(found))
        return self._local.search(query, limit)

    async def clear(self) -> None:
        """Forget everything, in all processes."""
        self._local.clear()
        if self._shared is not None:
            await self._shared.clear()

    def size(self) -> int:
        """Return how many records there are, in Redis as of this process's last look."""
        return self._shared.size if self._shared is not None and self._shared.works else self._local.size()

    def is_using_redis(self) -> bool:
        """Say whether Redis answered the last time that it was asked."""
        return self._shared is not None and self._shared.works


_ADD = """
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
local n = redis.call('INCR', KEYS[3])
redis.call('ZADD', KEYS[2], n, ARGV[1])
local over = redis.call('ZCARD', KEYS[2]) - tonumber(ARGV[3])
if over > 0 then
  local gone = redis.call('ZRANGE', KEYS[2], 0, over - 1)
  for i = 1, #gone do redis.call('HDEL', KEYS[1], gone[i]) end
  redis.call('ZREMRANGEBYRANK', KEYS[2], 0, over - 1)
end
return redis.call('ZCARD', KEYS[2])
"""
_GET = """
local value = redis.call('HGET', KEYS[1], ARGV[1])
if value then redis.call('ZADD', KEYS[2], redis.call('INCR', KEYS[3]), ARGV[1]) end
return {value, redis.call('ZCARD', KEYS[2])}
"""
_ALL = """
local answer = {}
local names = redis.call('ZREVRANGE', KEYS[2], 0, -1)
for i = 1, #names do
  answer[#answer + 1] = names[i]
  answer[#answer + 1] = redis.call('HGET', KEYS[1], names[i])
end
return answer
"""


class _RedisStore:
    """A hash of records, and a sorted set of when each was used last."""

    def __init__(self, url: str, max_size: int, prefix: str) -> None:
        from tta_sync.primitives.performance.in_redis import seam

        self._endpoint = seam().endpoint(url)
        base = f"{prefix}{keys.SCHEMA}:#:memory:"
        self._names = (f"{base}records", f"{base}used", f"{base}clock")
        self._max_size = max_size
        self._codec = codec.Codec(None, _MAX_BYTES, 1024)
        self.works = False
        self.size = 0

    async def _ask(self, *parts: bytes | str | int) -> Any:
        """Return the answer, None where there is none."""
        try:
            answer = await self._endpoint.link.ask(*parts)
        except (RedisDown, Refused, Oversized):
            self.works = False
            return None
        self.works = True
        return answer

    async def add(self, key: str, value: Any) -> bool:
        encoded = codec.encode(value)
        if encoded is None:
            raise ConfigurationError(f"JSON cannot carry this {type(value).__qualname__}: remember plain values")
        blob = self._codec.seal(
            key.encode(),
            encoded,
            identity=b"",
            created=0.0,
            fresh_until=0.0,
            expires_at=0.0,
            cost=0.0,
            versions=(),
        )
        if blob is None:
            raise ConfigurationError(f"a record of {len(encoded[1])} bytes is too large: {_MAX_BYTES} is the most")
        answer = await self._ask("EVAL", _ADD, 3, *self._names, key, blob, self._max_size)
        self.size = answer or self.size
        return answer is not None

    async def get(self, key: str) -> tuple[bool, Any]:
        answer = await self._ask("EVAL", _GET, 3, *self._names, key)
        if answer is None:
            return False, None
        blob, self.size = answer
        return self._open(key, blob)

    async def records(self) -> list[tuple[str, Any]]:
        answer = await self._ask("EVAL", _ALL, 3, *self._names)
        if answer is None:
            return []
        self.size = len(answer) // 2
        found = []
        for name, blob in zip(answer[::2], answer[1::2], strict=True):
            key = name.decode(errors="replace")
            good, value = self._open(key, blob)
            if good:
                found.append((key, value))
        return found

    async def clear(self) -> None:
        if await self._ask("DEL", *self._names) is not None:
            self.size = 0

    def _open(self, key: str, blob: bytes | None) -> tuple[bool, Any]:
        if blob is None:
            return False, None
        try:
            return True, self._codec.value(self._codec.open(key.encode(), blob))
        except codec.Undecodable:
            return False, None


def _matching(records: Any, query: str, limit: int) -> list[Any]:
    wanted = query.casefold()
    found: list[Any] = []
    for key, value in records:
        if len(found) >= limit:
            break
        if wanted in key.casefold() or wanted in str(value).casefold():
            found.append(value)
    return found


def _size(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(f"{name}={value!r}: give a whole number above 0")
    return value


def create_memory_key(user_id: str, session_id: str, context: dict[str, Any] | None = None) -> str:
    """Return ``user:session``, with eight digits for *context* where there is one; a colon inside a part is escaped.

    Raises:
        ConfigurationError: *context* holds something of which no key can be made.
    """
    parts = [part.replace("%", "%25").replace(":", "%3A") for part in (user_id, session_id)]
    if context:
        parts.append(blake2b(keys.canonical(context, "context").encode(), digest_size=4).hexdigest())
    return ":".join(parts)
