"""The cache in Redis: one result for all processes, and no call that suffers when Redis does."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import pickle
import signal
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio

from tta_sync import events
from tta_sync.context import Deadline, WorkflowContext
from tta_sync.exceptions import ConfigurationError, LoopUnavailableError
from tta_sync.primitives import TimeoutPrimitive
from tta_sync.primitives.core.base import MISS
from tta_sync.primitives.performance import CacheBackend, CachePrimitive, RedisBackend
from tta_sync.redis import endpoint


@pytest.fixture
def client(patient_redis_url: str) -> Iterator[redis.Redis]:
    """A plain client beside the cache, to look at what is stored; the cache is patient with this server."""
    with redis.Redis.from_url(patient_redis_url) as client:
        yield client


@pytest.fixture
def cached(client: redis.Redis) -> Callable[..., CachePrimitive[Any, Any]]:
    """``cached(step, ...)``: a cache of *step* in the session's Redis."""

    def make(step: Any, **options: Any) -> CachePrimitive[Any, Any]:
        return CachePrimitive(step, **({"ttl": 60, "storage": client, "namespace": "n", "jitter": 0} | options))

    return make


def stored(client: redis.Redis) -> list[bytes]:
    """The names of all results that are stored."""
    return sorted(name for name in client.scan_iter() if b":#:" not in name and not name.endswith(b":lock"))


def misses(heard: list[Any]) -> list[str]:
    return [event.reason for event in heard if isinstance(event, events.CacheMiss)]


def bypasses(heard: list[Any]) -> list[str]:
    return [event.reason for event in heard if isinstance(event, events.CacheBypassed)]


# ---- spellings and keys ----------------------------------------------------------------------------------------------


def test_every_kind_of_storage_shares_the_results_when_it_means_the_same_server(
    Step: Any, redis_url: str, client: redis.Redis, call: Any
) -> None:
    """A sync client, an asynchronous one, a URL and a RedisBackend are four spellings of one store."""
    step = Step()
    for storage in (
        {"storage": client},
        {"storage": redis.asyncio.Redis.from_url(redis_url)},
        {"storage": redis_url},
        {"storage": RedisBackend(redis_url)},
        {"backend": RedisBackend(redis_url, prefix="tta:")},
    ):
        cache = CachePrimitive(primitive=step, ttl=3600, namespace="n", **storage)
        assert call(cache, {"q": 1}) == {"for": {"q": 1}}
    assert step.calls == 1
    other = CachePrimitive(step, backend=RedisBackend(redis_url, prefix="other:"), namespace="n")
    call(other, {"q": 1})
    assert step.calls == 2
    secretive = CachePrimitive(step, storage=redis_url.replace("redis://", "redis://:hidden@"), namespace="n")
    assert "hidden" not in repr(secretive)
    with pytest.raises(ConfigurationError, match="no Redis URL"):
        CachePrimitive(step, storage="http://127.0.0.1", namespace="n")


def test_tta_devs_spelling_works_when_the_backend_is_redis(step: Any, client: Any, redis_url: str, call: Any) -> None:
    """CachePrimitive(primitive, cache_key_fn, ttl_seconds, backend) with RedisBackend(url)."""
    cache = CachePrimitive(step, lambda data, context: data["q"], 60.0, RedisBackend(redis_url), namespace="n")
    assert call(cache, {"q": 1, "noise": 1}) == call(cache, {"q": 1, "noise": 2})
    assert step.calls == 1


def test_key_says_what_it_is_when_it_is_read_in_redis(step: Any, cached: Any, call: Any, client: redis.Redis) -> None:
    """tta:{schema}:{tenant}:{namespace}:{version}: and a digest of 128 bits; data never show."""
    call(cached(step, version="v2", namespace="my:app"), "secret", tenant="acme")
    (name,) = stored(client)
    head, _, digest = name.rpartition(b":")
    assert head == b"tta:1:acme:my%3A;app:v2"
    assert len(bytes.fromhex(digest.decode())) == 16
    assert not any(b"secret" in name for name in client.scan_iter())


def test_namespace_is_the_names_of_the_steps_when_none_is_given(client: redis.Redis, call: Any, redis_url: str) -> None:
    """The default namespace is equal in every process that runs the same code."""
    cache = CachePrimitive(TimeoutPrimitive(fetch, timeout_seconds=5), storage=client)
    call(cache)
    (name,) = stored(client)
    assert name.split(b":")[3].decode() == f"TimeoutPrimitive({__name__}.fetch)"
    with pytest.raises(ConfigurationError, match="give the cache namespace="):
        CachePrimitive(lambda data: data, storage=client)


async def fetch(data: Any) -> Any:
    """A step with a lasting name."""
    return data


def test_second_step_of_a_name_is_refused_when_redis_is_shared(Step: Any, client: redis.Redis, redis_url: str) -> None:
    """Also through another client object of the same server."""
    one, other = Step(), Step()
    kept = CachePrimitive(one, storage=client)
    with pytest.raises(ConfigurationError, match="namespace="):
        CachePrimitive(other, storage=redis.Redis.from_url(redis_url))
    assert kept.primitive is one


def test_tenants_versions_and_namespaces_are_apart_when_data_are_equal(step: Any, cached: Any, call: Any) -> None:
    """Each has entries of its own."""
    for options in ({}, {"version": 2}, {"namespace": "other"}):
        for tenant in (None, "a", "b", "a"):
            call(cached(step, **options), 1, tenant=tenant)
    assert step.calls == 9


def test_hit_is_the_same_from_sync_code_and_on_the_loop(step: Any, cached: Any, heard: list[Any]) -> None:
    """run_sync and await answer from one store, with state, statistics and events; peek leaves Redis to the loop."""
    cache = cached(step)
    context = WorkflowContext()
    assert cache.run_sync([1], context) == {"for": [1]}
    assert context.state == {"cache_misses": 1}
    assert cache.peek([1], context) is MISS
    context = WorkflowContext(correlation_id="c")
    heard.clear()
    assert asyncio.run(cache.execute([1], context)) == cache.run_sync([1], context) == {"for": [1]}
    assert context.state == {"cache_hits": 2}
    assert heard == [events.CacheHit(step="cache of Step", correlation_id="c", layer="redis", stale=False)] * 2
    assert cache.get_stats() == {"size": 0, "hits": 2, "misses": 1, "expirations": 0, "hit_rate": 66.67}
    assert step.calls == 1


def test_miss_and_store_are_told_when_somebody_listens(step: Any, cached: Any, call: Any, heard: list[Any]) -> None:
    """Events name the layer."""
    call(cached(step), correlation_id="c")
    common = {"step": "cache of Step", "correlation_id": "c", "layer": "redis"}
    assert heard == [events.CacheMiss(**common, reason="absent"), events.CacheStored(**common, ttl=60.0)]


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, "", [], {"a": (1, None)}, "ü" * 3000, b"\x00", 2**80])
def test_results_come_back_as_they_were_when_redis_kept_them(Step: Any, cached: Any, call: Any, value: Any) -> None:
    """None is a result; tuples, bytes and large numbers keep their types."""
    step = Step(lambda data: value)
    cache = cached(step)
    call(cache)
    back = call(cache)
    assert back == value
    assert type(back) is type(value)
    assert step.calls == 1


@pytest.mark.parametrize("value", [object(), {1, 2}, [lambda: None]])
def test_result_is_returned_and_not_stored_when_json_cannot_carry_it(
    Step: Any, cached: Any, call: Any, client: redis.Redis, heard: list[Any], value: Any
) -> None:
    """What JSON cannot carry is computed for each call; an event says so, and no lock is left."""
    step = Step(lambda data: value)
    cache = cached(step)
    assert call(cache) is value
    assert call(cache) is value
    assert step.calls == 2
    assert client.keys("*:_:*") == []
    assert "JSON cannot carry this" in bypasses(heard)[0]


