"""What the layers of a cache have in common that live outside this process: whose bytes to believe, when to compute.

A layer of this kind says where bytes are kept and how a computation is made one's own; everything else stands here.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from tta_sync.context import WorkflowContext
from tta_sync.primitives.performance import codec, keys
from tta_sync.primitives.performance.codec import Codec, Envelope, Undecodable
from tta_sync.primitives.performance.flights import Flight

if TYPE_CHECKING:
    from tta_sync.primitives.performance.cache import CachePrimitive

_PATIENCE = (0.002, 0.05)  # seconds between looks at another process's computation: first, and at most
_MAX_NAMES = 4096
_SEEN = 64  # bytes by which a result is known again; its random id is among them


class Bypass(Exception):
    """The store cannot help this call: ``reason`` is one word for the statistics, ``detail`` what it said."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Examined(NamedTuple):
    """What lies in the store for one call, as an operator sees it."""

    name: str
    """Its key in the store."""
    fault: str
    """Why it would not answer a call, "" if it would: absent, expired, invalidated, corrupt, foreign, oversized."""
    size: int
    """Bytes in the store."""
    envelope: Envelope | None
    value: Any
    """For a remembered error its type's name and its arguments."""


class Lease:
    """The right to compute and store a result, as long as nobody invalidates it."""

    versions: tuple[int, ...] = ()

    def stop(self) -> None:
        """Do not renew it any more."""

    def release(self) -> None:
        """Let others compute."""


