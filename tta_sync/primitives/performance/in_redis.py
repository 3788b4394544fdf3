"""The layer of a cache that lives in Redis, shared by processes and machines.

Keys, all below the store's prefix (``tta:``) and the schema's number:

===================================================  =========================================================
``<tenant>:<namespace>:<version>:<digest>``          one result, see :mod:`tta_sync.primitives.performance.codec`
the same and ``:lock``                               the token of the process that computes it
``#:<namespace>:<version>:epoch``                    a counter; clearing the cache is one step of it
``#:<namespace>:<version>:tag:<tag>``                a counter per tag; invalidating the tag is one step of it
``#:<namespace>:<version>:news``                     how many invalidations there were; also the channel for them
===================================================  =========================================================

A result carries the counters' values of the moment when its computation began, and counts only while they are the same.
Counters begin at the microsecond of their creation, so one that Redis evicted never comes back to an old value.

A computation is begun under a lock, and its result is stored by one script that first asks whether the lock is still
its own and whether no counter has moved: a writer whose lock has expired, or whose key was invalidated meanwhile, is
refused.
"""

from __future__ import annotations

import asyncio
import importlib
import math
import os
import re
from collections.abc import Callable, Coroutine
from hashlib import sha1
from typing import TYPE_CHECKING, Any, TypeVar

from tta_sync.clock import SYSTEM_CLOCK
from tta_sync.context import WorkflowContext, cut_off
from tta_sync.exceptions import ConfigurationError, WouldDeadlockError
from tta_sync.primitives.core.base import WorkflowPrimitive
from tta_sync.primitives.performance import codec
from tta_sync.primitives.performance.codec import OVERHEAD, Codec, Undecodable
from tta_sync.primitives.performance.flights import Flight
from tta_sync.primitives.performance.shared import Bypass, Lease, SharedLayer
from tta_sync.primitives.performance.stores import RedisBackend
from tta_sync.primitives.performance.wire import Endpoint, Link, Oversized, RedisDown, Refused

if TYPE_CHECKING:
    from tta_sync.primitives.performance.cache import CachePrimitive

T = TypeVar("T")

LOCK_LIFE = 5.0  # seconds; renewed at a third of it
_FORGET_LIMIT = 1.0  # seconds for an invalidation, which may not be skipped
_PART_OF_REMAINING = 0.1  # of the time that a call has left, for one question to Redis
_MAX_SWEEPS = 1000
_MAX_PLAIN = 8 * 2**20  # bytes of a value of a RedisBackend without a cache