def test_result_is_returned_and_not_stored_when_it_is_too_large(
    Step: Any, cached: Any, call: Any, client: redis.Redis, heard: list[Any]
) -> None:
    """max_value_bytes bounds what goes into Redis."""
    step = Step(lambda data: "x" * 2000)
    cache = cached(step, max_value_bytes=1000)
    assert call(cache) == call(cache) == "x" * 2000
    assert step.calls == 2
    assert stored(client) == []
    assert bypasses(heard) == ["a result of 2002 bytes is too large"] * 2


def test_waiters_get_copies_when_one_computation_serves_them(Step: Any, cached: Any) -> None:
    """Also of a result that is not stored, as long as it can be copied."""
    step = Step(lambda data: {1, 2})

    async def main() -> None:
        step.gate = asyncio.Event()
        cache = cached(step)
        calls = [asyncio.ensure_future(cache.execute(1, WorkflowContext())) for _ in range(20)]
        await step.started.wait()
        await asyncio.sleep(0.05)
        step.gate.set()
        results = await asyncio.gather(*calls)
        assert results == [{1, 2}] * 20
        assert len({id(result) for result in results}) == 20
        assert step.calls == 1

    asyncio.run(main())


@pytest.mark.parametrize("data", [b"bytes", [b"x", 1], datetime.date(2026, 1, 1), {"when": datetime.date(2026, 1, 1)}])
def test_results_are_found_when_the_data_are_not_all_plain(step: Any, cached: Any, call: Any, data: Any) -> None:
    """Bytes and dates are data like any other; what looks like bytes is not."""
    step.answer = lambda data: 1
    cache = cached(step)
    call(cache, data)
    call(cache, data)
    assert step.calls == 1
    if isinstance(data, bytes):
        call(cache, bytearray(data))
        assert step.calls == 2


