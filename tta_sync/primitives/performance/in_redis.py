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
from functools import partial
from hashlib import sha1
from random import Random
from typing import TYPE_CHECKING, Any

from tta_sync.clock import SYSTEM_CLOCK
from tta_sync.context import WorkflowContext, cut_off
from tta_sync.exceptions import ConfigurationError, LoopUnavailableError
from tta_sync.primitives.core.base import WorkflowPrimitive
from tta_sync.primitives.performance import codec, keys
from tta_sync.primitives.performance.codec import Codec, Envelope, Undecodable
from tta_sync.primitives.performance.flights import Flight
from tta_sync.primitives.performance.stores import RedisBackend
from tta_sync.primitives.performance.wire import LIMIT, Endpoint, Link, Oversized, RedisDown, Refused

if TYPE_CHECKING:
    from tta_sync.primitives.performance.cache import CachePrimitive

LOCK_LIFE = 5.0  # seconds; renewed at a third of it
_PATIENCE = (0.002, 0.05)  # seconds between looks at another process's computation: first, and at most
_FORGET_LIMIT = 1.0  # seconds for an invalidation, which may not be skipped
_PART_OF_REMAINING = 0.1  # of the time that a call has left, for one question to Redis
_MAX_SWEEPS = 1000
_MAX_NAMES = 4096
_SEEN = 64  # bytes by which a result is known again; its random id is among them


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
-- KEYS: news, then result and lock of each result to drop, or counters to step; ARGV: how, message
if ARGV[1] == 'drop' then
  for i = 2, #KEYS do redis.call('DEL', KEYS[i]) end
else
  for i = 2, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 1 then redis.call('INCR', KEYS[i]) end
  end