class Script:
    """A Lua script, sent by its digest; by its text where the server does not know it yet."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def run(
        self,
        link: Link,
        names: tuple[bytes | str, ...],
        *arguments: bytes | str | int,
        limit: float | None = None,
        force: bool = False,
    ) -> Any:
        rest = (len(names), *names, *arguments)
        try:
            return await link.ask("EVALSHA", self.digest, *rest, limit=limit, force=force)
        except Refused as error:
            if error.code != "NOSCRIPT":
                raise
        return await link.ask("EVAL", self.text, *rest, limit=limit, force=force)


_ACQUIRE = Script("""
-- KEYS: lock, result, counters; ARGV: token, lock ms, first value of a counter, largest result, seen result, counter ms
local size = 0
if redis.call('TYPE', KEYS[2]).ok == 'string' then size = redis.call('STRLEN', KEYS[2]) end
if size > tonumber(ARGV[4]) then redis.call('DEL', KEYS[2]) size = 0 end
local answer = {'lock'}
if size > 0 then
  local result = redis.call('GET', KEYS[2])
  if string.sub(result, 1, #ARGV[5]) ~= ARGV[5] or #ARGV[5] == 0 then answer = {'result', result} end
end
if answer[1] == 'lock' and not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return {'busy'} end
for i = 3, #KEYS do
  if answer[1] == 'lock' then
    if not redis.call('SET', KEYS[i], ARGV[3], 'NX') then
      local left = redis.call('PTTL', KEYS[i])
      if left >= 0 and left < tonumber(ARGV[6]) then redis.call('PEXPIRE', KEYS[i], ARGV[6]) end
    elseif i > 3 then
      redis.call('PEXPIRE', KEYS[i], ARGV[6])
    end
  end
  answer[#answer + 1] = redis.call('GET', KEYS[i])
end
return answer
""")

_STORE = Script("""
-- KEYS: lock, result, counters; ARGV: token, result, ms, the counters' values
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
for i = 3, #KEYS do
  if redis.call('GET', KEYS[i]) ~= ARGV[i + 1] then return 0 end
end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return 1
""")

_RENEW = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
""")

_RELEASE = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
""")

_FORGET = Script("""
-- KEYS: news, then result and lock of each result to drop, or counters to step; ARGV: how, message, first number
if ARGV[1] == 'drop' then
  for i = 2, #KEYS do redis.call('DEL', KEYS[i]) end
else
  for i = 2, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 1 then redis.call('INCR', KEYS[i]) end
  end
end
redis.call('SET', KEYS[1], ARGV[3], 'NX')
redis.call('INCR', KEYS[1])
-- As text: Lua's own numbers have too few digits.
redis.call('PUBLISH', KEYS[1], redis.call('GET', KEYS[1]) .. ' ' .. ARGV[2])
""")


class LockLease(Lease):
    """The lock of one computation, renewed until it ends (loop thread only)."""

    def __init__(self, link: Link, lock: bytes, token: bytes, versions: tuple[int, ...]) -> None:
        self.link, self.lock, self.token, self.versions = link, lock, token, versions
        self._timer: asyncio.TimerHandle | None = None
        self._arm()

    def _arm(self) -> None:
        self._timer = self.link.loop.call_later(LOCK_LIFE / 3, self._renew)

    def _renew(self) -> None:
        # The answer does not matter: a lock that was lost is noticed when the result is stored.
        self.link.post("EVAL", _RENEW.text, 1, self.lock, self.token, int(LOCK_LIFE * 1000))
        self._arm()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def release(self) -> None:
        self.stop()
        release(self.link, self.lock, self.token)


def release(link: Link, lock: bytes, token: bytes) -> None:
    """Give a lock back if it is still *token*'s; nobody waits for Redis here."""
    link.post("EVAL", _RELEASE.text, 1, lock, token)


class RedisLayer(SharedLayer):
    """Answer from Redis, or compute once for all processes that ask at the same time."""

    label = "redis"

    def __init__(self, cache: CachePrimitive[Any, Any], storage: Any, claim: Callable[[dict[Any, Any]], str]) -> None:
        self._endpoint, prefix = resolve(storage)
        super().__init__(cache, prefix, claim(self._endpoint.claims))
        bounds = self._endpoint.bounds
        bounds.max_bytes = max(bounds.max_bytes, 2 * cache.max_value_bytes)
        self._epoch = f"{self._control}epoch".encode()
        self._tag = f"{self._control}tag:"
        self._news = f"{self._control}news".encode()
        self._last_news: int | None = None

    def _counters(self, tags: frozenset[str]) -> tuple[bytes, ...]:
        if not tags:
            return (self._epoch,)
        return (self._epoch, *(f"{self._tag}{tag}".encode(errors="surrogatepass") for tag in sorted(tags)))

    def trail(self, data: Any, context: WorkflowContext) -> frozenset[str]:
        """Return the tags that a memory above this layer needs, to hear of invalidations here."""
        cache = self._cache
        key = self.key(cache.known(data, context), context.tenant)
        return cache.tags_for(data, context) | {_trace(key)}

    def _limit(self, context: WorkflowContext) -> float | None:
        """Return the seconds that Redis has for an answer, None for the common limit."""
        cut = cut_off(context)
        if cut is None:
            return None
        part = _PART_OF_REMAINING * (cut - context.clock.monotonic())
        return None if part >= self._endpoint.bounds.limit else max(part, 0.001)

    # ---- asking Redis ------------------------------------------------------------------------------------------------

    async def _read(
        self, key: bytes, tags: frozenset[str], context: WorkflowContext
    ) -> tuple[bytes | None, list[bytes | None]]:
        try:
            blob, *versions = await self._endpoint.link.ask(
                "MGET", key, *self._counters(tags), limit=self._limit(context)
            )
        except (RedisDown, Refused, Oversized) as error:
            raise _bypass(error) from None
        return blob, versions

    async def _attempt(
        self, key: bytes, tags: frozenset[str], seen: bytes, context: WorkflowContext
    ) -> Lease | tuple[bytes, list[bytes | None]] | None:
        cache, link = self._cache, self._endpoint.link
        lock, token = key + b":lock", os.urandom(12).hex().encode()
        try:
            answer, *parts = await _ACQUIRE.run(
                link,
                (lock, key, *self._counters(tags)),
                token,
                int(LOCK_LIFE * 1000),
                _first(),
                self._codec.max_bytes + OVERHEAD,
                seen,
                math.ceil((cache.ttl + cache.stale_if_error + cache.max_wait + 60.0) * 1000),
                limit=self._limit(context),
            )
        except BaseException as error:
            # The command may be on its way, and get the lock after all.
            release(link, lock, token)
            if isinstance(error, (RedisDown, Refused, Oversized)):
                raise _bypass(error) from None
            raise
        if answer == b"lock":
            return LockLease(link, lock, token, tuple(map(int, parts)))
        return None if answer == b"busy" else (parts[0], parts[1:])

    async def _put(
        self, lease: Lease, key: bytes, tags: frozenset[str], blob: bytes, keep: float, flight: Flight
    ) -> bool:
        assert isinstance(lease, LockLease)
        try:
            stored = await _STORE.run(
                lease.link,
                (lease.lock, key, *self._counters(tags)),
                lease.token,
                blob,
                math.ceil(keep * 1000),
                *lease.versions,
                limit=self._limit(flight.context),
            )
        except (RedisDown, Refused, Oversized) as error:
            raise _bypass(error) from None
        return bool(stored)

    # ---- forgetting --------------------------------------------------------------------------------------------------

    async def forget_key(self, key: bytes) -> None:
        self._revoke(key)
        await self._forget("drop", (key, key + b":lock"), "k " + key.decode())

    async def forget_tags(self, tags: frozenset[str]) -> None:
        with self._cache.guard.lock:
            self._cache.flights.revoke_tags(tags)
        await self._forget("step", self._counters(tags)[1:], "t " + "\0".join(sorted(tags)))

    async def forget_all(self) -> None:
        self._revoke_all()
        await self._forget("step", (self._epoch,), "a ")
        await self._sweep()

    async def _forget(self, how: str, names: tuple[bytes, ...], message: str) -> None:
        try:
            await _FORGET.run(
                self._endpoint.link, (self._news, *names), how, message, _first(), limit=_FORGET_LIMIT, force=True
            )
        except (RedisDown, Refused, Oversized) as error:
            raise unreachable(
                f"{self._endpoint.name} could not be told of an invalidation ({error}); "
                "the memory of this process was cleared, other processes may answer with the old result"
            ) from None

    async def _sweep(self) -> None:
        """Free the room of results that a step of the epoch has made worthless; their TTL does it otherwise."""
        link, cursor = self._endpoint.link, b"0"
        pattern = f"{_no_glob(self._head)}*:{_no_glob(self._tail)}*"
        try:
            for _ in range(_MAX_SWEEPS):
                cursor, names = await link.ask("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
                # The pattern fits the counters, too, and these must outlive the results: others compare with them.
                own = [name for name in names if not name.startswith(self._control.encode())]
                if own:
                    await link.ask("UNLINK", *own)
                if cursor == b"0":
                    return
        except (RedisDown, Refused, Oversized):
            return

    # ---- hearing of invalidations in other processes, for the memory above -------------------------------------------

    async def listen(self) -> None:
        """See to it that the memory above hears of invalidations from now on, as long as Redis is up."""
        endpoint = self._endpoint
        listener = endpoint.listener
        if listener.hears(self._news, self) or endpoint.link.down:
            return
        was_down = listener.down  # then it comes back by itself, and takes nobody's time
        try:
            await listener.listen(self._news, self)
        except RedisDown as down:
            if listener.down and not was_down:  # one timeout is enough: the question that comes next need not wait
                endpoint.link.go_down(down)

    def hear(self, message: bytes) -> None:
        """Take the news of one invalidation: ``number kind names``."""
        known = self._last_news or 0
        try:
            digits, kind, names = message.split(b" ", 2)
            number, text = int(digits), names.decode(errors="surrogatepass")
        except ValueError:
            self._forget_above(None)  # not ours; whoever writes here may have meant anything
            return
        if number <= known:
            return  # another loop of this process has heard it; a counter that Redis lost begins with larger numbers
        self._last_news = number
        if number != known + 1:
            self._forget_above(None)  # something was missed
        elif kind == b"k":
            self._forget_above(frozenset({_trace(names)}))
        elif kind == b"t":
            self._forget_above(frozenset(text.split("\0")))
        else:
            self._forget_above(None)

    async def catch_up(self) -> None:
        """Ask how many invalidations there were; if some were missed, nothing in the memory above can be believed."""
        link = self._endpoint.link
        try:
            await link.ask("SET", self._news, _first(), "NX")
        except Refused:
            pass  # full, or read-only: then nobody else can tell of an invalidation either
        answer = await link.ask("GET", self._news)
        number = 0 if answer is None else int(answer)
        if number != self._last_news:
            self._forget_above(None)
        self._last_news = number

    def _forget_above(self, tags: frozenset[str] | None) -> None:
        for cache in self._cache.memories_above():
            if tags is None:
                cache.forget_all()
            else:
                cache.forget_tags(tags)


class PlainStore:
    """A :class:`RedisBackend` on its own: values under the names that the user gives them."""

    def __init__(self, backend: RedisBackend) -> None:
        self._endpoint, self._prefix = resolve(backend)
        self._codec = Codec(None, _MAX_PLAIN, 1024)

    async def get(self, key: str) -> Any | None:
        name = f"{self._prefix}{key}".encode()
        blob = await self._ask("GET", name)
        if blob is None:
            return None
        try:
            return self._codec.value(self._codec.open(name, blob))
        except Undecodable:
            return None

    async def set(self, key: str, value: Any, ttl_seconds: float) -> None:
        name = f"{self._prefix}{key}".encode()
        encoded = codec.encode(value)
        if encoded is None:
            raise ConfigurationError(f"JSON cannot carry this {type(value).__qualname__}: store plain values")
        now = SYSTEM_CLOCK.time()
        blob = self._codec.seal(
            name,
            encoded,
            identity=os.urandom(8),
            created=now,
            fresh_until=now + ttl_seconds,
            expires_at=now + ttl_seconds,
            cost=0.0,
            versions=(),
        )
        if blob is None:
            raise ConfigurationError(f"a value of {len(encoded[1])} bytes is too large")
        await self._ask("SET", name, blob, "PX", max(1, math.ceil(ttl_seconds * 1000)))

    async def delete(self, key: str) -> None:
        await self._ask("DEL", f"{self._prefix}{key}".encode())

    async def _ask(self, *parts: bytes | str | int) -> Any:
        try:
            return await self._endpoint.link.ask(*parts)
        except (RedisDown, Refused, Oversized) as error:
            raise unreachable(f"{self._endpoint.name}: {error}") from None


# ---- the seam to the Redis library ----------------------------------------------------------------------------------


def seam() -> Any:
    """Return ``tta_sync.redis``, a layer above: imported by name, and only once Redis is asked for."""
    return importlib.import_module("tta_sync.redis")


def resolve(storage: Any) -> tuple[Endpoint, str]:
    """Return the server that *storage* means, and what keys in it begin with.

    Raises:
        ConfigurationError: *storage* means no server, or the ``redis`` extra is not installed.
    """
    prefix = getattr(storage, "prefix", "tta:") if isinstance(storage, RedisBackend) else "tta:"
    source = storage.url if isinstance(storage, RedisBackend) else storage
    endpoint: Endpoint = seam().endpoint(source)
    return endpoint, prefix


def unreachable(message: str) -> ConnectionError:
    """Make the error that is a ConnectionError of Python's and of redis-py's."""
    error: ConnectionError = seam().RedisUnreachableError(message)
    return error


class _Chore(WorkflowPrimitive[Any, Any]):
    """A coroutine function as something that the facade runs."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, Any]], name: str) -> None:
        self._work = work
        self.name = name

    async def _run(self, data: Any, context: WorkflowContext) -> Any:
        return await self._work()


def from_sync(work: Callable[[], Coroutine[Any, Any, T]], name: str, remedy: str, timeout: float | None = None) -> T:
    """Run *work* on the managed loop and wait for it; *name* and *remedy* are for who calls it on a loop.

    Whatever deadline the current call has, this has *timeout* seconds.

    Raises:
        WouldDeadlockError: called on a loop's own thread.
        DeadlineExceededError: *timeout* has passed.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        answer: T = _Chore(work, name).run_sync(None, WorkflowContext(), timeout=timeout)
        return answer
    raise WouldDeadlockError(f"{name} would wait for Redis on the loop's own thread: write {remedy} there")


def _no_glob(text: str) -> str:
    return re.sub(r"([\\*?\[\]^])", r"\\\1", text)


def _first() -> int:
    """Return where a counter begins: beyond all that it can have reached before, should Redis have lost it."""
    return int(SYSTEM_CLOCK.time() * 1e6)


def _bypass(error: RedisDown | Refused | Oversized) -> Bypass:
    if isinstance(error, RedisDown):
        return Bypass("down", error.reason)
    return Bypass("refused", error.code) if isinstance(error, Refused) else Bypass("oversized", "oversized")


def _trace(key: bytes) -> str:
    """Return the tag by which a memory above knows what it has from *key*; no user's tag holds a zero."""
    return "\0" + key.decode(errors="replace")
