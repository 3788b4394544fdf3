"""Answer from what was computed before, and compute at most once at a time.

A hit in memory asks nothing of the loop: :meth:`CachePrimitive.peek` gives it to a synchronous caller without a hop.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable
from hashlib import blake2b
from marshal import dumps
from typing import TYPE_CHECKING, Any

from tta_sync import events
from tta_sync.context import WorkflowContext, current_context
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import (
    MISS,
    In,
    LambdaPrimitive,
    Out,
    WorkflowPrimitive,
    as_primitive,
    calling_form,
    step_name,
)
from tta_sync.primitives.performance import keys, snapshots
from tta_sync.primitives.performance.flights import Flight, Flights
from tta_sync.primitives.performance.stores import Entry, MemoryStore

if TYPE_CHECKING:
    from random import Random

_bus = events.bus
_LONG_FORM = keys.LONG_FORM
_DEFAULT_TTL = 3600.0
_REFRESH_LIMIT = 30.0  # seconds that a refresh in the background may take
_FOREVER = math.inf


class CachePrimitive(WorkflowPrimitive[In, Out]):
    """Keep a step's results for *ttl* seconds, and let concurrent callers of the same data share one computation.

    Two spellings: ``CachePrimitive(step, ttl=60)`` wraps a step; without a step it stands at the head of a chain, where
    it caches all that follows (``CachePrimitive(ttl=60) >> a >> b``), or at its tail, where it caches all before it.

    Every caller gets a copy of its own, so nobody can spoil a result for others; None is a result like any other. What
    cannot be copied is returned and not kept.

    Args:
        primitive: the step to cache.
        cache_key_fn: ``fn(data, context)`` or ``fn(data)``, the key instead of the data; the tenant is added to it.
        ttl: seconds until a result is forgotten (TTA.dev's name is *ttl_seconds*); 3600 by default.
        max_size: entries kept in memory; the least recently used goes first.
        max_bytes: bytes kept in memory, about; 64 MiB by default.
        soft_ttl: seconds after which a hit still answers at once, but starts a refresh in the background.
        stale_if_error: seconds beyond *ttl* for which the old result stands in for a step that fails.
        xfetch_beta: above 0, refresh early and at random, the sooner the longer the step takes; 1.0 is the paper's.
        negative_ttl: seconds for which an error of the types in *negative_for* is remembered and raised again.
        tags: names, or ``fn(data, context)`` that returns them, by which :meth:`invalidate` finds results.
        namespace: what tells this cache's keys from those of others in the same store.
        version: change it when the meaning of stored results changes; the old ones are not found again.
        jitter: the part of *ttl* by which it may be shortened at random, so that entries do not expire together.
        require_tenant: refuse a call whose context has no tenant.
        rng: the source of chance for *jitter* and *xfetch_beta*.

    Raises:
        ConfigurationError: built wrong; a call's data cannot be made a key (the message names the argument); a tenant
            is required and missing.

    Source: single-flight is Go's ``singleflight``, stale-while-revalidate and stale-if-error are RFC 5861's, XFetch is
    Vattani, Chierichetti and Lowenstein's "Optimal Probabilistic Cache Stampede Prevention".
    """

    peeks = True
    strategy = "cache"

    def __init__(
        self,
        primitive: Any = None,
        cache_key_fn: Callable[..., Any] | None = None,
        ttl_seconds: float | None = None,
        *,
        ttl: float | None = None,
        max_size: int = 10_000,
        max_bytes: int = 64 * 2**20,
        soft_ttl: float | None = None,
        stale_if_error: float = 0.0,
        xfetch_beta: float = 0.0,
        negative_ttl: float | None = None,
        negative_for: tuple[type[Exception], ...] = (),
        tags: Iterable[str] | Callable[..., Iterable[str]] = (),
        namespace: str | None = None,
        version: str | int = 1,
        jitter: float = 0.1,
        require_tenant: bool = False,
        rng: Random | None = None,
    ) -> None:
        if ttl is not None and ttl_seconds is not None:
            raise ConfigurationError("ttl and ttl_seconds are two names of one thing: give one of them")
        chosen = ttl if ttl is not None else ttl_seconds
        self.ttl = _seconds("ttl", _DEFAULT_TTL if chosen is None else chosen)
        self.soft_ttl = None if soft_ttl is None else _seconds("soft_ttl", soft_ttl)
        if self.soft_ttl is not None and self.soft_ttl >= self.ttl:
            raise ConfigurationError(
                f"soft_ttl={soft_ttl:g} must be below ttl={self.ttl:g}: it is when refreshing begins"
            )
        self.stale_if_error = _seconds("stale_if_error", stale_if_error or 0.0, zero=True)
        self.xfetch_beta = _seconds("xfetch_beta", xfetch_beta, zero=True)
        if (negative_ttl is None) != (not negative_for):
            raise ConfigurationError(
                "negative caching needs both negative_ttl= (seconds) and negative_for= (error types)"
            )
        self.negative_ttl = None if negative_ttl is None else _seconds("negative_ttl", negative_ttl)
        self.negative_for = tuple(negative_for)
        self.max_size = _count("max_size", max_size)
        self.max_bytes = _count("max_bytes", max_bytes)
        if not isinstance(jitter, (int, float)) or not 0 <= jitter < 1:
            raise ConfigurationError(f"jitter={jitter!r} is a part of the ttl: give 0 to 1, 0.1 for up to 10 % less")
        self.jitter = float(jitter)
        self.namespace = namespace
        self.version = str(version)
        self.require_tenant = require_tenant
        self.cache_key_fn = cache_key_fn
        self._key_of = _two_arguments("cache_key_fn", cache_key_fn)
        self._tags_of: Callable[[Any, WorkflowContext], Any] | None = None
        self._tags: frozenset[str] = frozenset()
        if callable(tags):
            self._tags_of = _two_arguments("tags", tags)
        else:
            self._tags = _tag_set(tags)
        self._rng = rng
        self._binding: dict[str, CachePrimitive[Any, Any]] = {}  # of an unbound cache: the one that it was bound as
        self._clear_state()
        self.primitive: WorkflowPrimitive[Any, Any] | None = None
        if primitive is not None:
            self._attach(as_primitive(primitive))

    def _clear_state(self) -> None:
        self._store: MemoryStore | None = None
        self._hits = self._misses = self._expirations = 0  # guarded by the store's lock

    def _attach(self, primitive: WorkflowPrimitive[Any, Any]) -> None:
        self.primitive = primitive
        self.name = self.name or f"cache of {step_name(primitive)}"
        self._store = MemoryStore(self.max_size, self.max_bytes)
        self._owner = b""  # what the keys of this cache begin with, in a store that it shares
        self._flights = Flights(self._store)

    # ---- standing in a chain -----------------------------------------------------------------------------------------

    @property
    def unbound(self) -> bool:
        """True for a cache that was built without a step: what it caches is the rest of its chain."""
        return self.primitive is None

    def bind(self, inner: WorkflowPrimitive[Any, Any]) -> CachePrimitive[Any, Any]:
        """Return the cache over *inner* that this one stands for; this one itself is not changed.

        The first binding counts: the same steps give the same bound cache again.

        Raises:
            ConfigurationError: it already caches other steps.
        """
        if self.primitive is not None:
            raise ConfigurationError(f"{self!r} already caches {self.primitive!r}")
        bound = self._binding.get("bound")
        if bound is None:
            candidate = copy.copy(self)
            candidate._binding = {}
            candidate._clear_state()
            candidate._attach(inner)
            bound = self._binding.setdefault("bound", candidate)  # atomic: of two threads one wins
        assert bound.primitive is not None
        if not _same_extent(bound.primitive, inner):
            raise ConfigurationError(
                f"this cache already caches {bound.primitive!r}, and now {inner!r}: "
                "one cache has one extent; give each chain a CachePrimitive of its own"
            )
        return bound

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return () if self.primitive is None else (self.primitive,)

    def details(self) -> str:
        return f"ttl={self.ttl:g}"

    # ---- answering ---------------------------------------------------------------------------------------------------

    def peek(self, data: In, context: WorkflowContext) -> Out | Any:
        """Return a fresh copy of a fresh result in memory, counted as a hit; else MISS."""
        store = self._store
        if store is None:
            return MISS
        known: Any = data if self._key_of is None else self._key_of(data, context)
        try:
            form = dumps(known, 2)
        except ValueError:
            return MISS
        if context.tenant is not None:
            form += dumps(context.tenant, 2)
        if len(form) >= _LONG_FORM:
            form = blake2b(form, digest_size=16).digest()
        entry = store.forms.get(form)
        if entry is None or context.clock.monotonic() >= entry.fresh_until:
            return MISS
        if entry.verify and not keys.is_plain(known):
            return MISS
        with store.lock:
            try:
                store.entries.move_to_end(entry.key)
            except KeyError:
                return MISS  # dropped a moment ago
            self._hits += 1
        state = context.state
        state["cache_hits"] = state.get("cache_hits", 0) + 1
        if entry.degraded:
            context.mark_degraded()
        if _bus.emit is not None:
            _bus.emit(events.CacheHit(step=self.name or "", correlation_id=context.correlation_id))
        load = entry.load
        return entry.stored if load is None else load(entry.stored)

    async def _run(self, data: Any, context: WorkflowContext) -> Any:
        value = self.peek(data, context)
        if value is not MISS:
            return value
        primitive = self.primitive
        if primitive is None:
            raise ConfigurationError(
                "this cache has nothing to cache: write CachePrimitive(step, ttl=60) or CachePrimitive(ttl=60) >> step"
            )
        store = self._store
        assert store is not None
        known = data if self._key_of is None else self._key_of(data, context)
        key = self._key(known, context.tenant)
        entry = self._look_up(store, key, known, context)
        if entry is not None:
            return await self._answer(entry, key, data, known, context)
        if _bus.emit is not None:
            _bus.emit(events.CacheMiss(step=self.name or "", correlation_id=context.correlation_id))

        async def work(flight: Flight) -> Any:
            return await self._compute(flight, key, known, data)

        return await self._flights.share(
            key, context, self._tags_for(data, context), self.name or "", work, lambda: primitive._run(data, context)
        )

    def _look_up(self, store: MemoryStore, key: bytes, known: Any, context: WorkflowContext) -> Entry | None:
        """Return what answers the call without computing, and count the call."""
        now = context.clock.monotonic()
        state = context.state
        with store.lock:
            entry = store.entries.get(key)
            if entry is not None and now < entry.expires_at:
                self._hits += 1
                store.entries.move_to_end(key)
                self._alias(store, entry, known, context.tenant)
                state["cache_hits"] = state.get("cache_hits", 0) + 1
                return entry
            if entry is not None:
                if not entry.expired:
                    entry.expired = True
                    self._expirations += 1
                if now >= entry.keep_until:
                    store.drop(key)
            self._misses += 1
        state["cache_misses"] = state.get("cache_misses", 0) + 1
        return None

    def _alias(self, store: MemoryStore, entry: Entry, known: Any, tenant: str | None) -> None:
        form = keys.exact_form(known, tenant)
        # Without an exact form the entry is found by its key: a hit, only a slower one.
        if form is not None and keys.is_plain(known):
            store.alias(entry, form, keys.holds_bytes(known))

    async def _answer(self, entry: Entry, key: bytes, data: Any, known: Any, context: WorkflowContext) -> Any:
        stale = not entry.error and context.clock.monotonic() >= entry.fresh_until
        if _bus.emit is not None:
            _bus.emit(events.CacheHit(step=self.name or "", correlation_id=context.correlation_id, stale=stale))
        if entry.error:
            raise snapshots.copy_error(entry.stored)
        if entry.degraded:
            context.mark_degraded()
        if stale:

            async def work(flight: Flight) -> Any:
                return await self._refresh(flight, key, known, data)

            self._flights.begin(
                key, context, self._tags_for(data, context), f"refresh of {self.name}", work, _REFRESH_LIMIT
            )
        return entry.copy()

    # ---- computing ---------------------------------------------------------------------------------------------------

    async def _compute(self, flight: Flight, key: bytes, known: Any, data: Any) -> Any:
        try:
            store, primitive, context = self._store, self.primitive, flight.context
            assert store is not None
            assert primitive is not None
            clock = context.clock
            began = clock.monotonic()
            with store.lock:
                old = store.entries.get(key)
            if old is not None and began < old.fresh_until:  # another loop was quicker
                flight.snapshot = snapshots.Snapshot(old.stored, old.load, old.size)
                return old.copy()
            try:
                value = await primitive._run(data, context)
            except Exception as error:
                if old is not None and not old.error and clock.monotonic() < old.keep_until:
                    return self._stand_in(flight, old)
                self._remember_error(flight, key, known, error)
                raise
            flight.snapshot = snapshots.take(value)
            if flight.snapshot is None:
                self._bypassed(context, f"a {type(value).__qualname__} cannot be copied")
            else:
                self._remember(flight, key, known, flight.snapshot, clock.monotonic() - began)
            return value
        finally:
            del flight  # an error's traceback leads to this frame

    async def _refresh(self, flight: Flight, key: bytes, known: Any, data: Any) -> None:
        context = flight.context
        timer = context.clock.call_at(context.deadline.at, flight.task.cancel)  # type: ignore[union-attr]  # both set
        try:
            await self._compute(flight, key, known, data)
        except BaseException as error:
            self._bypassed(context, f"the refresh failed with {type(error).__qualname__}")
        finally:
            timer.cancel()
            del flight

    def _stand_in(self, flight: Flight, old: Entry) -> Any:
        """Answer with an expired result because the step failed."""
        flight.context.mark_degraded()
        flight.snapshot = snapshots.Snapshot(old.stored, old.load, old.size)
        if _bus.emit is not None:
            _bus.emit(events.CacheHit(step=self.name or "", correlation_id=flight.context.correlation_id, stale=True))
        return old.copy()

    def _remember(self, flight: Flight, key: bytes, known: Any, snapshot: snapshots.Snapshot, cost: float) -> None:
        clock = flight.context.clock
        now = clock.monotonic()
        lifetime = self.ttl * (1.0 - self.jitter * self._chance()) if self.jitter else self.ttl
        expires_at = now + lifetime
        fresh_until = expires_at if self.soft_ttl is None else min(now + self.soft_ttl, expires_at)
        if self.xfetch_beta:
            # Drawn once per entry, not at each hit: single-flight leaves only processes to tell apart.
            fresh_until = min(fresh_until, expires_at + cost * self.xfetch_beta * math.log(1.0 - self._chance()))
        entry = Entry(
            key,
            snapshot,
            fresh_until=fresh_until,
            expires_at=expires_at,
            keep_until=expires_at + self.stale_if_error,
            clock=clock,
            tags=flight.tags,
            degraded=flight.context.degraded,
        )
        if self._put(flight, entry, known) and _bus.emit is not None:
            _bus.emit(
                events.CacheStored(step=self.name or "", correlation_id=flight.context.correlation_id, ttl=lifetime)
            )

    def _remember_error(self, flight: Flight, key: bytes, known: Any, error: Exception) -> None:
        if self.negative_ttl is None or not isinstance(error, self.negative_for):
            return
        kept = snapshots.copy_error(error)
        if kept is error:
            return  # it cannot be copied, so it cannot be raised twice
        kept.__traceback__ = kept.__context__ = None  # frames of a call that is over, and all that they hold
        clock = flight.context.clock
        expires_at = clock.monotonic() + self.negative_ttl
        snapshot = snapshots.Snapshot(kept, None, 1000)
        entry = Entry(
            key,
            snapshot,
            fresh_until=-_FOREVER,
            expires_at=expires_at,
            keep_until=expires_at,
            clock=clock,
            tags=flight.tags,
            error=True,
        )
        self._put(flight, entry, known)

    def _put(self, flight: Flight, entry: Entry, known: Any) -> bool:
        store = self._store
        assert store is not None
        with store.lock:
            if flight.revoked or not store.put(entry):
                return False
            self._alias(store, entry, known, flight.context.tenant)
        return True

    def _bypassed(self, context: WorkflowContext, reason: str) -> None:
        if _bus.emit is not None:
            _bus.emit(events.CacheBypassed(step=self.name or "", correlation_id=context.correlation_id, reason=reason))

    def _chance(self) -> float:
        if self._rng is None:
            from random import Random

            self._rng = Random()  # noqa: S311  # spreads load, keeps no secret
        return self._rng.random()

    # ---- keys --------------------------------------------------------------------------------------------------------

    def _key(self, known: Any, tenant: str | None) -> bytes:
        if tenant is None and self.require_tenant:
            raise ConfigurationError(
                f"{self.name} requires a tenant and the context has none: set WorkflowContext(tenant=...)"
            )
        argument = "data" if self._key_of is None else "the result of cache_key_fn"
        return self._owner + keys.prefix(tenant).encode() + keys.digest(known, argument)

    def _tags_for(self, data: Any, context: WorkflowContext) -> frozenset[str]:
        return self._tags if self._tags_of is None else _tag_set(self._tags_of(data, context))

    # ---- invalidation ------------------------------------------------------------------------------------------------

    def invalidate(self, data: Any = None, *, tags: Iterable[str] = (), tenant: str | None = None) -> None:
        """Forget the result for *data*, or all results that carry one of *tags*; in effect on return.

        A computation that has begun before is not stored, and no later caller joins it. The tenant is *tenant*, else
        that of the current context. On an unbound cache this means the chain that it stands in.
        """
        cache = self._acting()
        if cache is not None:
            cache._forget(data, _tag_set(tags), tenant)

    def clear_cache(self) -> None:
        """Forget all results of this cache, of every tenant; in effect on return."""
        cache = self._acting()
        if cache is not None:
            store = cache._store
            assert store is not None
            with store.lock:
                store.drop_all(cache._owner)
                cache._flights.revoke_all()

    async def ainvalidate(self, data: Any = None, *, tags: Iterable[str] = (), tenant: str | None = None) -> None:
        """Do what :meth:`invalidate` does, on the loop."""
        self.invalidate(data, tags=tags, tenant=tenant)

    async def aclear_cache(self) -> None:
        """Do what :meth:`clear_cache` does, on the loop."""
        self.clear_cache()

    def _forget(self, data: Any, tags: frozenset[str], tenant: str | None) -> None:
        store = self._store
        assert store is not None
        key = None
        if data is not None or not tags:
            current = current_context()
            if current is None or (tenant is not None and tenant != current.tenant):
                current = WorkflowContext(tenant=tenant)
            key = self._key(data if self._key_of is None else self._key_of(data, current), current.tenant)
        with store.lock:
            if key is not None:
                store.drop(key)
                self._flights.revoke(key)
            if tags:
                store.drop_tags(tags, self._owner)
                self._flights.revoke_tags(tags)

    def _acting(self) -> CachePrimitive[Any, Any] | None:
        """Return the cache that holds the results: this one, or the one that it was bound as; None if there is none."""
        return self if self.primitive is not None else self._binding.get("bound")

    # ---- statistics --------------------------------------------------------------------------------------------------

    def get_stats(self) -> dict[str, Any]:
        """Return size, hits, misses, expirations, and hit_rate in percent, as TTA.dev does."""
        cache = self._acting()
        if cache is None:
            return {"size": 0, "hits": 0, "misses": 0, "expirations": 0, "hit_rate": 0.0}
        store = cache._store
        assert store is not None
        with store.lock:
            hits, misses, expirations = cache._hits, cache._misses, cache._expirations
            size = store.count(cache._owner)
        rate = round(100.0 * hits / (hits + misses), 2) if hits + misses else 0.0
        return {"size": size, "hits": hits, "misses": misses, "expirations": expirations, "hit_rate": rate}

    def get_hit_rate(self) -> float:
        """Return the hits in percent of all calls so far, 0.0 before the first."""
        rate: float = self.get_stats()["hit_rate"]
        return rate

    def evict_expired(self) -> int:
        """Drop from memory what has expired, without waiting for its next call; return how many entries went."""
        cache = self._acting()
        if cache is None:
            return 0
        store = cache._store
        assert store is not None
        with store.lock:
            gone, counted = store.drop_expired(cache._owner)
            cache._expirations += gone - counted
        return gone


def _seconds(name: str, value: Any, zero: bool = False) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):
        raise ConfigurationError(f"{name}={value!r}: give a number {'of 0 or more' if zero else 'above 0'}")
    return float(value)


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(f"{name}={value!r}: give a whole number above 0")
    return value


def _two_arguments(name: str, function: Any) -> Callable[[Any, WorkflowContext], Any] | None:
    if function is None:
        return None
    if not callable(function):
        raise ConfigurationError(f"{name}={function!r} is not a function: write {name}=lambda data, context: ...")
    if inspect.iscoroutinefunction(function):
        raise ConfigurationError(f"{name} must be a plain function: it is asked on threads without a loop, too")
    form, two = calling_form(function)
    return form if two else lambda data, context: form(data)


def _tag_set(tags: Iterable[str]) -> frozenset[str]:
    tags = (tags,) if isinstance(tags, str) else tuple(tags)
    for tag in tags:
        if not isinstance(tag, str) or not tag:
            raise ConfigurationError(f"tag {tag!r} is not a name: tags are non-empty strings")
    return frozenset(tags)


def _same_extent(one: WorkflowPrimitive[Any, Any], other: WorkflowPrimitive[Any, Any]) -> bool:
    ours, theirs = _parts(one), _parts(other)
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))


def _parts(primitive: WorkflowPrimitive[Any, Any]) -> tuple[Any, ...]:
    steps = getattr(primitive, "steps", None)
    if isinstance(steps, tuple):
        return tuple(part for step in steps for part in _parts(step))
    if type(primitive) is LambdaPrimitive:
        return (primitive.func,)  # made anew each time the function stands in a chain
    return (primitive,)
