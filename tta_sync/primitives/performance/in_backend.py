"""The layer of a cache that lives in a store of the user's own: whatever has async get, set and delete."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.performance import codec, keys
from tta_sync.primitives.performance.codec import Codec, Envelope, Undecodable
from tta_sync.primitives.performance.flights import Flight
from tta_sync.primitives.performance.stores import CacheBackend

if TYPE_CHECKING:
    from tta_sync.primitives.performance.cache import CachePrimitive

_LIMIT = 1.0  # seconds for one question to a store of which we know nothing
_EPOCH_LIFE = 1.0  # seconds after which other processes have seen that the cache was cleared


class BackendLayer:
    """Answer from a :class:`CacheBackend`, or compute once for all who ask at the same time in this process.

    A store without locks and counters has no single-flight across processes, and no tags.
    """

    def __init__(
        self, cache: CachePrimitive[Any, Any], backend: CacheBackend, claim: Callable[[dict[Any, Any]], str]
    ) -> None:
        self._cache = cache
        self._backend = backend
        if cache.has_tags:
            raise ConfigurationError(
                f"tags need memory or Redis: a {type(backend).__name__} has no counters; leave tags= out"
            )
        self._head = f"tta:{keys.SCHEMA}:"
        self._tail = keys.prefix(claim(_claims_of(backend)), cache.version)
        self._epoch_key = f"{self._head}#:{self._tail}epoch"
        self._codec = Codec(cache.secret, cache.max_value_bytes, cache.compress_above)
        self._epoch, self._epoch_read = "", float("-inf")

    def key(self, known: Any, tenant: str | None) -> bytes:
        digest = keys.digest(known, self._cache.key_argument).hex()
        return f"{self._head}{keys.prefix(tenant)}{self._tail}{digest}".encode()

    async def _name(self, key: bytes) -> str:
        """Return the name under which *key* is stored now: one step of the epoch changes all of them."""
        now = asyncio.get_running_loop().time()
        if now - self._epoch_read >= _EPOCH_LIFE:
            epoch = await self._within(self._backend.get(self._epoch_key))
            self._epoch, self._epoch_read = epoch.decode() if isinstance(epoch, bytes) else "", now
        return key.decode() + self._epoch

    async def answer(self, data: Any, known: Any, context: WorkflowContext) -> Any:
        cache = self._cache
        key = self.key(known, context.tenant)
        reason, old = "absent", None
        try:
            blob = await self._within(self._backend.get(await self._name(key)))
            if blob is not None:
                old = self._codec.open(key, blob if isinstance(blob, bytes) else b"")
                now = context.clock.time()
                if now < old.expires_at:
                    value = self._codec.value(old)
                    cache.count_hit(context, "backend", now >= old.fresh_until)
                    if old.degraded:
                        context.mark_degraded()
                    if now >= old.fresh_until:
                        cache.refresh(key, context, frozenset(), partial(self._compute, key=key, data=data, old=None))
                    return value
                reason = "expired"
        except Undecodable as undecodable:
            reason, old = undecodable.reason, None
        except Exception as error:  # of a store of which we know nothing
            reason = "down"
            cache.emit_bypassed(context, "backend", type(error).__qualname__)
        if reason == "expired":
            with cache.guard.lock:
                cache.expirations += 1
        cache.count_miss(context, "backend", reason)
        primitive = cache.primitive
        assert primitive is not None
        work = partial(self._compute, key=key, data=data, old=old)
        return await cache.flights.share(
            key, context, frozenset(), cache.label, work, lambda: primitive._run(data, context)
        )

    async def _compute(self, flight: Flight, key: bytes, data: Any, old: Envelope | None) -> Any:
        try:
            cache, context = self._cache, flight.context
            primitive = cache.primitive
            assert primitive is not None
            began = context.clock.monotonic()
            try:
                value = await primitive._run(data, context)
            except Exception:
                if old is not None and context.clock.time() < old.expires_at + cache.stale_if_error:
                    context.mark_degraded()
                    cache.emit_hit(context, "backend", stale=True)
                    return self._codec.value(old)
                raise
            await self._store(flight, key, value, context.clock.monotonic() - began)
            return value
        finally:
            del flight  # an error's traceback leads to this frame

    async def _store(self, flight: Flight, key: bytes, value: Any, cost: float) -> None:
        cache, context = self._cache, flight.context
        encoded = codec.encode(value)
        if encoded is None:
            cache.emit_bypassed(context, "backend", f"JSON cannot carry this {type(value).__qualname__}")
            return
        now, lifetime = context.clock.time(), cache.lifetime()
        blob = self._codec.seal(
            key,
            encoded,
            identity=os.urandom(8),
            created=now,
            fresh_until=now + (lifetime if cache.soft_ttl is None else min(cache.soft_ttl, lifetime)),
            expires_at=now + lifetime,
            cost=cost,
            versions=(),
            degraded=context.degraded,
        )
        if blob is None:
            cache.emit_bypassed(context, "backend", f"a result of {len(encoded[1])} bytes is too large")
            return
        try:
            name = await self._name(key)
            if _revoked(flight):
                return
            await self._within(self._backend.set(name, blob, lifetime + cache.stale_if_error))
            if _revoked(flight):  # while we wrote
                await self._within(self._backend.delete(name))
                return
        except Exception as error:  # of a store of which we know nothing
            cache.emit_bypassed(context, "backend", type(error).__qualname__)
        else:
            cache.emit_stored(context, "backend", lifetime)

    async def _within(self, answer: Awaitable[Any]) -> Any:
        async with asyncio.timeout(_LIMIT):
            return await answer

    # ---- forgetting --------------------------------------------------------------------------------------------------

    async def forget_key(self, key: bytes) -> None:
        with self._cache.guard.lock:
            self._cache.flights.revoke(key)
        await self._told(lambda name: self._backend.delete(name), key)

    async def forget_tags(self, tags: frozenset[str]) -> None:
        """Do nothing: without tags of its own, this layer holds nothing that carries one."""

    async def forget_all(self) -> None:
        with self._cache.guard.lock:
            self._cache.flights.revoke_all()
        epoch = os.urandom(8).hex()
        # A year: longer than any result can live that the old epoch named.
        await self._told(lambda _: self._backend.set(self._epoch_key, epoch.encode(), 365 * 86_400.0), b"")
        self._epoch = epoch

    async def _told(self, tell: Callable[[str], Awaitable[Any]], key: bytes) -> None:
        try:
            await self._within(tell(await self._name(key)))
        except Exception as error:  # of a store of which we know nothing
            raise ConnectionError(
                f"{type(self._backend).__name__} could not be told of an invalidation: {type(error).__name__}"
            ) from error


def _revoked(flight: Flight) -> bool:
    return flight.revoked


def _claims_of(backend: Any) -> dict[Any, Any]:
    """Return who has which namespace in *backend*; kept on the object itself, where it lets us."""
    try:
        claims: dict[Any, Any] = vars(backend).setdefault("_tta_sync_claims", {})
    except TypeError:  # it has slots
        return {}
    return claims