def test_names_take_bounded_memory_when_there_are_many(
    Step: Any, cached: Any, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process remembers of keys is bounded, and forgetting it changes nothing."""
    from tta_sync.primitives.performance import shared

    monkeypatch.setattr(shared, "_MAX_NAMES", 3)
    step = Step(lambda data: {data})
    cache = cached(step)
    for data in range(10):
        call(cache, data)
    assert len(cache._layer._names) <= 3
    assert len(cache._layer._uncarried) <= 3
    good = Step()
    other = cached(good, namespace="other")
    for data in [*range(10), *range(10)]:
        assert call(other, data) == {"for": data}
    assert good.calls == 10


# ---- what is not believed --------------------------------------------------------------------------------------------


HOSTILE = {
    "pickle": (lambda good: pickle.dumps({"for": "hostile"}), "foreign"),
    "json": (lambda good: b'{"for": "hostile"}', "foreign"),
    "empty": (lambda good: b"", "foreign"),
    "truncated": (lambda good: good[:-1], "corrupt"),
    "altered": (lambda good: good[:-3] + b"9" + good[-2:], "corrupt"),
    "oversized": (lambda good: b"TC1" + b"x" * 5_000_000, "oversized"),
    "enormous": (lambda good: b"TC1" + b"x" * 40_000_000, "oversized"),
    "bomb": (lambda good: zlib.compress(b"x" * 50_000_000), "foreign"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_stored_bytes_are_a_miss_when_they_cannot_be_believed(
    step: Any, cached: Any, call: Any, client: redis.Redis, heard: list[Any], kind: str
) -> None:
    """Foreign, cut, altered and huge values are misses that are counted and then overwritten."""
    make, reason = HOSTILE[kind]
    cache = cached(step, max_value_bytes=1_000_000)
    call(cache)
    (name,) = stored(client)
    client.set(name, make(client.get(name)), px=60_000)
    heard.clear()
    assert call(cache) == {"for": 1}
    assert misses(heard) == [reason]
    assert step.calls == 2
    assert call(cache) == {"for": 1}
    assert step.calls == 2


def test_value_of_another_type_is_a_miss_when_it_lies_under_our_key(
    step: Any, cached: Any, call: Any, client: redis.Redis
) -> None:
    """A list or hash under our name is overwritten, not tripped over."""
    cache = cached(step)
    call(cache)
    (name,) = stored(client)
    client.delete(name)
    client.rpush(name, "x")
    assert call(cache) == call(cache) == {"for": 1}
    assert step.calls == 2


def test_result_of_another_secret_is_a_miss_when_a_secret_is_set(
    step: Any, cached: Any, call: Any, heard: list[Any]
) -> None:
    """With secret=, only results sealed with it are believed; the secret shows nowhere."""
    call(cached(step))
    heard.clear()
    signed = cached(step, secret="s3cret-word")
    call(signed)
    assert misses(heard) == ["corrupt"]
    call(signed)
    assert step.calls == 2
    call(cached(step, secret=b"s3cret-word"))
    assert step.calls == 2
    assert "s3cret" not in repr(signed)


def test_copied_result_is_a_miss_when_it_lies_under_another_key(
    step: Any, cached: Any, call: Any, client: redis.Redis, heard: list[Any]
) -> None:
    """Nobody can make one call answer with another's result by copying bytes."""
    cache = cached(step, secret="s")
    call(cache, 1)
    (one,) = stored(client)
    call(cache, 2)
    (two,) = set(stored(client)) - {one}
    client.set(two, client.get(one))
    heard.clear()
    assert call(cache, 2) == {"for": 2}
    assert misses(heard) == ["corrupt"]


# ---- expiry ----------------------------------------------------------------------------------------------------------


def test_redis_forgets_by_itself_when_the_time_is_over(step: Any, cached: Any, call: Any, client: redis.Redis) -> None:
    """A stored result has a TTL in Redis: the ttl plus the time for which it may stand in."""
    call(cached(step, stale_if_error=30))
    (name,) = stored(client)
    assert 85_000 < client.pttl(name) <= 90_000


def test_result_is_forgotten_when_its_ttl_has_passed(
    step: Any, cached: Any, call: Any, clock: Any, heard: list[Any]
) -> None:
    """The time to live counts on the call's clock."""
    cache = cached(step, ttl=10)
    call(cache)
    clock.jump(9.99)
    call(cache)
    assert step.calls == 1
    clock.jump(0.01)
    call(cache)
    assert step.calls == 2
    assert misses(heard) == ["absent", "expired"]
    assert cache.get_stats()["expirations"] == 1


def test_time_to_live_is_shortened_by_jitter_and_never_lengthened(
    step: Any, cached: Any, call: Any, heard: list[Any]
) -> None:
    """Each result lives 90 to 100 % of the ttl."""
    cache = cached(step, ttl=100, jitter=0.1)
    for data in range(30):
        call(cache, data)
    lives = [event.ttl for event in heard if isinstance(event, events.CacheStored)]
    assert 90 <= min(lives) < 95 < max(lives) <= 100


def test_stale_result_answers_while_one_refresh_runs_when_soft_ttl_has_passed(
    step: Any, cached: Any, clock: Any, heard: list[Any]
) -> None:
    """After soft_ttl callers get the old result at once, then the new one; two caches refresh it once."""
    step.answer = lambda data: step.calls
    caches = [cached(step, ttl=100, soft_ttl=10) for _ in range(2)]

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        assert await caches[0].execute(1, context) == 1
        clock.jump(10)
        step.gate = asyncio.Event()
        heard.clear()
        assert [await cache.execute(1, context) for cache in caches * 3] == [1] * 6
        assert [event.stale for event in heard if isinstance(event, events.CacheHit)] == [True] * 6
        while step.calls < 2:
            await asyncio.sleep(0.001)
        step.gate.set()
        for cache in caches:
            while await cache.execute(1, context) != 2:
                await asyncio.sleep(0.001)
        assert step.calls == 2

    asyncio.run(main())


def test_early_refresh_begins_as_xfetch_says_when_a_step_is_slow(step: Any, cached: Any, call: Any, clock: Any) -> None:
    """Before it expires, a result that took long is refreshed at random, while it answers."""
    import random

    class Chance(random.Random):
        def random(self) -> float:
            return 1 - 2.718281828459045**-1

    def answer(data: Any) -> Any:
        clock.jump(4)
        return step.calls

    step.answer = answer
    cache = cached(step, ttl=100, xfetch_beta=2.0, rng=Chance())

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        await cache.execute(1, context)
        clock.jump(91.99)
        await cache.execute(1, context)
        await asyncio.sleep(0.02)
        assert step.calls == 1
        clock.jump(0.02)
        assert await cache.execute(1, context) == 1
        while await cache.execute(1, context) != 2:
            await asyncio.sleep(0.001)

    asyncio.run(main())


def test_old_result_stands_in_when_the_step_fails_within_the_window(
    step: Any, cached: Any, call: Any, clock: Any, heard: list[Any]
) -> None:
    """stale_if_error holds in Redis as in memory."""
    cache = cached(step, ttl=10, stale_if_error=20)
    call(cache)
    step.error = OSError("gone")
    clock.jump(29.99)
    context = WorkflowContext(clock=clock)
    assert asyncio.run(cache.execute(1, context)) == {"for": 1}
    assert context.degraded
    assert heard[-1].stale
    clock.jump(0.01)
    with pytest.raises(OSError, match="gone"):
        call(cache)


def test_invalidated_result_does_not_stand_in_when_the_step_fails(step: Any, cached: Any, call: Any) -> None:
    """What was declared wrong is worse than an error."""
    cache = cached(step, ttl=10, stale_if_error=20, tags=["t"])
    call(cache)
    cache.invalidate(tags=["t"])
    step.error = OSError("gone")
    with pytest.raises(OSError, match="gone"):
        call(cache)


class NotFound(LookupError):
    """An error worth remembering."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Odd(LookupError):
    """One whose arguments do not build it again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("text")


def test_listed_error_is_raised_again_when_it_is_remembered(
    step: Any, cached: Any, call: Any, clock: Any, client: redis.Redis
) -> None:
    """Errors of exactly the listed types are remembered for all processes, for negative_ttl seconds."""
    step.error = NotFound("x")
    one, other = (cached(step, negative_ttl=5, negative_for=(KeyError, NotFound)) for _ in range(2))
    for cache in (one, other, one):
        with pytest.raises(NotFound, match="x") as caught:
            call(cache)
        assert caught.value.what == "x"
    assert step.calls == 1
    assert client.pttl(stored(client)[0]) <= 5000
    clock.jump(5)
    step.error = None
    assert call(one) == {"for": 1}


def test_stale_result_goes_on_answering_when_its_refresh_fails_with_a_listed_error(
    step: Any, cached: Any, clock: Any, heard: list[Any]
) -> None:
    """An error of a refresh is not remembered in place of a result that is still good; an event tells of it."""
    cache = cached(step, ttl=100, soft_ttl=10, negative_ttl=50, negative_for=NotFound)

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        await cache.execute(1, context)
        clock.jump(10)
        step.error = NotFound("x")
        for calls in (2, 3):
            assert await cache.execute(1, context) == {"for": 1}
            while step.calls < calls or cache.flights._all:
                await asyncio.sleep(0.001)

    asyncio.run(main())
    assert bypasses(heard) == ["a refresh failed with NotFound"] * 2
    assert {event.layer for event in heard} == {"redis"}


def test_remembered_error_is_a_miss_when_its_type_is_not_listed_any_more(
    step: Any, cached: Any, call: Any, heard: list[Any]
) -> None:
    """Redis can make us raise nothing but what the cache was told to remember."""
    step.error = NotFound("x")
    with pytest.raises(NotFound):
        call(cached(step, negative_ttl=5, negative_for=NotFound))
    step.error = None
    heard.clear()
    assert call(cached(step, negative_ttl=5, negative_for=KeyError)) == {"for": 1}
    assert misses(heard) == ["foreign"]


@pytest.mark.parametrize("error", [NotFound(object()), Odd(1, 2), KeyError("a subclass")])  # type: ignore[arg-type]
def test_error_is_not_remembered_when_it_cannot_be_built_again(
    step: Any, cached: Any, call: Any, client: redis.Redis, error: Exception
) -> None:
    """Arguments that JSON cannot carry, types that their arguments do not build, subclasses: asked for each time."""
    step.error = error
    cache = cached(step, negative_ttl=5, negative_for=(NotFound, Odd, LookupError))
    for _ in range(2):
        with pytest.raises(type(error)):
            call(cache)
    assert step.calls == 2
    assert stored(client) == [] or type(error) is Odd  # of which nobody knew before it was to be built


def test_degraded_result_marks_every_caller_when_it_comes_from_redis(cached: Any) -> None:
    """The mark is stored with the result."""

    async def lesser(data: Any, context: WorkflowContext) -> int:
        context.mark_degraded()
        return 0

    cache = cached(lesser)
    for _ in range(2):
        context = WorkflowContext()
        asyncio.run(cache.execute(1, context))
        assert context.degraded


# ---- invalidation ----------------------------------------------------------------------------------------------------


def test_every_cache_of_the_namespace_forgets_when_one_invalidates(
    step: Any, cached: Any, call: Any, client: redis.Redis
) -> None:
    """invalidate(data) and clear_cache() have taken effect on return, for whoever shares the store."""
    one, other = cached(step), cached(step)
    call(one, {"a": 1, "b": 2})
    call(one, 2)
    other.invalidate({"b": 2, "a": 1})
    call(one, {"a": 1, "b": 2})
    call(one, 2)
    assert step.calls == 3
    other.clear_cache()
    assert stored(client) == []
    call(one, 2)
    assert step.calls == 4


def test_keys_of_others_stay_when_a_cache_is_cleared(step: Any, cached: Any, call: Any, client: redis.Redis) -> None:
    """clear_cache() touches no key that is not the cache's own, however alike their names are."""
    client.set("mine", "kept")
    client.set("tta:1:_:n:1:", "a result of mine by its name")
    others = [
        cached(step, namespace="an"),
        cached(step, namespace="n", version="11"),
        cached(step, namespace="n*"),
        cached(step, namespace="m"),
    ]
    cache = cached(step)
    for each in (*others, cache):
        call(each)
        call(each, tenant="t:n:1:")
    step.calls = 0
    cache.clear_cache()
    assert client.get("mine") == b"kept"
    for other in others:
        call(other)
        call(other, tenant="t:n:1:")
    assert step.calls == 0
    call(cache)
    assert step.calls == 1


def test_prefix_may_hold_patterns_when_a_cache_is_cleared(step: Any, redis_url: str, call: Any, client: Any) -> None:
    """What looks like a pattern in a name is taken as it is written."""
    odd = CachePrimitive(step, backend=RedisBackend(redis_url, prefix="t[ab]*?:"), namespace="n")
    other = CachePrimitive(step, backend=RedisBackend(redis_url, prefix="ta:"), namespace="n")
    call(odd)
    call(other)
    odd.clear_cache()
    assert [name for name in stored(client) if name.startswith(b"t[")] == []
    call(other)
    assert step.calls == 2


def test_tagged_results_are_forgotten_when_their_tag_is_invalidated(step: Any, cached: Any, call: Any) -> None:
    """Tags reach all tenants and all caches of the namespace."""
    cache = cached(step, tags=lambda data, context: [f"user:{data[0]}", "all"])
    other = cached(step, tags=["none"])
    for data in ("a1", "a2", "b1"):
        call(cache, data, tenant="t")
    other.invalidate(tags=["user:a", "nobody"])
    for data in ("a1", "a2", "b1"):
        call(cache, data, tenant="t")
    assert step.calls == 5
    other.invalidate(tags="all")
    call(cache, "b1", tenant="t")
    assert step.calls == 6


def test_tag_with_any_letters_works_when_it_is_invalidated(step: Any, cached: Any, call: Any) -> None:
    """Spaces, colons, line ends and half surrogates in a tag are letters like any others."""
    odd = "a: b\r\n\ud800ü"
    cache = cached(step, tags=[odd])
    call(cache)
    call(cache)
    cache.invalidate(tags=[odd])
    call(cache)
    assert step.calls == 2


def test_results_are_a_miss_when_redis_lost_their_counters(
    step: Any, cached: Any, call: Any, client: redis.Redis, heard: list[Any]
) -> None:
    """A counter that was evicted never comes back to a value at which old results would count again."""
    cache = cached(step, tags=["t"])
    call(cache)
    cache.invalidate(tags=["t"])
    call(cache)
    for lost in (b"*:tag:t", b"*:epoch"):
        (name,) = client.keys(lost)
        client.delete(name)
        heard.clear()
        call(cache)
        assert misses(heard) == ["invalidated"]
    assert step.calls == 4
    call(cache)
    assert step.calls == 4


def test_counters_of_tags_expire_after_the_results_that_carry_them(
    step: Any, cached: Any, call: Any, client: redis.Redis
) -> None:
    """Tags without number do not fill Redis: each counter goes after the last result that needs it."""
    call(cached(step, ttl=10, tags=["t"]))
    (name,) = client.keys("*:tag:t")
    short = client.pttl(name)
    assert 10_000 < short < 150_000
    call(cached(step, ttl=1000, tags=["t"]), 2)
    assert client.pttl(name) > 1_000_000
    (epoch,) = client.keys("*:epoch")
    assert client.pttl(epoch) == -1


def test_plain_call_names_its_twin_when_it_is_made_on_a_loop(step: Any, cached: Any) -> None:
    """On the loop an invalidation in Redis must be awaited; the error says how."""
    cache = cached(step)

    async def main() -> None:
        with pytest.raises(LoopUnavailableError, match=r"await cache\.ainvalidate\(\.\.\.\)"):
            cache.invalidate(1)
        with pytest.raises(LoopUnavailableError, match=r"await cache\.aclear_cache\(\.\.\.\)"):
            cache.clear_cache()
        await cache.execute(1, WorkflowContext())
        await cache.ainvalidate(1)
        await cache.execute(1, WorkflowContext())
        await cache.aclear_cache()
        await cache.execute(1, WorkflowContext())

    asyncio.run(main())
    assert step.calls == 3


# ---- one computation for all -----------------------------------------------------------------------------------------


def numbering(gates: list[asyncio.Event]) -> Callable[[Any], Any]:
    """A step that answers with the number of its call, each call at a gate of its own."""

    async def number(data: Any) -> int:
        gates.append(asyncio.Event())
        mine = len(gates)
        await gates[-1].wait()
        return mine

    return number


async def grown(gates: list[Any], size: int) -> None:
    while len(gates) < size:
        await asyncio.sleep(0.001)


def test_second_process_waits_when_the_first_one_computes(cached: Any, client: redis.Redis) -> None:
    """Two caches that share nothing but Redis compute once; the lock is gone afterwards."""
    gates: list[asyncio.Event] = []
    number = numbering(gates)
    caches = [cached(number) for _ in range(4)]

    async def main() -> None:
        calls = [asyncio.ensure_future(cache.execute(1, WorkflowContext())) for cache in caches for _ in range(10)]
        await grown(gates, 1)
        assert len(client.keys("*:lock")) == 1
        await asyncio.sleep(0.1)
        gates[0].set()
        assert await asyncio.gather(*calls) == [1] * 40
        assert len(gates) == 1

    asyncio.run(main())
    assert client.keys("*:lock") == []


@pytest.mark.parametrize("end", ["raises", "is cancelled"])
def test_next_process_computes_at_once_when_the_first_one_fails(cached: Any, client: redis.Redis, end: str) -> None:
    """A leader that raises or is cancelled gives its lock back; nobody waits for it to expire."""
    gates: list[asyncio.Event] = []
    fail = True

    async def number(data: Any) -> int:
        gates.append(asyncio.Event())
        mine = len(gates)
        await gates[-1].wait()
        if fail:
            raise OSError("x")
        return mine

    one, other = cached(number), cached(number)

    async def main() -> None:
        nonlocal fail
        first = asyncio.ensure_future(one.execute(1, WorkflowContext()))
        await grown(gates, 1)
        second = asyncio.ensure_future(other.execute(1, WorkflowContext()))
        await asyncio.sleep(0.02)
        began = time.monotonic()
        if end == "raises":
            gates[0].set()
        else:
            first.cancel()
        await asyncio.wait([first])
        fail = False
        await grown(gates, 2)
        assert time.monotonic() - began < 2  # the lock's life is 5 s
        gates[1].set()
        assert await second == 2

    asyncio.run(main())
    assert client.keys("*:lock") == []


@pytest.mark.parametrize("how", ["key", "tag", "all"])
def test_late_writer_loses_when_its_key_was_invalidated_meanwhile(cached: Any, client: redis.Redis, how: str) -> None:
    """A computation that began before an invalidation in another process is not stored."""
    gates: list[asyncio.Event] = []
    number = numbering(gates)
    one, other = (cached(number, tags=["t"]) for _ in range(2))

    async def main() -> None:
        early = asyncio.ensure_future(one.execute(1, WorkflowContext()))
        await grown(gates, 1)
        await {
            "key": lambda: other.ainvalidate(1),
            "tag": lambda: other.ainvalidate(tags=["t"]),
            "all": lambda: other.aclear_cache(),
        }[how]()
        gates[0].set()
        assert await early == 1
        assert stored(client) == []
        late = asyncio.ensure_future(other.execute(1, WorkflowContext()))
        await grown(gates, 2)
        gates[1].set()
        assert await late == 2
        assert await one.execute(1, WorkflowContext()) == 2

    asyncio.run(main())


@pytest.mark.parametrize("how", ["key", "tag", "all"])
@pytest.mark.parametrize("where", ["memory", "redis", "both"])
def test_refresh_loses_when_its_key_was_invalidated_meanwhile(
    client: redis.Redis, clock: Any, where: str, how: str
) -> None:
    """A refresh that began before an invalidation neither answers nor is stored, in whatever layer it runs."""
    gates: list[asyncio.Event] = []
    number = numbering(gates)
    options: dict[str, Any] = {"ttl": 100, "soft_ttl": 10, "jitter": 0, "tags": ["t"]}
    in_redis = {"storage": client, "namespace": "n"}
    if where == "both":
        flow = CachePrimitive(**options) >> number >> CachePrimitive(**options, **in_redis)
        other = CachePrimitive(number, **options, **in_redis)
    else:
        flow = other = CachePrimitive(number, **options, **(in_redis if where == "redis" else {}))
        if where == "redis":
            other = CachePrimitive(number, **options, **in_redis)

    async def main() -> None:
        def ask() -> asyncio.Future[Any]:
            return asyncio.ensure_future(flow.execute(1, WorkflowContext(clock=clock)))

        first = ask()
        await grown(gates, 1)
        gates[0].set()
        assert await first == 1
        clock.jump(10)
        assert await ask() == 1
        await grown(gates, 2)  # the refresh is on its way
        await {
            "key": lambda: other.ainvalidate(1),
            "tag": lambda: other.ainvalidate(tags=["t"]),
            "all": lambda: other.aclear_cache(),
        }[how]()
        if where == "both":
            memory = flow.children()[0]._acting()  # type: ignore[attr-defined]  # a chain of ours
            while memory.get_stats()["size"]:  # until it has heard
                await asyncio.sleep(0.001)
        gates[1].set()
        late = ask()
        await grown(gates, 3)
        gates[2].set()
        assert await late == 3
        assert await ask() == 3
        assert len(gates) == 3

    asyncio.run(main())


def test_call_is_refused_when_redis_needs_a_tenant_and_there_is_none(
    cached: Any, step: Any, client: redis.Redis
) -> None:
    """Nothing is asked, computed or stored for a call that might be anybody's."""
    cache = cached(step, require_tenant=True)
    with pytest.raises(ConfigurationError, match="requires a tenant"):
        cache.run_sync(1)
    assert (step.calls, stored(client)) == (0, [])
    assert cache.run_sync(1, WorkflowContext(tenant="a")) == {"for": 1}


def test_late_result_is_not_stored_when_its_own_process_invalidated_it(cached: Any, client: redis.Redis) -> None:
    """Nor is a later caller in this process handed the early result."""
    gates: list[asyncio.Event] = []
    cache = cached(numbering(gates))

    async def main() -> None:
        early = asyncio.ensure_future(cache.execute(1, WorkflowContext()))
        await grown(gates, 1)
        await cache.ainvalidate(1)
        late = asyncio.ensure_future(cache.execute(1, WorkflowContext()))
        await grown(gates, 2)
        gates[0].set()
        assert await early == 1
        assert stored(client) == []
        gates[1].set()
        assert await late == 2
        assert await cache.execute(1, WorkflowContext()) == 2

    asyncio.run(main())


def test_waiter_goes_on_waiting_when_junk_appears_under_the_key(cached: Any, client: redis.Redis) -> None:
    """What cannot be believed is not taken for the result that is being waited for."""
    gates: list[asyncio.Event] = []
    number = numbering(gates)
    one, other = cached(number), cached(number)

    async def main() -> None:
        first = asyncio.ensure_future(one.execute(1, WorkflowContext()))
        await grown(gates, 1)
        waiting = asyncio.ensure_future(other.execute(1, WorkflowContext()))
        await asyncio.sleep(0.02)
        (lock,) = client.keys("*:lock")
        client.set(lock.removesuffix(b":lock"), b"junk")
        await asyncio.sleep(0.1)
        assert len(gates) == 1
        gates[0].set()
        assert await asyncio.gather(first, waiting) == [1, 1]

    asyncio.run(main())


def test_waiter_is_told_of_degradation_when_another_process_computed(cached: Any) -> None:
    """The mark reaches whoever waited for the lock."""
    gates: list[asyncio.Event] = []

    async def lesser(data: Any, context: WorkflowContext) -> int:
        gates.append(asyncio.Event())
        await gates[-1].wait()
        context.mark_degraded()
        return 0

    one, other = cached(lesser), cached(lesser)

    async def main() -> None:
        contexts = [WorkflowContext(), WorkflowContext()]
        first = asyncio.ensure_future(one.execute(1, contexts[0]))
        await grown(gates, 1)
        second = asyncio.ensure_future(other.execute(1, contexts[1]))
        await asyncio.sleep(0.02)
        gates[0].set()
        await asyncio.gather(first, second)
        assert [context.degraded for context in contexts] == [True, True]
        assert len(gates) == 1

    asyncio.run(main())


def test_late_writer_loses_when_its_lock_has_expired(cached: Any, client: redis.Redis) -> None:
    """A writer that lost its lock, whoever has it now, does not overwrite what others stored."""
    gates: list[asyncio.Event] = []
    number = numbering(gates)
    one, other = cached(number), cached(number)

    async def main() -> None:
        slow = asyncio.ensure_future(one.execute(1, WorkflowContext()))
        await grown(gates, 1)
        client.delete(*client.keys("*:lock"))  # as its end of life does
        quick = asyncio.ensure_future(other.execute(1, WorkflowContext()))
        await grown(gates, 2)
        gates[1].set()
        assert await quick == 2
        gates[0].set()
        assert await slow == 1
        assert await one.execute(1, WorkflowContext()) == 2

    asyncio.run(main())


def test_lock_lives_on_when_the_computation_takes_longer_than_its_life(
    cached: Any, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is renewed at a third of its life, so that a slow computation stays alone."""
    from tta_sync.primitives.performance import in_redis

    monkeypatch.setattr(in_redis, "LOCK_LIFE", 3.0)
    gates: list[asyncio.Event] = []
    number = numbering(gates)
    one, other = cached(number), cached(number)

    async def main() -> None:
        slow = asyncio.ensure_future(one.execute(1, WorkflowContext()))
        await grown(gates, 1)
        waiting = asyncio.ensure_future(other.execute(1, WorkflowContext()))
        (lock,) = client.keys("*:lock")
        left = client.pttl(lock)
        assert left <= 3000
        while client.pttl(lock) <= left:  # until it has grown
            left = client.pttl(lock)
            await asyncio.sleep(0.01)
        assert len(gates) == 1
        gates[0].set()
        assert await asyncio.gather(slow, waiting) == [1, 1]

    asyncio.run(main())


def test_waiter_computes_itself_when_max_wait_is_over(cached: Any) -> None:
    """Nobody waits for another process longer than max_wait; what he computes then is his alone."""
    gates: list[asyncio.Event] = []
    number = numbering(gates)
    one, other = cached(number), cached(number, max_wait=0.1)

    async def main() -> None:
        slow = asyncio.ensure_future(one.execute(1, WorkflowContext()))
        await grown(gates, 1)
        waiting = asyncio.ensure_future(other.execute(1, WorkflowContext()))
        await grown(gates, 2)
        gates[1].set()
        assert await waiting == 2
        gates[0].set()
        assert await slow == 1
        assert await other.execute(1, WorkflowContext()) == 1

    asyncio.run(main())


def test_error_is_shared_by_processes_when_it_is_remembered(cached: Any) -> None:
    """Who waits for another process's computation gets its remembered error, and does not compute again."""
    gates: list[asyncio.Event] = []

    async def fail(data: Any) -> None:
        gates.append(asyncio.Event())
        await gates[-1].wait()
        raise NotFound("x")

    one, other = (cached(fail, negative_ttl=5, negative_for=NotFound) for _ in range(2))

    async def main() -> None:
        calls = [asyncio.ensure_future(one.execute(1, WorkflowContext()))]
        await grown(gates, 1)
        calls.append(asyncio.ensure_future(other.execute(1, WorkflowContext())))
        await asyncio.sleep(0.05)
        gates[0].set()
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in errors] == [NotFound, NotFound]
        assert len(gates) == 1

    asyncio.run(main())


def test_nobody_waits_for_others_when_a_result_is_known_not_to_be_stored(cached: Any) -> None:
    """A step whose result JSON cannot carry is not serialised across processes for nothing."""
    gates: list[asyncio.Event] = []

    async def uncarried(data: Any) -> Any:
        gates.append(asyncio.Event())
        await gates[-1].wait()
        return {1, 2}

    one, other = cached(uncarried), cached(uncarried)

    async def main() -> None:
        for cache in (one, other):
            call = asyncio.ensure_future(cache.execute(1, WorkflowContext()))
            size = len(gates)
            await grown(gates, size + 1)
            gates[-1].set()
            await call
        calls = [asyncio.ensure_future(cache.execute(1, WorkflowContext())) for cache in (one, other)]
        async with asyncio.timeout(15):  # who waits for others does so for 30 s
            await grown(gates, 4)
        for gate in gates:
            gate.set()
        assert await asyncio.gather(*calls) == [{1, 2}] * 2

    asyncio.run(main())


def test_no_lock_stays_when_the_leader_is_cancelled_while_it_asks_for_it(
    step: Any, cached: Any, client: redis.Redis, eventually: Any
) -> None:
    """A lock that is granted to a call that has left is given back at once."""
    cache = cached(step)

    async def main() -> None:
        await cache.execute("warm", WorkflowContext())
        for ticks in range(1, 12):
            call = asyncio.ensure_future(cache.execute("cold", WorkflowContext()))
            for _ in range(ticks):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            if not call.cancelled():
                break
        # Whatever moment it was, the next one need not wait for a lock to run out.
        began = time.monotonic()
        await cache.execute("cold", WorkflowContext())
        assert time.monotonic() - began < 3

    asyncio.run(main())
    assert client.keys("*:lock") == []


def test_redis_is_not_asked_when_this_process_computes_already(Step: Any, cached: Any, client: redis.Redis) -> None:
    """Who comes while the result is being computed waits for it without a question of his own."""
    step = Step()

    async def main() -> None:
        cache = cached(step)
        step.gate = asyncio.Event()
        calls = [asyncio.ensure_future(cache.execute(1, WorkflowContext()))]
        await step.started.wait()
        before = client.info("commandstats")["cmdstat_mget"]["calls"]
        calls += [asyncio.ensure_future(cache.execute(1, WorkflowContext())) for _ in range(100)]
        await asyncio.sleep(0.05)
        step.gate.set()
        assert await asyncio.gather(*calls) == [{"for": 1}] * 101
        assert client.info("commandstats")["cmdstat_mget"]["calls"] == before

    asyncio.run(main())


# ---- memory over Redis -----------------------------------------------------------------------------------------------


NEWS = "tta:1:#:n:1:news"


def two_layers(step: Any, client: Any, **options: Any) -> tuple[Any, Any, Any]:
    """memory >> step >> redis, as one process has it."""
    memory = CachePrimitive(ttl=300, max_size=1000, jitter=0)
    shared = CachePrimitive(ttl=3600, storage=client, namespace="n", **options)
    return memory >> step >> shared, memory, shared


def test_memory_answers_before_redis_when_both_stand_in_a_chain(step: Any, client: redis.Redis) -> None:
    """The left cache is the outer one: the second call asks neither Redis nor the step, a new process only Redis."""
    flow, memory, shared = two_layers(step, client)
    assert flow.run_sync(1) == flow.run_sync(1) == {"for": 1}
    assert (memory.get_stats()["hits"], shared.get_stats()["hits"]) == (1, 0)
    memory.clear_cache()
    context = WorkflowContext()
    assert flow.run_sync(1, context) == {"for": 1}
    assert (memory.get_stats()["misses"], shared.get_stats()["hits"]) == (2, 1)
    assert context.state == {"cache_hits": 1, "cache_misses": 1}
    assert step.calls == 1
    other_process, _, _ = two_layers(step, client)
    assert other_process.run_sync(1) == {"for": 1}
    assert step.calls == 1


@pytest.mark.parametrize("how", ["key", "tag", "all"])
def test_memory_forgets_when_its_redis_cache_is_told_in_this_process(step: Any, client: redis.Redis, how: str) -> None:
    """What the inner cache forgets, the memory above it has forgotten on return."""
    flow, memory, shared = two_layers(step, client, tags=["t"])
    flow.run_sync(1)
    {
        "key": lambda: shared.invalidate(1),
        "tag": lambda: shared.invalidate(tags=["t"]),
        "all": shared.clear_cache,
    }[how]()
    assert memory.get_stats()["size"] == 0
    flow.run_sync(1)
    assert step.calls == 2


@pytest.mark.parametrize("how", ["key", "tag"])
def test_redis_forgets_when_the_memory_above_is_told(step: Any, client: redis.Redis, how: str) -> None:
    """A wrong answer is wrong in every layer: invalidate on the outer cache reaches the inner one."""
    flow, memory, _ = two_layers(step, client, tags=["t"])
    flow.run_sync(1)
    {"key": lambda: memory.invalidate(1), "tag": lambda: memory.invalidate(tags=["t"])}[how]()
    flow.run_sync(1)
    assert step.calls == 2


@pytest.mark.parametrize("how", ["key", "tag", "all"])
def test_memory_of_another_process_forgets_when_one_invalidates(
    step: Any, client: redis.Redis, eventually: Any, how: str
) -> None:
    """An invalidation is told to the memory above the same namespace in every process, and no more than it concerns."""
    flow, memory, _ = two_layers(step, client, tags=["t"])
    other_flow, _, other_shared = two_layers(step, client, tags=["t"])
    other_flow.run_sync(1)
    flow.run_sync(1)
    flow.run_sync(2)
    assert memory.get_stats()["size"] == 2
    {
        "key": lambda: other_shared.invalidate(1),
        "tag": lambda: other_shared.invalidate(tags=["t"]),
        "all": other_shared.clear_cache,
    }[how]()
    left = 1 if how == "key" else 0
    eventually(lambda: memory.get_stats()["size"] == left, what="the news")
    flow.run_sync(1)
    assert step.calls == 3


def test_memory_forgets_everything_when_it_may_have_missed_an_invalidation(
    step: Any, client: redis.Redis, eventually: Any
) -> None:
    """After the connection for news was lost, memory that cannot be trusted any more is given up."""
    flow, memory, _ = two_layers(step, client)
    _, _, other = two_layers(step, client)

    def filled() -> bool:
        flow.run_sync(1)
        flow.run_sync(2)
        return _listeners(client) == 1 and memory.get_stats()["size"] == 2

    eventually(filled, what="the subscription")
    _cut_listeners(client)
    eventually(lambda: _listeners(client) == 1, what="the new subscription")
    assert memory.get_stats()["size"] == 2  # nothing was missed: nothing is given up
    client.incr(NEWS)  # as an invalidation does that was told while nobody heard
    _cut_listeners(client)
    eventually(lambda: memory.get_stats()["size"] == 0, what="the memory's end")
    del other


def _listeners(client: redis.Redis) -> int:
    return sum(int(found["sub"]) for found in client.client_list())


def _cut_listeners(client: redis.Redis) -> None:
    for found in client.client_list():
        if int(found["sub"]):
            client.client_kill_filter(_id=found["id"])


@pytest.mark.parametrize("message", [b"", b"x y z", b"9" * 20 + b" k x", b"9" * 20 + b" z x", b"9" * 20 + b" t \xff"])
def test_memory_forgets_everything_when_the_news_make_no_sense(
    step: Any, client: redis.Redis, eventually: Any, message: bytes
) -> None:
    """Whoever writes into our channel can make us compute anew, and nothing else."""
    flow, memory, _ = two_layers(step, client)
    flow.run_sync(1)
    eventually(lambda: _listeners(client) == 1, what="the subscription")
    client.publish(NEWS, message)
    eventually(lambda: memory.get_stats()["size"] == 0, what="the memory's end")
    assert flow.run_sync(1) == {"for": 1}


def test_news_count_once_when_two_loops_of_a_process_hear_them(step: Any, client: redis.Redis, eventually: Any) -> None:
    """What a second loop hears again is not taken for a sign that something was missed."""
    flow, memory, _ = two_layers(step, client, tags=lambda data: [f"t{data}"])
    _, _, other = two_layers(step, client)
    other.bind(step)
    for data in range(5):
        flow.run_sync(data)

    async def second_loop() -> None:
        await flow.execute(99, WorkflowContext())
        assert _listeners(client) == 2
        for data in range(3):
            await other.ainvalidate(tags=[f"t{data}"])
            while memory.get_stats()["size"] != 5 - data:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)  # for the news on the other connection
        assert memory.get_stats()["size"] == 3

    asyncio.run(second_loop())


