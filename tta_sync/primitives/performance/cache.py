"""Answer from what was computed before, and compute at most once at a time.

A hit in memory asks nothing of the loop: :meth:`CachePrimitive.peek` gives it to a synchronous caller without a hop.
"""

from __future__ import annotations

import copy
import inspect
import math
import types
import weakref
from collections.abc import Callable, Iterable
from functools import partial
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
    StepLike,
    WorkflowPrimitive,
    as_primitive,
    calling_form,
    step_name,
)
from tta_sync.primitives.core.composition import check_composition, children_of
from tta_sync.primitives.core.options import is_async
from tta_sync.primitives.core.sequential import SequentialPrimitive
from tta_sync.primitives.performance.flights import Flight, Flights
from tta_sync.primitives.performance.in_memory import MemoryLayer
from tta_sync.primitives.performance.keys import LONG_FORM, is_plain, prefix
from tta_sync.primitives.performance.stores import CacheBackend, Guard, InMemoryBackend, MemoryStore, RedisBackend

if TYPE_CHECKING:
    from random import Random

    from tta_sync.primitives.performance.in_backend import BackendLayer
    from tta_sync.primitives.performance.in_redis import RedisLayer

_bus = events.bus
_DEFAULT_TTL = 3600.0


class CachePrimitive(WorkflowPrimitive[In, Out]):
    """Keep a step's results for *ttl* seconds, and let concurrent callers of the same data share one computation.

    Two spellings: ``CachePrimitive(step, ttl=60)`` wraps a step; without a step it stands at the head of a chain, where
    it caches all that follows (``CachePrimitive(ttl=60) >> a >> b``), or at its tail, where it caches all before it.
    ``CachePrimitive(ttl=60) >> a >> CachePrimitive(ttl=3600, storage=redis)`` is memory over Redis over *a*.

    Every caller gets a copy of its own, so nobody can spoil a result for others; None is a result like any other. What
    cannot be copied (in Redis: what JSON cannot carry) is returned and not kept. A store that fails or hangs is passed
    by: the step is called, and an event says so.

    Args:
        primitive: the step to cache.
        cache_key_fn: ``fn(data, context)`` or ``fn(data)``, the key instead of the data; the tenant is added to it.
        ttl: seconds until a result is forgotten (TTA.dev's name is *ttl_seconds*); 3600 by default.
        storage: a ``redis.Redis`` or ``redis.asyncio.Redis`` client, its URL, or a back end (TTA.dev's name is
            *backend*); memory by default. A client gives address and credentials: the cache opens its own connections.
        max_size: entries kept in memory; the least recently used goes first.
        max_bytes: bytes kept in memory, about; 64 MiB by default.
        soft_ttl: seconds after which a hit still answers at once, but starts a refresh in the background.
        stale_if_error: seconds beyond *ttl* for which the old result stands in for a step that fails.
        xfetch_beta: above 0, refresh early and at random, the sooner the longer the step takes; 1.0 is the paper's.
        negative_ttl: seconds for which an error of the types in *negative_for* is remembered and raised again.
        tags: names, or ``fn(data, context)`` that returns them, by which :meth:`invalidate` finds results.
        namespace: what tells this cache's keys from those of others in the same store; by default the names of the
            steps that it caches.
        version: change it when the meaning of stored results changes; the old ones are not found again.
        jitter: the part of *ttl* by which it may be shortened at random, so that entries do not expire together.
        require_tenant: refuse a call whose context has no tenant.
        secret: seals what is stored in Redis; results sealed with another secret are not believed.
        compress_above: bytes from which results are compressed in Redis; None for never.
        max_value_bytes: results larger than this are not stored in Redis, nor read from it.
        max_wait: seconds for which to wait for another process's computation before beginning one's own.
        rng: the source of chance for *jitter* and *xfetch_beta*.

    Raises:
        ConfigurationError: built wrong; a call's data cannot be made a key (the message names the argument); a tenant
            is required and missing.

    Source: single-flight is Go's ``singleflight``, stale-while-revalidate and stale-if-error are RFC 5861's, XFetch is
    Vattani, Chierichetti and Lowenstein's "Optimal Probabilistic Cache Stampede Prevention".
    """

    peeks = True
    _tta_kind = "cache"
    tells_itself = True  # by CacheHit and CacheMiss; a hit that was peeked at could tell no more

    def __init__(
        self,
        primitive: StepLike[In, Out] | None = None,
        cache_key_fn: Callable[..., Any] | None = None,
        ttl_seconds: float | None = None,
        backend: Any = None,
        *,
        ttl: float | None = None,
        storage: Any = None,
        max_size: int = 10_000,
        max_bytes: int = 64 * 2**20,
        soft_ttl: float | None = None,
        stale_if_error: float | None = None,
        xfetch_beta: float = 0.0,
        negative_ttl: float | None = None,
        negative_for: type[Exception] | tuple[type[Exception], ...] = (),
        tags: Iterable[str] | Callable[..., Iterable[str]] = (),
        namespace: str | None = None,
        version: str | int = 1,
        jitter: float = 0.1,
        require_tenant: bool = False,
        secret: str | bytes | None = None,
        compress_above: int | None = 1024,
        max_value_bytes: int = 8 * 2**20,
        max_wait: float = 30.0,
        rng: Random | None = None,
    ) -> None:
        self.ttl = _seconds("ttl", _one_of("ttl", ttl, "ttl_seconds", ttl_seconds, _DEFAULT_TTL))
        self.storage = _one_of("storage", storage, "backend", backend, None)
        self.soft_ttl = None if soft_ttl is None else _seconds("soft_ttl", soft_ttl)
        if self.soft_ttl is not None and self.soft_ttl >= self.ttl:
            raise ConfigurationError(f"soft_ttl={soft_ttl:g} must be below ttl={self.ttl:g}: refreshing begins there")
        self.stale_if_error = _seconds("stale_if_error", stale_if_error or 0.0, zero=True)
        self.xfetch_beta = _seconds("xfetch_beta", xfetch_beta, zero=True)
        self.negative_for = negative_for if isinstance(negative_for, tuple) else (negative_for,)
        if (negative_ttl is None) != (not self.negative_for):
            raise ConfigurationError("negative caching needs negative_ttl= (seconds) and negative_for= (error types)")
        self.negative_ttl = None if negative_ttl is None else _seconds("negative_ttl", negative_ttl)
        self.max_size = _count("max_size", max_size)
        self.max_bytes = _count("max_bytes", max_bytes)
        if not isinstance(jitter, (int, float)) or not 0 <= jitter < 1:
            raise ConfigurationError(f"jitter={jitter!r} is a part of the ttl: give 0 to 1, 0.1 for up to 10 % less")
        self.jitter = float(jitter)
        self.namespace = namespace
        self.version = str(version)
        self.require_tenant = require_tenant
        self.secret = secret.encode() if isinstance(secret, str) else secret
        self.compress_above = None if compress_above is None else _count("compress_above", compress_above)
        self.max_value_bytes = _count("max_value_bytes", max_value_bytes)
        self.max_wait = _seconds("max_wait", max_wait)
        self.cache_key_fn = cache_key_fn
        self.key_argument = "data" if cache_key_fn is None else "the result of cache_key_fn"
        self._key_of = _two_arguments("cache_key_fn", cache_key_fn)
        self._tags_of = _two_arguments("tags", tags) if callable(tags) else None
        self._tags = frozenset() if callable(tags) else tag_set(tags)
        self._rng = rng
        # What an unbound cache was bound as; one dict, shared by all copies of it.
        self._binding: dict[str, CachePrimitive[Any, Any]] = {}
        self.primitive: WorkflowPrimitive[Any, Any] | None = None
        self.label = ""
        self._store: MemoryStore | None = None
        self._salt = b""
        if primitive is not None:
            self._attach(as_primitive(primitive))
            check_composition(self)

    def _attach(self, primitive: WorkflowPrimitive[Any, Any]) -> None:
        """Become the cache of *primitive*, with nothing stored yet."""
        self.primitive = primitive
        self.label = self.name or f"cache of {step_name(primitive)}"
        self.hits = self.misses = self.expirations = 0  # guarded by the guard's lock
        self._outer: weakref.WeakSet[CachePrimitive[Any, Any]] = weakref.WeakSet()
        self._inner = primitive if isinstance(primitive, CachePrimitive) else None
        self._layer: MemoryLayer | RedisLayer | BackendLayer
        if self.storage is None or isinstance(self.storage, InMemoryBackend):
            store, owner = MemoryStore(self.max_size, self.max_bytes), b""
            if self.storage is not None:
                store = self.storage.store
                owner = prefix(self._claim(store.claims), self.version).encode()
            self._store = store
            self.guard: Guard = store
            self._salt = owner
            self.flights = Flights(store)
            self._layer = MemoryLayer(self, store, owner)
            self._layer.below = tuple(self._shared_below())
        else:
            self._store = None
            self.guard = Guard()
            self.flights = Flights(self.guard)
            self._layer = self._shared_layer(self.storage)
        if self._inner is not None:
            self._inner._outer.add(self)

    def _shared_layer(self, storage: Any) -> RedisLayer | BackendLayer:
        theirs = any(base.__module__.partition(".")[0] == "redis" for base in type(storage).__mro__)
        if theirs or isinstance(storage, (str, RedisBackend)):
            from tta_sync.primitives.performance.in_redis import RedisLayer

            return RedisLayer(self, storage, self._claim)
        if isinstance(storage, CacheBackend) and not isinstance(storage, type):
            from tta_sync.primitives.performance.in_backend import BackendLayer

            return BackendLayer(self, storage, self._claim)
        raise ConfigurationError(
            f"{storage!r:.100} is no store: give redis.Redis(...), redis.asyncio.Redis(...), a URL, RedisBackend(url), "
            "InMemoryBackend(), or an object with async get(key), set(key, value, ttl_seconds) and delete(key)"
        )

    @property
    def has_tags(self) -> bool:
        """Say whether results may carry tags."""
        return bool(self._tags) or self._tags_of is not None

    def _shared_below(self) -> Iterable[RedisLayer]:
        """Yield the Redis layers of the caches that stand directly below this one."""
        cache = self._inner
        if cache is None:
            return
        from tta_sync.primitives.performance.in_redis import RedisLayer

        while cache is not None:
            if isinstance(cache._layer, RedisLayer):
                yield cache._layer
            cache = cache._inner

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
            candidate._attach(inner)
            bound = self._binding.setdefault("bound", candidate)  # atomic: of two threads one wins
        assert bound.primitive is not None
        if not _same(_extent(bound.primitive), _extent(inner)):
            raise ConfigurationError(
                f"this cache already caches {bound.primitive!r}, and now {inner!r}: "
                "one cache has one extent; give each chain a CachePrimitive of its own"
            )
        return bound

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return () if self.primitive is None else (self.primitive,)

    def details(self) -> str:
        return f"ttl={self.ttl:g}" if self.storage is None else f"ttl={self.ttl:g}, storage={_named(self.storage)}"

    def _claim(self, claims: dict[Any, Any]) -> str:
        """Return this cache's namespace in a store that it shares.

        Raises:
            ConfigurationError: it would share entries with another step, or might in another process.
        """
        assert self.primitive is not None
        if self.namespace is not None:
            return self.namespace
        text = describe(self.primitive)
        if "<locals>" in text or "<lambda>" in text or "functools.partial" in text:
            raise ConfigurationError(
                f"{text} has no name that is the same in every process: "
                "give the cache namespace=..., or define the step at the top of a module"
            )
        leaves = _leaves(self.primitive)
        known = claims.setdefault(text, _references(leaves))  # atomic: of two threads one is first
        theirs = [reference() for reference in known]
        if any(leaf is None for leaf in theirs):
            claims[text] = _references(leaves)  # the other one is gone
        elif not _same(leaves, theirs):
            raise ConfigurationError(
                f"two different steps are called {text}, and would share their entries: give each cache namespace=..."
            )
        return text

    def conflict(self, inner: WorkflowPrimitive[Any, Any], direct: bool) -> str | None:
        if direct and type(inner)._tta_kind == "fallback":
            return (
                f"the cache around {inner!r} keeps what the fallback answered for as long as any other result: "
                "put the fallback outside, FallbackPrimitive(CachePrimitive(primary), fallback)"
            )
        return None

    # ---- answering ---------------------------------------------------------------------------------------------------

    def peek(self, data: In, context: WorkflowContext) -> Out | Any:
        """Return a fresh copy of a fresh result in memory, counted as a hit; else MISS."""
        store = self._store
        if store is None:
            return MISS
        known: Any = data
        try:
            if self._key_of is not None:
                known = self._key_of(data, context)
            form = dumps(known, 2)
            if context.tenant is not None:
                form += dumps(context.tenant, 2)
        except Exception:  # not to be marshalled, or the user's key function fails: the long way will tell
            return MISS
        if len(form) >= LONG_FORM:
            form = blake2b(form, digest_size=16).digest()
        entry = store.forms.get(self._salt + form if self._salt else form)
        if entry is None or context.clock.monotonic() >= entry.fresh_until:
            return MISS
        if entry.verify and not is_plain(known):
            return MISS
        with store.lock:
            try:
                store.entries.move_to_end(entry.key)
            except KeyError:
                return MISS  # dropped a moment ago
            self.hits += 1
        state = context.state
        state["cache_hits"] = state.get("cache_hits", 0) + 1
        if entry.degraded:
            context.mark_degraded()
        if _bus.emit is not None:
            self.emit_hit(context, "memory", stale=False)
        load = entry.load
        return entry.stored if load is None else load(entry.stored)

    async def _run(self, data: Any, context: WorkflowContext) -> Any:
        value = self.peek(data, context)
        if value is not MISS:
            return value
        if self.primitive is None:
            raise ConfigurationError(
                "this cache has nothing to cache: write CachePrimitive(step, ttl=60) or CachePrimitive(ttl=60) >> step"
            )
        if self.require_tenant and context.tenant is None:
            raise ConfigurationError(
                f"the {self.label} requires a tenant and the context has none: set WorkflowContext(tenant=...)"
            )
        return await self._layer.answer(data, self.known(data, context), context)

    def known(self, data: Any, context: WorkflowContext) -> Any:
        """Return what the call is known by: its data, or what the key function makes of them."""
        return data if self._key_of is None else self._key_of(data, context)

    def tags_for(self, data: Any, context: WorkflowContext) -> frozenset[str]:
        return self._tags if self._tags_of is None else tag_set(self._tags_of(data, context))

    def refresh(
        self, key: bytes, context: WorkflowContext, tags: frozenset[str], layer: str, work: Callable[[Flight], Any]
    ) -> None:
        """Compute anew in the background, unless somebody is at it."""

        async def told(flight: Flight) -> Any:
            try:
                return await work(flight)
            except BaseException as error:
                self.emit_bypassed(flight.context, layer, f"a refresh failed with {type(error).__qualname__}")
                raise
            finally:
                del flight

        self.flights.begin(key, context, tags, f"refresh, {self.label}", told)

    # ---- chance ------------------------------------------------------------------------------------------------------

    def lifetime(self) -> float:
        """Return the ttl, shortened by the jitter."""
        return self.ttl * (1.0 - self.jitter * self._chance()) if self.jitter else self.ttl

    def early(self, expires_at: float, cost: float) -> float:
        """Return the moment from which XFetch wants a result that took *cost* seconds to be refreshed."""
        return expires_at + cost * self.xfetch_beta * math.log(1.0 - self._chance())

    def _chance(self) -> float:
        if self._rng is None:
            from random import Random

            self._rng = Random()  # noqa: S311  # spreads load, keeps no secret
        return self._rng.random()

    # ---- invalidation ------------------------------------------------------------------------------------------------

    def invalidate(self, data: Any = None, *, tags: Iterable[str] = (), tenant: str | None = None) -> None:
        """Forget the result for *data*, or all results that carry one of *tags*; in effect on return.

        What the caches directly above and below this one know of it is forgotten, too, and in Redis also in the memory
        of other processes. A computation that has begun before is not stored, and no later caller joins it. The tenant
        is *tenant*, else that of the current context. On an unbound cache this means the chain that it stands in.

        Raises:
            ConnectionError: Redis cannot be reached; the memory of this process was cleared.
            WouldDeadlockError: called on a loop with a cache in Redis: await :meth:`ainvalidate` there.
        """
        steps = self._forgetting(data, tag_set(tags), tenant)
        self._at_once(steps, "invalidate")

    async def ainvalidate(self, data: Any = None, *, tags: Iterable[str] = (), tenant: str | None = None) -> None:
        """Do what :meth:`invalidate` does, on the loop."""
        await self._in_turn(self._forgetting(data, tag_set(tags), tenant))

    def clear_cache(self) -> None:
        """Forget all results of this cache, of every tenant, and what caches directly above know; in effect on return.

        Raises:
            ConnectionError: Redis cannot be reached; the memory of this process was cleared.
            WouldDeadlockError: called on a loop with a cache in Redis: await :meth:`aclear_cache` there.
        """
        self._at_once(self._clearing(), "clear_cache")

    async def aclear_cache(self) -> None:
        """Do what :meth:`clear_cache` does, on the loop."""
        await self._in_turn(self._clearing())

    def _forgetting(self, data: Any, tags: frozenset[str], tenant: str | None) -> list[Callable[[], Any]]:
        acting = self._acting()
        if acting is None:
            return []
        by_key = data is not None or not tags
        context = current_context()
        if context is None or (tenant is not None and tenant != context.tenant):
            context = WorkflowContext(tenant=tenant)
        steps: list[Callable[[], Any]] = []
        for cache in acting._stack():
            if by_key:
                key = cache._layer.key(cache.known(data, context), context.tenant)
                steps.append(partial(cache._layer.forget_key, key))
            if tags:
                steps.append(partial(cache._layer.forget_tags, tags))
        return steps

    def _clearing(self) -> list[Callable[[], Any]]:
        acting = self._acting()
        return [] if acting is None else [cache._layer.forget_all for cache in (acting, *acting._above())]

    def _at_once(self, steps: list[Callable[[], Any]], name: str) -> None:
        acting = self._acting()
        if acting is None:
            return
        if any(not isinstance(cache._layer, MemoryLayer) for cache in acting._stack()):
            from tta_sync.primitives.performance.in_redis import from_sync

            from_sync(lambda: self._in_turn(steps), f"{name}()", f"await cache.a{name}(...)")
        else:
            for step in steps:
                step()

    async def _in_turn(self, steps: list[Callable[[], Any]]) -> None:
        """Do all *steps*, also when one fails; then raise the first error."""
        failed: ConnectionError | None = None
        for step in steps:
            try:
                answer = step()
                if inspect.isawaitable(answer):
                    await answer
            except ConnectionError as error:
                failed = failed or error
        if failed is not None:
            acting = self._acting()
            assert acting is not None
            for memory in acting.memories_above():
                memory.forget_all()  # who knows what else was not heard of
            raise failed

    def memories_above(self) -> list[MemoryLayer]:
        """Return the memory of this cache and of those directly above it."""
        return [cache._layer for cache in (self, *self._above()) if isinstance(cache._layer, MemoryLayer)]

    def _above(self) -> list[CachePrimitive[Any, Any]]:
        """Return the caches that this one is directly inside of, the next one first."""
        found = list(self._outer)
        return found + [further for cache in found for further in cache._above()]

    def _stack(self) -> list[CachePrimitive[Any, Any]]:
        """Return the caches directly below this one, itself, and those directly above: the innermost first."""
        below: list[CachePrimitive[Any, Any]] = []
        cache = self._inner
        while cache is not None:
            below.insert(0, cache)
            cache = cache._inner
        return [*below, self, *self._above()]

    def _acting(self) -> CachePrimitive[Any, Any] | None:
        """Return the cache that holds the results: this one, or the one that it was bound as; None if there is none."""
        return self if self.primitive is not None else self._binding.get("bound")

    # ---- statistics and events ---------------------------------------------------------------------------------------

    def get_stats(self) -> dict[str, Any]:
        """Return size (entries in memory), hits, misses, expirations, and hit_rate in percent, as TTA.dev does."""
        cache = self._acting()
        if cache is None:
            return {"size": 0, "hits": 0, "misses": 0, "expirations": 0, "hit_rate": 0.0}
        with cache.guard.lock:
            hits, misses, expirations = cache.hits, cache.misses, cache.expirations
            size = 0 if cache._store is None else cache._store.count(cache._salt)
        rate = round(100.0 * hits / (hits + misses), 2) if hits + misses else 0.0
        return {"size": size, "hits": hits, "misses": misses, "expirations": expirations, "hit_rate": rate}

    def get_hit_rate(self) -> float:
        """Return the hits in percent of all calls so far, 0.0 before the first."""
        rate: float = self.get_stats()["hit_rate"]
        return rate

    def evict_expired(self) -> int:
        """Drop from memory what has expired, without waiting for its next call; return how many entries went."""
        cache = self._acting()
        if cache is None or cache._store is None:
            return 0
        with cache._store.lock:
            gone, counted = cache._store.drop_expired(cache._salt)
            cache.expirations += gone - counted
        return gone

    def count_hit(self, context: WorkflowContext, layer: str, stale: bool) -> None:
        with self.guard.lock:
            self.hits += 1
        context.state["cache_hits"] = context.state.get("cache_hits", 0) + 1
        self.emit_hit(context, layer, stale)

    def count_miss(self, context: WorkflowContext, layer: str, reason: str) -> None:
        with self.guard.lock:
            self.misses += 1
        context.state["cache_misses"] = context.state.get("cache_misses", 0) + 1
        if _bus.emit is not None:
            _bus.emit(
                events.CacheMiss(step=self.label, correlation_id=context.correlation_id, layer=layer, reason=reason)
            )

    def emit_hit(self, context: WorkflowContext, layer: str, stale: bool) -> None:
        if _bus.emit is not None:
            _bus.emit(events.CacheHit(step=self.label, correlation_id=context.correlation_id, layer=layer, stale=stale))

    def emit_stored(self, context: WorkflowContext, layer: str, ttl: float) -> None:
        if _bus.emit is not None:
            _bus.emit(events.CacheStored(step=self.label, correlation_id=context.correlation_id, layer=layer, ttl=ttl))

    def emit_bypassed(self, context: WorkflowContext, layer: str, reason: str) -> None:
        if _bus.emit is not None:
            _bus.emit(
                events.CacheBypassed(step=self.label, correlation_id=context.correlation_id, layer=layer, reason=reason)
            )