end
local number = redis.call('INCR', KEYS[1])
redis.call('PUBLISH', KEYS[1], number .. ' ' .. ARGV[2])
return number
""")


class Lease:
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
        """Let others compute; nobody waits for Redis here."""
        self.stop()
        self.link.post("EVAL", _RELEASE.text, 1, self.lock, self.token)


class RedisLayer:
    """Answer from Redis, or compute once for all processes that ask at the same time."""

    def __init__(self, cache: CachePrimitive[Any, Any], storage: Any, claim: Callable[[dict[Any, Any]], str]) -> None:
        self._cache = cache
        self._endpoint, prefix = resolve(storage)
        bounds = self._endpoint.bounds
        bounds.max_bytes = max(bounds.max_bytes, 2 * cache.max_value_bytes)
        namespace, version = claim(self._endpoint.claims), cache.version
        self._head = f"{prefix}{keys.SCHEMA}:"
        self._tail = keys.prefix(namespace, version)
        control = f"{self._head}#:{self._tail}"
        self._epoch = f"{control}epoch".encode()
        self._tag = f"{control}tag:"
        self._news = f"{control}news".encode()
        self._codec = Codec(cache.secret, cache.max_value_bytes, cache.compress_above)
        self._names: dict[bytes, bytes] = {}  # exact form -> key, for calls that come again and again
        self._chance = Random()  # noqa: S311  # spreads load, keeps no secret
        self._last_news: int | None = None

    # ---- keys --------------------------------------------------------------------------------------------------------

    def key(self, known: Any, tenant: str | None) -> bytes:
        form = keys.exact_form(known, tenant)
        if form is not None:
            name = self._names.get(form)
            if name is not None:
                return name
        digest = keys.digest(known, self._cache.key_argument).hex()
        name = f"{self._head}{keys.prefix(tenant)}{self._tail}{digest}".encode()
        if form is not None and keys.is_plain(known) and not keys.holds_bytes(known):
            if len(self._names) >= _MAX_NAMES:
                self._names.clear()
            self._names[form] = name
        return name

    def _counters(self, tags: frozenset[str]) -> tuple[bytes, ...]:
        if not tags:
            return (self._epoch,)
        return (self._epoch, *(f"{self._tag}{tag}".encode(errors="surrogatepass") for tag in sorted(tags)))

    def trail(self, data: Any, context: WorkflowContext) -> frozenset[str]:
        """Return the tags that a memory above this layer needs, to hear of invalidations here."""
        cache = self._cache
        key = self.key(cache.known(data, context), context.tenant)
        return cache.tags_for(data, context) | {_trace(key)}

    # ---- answering ---------------------------------------------------------------------------------------------------

    async def answer(self, data: Any, known: Any, context: WorkflowContext) -> Any:
        cache = self._cache
        key = self.key(known, context.tenant)
        tags = cache.tags_for(data, context)
        counters = self._counters(tags)
        reason, seen, old = "absent", b"", None
        try:
            blob, *versions = await self._endpoint.link.ask("MGET", key, *counters, limit=_limit(context))
            if blob is not None:
                seen = blob[:_SEEN]
                old = self._codec.open(key, blob)
                reason = self._fault(old, versions, context)
                if not reason:
                    return self._from(old, seen, key, tags, counters, data, context)
                if reason != "expired":
                    old = None
        except RedisDown as down:
            reason = "down"
            cache.emit_bypassed(context, "redis", down.reason)
        except Refused as refused:
            reason = "refused"
            cache.emit_bypassed(context, "redis", refused.code)
        except Oversized:
            reason = "oversized"
        except Undecodable as undecodable:
            reason, old = undecodable.reason, None
        if reason == "expired":
            with cache.guard.lock:
                cache.expirations += 1
        cache.count_miss(context, "redis", reason)
        primitive = cache.primitive
        assert primitive is not None
        work = partial(self._compute, key=key, counters=counters, data=data, seen=seen, old=old)
        return await cache.flights.share(key, context, tags, cache.label, work, lambda: primitive._run(data, context))

    def _fault(self, envelope: Envelope, versions: list[bytes | None], context: WorkflowContext) -> str:
        """Say why a stored result does not count any more, "" if it does."""
        if [b"%d" % version for version in envelope.versions] != versions:
            return "invalidated"
        return "expired" if context.clock.time() >= envelope.expires_at else ""

    def _from(
        self,
        envelope: Envelope,
        seen: bytes,
        key: bytes,
        tags: frozenset[str],
        counters: tuple[bytes, ...],
        data: Any,
        context: WorkflowContext,
    ) -> Any:
        """Return what is inside, counted as a hit; start a refresh where it is due."""
        cache = self._cache
        value = self._codec.value(envelope)
        error = self._error(value) if envelope.is_error else None
        now = context.clock.time()
        stale = now >= envelope.fresh_until
        cache.count_hit(context, "redis", stale)
        if error is not None:
            raise error
        if envelope.degraded:
            context.mark_degraded()
        if stale or (cache.xfetch_beta and now >= cache.early(envelope.expires_at, envelope.cost)):
            work = partial(self._compute, key=key, counters=counters, data=data, seen=seen, old=None, refresh=True)
            cache.refresh(key, context, tags, work)
        return value

    def _error(self, value: Any) -> Exception:
        """Build a remembered error again, of no type but those that the cache was told to remember."""
        try:
            name, arguments = value
            for kind in self._cache.negative_for:
                if name == f"{kind.__module__}.{kind.__qualname__}":
                    return kind(*arguments)
        except Exception:  # whatever the type's constructor raises
            raise Undecodable("corrupt") from None
        raise Undecodable("foreign")

    # ---- computing ---------------------------------------------------------------------------------------------------

    async def _compute(
        self,
        flight: Flight,
        key: bytes,
        counters: tuple[bytes, ...],
        data: Any,
        seen: bytes,
        old: Envelope | None,
        refresh: bool = False,
    ) -> Any:
        lease: Lease | None = None
        try:
            cache, context = self._cache, flight.context
            primitive = cache.primitive
            assert primitive is not None
            value, found, lease = await self._acquire(flight, key, counters, seen, refresh)
            if found is not None:
                if found.degraded:
                    context.mark_degraded()
                if found.is_error:
                    raise self._error(value)
                return value
            if refresh and lease is None:
                return None  # another process is at it, or Redis is gone: the result in use is good enough
            began = context.clock.monotonic()
            try:
                value = await primitive._run(data, context)
            except Exception as error:
                if old is not None and context.clock.time() < old.expires_at + cache.stale_if_error:
                    context.mark_degraded()
                    cache.emit_hit(context, "redis", stale=True)
                    return self._codec.value(old)
                if lease is not None and cache.negative_ttl is not None and type(error) in cache.negative_for:
                    encoded, lifetime = codec.encode_error(error), cache.negative_ttl
                    if encoded is not None:
                        lease = await self._store(flight, lease, key, counters, encoded, lifetime, 0.0)
                raise
            if lease is not None:
                encoded = codec.encode(value)
                if encoded is None:
                    cache.emit_bypassed(context, "redis", f"JSON cannot carry this {type(value).__qualname__}")
                else:
                    cost = context.clock.monotonic() - began
                    lease = await self._store(flight, lease, key, counters, encoded, cache.lifetime(), cost)
            return value
        finally:
            if lease is not None:
                lease.release()
            del flight  # an error's traceback leads to this frame

    async def _acquire(
        self, flight: Flight, key: bytes, counters: tuple[bytes, ...], seen: bytes, refresh: bool
    ) -> tuple[Any, Envelope | None, Lease | None]:
        """Return what another process has stored by now, or the lock, or neither where Redis cannot help."""
        cache, context = self._cache, flight.context
        link = self._endpoint.link
        if link.down:
            return None, None, None
        lock, token = key + b":lock", os.urandom(12).hex().encode()
        give_up = link.loop.time() + cache.max_wait
        pause, longest = _PATIENCE
        keep = math.ceil((cache.ttl + cache.stale_if_error + cache.max_wait + 60.0) * 1000)
        first = int(SYSTEM_CLOCK.time() * 1e6)
        try:
            while True:
                answer, *parts = await _ACQUIRE.run(
                    link,
                    (lock, key, *counters),
                    token,
                    int(LOCK_LIFE * 1000),
                    first,
                    self._codec.max_bytes + 10_000,
                    seen,
                    keep,
                    limit=_limit(context),
                )
                if answer == b"lock":
                    return None, None, Lease(link, lock, token, tuple(map(int, parts)))
                if answer == b"result":
                    blob, *versions = parts
                    seen = blob[:_SEEN]
                    try:
                        found = self._codec.open(key, blob)
                        now = context.clock.time()
                        if not self._fault(found, versions, context) and not (refresh and now >= found.fresh_until):
                            return self._codec.value(found), found, None
                    except Undecodable:
                        pass
                    continue  # with what was seen, the script goes on to the lock
                if refresh or link.loop.time() >= give_up:
                    return None, None, None
                await asyncio.sleep(pause * (0.5 + self._chance.random()))
                pause = min(pause * 1.5, longest)
        except RedisDown as down:
            cache.emit_bypassed(context, "redis", down.reason)
        except Refused as refused:
            cache.emit_bypassed(context, "redis", refused.code)
        except Oversized:
            cache.emit_bypassed(context, "redis", "oversized")
        return None, None, None

    async def _store(
        self,
        flight: Flight,
        lease: Lease,
        key: bytes,
        counters: tuple[bytes, ...],
        encoded: tuple[int, bytes],
        lifetime: float,
        cost: float,
    ) -> Lease | None:
        """Store a result, if it still may be; return the lease where it is yet to be released."""
        cache, context = self._cache, flight.context
        now = context.clock.time()
        blob = self._codec.seal(
            key,
            encoded,
            identity=os.urandom(8),
            created=now,
            fresh_until=now + (lifetime if cache.soft_ttl is None else min(cache.soft_ttl, lifetime)),
            expires_at=now + lifetime,
            cost=cost,
            versions=lease.versions,
            degraded=context.degraded,
        )
        if blob is None:
            cache.emit_bypassed(context, "redis", f"a result of {len(encoded[1])} bytes is too large")
            return lease
        if flight.revoked:
            return lease
        lease.stop()
        try:
            stored = await _STORE.run(
                lease.link,
                (lease.lock, key, *counters),
                lease.token,
                blob,
                math.ceil((lifetime + cache.stale_if_error) * 1000),
                *lease.versions,
                limit=_limit(context),
            )
        except RedisDown as down:
            cache.emit_bypassed(context, "redis", down.reason)
            return lease
        except Refused as refused:
            cache.emit_bypassed(context, "redis", refused.code)
            return lease
        if stored:
            cache.emit_stored(context, "redis", lifetime)
        return None

    # ---- forgetting --------------------------------------------------------------------------------------------------

    async def forget_key(self, key: bytes) -> None:
        with self._cache.guard.lock:
            self._cache.flights.revoke(key)
        await self._forget("drop", (key, key + b":lock"), "k " + key.decode())

    async def forget_tags(self, tags: frozenset[str]) -> None:
        with self._cache.guard.lock:
            self._cache.flights.revoke_tags(tags)
        await self._forget("step", self._counters(tags)[1:], "t " + "\0".join(sorted(tags)))

    async def forget_all(self) -> None:
        with self._cache.guard.lock:
            self._cache.flights.revoke_all()
        await self._forget("step", (self._epoch,), "a ")
        await self._sweep()

    async def _forget(self, how: str, names: tuple[bytes, ...], message: str) -> None:
        try:
            number = await _FORGET.run(
                self._endpoint.link, (self._news, *names), how, message, limit=_FORGET_LIMIT, force=True
            )
        except (RedisDown, Refused, Oversized) as error:
            raise unreachable(
                f"{self._endpoint.name} could not be told of an invalidation ({error}); "
                "the memory of this process was cleared, other processes may answer with the old result"
            ) from None
        if self._last_news == number - 1:
            self._last_news = number  # what this process did itself is no news

    async def _sweep(self) -> None:
        """Free the room of results that a step of the epoch has made worthless; their TTL does it otherwise."""
        link, cursor = self._endpoint.link, b"0"
        pattern = f"{_no_glob(self._head)}*:{_no_glob(self._tail)}*"
        try:
            for _ in range(_MAX_SWEEPS):
                cursor, names = await link.ask("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
                own = [name for name in names if self._owns(name.decode(errors="replace"))]
                if own:
                    await link.ask("UNLINK", *own)
                if cursor == b"0":
                    return
        except (RedisDown, Refused, Oversized):
            return

    def _owns(self, name: str) -> bool:
        """Say whether *name* is a result of this cache: the pattern alone also fits namespaces that end alike."""
        return name[len(self._head) :].partition(":")[2].startswith(self._tail)

    # ---- hearing of invalidations in other processes, for the memory above -------------------------------------------

    async def listen(self) -> None:
        """See to it that the memory above hears of invalidations from now on, as long as Redis is up."""
        endpoint = self._endpoint
        listener = endpoint.listener
        if listener.hears(self._news, self) or endpoint.link.down:
            return
        try:
            await listener.listen(self._news, self)
        except RedisDown as down:
            # One timeout is enough: the question that comes next need not wait for its own.
            endpoint.link.go_down(down)

    def hear(self, message: bytes) -> None:
        """Take the news of one invalidation: ``number kind names``."""
        known = self._last_news
        try:
            number, kind, names = message.split(b" ", 2)
            self._last_news = int(number)
            text = names.decode(errors="surrogatepass")
        except ValueError:
            self._forget_above(None)  # not ours; whoever writes here may have meant anything
            return
        if known == self._last_news:
            return
        if known is None or known != self._last_news - 1:
            self._forget_above(None)  # something was missed
        elif kind == b"k":
            self._forget_above(frozenset({_trace(names)}))
        elif kind == b"t":
            self._forget_above(frozenset(text.split("\0")))
        else:
            self._forget_above(None)

    async def catch_up(self) -> None:
        """Ask how many invalidations there were; if some were missed, nothing in the memory above can be believed."""
        answer = await self._endpoint.link.ask("GET", self._news)
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
        self._codec = Codec(None, self._endpoint.bounds.max_bytes // 2, 1024)

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


def from_sync(work: Callable[[], Coroutine[Any, Any, Any]], name: str, remedy: str) -> None:
    """Run *work* on the managed loop and wait for it.

    Raises:
        LoopUnavailableError: called on a loop's own thread.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        _Chore(work, name).run_sync(None, WorkflowContext())
        return
    raise LoopUnavailableError(f"{name} would wait for Redis on the loop's own thread: write {remedy} there")


def _no_glob(text: str) -> str:
    return re.sub(r"([\\*?\[\]^])", r"\\\1", text)


def _trace(key: bytes) -> str:
    """Return the tag by which a memory above knows what it has from *key*; no user's tag holds a zero."""
    return "\0" + key.decode(errors="replace")


def _limit(context: WorkflowContext) -> float | None:
    """Return the seconds that Redis has for an answer, None for the common limit."""
    cut = cut_off(context)
    if cut is None:
        return None
    part = _PART_OF_REMAINING * (cut - context.clock.monotonic())
    return None if part >= LIMIT else max(part, 0.001)