def test_counters_stay_when_a_cache_is_cleared(step: Any, cached: Any, call: Any, client: redis.Redis) -> None:
    """What others compare with does not begin anew."""
    cache = cached(step, tags=["t"])
    call(cache)
    cache.invalidate(1)
    before = {name: int(client.get(name)) for name in client.scan_iter("*:#:*")}
    assert len(before) == 3
    cache.clear_cache()
    after = {name: int(client.get(name)) for name in client.scan_iter("*:#:*")}
    stepped = {name for name in before if after[name] == before[name] + 1}
    assert stepped == {NEWS.encode(), NEWS.encode().replace(b"news", b"epoch")}
    assert after.keys() == before.keys()


def test_memory_forgets_everything_when_redis_lost_its_counters(
    step: Any, client: redis.Redis, eventually: Any
) -> None:
    """A counter of news that begins anew is no old news."""
    flow, memory, _ = two_layers(step, client)
    _, _, other = two_layers(step, client)
    other.bind(step)
    flow.run_sync(1)
    client.flushall()
    other.invalidate("something else")
    eventually(lambda: memory.get_stats()["size"] == 0, what="the memory's end")


def test_redis_is_asked_when_only_the_news_do_not_come(step: Any, own_redis_server: Any) -> None:
    """A user who may not subscribe has his results in Redis all the same; memory is bounded by its ttl."""
    with redis.Redis.from_url(own_redis_server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "app", "on", ">p", "~*", "+@all", "-subscribe", "allchannels")
        backend = RedisBackend(f"redis://app:p@127.0.0.1:{own_redis_server.port}")
        flow, memory, shared = two_layers(step, backend)
        for _ in range(3):
            flow.run_sync(1)
            memory.clear_cache()
        assert step.calls == 1
        assert shared.get_stats()["hits"] == 2