# ---- what a cache is over -------------------------------------------------------------------------------------------


def describe(primitive: WorkflowPrimitive[Any, Any], above: tuple[int, ...] = ()) -> str:
    """Return the qualified names of the steps inside, the same in every process that runs the same code."""
    if isinstance(primitive, LambdaPrimitive):
        return _qualified(primitive.func)
    parts = children_of(primitive)
    if not parts:
        foreign = getattr(primitive, "foreign", None)
        return _qualified(type(primitive if foreign is None else foreign))
    above = (*above, id(primitive))
    inside = ">".join("..." if id(part) in above else describe(part, above) for part in parts)
    return inside if isinstance(primitive, CachePrimitive) else f"{type(primitive).__name__}({inside})"


def _qualified(thing: Any) -> str:
    if not hasattr(thing, "__qualname__"):  # a partial, or an object with __call__
        thing = type(thing)
    return f"{thing.__module__}.{thing.__qualname__}"


def _leaves(primitive: WorkflowPrimitive[Any, Any], above: tuple[int, ...] = ()) -> list[Any]:
    """Return the users' own functions and objects inside, which stay the same where wrappers are made anew."""
    if isinstance(primitive, LambdaPrimitive):
        return [primitive.func]
    parts = children_of(primitive)
    if not parts:
        return [getattr(primitive, "foreign", primitive)]
    above = (*above, id(primitive))
    return [leaf for part in parts if id(part) not in above for leaf in _leaves(part, above)]