class SharedLayer(ABC):
    """Answer from a store outside this process, or compute once for all who ask at the same time."""

    label = "shared"

    def __init__(self, cache: CachePrimitive[Any, Any], prefix: str, namespace: str) -> None:
        self._cache = cache
        self._head = f"{prefix}{keys.SCHEMA}:"
        self._tail = keys.prefix(namespace, cache.version)
        self._control = f"{self._head}#:{self._tail}"
        self._codec = Codec(cache.secret, cache.max_value_bytes, cache.compress_above)
        self._names: dict[bytes, bytes] = {}  # exact form -> key, for calls that come again and again
        self._uncarried: set[bytes] = set()  # keys whose results cannot be stored: nobody need wait for them
        self._chance = Random()  # noqa: S311  # spreads load, keeps no secret

    # ---- to be said by each kind of store ----------------------------------------------------------------------------

    @abstractmethod
    async def _read(
        self, key: bytes, tags: frozenset[str], context: WorkflowContext
    ) -> tuple[bytes | None, list[bytes | None]]:
        """Return what is stored under *key*, and the present values of the counters that it depends on.

        Raises:
            Bypass: nobody knows.
        """

    @abstractmethod
    async def _attempt(
        self, key: bytes, tags: frozenset[str], seen: bytes, context: WorkflowContext
    ) -> Lease | tuple[bytes, list[bytes | None]] | None:
        """Return the right to compute, or a result other than *seen* with the counters' values, or None for "wait".

        Raises:
            Bypass: nobody knows.
        """

    @abstractmethod
    async def _put(
        self, lease: Lease, key: bytes, tags: frozenset[str], blob: bytes, keep: float, flight: Flight
    ) -> bool:
        """Store *blob* for *keep* seconds, and give the lease back; False if the lease did not hold any more.

        Raises:
            Bypass: it could not be stored.
        """

    @abstractmethod
    async def forget_key(self, key: bytes) -> None:
        """Forget one result, everywhere; in effect on return."""

    @abstractmethod
    async def forget_tags(self, tags: frozenset[str]) -> None:
        """Forget what carries one of *tags*, everywhere; in effect on return."""

    @abstractmethod
    async def forget_all(self) -> None:
        """Forget everything, everywhere; in effect on return."""

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

    # ---- for operators -----------------------------------------------------------------------------------------------

    async def examine(self, key: bytes, context: WorkflowContext) -> Examined:
        """Return what is stored under *key*, without computing or counting anything.

        Of the counters only that of the whole namespace is compared: which tags a result carries, only its step knows.

        Raises:
            Bypass: the store does not answer.
        """
        blob, versions = await self._read(key, frozenset(), context)
        if blob is None:
            return Examined(key.decode(), "absent", 0, None, None)
        try:
            envelope = self._codec.open(key, blob)
            value = self._codec.value(envelope)
        except Undecodable as undecodable:
            return Examined(key.decode(), undecodable.reason, len(blob), None, None)
        fault = self._fault(envelope._replace(versions=envelope.versions[: len(versions)]), versions, context)
        return Examined(key.decode(), fault, len(blob), envelope, value)

    # ---- answering ---------------------------------------------------------------------------------------------------

    async def answer(self, data: Any, known: Any, context: WorkflowContext) -> Any:
        cache = self._cache
        key = self.key(known, context.tenant)
        tags = cache.tags_for(data, context)
        reason, seen, old, blob = "absent", b"", None, None
        try:
            if not cache.flights.waiting(key):  # else this process knows already that there is nothing
                blob, versions = await self._read(key, tags, context)
            if blob is not None:
                seen = blob[:_SEEN]
                old = self._codec.open(key, blob)
                reason = self._fault(old, versions, context)
                if not reason:
                    return self._from(old, seen, key, tags, data, context)
                if reason != "expired" or old.is_error:
                    old = None
        except Bypass as bypass:
            reason = bypass.reason
            cache.emit_bypassed(context, self.label, bypass.detail)
        except Undecodable as undecodable:
            reason, old = undecodable.reason, None
        if reason == "expired":
            with cache.guard.lock:
                cache.expirations += 1
        cache.count_miss(context, self.label, reason)
        primitive = cache.primitive
        assert primitive is not None
        work = partial(self._compute, key=key, data=data, seen=seen, old=old)
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
        data: Any,
        context: WorkflowContext,
    ) -> Any:
        """Return what is inside, counted as a hit; start a refresh where it is due."""
        cache = self._cache
        value = self._codec.value(envelope)
        if envelope.is_error:
            error = self._error(value)
            cache.count_hit(context, self.label, stale=False)
            raise error
        now = context.clock.time()
        stale = now >= envelope.fresh_until
        cache.count_hit(context, self.label, stale)
        if envelope.degraded:
            context.mark_degraded()
        if stale or (cache.xfetch_beta and now >= cache.early(envelope.expires_at, envelope.cost)):
            work = partial(self._compute, key=key, data=data, seen=seen, old=None, refresh=True)
            cache.refresh(key, context, tags, self.label, work)
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
            value, found, lease = await self._acquire(flight, key, seen, refresh)
            if found is not None:
                return self._found(value, found, context)
            if refresh and lease is None:
                return None  # another process is at it, or the store is gone: the result in use is good enough
            began = context.clock.monotonic()
            try:
                value = await primitive._run(data, context)
            except Exception as error:
                if old is not None and context.clock.time() < old.expires_at + cache.stale_if_error:
                    context.mark_degraded()
                    cache.emit_hit(context, self.label, stale=True)
                    return self._codec.value(old)
                if lease is not None and not refresh:
                    lease = await self._remember_error(flight, lease, key, error)
                raise
            if lease is not None:
                lease = await self._remember(flight, lease, key, value, context.clock.monotonic() - began)
            return value
        finally:
            if lease is not None:
                lease.release()
            del flight  # an error's traceback leads to this frame

    def _found(self, value: Any, envelope: Envelope, context: WorkflowContext) -> Any:
        """Return, or raise, what another process has computed meanwhile."""
        if envelope.is_error:
            raise value
        if envelope.degraded:
            context.mark_degraded()
        return value

    async def _acquire(
        self, flight: Flight, key: bytes, seen: bytes, refresh: bool
    ) -> tuple[Any, Envelope | None, Lease | None]:
        """Return what another process has stored by now, or the right to compute, or neither: then compute alone."""
        cache, context = self._cache, flight.context
        if key in self._uncarried:
            return None, None, None
        now = asyncio.get_running_loop().time
        give_up = now() + cache.max_wait
        pause, longest = _PATIENCE
        try:
            while True:
                answer = await self._attempt(key, flight.tags, seen, context)
                if isinstance(answer, Lease):
                    return None, None, answer
                if answer is not None:
                    blob, versions = answer
                    seen = blob[:_SEEN]  # next time this is nothing new
                    try:
                        found = self._codec.open(key, blob)
                        fault = self._fault(found, versions, context)
                        if not fault and not (refresh and context.clock.time() >= found.fresh_until):
                            value = self._codec.value(found)
                            return self._error(value) if found.is_error else value, found, None
                    except Undecodable:
                        pass
                    continue
                if refresh or now() >= give_up:
                    return None, None, None
                await asyncio.sleep(pause * (0.5 + self._chance.random()))
                pause = min(pause * 1.5, longest)
        except Bypass as bypass:
            cache.emit_bypassed(context, self.label, bypass.detail)
        return None, None, None

    async def _remember(self, flight: Flight, lease: Lease, key: bytes, value: Any, cost: float) -> Lease | None:
        encoded = codec.encode(value)
        if encoded is not None:
            return await self._store(flight, lease, key, encoded, self._cache.lifetime(), cost)
        if len(self._uncarried) >= _MAX_NAMES:
            self._uncarried.clear()
        self._uncarried.add(key)
        self._cache.emit_bypassed(flight.context, self.label, f"JSON cannot carry this {type(value).__qualname__}")
        return lease

    async def _remember_error(self, flight: Flight, lease: Lease, key: bytes, error: Exception) -> Lease | None:
        cache = self._cache
        # Exactly the listed types: what is stored is a name, and only these are built again.
        if cache.negative_ttl is None or type(error) not in cache.negative_for:
            return lease
        encoded = codec.encode_error(error)
        return lease if encoded is None else await self._store(flight, lease, key, encoded, cache.negative_ttl, 0.0)

    async def _store(
        self, flight: Flight, lease: Lease, key: bytes, encoded: tuple[int, bytes], lifetime: float, cost: float
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
            cache.emit_bypassed(context, self.label, f"a result of {len(encoded[1])} bytes is too large")
            return lease
        lease.stop()
        try:
            stored = await self._put(lease, key, flight.tags, blob, lifetime + cache.stale_if_error, flight)
        except Bypass as bypass:
            cache.emit_bypassed(context, self.label, bypass.detail)
            return lease
        if stored:
            cache.emit_stored(context, self.label, lifetime)
        return None

    def _revoke(self, key: bytes) -> None:
        with self._cache.guard.lock:
            self._cache.flights.revoke(key)

    def _revoke_all(self) -> None:
        with self._cache.guard.lock:
            self._cache.flights.revoke_all()