def test_results_in_redis_are_used_when_it_is_read_only_from_the_beginning(step: Any, own_redis_server: Any) -> None:
    """Memory over a replica: what the replica holds is an answer, also if it takes no counter."""
    with redis.Redis.from_url(own_redis_server.url) as admin:
        CachePrimitive(step, storage=admin, namespace="n").run_sync(1)
        admin.delete(NEWS)
        admin.replicaof("127.0.0.1", 1)
        flow, memory, _ = two_layers(step, admin)
        assert flow.run_sync(1) == flow.run_sync(1) == {"for": 1}
        assert step.calls == 1
        assert memory.get_stats()["hits"] == 1


def test_results_stay_in_memory_when_redis_goes_away(step: Any, own_redis_server: Any) -> None:
    """Memory above a dead Redis goes on answering until its own ttl, and new results are kept there."""
    with redis.Redis.from_url(own_redis_server.url) as client:
        flow, memory, _ = two_layers(step, client)
        flow.run_sync(1)
        own_redis_server.stop()
        assert flow.run_sync(1) == {"for": 1}
        assert flow.run_sync(2) == flow.run_sync(2) == {"for": 2}
        assert step.calls == 2
        assert memory.get_stats()["size"] == 2


# ---- Redis in trouble ------------------------------------------------------------------------------------------------


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The URL of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}"