def _extent(primitive: WorkflowPrimitive[Any, Any]) -> list[Any]:
    """Return the steps that a cache stands around; a function is a new step each time it is written in a chain."""
    steps = children_of(primitive) if isinstance(primitive, SequentialPrimitive) else (primitive,)
    return [step.func if type(step) is LambdaPrimitive else step for step in steps]


def _same(ours: list[Any], theirs: list[Any]) -> bool:
    if len(ours) != len(theirs):
        return False
    # A bound method is a new object each time it is looked up.
    return all(a is b or (type(a) is types.MethodType and a == b) for a, b in zip(ours, theirs, strict=True))


def _references(leaves: list[Any]) -> list[Callable[[], Any]]:
    return [_reference(leaf) for leaf in leaves]


def _reference(leaf: Any) -> Callable[[], Any]:
    if type(leaf) is types.MethodType:
        return weakref.WeakMethod(leaf)
    try:
        return weakref.ref(leaf)
    except TypeError:  # an object without a slot for references: held, so that its identity means something
        return lambda: leaf


def _named(storage: Any) -> str:
    return "a URL" if isinstance(storage, str) else type(storage).__name__  # which may hold a password


# ---- options --------------------------------------------------------------------------------------------------------


def _one_of(name: str, value: Any, other: str, alternative: Any, default: Any) -> Any:
    if value is not None and alternative is not None:
        raise ConfigurationError(f"{name} and {other} are two names of one thing: give one of them")
    return value if value is not None else default if alternative is None else alternative


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
    if is_async(function):
        raise ConfigurationError(f"{name} must be a plain function: it is asked on threads without a loop, too")
    form, two = calling_form(function)
    return form if two else lambda data, context: form(data)


def tag_set(tags: Iterable[str]) -> frozenset[str]:
    """Return *tags* as a set; one name alone is one tag."""
    tags = (tags,) if isinstance(tags, str) else tuple(tags)
    for tag in tags:
        if not isinstance(tag, str) or not tag or "\0" in tag:
            raise ConfigurationError(f"tag {tag!r} is not a name: tags are non-empty strings")
    return frozenset(tags)