def _timed(cache: CachePrimitive[Any, Any], data: Any) -> float:
    began = time.perf_counter()
    assert cache.run_sync(data) == {"for": data}
    return time.perf_counter() - began


def test_calls_are_answered_at_once_when_redis_swallows_everything(
    step: Any, black_hole: str, heard: list[Any]
) -> None:
    """A black hole costs one call a tenth of a second; the next ones are not held up."""
    cache = CachePrimitive(step, storage=RedisBackend(black_hole), namespace="n")
    assert _timed(cache, 0) < 1.0
    later = sorted(_timed(cache, data) for data in range(1, 41))
    assert later[20] < 0.05  # in truth well below 5 ms, as the benchmark shows
    assert step.calls == 41
    assert set(misses(heard)) == {"down"}


def test_call_with_little_time_waits_little_when_redis_swallows_everything(step: Any, black_hole: str) -> None:
    """Redis has a tenth of what a call has left, not a tenth of a second."""
    cache = CachePrimitive(step, storage=RedisBackend(black_hole), namespace="n")

    endpoint(black_hole).bounds.limit = 60.0

    async def main() -> None:
        context = WorkflowContext(deadline=Deadline.after(10.0))
        assert await cache.execute(1, context) == {"for": 1}
        assert context.deadline is not None
        assert context.deadline.remaining() > 2

    asyncio.run(main())


def test_memory_over_a_black_hole_waits_once_when_it_is_first_asked(step: Any) -> None:
    """The subscription for news and the question share one time-out."""

    def asked() -> bytes:
        with socket.create_server(("127.0.0.1", 0)) as server:
            flow, _, _ = two_layers(step, redis.Redis(host="127.0.0.1", port=server.getsockname()[1]))
            assert flow.run_sync(1) == {"for": 1}
            server.settimeout(5)
            connection, _ = server.accept()
            with connection:
                assert b"SUBSCRIBE" in connection.recv(1000)
            server.settimeout(0.01)
            try:
                connection, _ = server.accept()
                with connection:
                    return connection.recv(1000)
            except TimeoutError:
                return b""

    # On a machine that stalls, silence is not taken for the server's: then it may be asked again.
    assert any(b"MGET" not in asked() for _ in range(5))
    step.calls = 0
    flow, _, _ = two_layers(step, redis.Redis(host="127.0.0.1", port=1))
    began = time.perf_counter()
    for data in range(20):
        flow.run_sync(data)
    assert time.perf_counter() - began < 1.0


def test_cache_works_again_when_redis_was_killed_and_restarted(
    step: Any, own_redis_server: Any, eventually: Any, heard: list[Any]
) -> None:
    """Calls are answered by computing while Redis is gone; when it is back, so is the cache, without a restart."""
    cache = CachePrimitive(step, storage=RedisBackend(own_redis_server.url), namespace="n")
    cache.run_sync(1)
    own_redis_server.stop(signal.SIGKILL)
    for _ in range(3):
        assert cache.run_sync(1) == {"for": 1}
    assert step.calls == 4
    own_redis_server.start()

    def works() -> bool:
        before = step.calls
        cache.run_sync("probe")
        return bool(step.calls == before)

    eventually(works, what="the cache's return")


def test_cache_works_again_when_redis_was_frozen_and_thawed(step: Any, own_redis_server: Any, eventually: Any) -> None:
    """A server that hangs for a while is passed by, and then used again with what it holds."""
    cache = CachePrimitive(step, storage=RedisBackend(own_redis_server.url), namespace="n")
    cache.run_sync(1)
    os.kill(own_redis_server.pid, signal.SIGSTOP)
    try:
        assert cache.run_sync(1) == {"for": 1}
        assert step.calls == 2
    finally:
        os.kill(own_redis_server.pid, signal.SIGCONT)

    def works() -> bool:
        before = step.calls
        cache.run_sync(1)
        return bool(step.calls == before)

    eventually(works, what="the cache's return")


def test_result_is_returned_when_redis_dies_during_the_computation(step: Any, own_redis_server: Any) -> None:
    """A store that is gone when the result is ready costs the caller nothing."""
    cache = CachePrimitive(step, storage=RedisBackend(own_redis_server.url), namespace="n")

    async def main() -> None:
        step.gate = asyncio.Event()
        call = asyncio.ensure_future(cache.execute(1, WorkflowContext()))
        await step.started.wait()
        await asyncio.to_thread(own_redis_server.stop, signal.SIGKILL)
        step.gate.set()
        assert await call == {"for": 1}

    asyncio.run(main())


def test_calls_are_answered_when_redis_is_out_of_memory(step: Any, own_redis_server: Any, heard: list[Any]) -> None:
    """A full Redis still answers what it holds; what it cannot take is computed."""
    with redis.Redis.from_url(own_redis_server.url) as admin:
        cache = CachePrimitive(step, storage=admin, namespace="n")
        cache.run_sync("held")
        admin.config_set("maxmemory", 1)
        admin.config_set("maxmemory-policy", "noeviction")
        for _ in range(2):
            assert cache.run_sync("new") == {"for": "new"}
        assert cache.run_sync("held") == {"for": "held"}
        assert step.calls == 3
        assert set(bypasses(heard)) == {"OOM"}
        cache.invalidate("held")  # forgetting one result needs no memory
        assert cache.run_sync("held") == {"for": "held"}
        assert step.calls == 4
        with pytest.raises(ConnectionError, match="OOM"):
            cache.clear_cache()
        admin.config_set("maxmemory", 0)
        cache.run_sync("new")
        cache.run_sync("new")
        assert step.calls == 5


def test_calls_are_answered_when_redis_is_read_only(step: Any, own_redis_server: Any, heard: list[Any]) -> None:
    """A replica answers what it holds; what it cannot take is computed."""
    with redis.Redis.from_url(own_redis_server.url) as admin:
        cache = CachePrimitive(step, storage=admin, namespace="n")
        cache.run_sync("held")
        admin.replicaof("127.0.0.1", 1)
        for _ in range(2):
            assert cache.run_sync("new") == {"for": "new"}
        assert cache.run_sync("held") == {"for": "held"}
        assert step.calls == 3
        assert set(bypasses(heard)) == {"READONLY"}
        admin.replicaof("NO", "ONE")
        cache.run_sync("new")
        cache.run_sync("new")
        assert step.calls == 4


def test_calls_are_answered_when_the_password_is_wrong(step: Any, own_redis_server: Any, heard: list[Any]) -> None:
    """A server that does not let us in is passed by; no password shows in an event."""
    with redis.Redis.from_url(own_redis_server.url) as admin:
        admin.config_set("requirepass", "right")
        url = own_redis_server.url.replace("redis://", "redis://:wrong-word@")
        cache = CachePrimitive(step, storage=RedisBackend(url), namespace="n")
        for _ in range(2):
            assert cache.run_sync(1) == {"for": 1}
        assert "wrong-word" not in repr(heard) + repr(cache.storage)
        with pytest.raises(ConnectionError) as caught:
            cache.invalidate(1)
        assert "wrong-word" not in str(caught.value)


def test_scripts_are_sent_again_when_redis_forgot_them(step: Any, cached: Any, call: Any, client: redis.Redis) -> None:
    """A server that lost its scripts is told them again."""
    cache = cached(step)
    call(cache, 1)
    client.script_flush()
    call(cache, 2)
    call(cache, 2)
    assert step.calls == 2


@pytest.mark.parametrize("name", ["invalidate", "clear_cache"])
def test_invalidation_raises_when_redis_cannot_be_reached(step: Any, own_redis_server: Any, name: str) -> None:
    """An invalidation that other processes cannot hear of is an error, and this process's memory is cleared."""
    with redis.Redis.from_url(own_redis_server.url) as client:
        flow, memory, shared = two_layers(step, client)
        flow.run_sync(1)
        flow.run_sync(2)
        own_redis_server.stop()
        for kind in (ConnectionError, redis.ConnectionError):
            with pytest.raises(kind, match="could not be told of an invalidation"):
                shared.invalidate(1) if name == "invalidate" else shared.clear_cache()
        assert memory.get_stats()["size"] == 0


def test_invalidation_tries_again_when_redis_is_thought_to_be_down(
    step: Any, own_redis_server: Any, eventually: Any
) -> None:
    """An open circuit keeps calls from waiting, not invalidations from being told."""
    cache = CachePrimitive(step, storage=RedisBackend(own_redis_server.url), namespace="n")
    cache.run_sync(1)
    own_redis_server.stop()
    cache.run_sync(1)
    own_redis_server.start()
    cache.invalidate(1)  # does not raise


# ---- a backend alone -------------------------------------------------------------------------------------------------


def test_backend_stores_values_when_used_alone(redis_url: str, client: redis.Redis) -> None:
    """RedisBackend has async get, set and delete of values; get of nothing, or of what is not ours, is None."""
    backend = RedisBackend(redis_url, prefix="mine:")

    async def main() -> None:
        assert await backend.get("k") is None
        await backend.set("k", {"a": (1, None)}, 10)
        assert await backend.get("k") == {"a": (1, None)}
        assert 9000 < client.pttl("mine:k") <= 10_000
        await backend.delete("k")
        assert await backend.get("k") is None
        client.set("mine:k", json.dumps(1))
        assert await backend.get("k") is None
        with pytest.raises(ConfigurationError, match="JSON cannot carry this object"):
            await backend.set("k", object(), 10)
        with pytest.raises(ConfigurationError, match="too large"):
            await backend.set("k", "x" * 20_000_000, 10)

    asyncio.run(main())
    assert isinstance(backend, CacheBackend)


def test_backend_raises_when_redis_is_gone_and_it_is_used_alone(free_port: Any) -> None:
    """Without a cache around it, nobody could compute the value: the failure is the caller's to know."""
    backend = RedisBackend(f"redis://user:hidden@127.0.0.1:{free_port()}")
    with pytest.raises(ConnectionError) as caught:
        asyncio.run(backend.get("k"))
    assert "hidden" not in str(caught.value) + repr(backend)


# ---- forks -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_child_uses_connections_of_its_own_when_it_was_forked(step: Any, cached: Any, client: redis.Redis) -> None:
    """A forked child answers from Redis, and leaves the parent's connection alone."""
    cache = cached(step)
    assert cache.run_sync(1) == {"for": 1}
    pid = os.fork()
    if pid == 0:
        try:
            good = cache.run_sync(1) == {"for": 1} and cache.run_sync(2) == {"for": 2}
            os._exit(0 if good and step.calls == 2 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert cache.run_sync(1) == cache.run_sync(1)
    assert cache.run_sync(2) == {"for": 2}
    assert step.calls == 1


def test_threads_share_one_computation_when_they_call_at_once(cached: Any) -> None:
    """Fifty threads of synchronous code on a cold key: one run."""
    runs: list[int] = []

    async def slow(data: Any) -> Any:
        runs.append(data)
        await asyncio.sleep(0.05)
        return data

    cache = cached(slow)
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(cache.run_sync(7))) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [7] * 50
    assert runs == [7]
