"""The cache in memory: what a hit is, what is kept and for how long, what is counted, how it is forgotten."""

from __future__ import annotations

import asyncio
import collections
import datetime
import random
import threading
import time
from typing import Any

import pytest

from tta_sync import events
from tta_sync.context import WorkflowContext, running_context
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives import CompositionWarning, FallbackPrimitive, InMemoryBackend, RetryPrimitive
from tta_sync.primitives.core.base import MISS, WorkflowPrimitive, caller_step, step as as_step
from tta_sync.primitives.performance import CacheBackend, CachePrimitive

# ---- both spellings --------------------------------------------------------------------------------------------------


def test_second_call_is_answered_from_memory_when_spelt_as_the_seeds_do(step: Any, call: Any) -> None:
    """CachePrimitive(primitive=x, ttl=...) runs the step once for equal data."""
    cache = CachePrimitive(primitive=step, ttl=3600)
    assert call(cache, {"q": 1}) == call(cache, {"q": 1}) == {"for": {"q": 1}}
    assert step.calls == 1


def test_key_function_decides_when_spelt_as_tta_dev_does(step: Any, call: Any) -> None:
    """CachePrimitive(primitive, cache_key_fn, ttl_seconds=...) keys on what the function returns."""
    cache = CachePrimitive(step, lambda data, context: data["q"], ttl_seconds=60.0)
    call(cache, {"q": "a", "noise": 1})
    call(cache, {"q": "a", "noise": 2})
    call(cache, {"q": "b", "noise": 1})
    assert step.calls == 2
    assert cache.get_stats() == {"size": 2, "hits": 1, "misses": 2, "expirations": 0, "hit_rate": 33.33}
    assert cache.get_hit_rate() == 33.33


def test_key_function_may_take_the_data_alone_when_it_needs_no_context(step: Any, call: Any) -> None:
    """A key function of one argument is called with the data."""
    cache = CachePrimitive(step, len)
    call(cache, "ab")
    call(cache, "cd")
    assert step.calls == 1


def test_default_time_to_live_is_an_hour_when_none_is_given(step: Any, call: Any, clock: Any) -> None:
    """Without ttl, results live 3600 seconds."""
    cache = CachePrimitive(step, jitter=0)
    call(cache)
    clock.jump(3599.9)
    call(cache)
    assert step.calls == 1
    clock.jump(0.1)
    call(cache)
    assert step.calls == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ttl": 0}, "ttl=0: give a number above 0"),
        ({"ttl": -1}, "ttl=-1"),
        ({"ttl": float("nan")}, "ttl=nan"),
        ({"ttl": float("inf")}, "ttl=inf"),
        ({"ttl": True}, "ttl=True"),
        ({"ttl": "60"}, "ttl='60'"),
        ({"ttl": 1, "ttl_seconds": 1}, "two names of one thing"),
        ({"storage": InMemoryBackend(), "backend": InMemoryBackend()}, "two names of one thing"),
        ({"ttl": 10, "soft_ttl": 10}, "soft_ttl=10 must be below ttl=10"),
        ({"soft_ttl": 0}, "soft_ttl=0"),
        ({"stale_if_error": -1}, "stale_if_error=-1: give a number of 0 or more"),
        ({"xfetch_beta": -0.5}, "xfetch_beta"),
        ({"negative_ttl": 5}, "negative_for="),
        ({"negative_for": (KeyError,)}, "negative_ttl="),
        ({"negative_ttl": 0, "negative_for": KeyError}, "negative_ttl=0"),
        ({"max_size": 0}, "max_size=0: give a whole number above 0"),
        ({"max_size": 1.5}, "max_size=1.5"),
        ({"max_size": True}, "max_size=True"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"jitter": 1}, "jitter=1 is a part of the ttl"),
        ({"jitter": -0.1}, "jitter=-0.1"),
        ({"jitter": "a"}, "jitter='a'"),
        ({"compress_above": 0}, "compress_above=0"),
        ({"max_value_bytes": 0}, "max_value_bytes=0"),
        ({"max_wait": 0}, "max_wait=0"),
        ({"tags": [""]}, "tag '' is not a name"),
        ({"tags": [1]}, "tag 1 is not a name"),
        ({"cache_key_fn": "q"}, "cache_key_fn='q' is not a function"),
        ({"cache_key_fn": lambda: 1}, "cannot be a step|f\\(data\\)"),
        ({"storage": object()}, "is no store: give redis.Redis"),
        ({"storage": InMemoryBackend}, "is no store"),
    ],
)
def test_cache_is_refused_when_built_with_a_senseless_option(step: Any, options: dict[str, Any], text: str) -> None:
    """What cannot work is a ConfigurationError at construction that names the option."""
    with pytest.raises(ConfigurationError, match=text):
        CachePrimitive(step, **options)


def test_async_key_function_is_refused_when_the_cache_is_built(step: Any) -> None:
    """The key must be found on threads without a loop."""

    async def key(data: Any, context: Any) -> Any: ...

    class Key:
        async def __call__(self, data: Any) -> Any: ...

    with pytest.raises(ConfigurationError, match="cache_key_fn must be a plain function"):
        CachePrimitive(step, key)
    with pytest.raises(ConfigurationError, match="cache_key_fn must be a plain function"):
        CachePrimitive(step, Key())
    with pytest.raises(ConfigurationError, match="tags must be a plain function"):
        CachePrimitive(step, tags=key)  # type: ignore[arg-type]  # that is the point


def test_unbound_cache_is_refused_when_called(call: Any) -> None:
    """A cache without a step says how to give it one, and answers all else as an empty one does."""
    cache = CachePrimitive(ttl=60)
    with pytest.raises(ConfigurationError, match=r"CachePrimitive\(ttl=60\) >> step"):
        call(cache)
    assert cache.peek(1, WorkflowContext()) is MISS
    assert cache.get_stats() == {"size": 0, "hits": 0, "misses": 0, "expirations": 0, "hit_rate": 0.0}
    assert (cache.get_hit_rate(), cache.evict_expired()) == (0.0, 0)
    cache.invalidate(1)
    cache.clear_cache()


def test_cache_says_what_it_caches_when_printed(step: Any) -> None:
    """The repr names the step and the time to live."""
    assert repr(CachePrimitive(step, ttl=60)) == "Cache(Step, ttl=60)"
    assert repr(CachePrimitive(step, ttl=60, backend=InMemoryBackend(), namespace="a")) == (
        "Cache(Step, ttl=60, storage=InMemoryBackend)"
    )


def test_warning_names_the_remedy_when_a_cache_stands_around_a_fallback(Step: Any) -> None:
    """A lesser answer would be kept as long as a good one; the other way round it is not kept at all."""
    primary, lesser = Step(), Step()
    with pytest.warns(CompositionWarning, match=r"FallbackPrimitive\(CachePrimitive\(primary\), fallback\)") as caught:
        CachePrimitive(FallbackPrimitive(primary, lesser), ttl=60)
    assert caught[0].filename == __file__
    FallbackPrimitive(CachePrimitive(primary, ttl=60), lesser)


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        1,
        "a",
        None,
        [1, {"b": (2.0, None)}],
        {"x": 1, "y": [True]},
        b"bytes",
        {b"k": 1},
        datetime.date(2026, 1, 1),
        [bytearray(b"x")],
    ],
)
def test_equal_data_hit_when_they_are_another_object(Step: Any, call: Any, data: Any) -> None:
    """A hit needs equal data, not the same object; also by peek."""
    import copy

    step = Step()
    cache = CachePrimitive(step, ttl=60)
    assert call(cache, copy.deepcopy(data)) == call(cache, data)
    assert step.calls == 1
    assert cache.get_stats()["hits"] == 1


def test_reordered_dict_hits_when_the_first_order_was_stored(step: Any, call: Any, clock: Any) -> None:
    """The order of a dict's keys is no difference; once seen, each order is answered by peek."""
    cache = CachePrimitive(step, ttl=60)
    call(cache, {"a": 1, "b": 2})
    context = WorkflowContext(clock=clock)
    assert cache.peek({"b": 2, "a": 1}, context) is MISS
    call(cache, {"b": 2, "a": 1})
    assert step.calls == 1
    assert cache.peek({"b": 2, "a": 1}, context) == {"for": {"a": 1, "b": 2}}
    assert cache.peek({"a": 1, "b": 2}, context) == {"for": {"a": 1, "b": 2}}


def test_many_orders_of_a_dict_share_one_entry_when_they_come_by_turns(step: Any, call: Any) -> None:
    """However many forms of equal data there are, memory holds one entry and few forms."""
    import itertools

    cache = CachePrimitive(step, ttl=60)
    for order in itertools.permutations("abcd"):
        call(cache, dict.fromkeys(order, 1))
    assert step.calls == 1
    assert cache._store is not None
    assert len(cache._store.forms) <= 8
    single = CachePrimitive(step, ttl=60)
    call(single, dict.fromkeys("abcd", 1))
    assert single._store is not None
    assert cache._store.bytes > single._store.bytes  # forms have their weight
    assert cache._store.bytes == sum(entry.size for entry in cache._store.entries.values())


@pytest.mark.parametrize("lookalike", [bytearray(b"x"), memoryview(b"x")])
def test_other_buffers_do_not_hit_when_bytes_were_stored(step: Any, clock: Any, call: Any, lookalike: Any) -> None:
    """What marshal writes like bytes is not taken for bytes."""
    cache = CachePrimitive(step, ttl=60)
    call(cache, b"x")
    assert cache.peek(lookalike, WorkflowContext(clock=clock)) is MISS
    assert cache.peek(b"x", WorkflowContext(clock=clock)) == {"for": b"x"}


def test_buffers_have_entries_of_their_own_when_they_look_like_bytes(step: Any, call: Any, clock: Any) -> None:
    """What was stored for another buffer is no answer for bytes."""
    step.answer = lambda data: type(data[0]).__name__
    cache = CachePrimitive(step, ttl=60)
    assert call(cache, [bytearray(b"x")]) == "bytearray"
    assert cache.peek([b"x"], WorkflowContext(clock=clock)) is MISS
    assert call(cache, [b"x"]) == "bytes"
    assert call(cache, [bytearray(b"x")]) == "bytearray"


def test_long_data_are_peeked_at_when_they_were_stored(step: Any, call: Any, clock: Any) -> None:
    """Data of any length are answered without the loop."""
    cache = CachePrimitive(step, ttl=60)
    call(cache, "x" * 10_000)
    assert cache.peek("x" * 10_000, WorkflowContext(clock=clock)) == {"for": "x" * 10_000}
    assert cache.peek("x" * 9_999, WorkflowContext(clock=clock)) is MISS


def test_peek_finds_nothing_when_the_entry_goes_at_the_same_moment(step: Any, call: Any, clock: Any) -> None:
    """An entry that another thread drops between look and use is a miss."""
    cache = CachePrimitive(step, ttl=60)
    call(cache)
    assert cache._store is not None
    cache._store.entries.clear()  # as if between the two looks of peek
    assert cache.peek(1, WorkflowContext(clock=clock)) is MISS
    assert cache.get_stats()["hits"] == 0


def test_tenants_have_entries_of_their_own_when_their_data_are_equal(step: Any, call: Any, clock: Any) -> None:
    """The tenant is part of the key, with and without a key function."""
    for cache in (CachePrimitive(step, ttl=60), CachePrimitive(step, lambda data, context: "k", ttl=60)):
        step.calls = 0
        for tenant in ("a", "b", None, "a", "b", None):
            call(cache, 1, tenant=tenant)
        assert step.calls == 3
        assert cache.peek(1, WorkflowContext(clock=clock, tenant="c")) is MISS


def test_call_is_refused_when_a_tenant_is_required_and_missing(step: Any, call: Any, clock: Any) -> None:
    """With require_tenant, a call without one is an error and not an answer to everybody."""
    cache = CachePrimitive(step, ttl=60, require_tenant=True)
    with pytest.raises(ConfigurationError, match=r"requires a tenant .* WorkflowContext\(tenant="):
        call(cache)
    assert step.calls == 0
    call(cache, 1, tenant="a")
    assert cache.peek(1, WorkflowContext(clock=clock)) is MISS
    assert cache.peek(1, WorkflowContext(clock=clock, tenant="a")) == {"for": 1}


def test_argument_is_named_when_data_cannot_be_a_key(step: Any, call: Any, clock: Any) -> None:
    """Data of an unknown type are an error that says where and what to do, and the step is not run."""
    cache = CachePrimitive(step, ttl=60)
    with pytest.raises(ConfigurationError, match=r"data\['user'\] is a .*object.*give cache_key_fn="):
        call(cache, {"user": object()})
    by_function = CachePrimitive(step, lambda data, context: object())
    with pytest.raises(ConfigurationError, match=r"the result of cache_key_fn is a builtins\.object"):
        call(by_function)
    assert step.calls == 0
    assert cache.peek({"user": object()}, WorkflowContext(clock=clock)) is MISS


def test_key_functions_error_comes_out_when_it_fails(step: Any, call: Any, clock: Any) -> None:
    """A key function that fails fails the call as any step would; peek leaves that to the long way."""
    cache = CachePrimitive(step, lambda data, context: data["q"])
    assert cache.peek({}, WorkflowContext(clock=clock)) is MISS
    with pytest.raises(KeyError, match="q"):
        call(cache, {})


def test_large_data_leave_little_in_memory_when_they_are_the_key(Step: Any, call: Any) -> None:
    """The data themselves are not kept."""
    step = Step(lambda data: 1)
    cache = CachePrimitive(step, ttl=60)
    call(cache, "x" * 1_000_000)
    call(cache, "x" * 1_000_000)
    assert step.calls == 1
    assert cache._store is not None
    assert cache._store.bytes < 2000


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("falsy", [None, 0, "", [], {}, False])
def test_empty_results_are_cached_when_a_step_returns_them(Step: Any, call: Any, falsy: Any) -> None:
    """None and all that is false are results like any other."""
    step = Step(lambda data: falsy)
    cache = CachePrimitive(step, ttl=60)
    assert call(cache) == call(cache) == falsy
    assert type(cache.peek(1, WorkflowContext())) is type(falsy) or cache.peek(1, WorkflowContext()) is MISS
    assert step.calls == 1


class Mutable:
    """An object of a user's own type."""

    def __init__(self, items: list[int]) -> None:
        self.items = items

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mutable) and self.items == other.items


Pair = collections.namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    "make",
    [
        lambda: [1, [2]],
        lambda: {"a": {"b": [1]}},
        lambda: ({1, 2}, [3]),
        lambda: bytearray(b"abc"),
        lambda: {"when": datetime.datetime(2026, 1, 1), "n": [1]},
        lambda: Mutable([1, 2]),
        lambda: [Mutable([1])],
        lambda: collections.OrderedDict(b=[1], a=2),
        lambda: Pair([1], 2),
    ],
)
def test_every_reader_gets_a_copy_when_results_can_be_changed(Step: Any, call: Any, make: Any) -> None:
    """Nobody who changes what he got changes what others get: not the first caller, not a hit, not the step itself."""
    kept: list[Any] = []

    def answer(data: Any) -> Any:
        kept.append(make())
        return kept[-1]

    step = Step(answer)
    cache = CachePrimitive(step, ttl=60)
    for _ in range(3):
        result = call(cache)
        assert result == make()
        assert type(result) is type(make())
        _spoil(result)
        _spoil(kept[0])
    assert step.calls == 1


def _spoil(value: Any) -> None:
    if isinstance(value, (list, bytearray)):
        value.append(99)
    elif isinstance(value, dict):
        for item in value.values():
            _spoil(item)
        value["spoilt"] = True
    elif isinstance(value, tuple):
        for item in value:
            _spoil(item)
    elif isinstance(value, set):
        value.add(99)
    elif isinstance(value, Mutable):
        value.items.append(99)


def test_shared_parts_stay_shared_when_a_result_is_copied(Step: Any, call: Any) -> None:
    """A list that is in a result twice is one list in each copy."""
    row = [1]
    cache = CachePrimitive(Step(lambda data: [row, row]), ttl=60)
    call(cache)
    one, other = call(cache)
    assert one is other
    assert one is not row


def test_result_is_returned_and_not_kept_when_it_cannot_be_copied(Step: Any, call: Any, heard: list[Any]) -> None:
    """What cannot be copied is computed for each call, and an event says so."""
    step = Step(lambda data: threading.Lock())
    cache = CachePrimitive(step, ttl=60)
    assert call(cache) is not call(cache)
    assert step.calls == 2
    assert cache.get_stats()["size"] == 0
    assert [event.reason for event in heard if isinstance(event, events.CacheBypassed)] == (
        ["a lock cannot be copied"] * 2
    )


def test_deeply_nested_result_is_returned_when_it_cannot_be_copied(Step: Any, call: Any) -> None:
    """A result too deep for any copy is an answer all the same."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    cache = CachePrimitive(Step(lambda data: deep), ttl=60)
    assert call(cache) is deep


def test_least_recently_used_goes_first_when_max_size_is_reached(step: Any, call: Any) -> None:
    """The memory layer never holds more than max_size entries."""
    cache = CachePrimitive(step, ttl=60, max_size=2)
    for data in (1, 2, 1, 3, 1, 2):
        call(cache, data)
    assert step.calls == 4  # 2 was the least recently used when 3 came
    assert cache.get_stats()["size"] == 2


def test_hit_on_the_loop_counts_as_use_when_peek_could_not_answer(step: Any, call: Any) -> None:
    """Data without a cheap form, such as dates, keep their entries by being asked for."""
    cache = CachePrimitive(step, ttl=60, max_size=2)
    one, two, three = (datetime.date(2026, 1, day) for day in (1, 2, 3))
    for data in (one, two, one, three, one):
        call(cache, data)
    assert step.calls == 3


def test_peek_counts_as_use_when_the_oldest_is_looked_for(step: Any, call: Any, clock: Any) -> None:
    """A hit by peek keeps its entry as a hit on the loop does."""
    cache = CachePrimitive(step, ttl=60, max_size=2)
    call(cache, 1)
    call(cache, 2)
    cache.peek(1, WorkflowContext(clock=clock))
    call(cache, 3)
    assert cache.peek(1, WorkflowContext(clock=clock)) == {"for": 1}
    assert cache.peek(2, WorkflowContext(clock=clock)) is MISS


def test_oldest_go_first_when_max_bytes_is_reached(Step: Any, call: Any) -> None:
    """The memory layer never holds more than max_bytes, and nothing that alone is more."""
    step = Step(lambda data: "x" * data)
    cache = CachePrimitive(step, ttl=60, max_bytes=10_000)
    for data in (4000, 4001, 4002):
        call(cache, data)
    assert cache.get_stats()["size"] == 2
    call(cache, 20_000)
    call(cache, 20_000)
    assert step.calls == 5
    assert cache.get_stats()["size"] == 2


def test_objects_are_weighed_when_bytes_are_bounded(Step: Any, call: Any) -> None:
    """What a user's own object holds counts, however deep."""
    step = Step(lambda data: Mutable([{"text": "x" * 6000, "n": data}]))  # type: ignore[list-item]  # any items do
    cache = CachePrimitive(step, ttl=60, max_bytes=10_000)
    call(cache, 1)
    call(cache, 2)
    assert cache.get_stats()["size"] == 1


def test_weighing_ends_when_a_result_is_huge() -> None:
    """The estimate of a result's size is bounded itself: in breadth, and in depth."""
    from tta_sync.primitives.performance import snapshots

    broad = Mutable([Mutable([number]) for number in range(50_000)])  # type: ignore[misc]  # any items do
    deep: Any = 1
    for _ in range(500):
        deep = Mutable([deep])
    for value in (broad, deep):
        budget = [10_000]
        assert snapshots._size(value, budget=budget) > 0
        assert budget[0] > -70_000


def test_store_is_kept_or_given_up_when_the_process_was_forked(step: Any, call: Any) -> None:
    """Whole, it is the child's; torn by a thread that is not there any more, it is empty. The lock is open."""
    cache = CachePrimitive(step, ttl=60)
    call(cache)
    store = cache._store
    assert store is not None
    store.after_fork()
    assert cache.get_stats()["size"] == 1
    store.lock.acquire()
    store.after_fork()
    assert cache.get_stats()["size"] == 0
    call(cache)
    assert step.calls == 2


# ---- expiry ----------------------------------------------------------------------------------------------------------


def test_result_is_forgotten_when_its_ttl_has_passed(step: Any, call: Any, clock: Any) -> None:
    """An entry answers until its time to live ends, and then counts as one expiration."""
    cache = CachePrimitive(step, ttl=10, jitter=0)
    call(cache)
    clock.jump(9.99)
    call(cache)
    assert step.calls == 1
    clock.jump(0.01)
    assert cache.peek(1, WorkflowContext(clock=clock)) is MISS
    call(cache)
    assert step.calls == 2
    assert cache.get_stats() == {"size": 1, "hits": 1, "misses": 2, "expirations": 1, "hit_rate": 33.33}


def test_expired_entries_go_when_they_are_evicted(step: Any, call: Any, clock: Any) -> None:
    """evict_expired() drops what has expired and says how many went."""
    cache = CachePrimitive(step, ttl=10, jitter=0)
    call(cache, 1)
    clock.jump(5)
    call(cache, 2)
    assert cache.evict_expired() == 0
    clock.jump(5)
    assert cache.evict_expired() == 1
    assert cache.evict_expired() == 0
    assert cache.get_stats() == {"size": 1, "hits": 0, "misses": 2, "expirations": 1, "hit_rate": 0.0}


def test_time_to_live_is_shortened_by_jitter_and_never_lengthened(Step: Any, call: Any, clock: Any) -> None:
    """With jitter 0.1 entries live between 90 and 100 % of the ttl, each its own time."""
    step = Step()
    cache = CachePrimitive(step, ttl=100, rng=random.Random(7))
    for data in range(200):
        call(cache, data)
    clock.jump(89.99)
    assert cache.evict_expired() == 0
    clock.jump(5.01)
    gone = cache.evict_expired()
    assert 60 < gone < 140
    clock.jump(5)
    assert cache.evict_expired() == 200 - gone


def test_stale_result_answers_while_it_is_refreshed_when_soft_ttl_has_passed(
    step: Any, clock: Any, heard: list[Any]
) -> None:
    """After soft_ttl a caller gets the old result at once, one refresh runs, and later callers get the new one."""
    step.answer = lambda data: step.calls
    cache = CachePrimitive(step, ttl=100, soft_ttl=10, jitter=0)

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        assert await cache.execute(1, context) == 1
        clock.jump(10)
        assert cache.peek(1, context) is MISS
        step.gate = asyncio.Event()
        step.started.clear()
        heard.clear()
        assert [await cache.execute(1, context) for _ in range(5)] == [1] * 5
        assert [event.stale for event in heard if isinstance(event, events.CacheHit)] == [True] * 5
        await step.started.wait()
        step.gate.set()
        while cache.peek(1, context) is MISS:
            await asyncio.sleep(0)
        assert cache.peek(1, context) == 2
        assert step.calls == 2

    asyncio.run(main())
    assert cache.get_stats()["hits"] == 7


def test_stale_result_is_refreshed_when_tasks_begin_eagerly(step: Any, clock: Any, eager_task_factory: Any) -> None:
    """The refresh does its first steps before its task is known to anybody."""
    step.answer = lambda data: step.calls
    cache = CachePrimitive(step, ttl=100, soft_ttl=10, jitter=0)

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(eager_task_factory)
        context = WorkflowContext(clock=clock)
        assert await cache.execute(1, context) == 1
        clock.jump(10)
        assert await cache.execute(1, context) == 1
        while cache.peek(1, context) is MISS:
            await asyncio.sleep(0)
        assert cache.peek(1, context) == 2

    asyncio.run(asyncio.wait_for(main(), 30.0))


def test_stale_result_goes_on_answering_when_its_refresh_fails(step: Any, clock: Any, heard: list[Any]) -> None:
    """A failed refresh is an event; the old result answers until its ttl ends."""
    cache = CachePrimitive(step, ttl=100, soft_ttl=10, jitter=0)

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        await cache.execute(1, context)
        clock.jump(10)
        step.error = OSError("gone")
        for calls in (2, 3):
            assert await cache.execute(1, context) == {"for": 1}
            while step.calls < calls:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
        clock.jump(90)
        with pytest.raises(OSError, match="gone"):
            await cache.execute(1, context)

    asyncio.run(main())
    assert [event.reason for event in heard if isinstance(event, events.CacheBypassed)] == (
        ["a refresh failed with OSError"] * 2
    )


def test_refresh_has_a_context_of_its_own_when_it_runs(step: Any, clock: Any) -> None:
    """A refresh keeps the call's identity and tenant, but not its deadline, caller or state."""
    cache = CachePrimitive(step, ttl=100, soft_ttl=10, jitter=0)

    async def main() -> None:
        from tta_sync.context import Deadline

        await cache.execute(1, WorkflowContext(clock=clock, tenant="t"))
        clock.jump(10)
        context = WorkflowContext(clock=clock, tenant="t", correlation_id="c", deadline=Deadline.after(0.5, clock))
        step.started.clear()
        await cache.execute(1, context)
        await step.started.wait()
        refreshed = step.contexts[-1]
        assert refreshed is not context
        assert (refreshed.correlation_id, refreshed.tenant) == ("c", "t")
        assert refreshed.deadline is not context.deadline
        assert refreshed.deadline.remaining() == 30.0
        refreshed.state["x"] = 1
        refreshed.mark_degraded()
        assert "x" not in context.state
        assert not context.degraded

    asyncio.run(main())


def test_old_result_stands_in_when_the_step_fails_within_the_window(
    step: Any, call: Any, clock: Any, heard: list[Any]
) -> None:
    """With stale_if_error an expired result answers for a failing step, marked as degraded, until the window ends."""
    cache = CachePrimitive(step, ttl=10, stale_if_error=20, jitter=0)
    call(cache)
    step.error = OSError("gone")
    clock.jump(10)
    context = WorkflowContext(clock=clock)
    assert asyncio.run(cache.execute(1, context)) == {"for": 1}
    assert context.degraded
    assert heard[-1].stale
    clock.jump(19.99)
    assert call(cache) == {"for": 1}
    assert step.calls == 3
    assert cache.get_stats()["expirations"] == 1
    clock.jump(0.01)
    with pytest.raises(OSError, match="gone"):
        call(cache)
    assert cache.get_stats()["expirations"] == 1


def test_fresh_result_replaces_the_old_one_when_the_step_recovers(step: Any, call: Any, clock: Any) -> None:
    """Within the window the step is asked first; its answer wins."""
    step.answer = lambda data: step.calls
    cache = CachePrimitive(step, ttl=10, stale_if_error=20, jitter=0)
    call(cache)
    clock.jump(15)
    assert call(cache) == 2


def test_programming_error_of_an_interrupt_is_not_hidden_when_an_old_result_exists(
    step: Any, call: Any, clock: Any
) -> None:
    """Only errors are stood in for: what ends the process is not."""
    cache = CachePrimitive(step, ttl=10, stale_if_error=20, jitter=0)
    call(cache)
    clock.jump(10)
    step.error = SystemExit(3)
    with pytest.raises(SystemExit):
        call(cache)


def test_early_refresh_begins_as_xfetch_says_when_a_step_is_slow(step: Any, call: Any, clock: Any) -> None:
    """now − cost·beta·ln(1−U) ≥ expiry: a step of 4 s with U = 1 − 1/e is refreshed 4·beta seconds before the end."""

    class Chance(random.Random):
        def random(self) -> float:
            return 1 - 2.718281828459045**-1

    def answer(data: Any) -> Any:
        clock.jump(4)
        return step.calls

    step.answer = answer
    cache = CachePrimitive(step, ttl=100, jitter=0, xfetch_beta=2.0, rng=Chance())
    call(cache)
    clock.jump(91.99)
    assert cache.peek(1, WorkflowContext(clock=clock)) == 1
    clock.jump(0.02)
    assert cache.peek(1, WorkflowContext(clock=clock)) is MISS

    async def main() -> None:
        assert await cache.execute(1, WorkflowContext(clock=clock)) == 1
        while cache.peek(1, WorkflowContext(clock=clock)) is MISS:
            await asyncio.sleep(0)
        assert cache.peek(1, WorkflowContext(clock=clock)) == 2

    asyncio.run(main())


class NotFound(LookupError):
    """An error worth remembering."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def test_listed_error_is_raised_again_when_it_is_remembered(step: Any, call: Any, clock: Any) -> None:
    """For negative_ttl seconds an error of a listed type, or of a subclass, is raised without asking the step."""
    step.error = NotFound("x")
    cache = CachePrimitive(step, ttl=60, negative_ttl=5, negative_for=LookupError)
    for _ in range(3):
        with pytest.raises(NotFound, match="x") as caught:
            call(cache)
        assert caught.value.what == "x"
    with pytest.raises(NotFound) as again:
        call(cache)
    assert len({id(step.error), id(caught.value), id(again.value)}) == 3
    assert step.calls == 1
    assert cache.peek(1, WorkflowContext(clock=clock)) is MISS
    assert cache.get_stats()["hits"] == 3
    clock.jump(5)
    step.error = None
    assert call(cache) == {"for": 1}


def test_nothing_of_the_failed_call_is_kept_when_its_error_is_remembered(call: Any) -> None:
    """A remembered error holds no frames, and so nothing that they hold."""
    import gc
    import weakref

    class Token:
        """Something in the frame of the failing step."""

    tokens: list[weakref.ref[Token]] = []

    async def fail(data: Any) -> None:
        token = Token()
        tokens.append(weakref.ref(token))
        try:
            raise ValueError("inner")
        except ValueError as error:
            raise NotFound("x") from error

    cache = CachePrimitive(fail, ttl=60, negative_ttl=5, negative_for=LookupError)
    for _ in range(2):
        try:
            call(cache)
        except NotFound:
            pass
    gc.collect()
    assert len(tokens) == 1
    assert tokens[0]() is None


def test_other_errors_are_not_remembered_when_some_are(step: Any, call: Any) -> None:
    """What is not listed is asked for again each time."""
    step.error = OSError("x")
    cache = CachePrimitive(step, ttl=60, negative_ttl=5, negative_for=LookupError)
    for _ in range(2):
        with pytest.raises(OSError, match="x"):
            call(cache)
    assert step.calls == 2


def test_error_is_not_remembered_when_it_cannot_be_copied(step: Any, call: Any) -> None:
    """One exception object is never raised twice."""

    class Odd(LookupError):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("text")

    step.error = Odd(1, 2)
    cache = CachePrimitive(step, ttl=60, negative_ttl=5, negative_for=LookupError)
    for _ in range(2):
        with pytest.raises(Odd):
            call(cache)
    assert step.calls == 2


def test_error_is_not_remembered_in_place_of_an_old_result_when_that_stands_in(
    step: Any, call: Any, clock: Any
) -> None:
    """An old result within its window is worth more than the memory of an error."""
    cache = CachePrimitive(step, ttl=10, jitter=0, stale_if_error=50, negative_ttl=5, negative_for=LookupError)
    call(cache)
    clock.jump(10)
    step.error = NotFound("x")
    assert call(cache) == call(cache) == {"for": 1}


def test_stale_result_goes_on_answering_when_its_refresh_fails_with_a_listed_error(step: Any, clock: Any) -> None:
    """An error of a refresh is not remembered in place of a result that is still good."""
    cache = CachePrimitive(step, ttl=100, soft_ttl=10, jitter=0, negative_ttl=50, negative_for=LookupError)

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        await cache.execute(1, context)
        clock.jump(10)
        step.error = NotFound("x")
        for calls in (2, 3):
            assert await cache.execute(1, context) == {"for": 1}
            while step.calls < calls or cache.flights._all:
                await asyncio.sleep(0)

    asyncio.run(main())


# ---- peek, state and events ------------------------------------------------------------------------------------------


def test_peek_answers_as_the_long_way_does_when_it_is_a_hit(step: Any, call: Any, clock: Any, heard: list[Any]) -> None:
    """A hit by peek gives value, isolation, statistics, state and events as by execute; a miss leaves no trace."""
    cache = CachePrimitive(step, ttl=60)
    context = WorkflowContext(clock=clock)
    assert cache.peek([1], context) is MISS
    assert (context.state, heard, cache.get_stats()["misses"]) == ({}, [], 0)
    call(cache, [1])
    long_way, short_way = (WorkflowContext(clock=clock, correlation_id="x") for _ in range(2))
    heard.clear()
    by_execute = asyncio.run(cache.execute([1], long_way))
    by_peek = cache.peek([1], short_way)
    by_peek["for"].append(2)
    assert by_execute == {"for": [1]} == cache.peek([1], WorkflowContext(clock=clock, correlation_id="x"))
    assert long_way.state == short_way.state == {"cache_hits": 1}
    assert heard == [events.CacheHit(step="cache of Step", correlation_id="x", layer="memory", stale=False)] * 3
    assert cache.get_stats()["hits"] == 3


def test_context_tells_hits_from_misses_when_a_call_returns(step: Any, clock: Any) -> None:
    """state["cache_hits"] and state["cache_misses"] say whether this call was answered from the cache."""
    cache = CachePrimitive(step, ttl=60)
    first, second = (WorkflowContext(clock=clock) for _ in range(2))
    asyncio.run(cache.execute(1, first))
    asyncio.run(cache.execute(1, second))
    asyncio.run(cache.execute(1, second))
    assert first.state == {"cache_misses": 1}
    assert second.state == {"cache_hits": 2}


def test_miss_and_store_are_told_when_somebody_listens(step: Any, call: Any, clock: Any, heard: list[Any]) -> None:
    """Events say what was missed and why, and for how long a result was stored."""
    cache = CachePrimitive(step, ttl=60, jitter=0)
    call(cache, correlation_id="c")
    clock.jump(60)
    call(cache, correlation_id="c")
    common = {"step": "cache of Step", "correlation_id": "c", "layer": "memory"}
    assert heard == [
        events.CacheMiss(**common, reason="absent"),
        events.CacheStored(**common, ttl=60.0),
        events.CacheMiss(**common, reason="expired"),
        events.CacheStored(**common, ttl=60.0),
    ]


def test_step_sees_and_changes_the_callers_state_when_it_is_computed(clock: Any) -> None:
    """What a cached step tells the steps after it in state arrives, as without a cache; a hit tells nothing."""

    async def tell(data: Any, context: WorkflowContext) -> int:
        assert context.state["before"] == 1
        assert running_context.get() is context
        context.state["told"] = data
        context.state["before"] = 2
        return 0

    cache = CachePrimitive(tell, ttl=60)
    first = WorkflowContext(clock=clock, state={"before": 1})
    asyncio.run(cache.execute(7, first))
    assert first.state == {"before": 2, "told": 7, "cache_misses": 1}
    second = WorkflowContext(clock=clock, state={"before": 1})
    asyncio.run(cache.execute(7, second))
    assert second.state == {"before": 1, "cache_hits": 1}


def test_degraded_result_marks_every_caller_when_it_comes_from_the_cache(clock: Any) -> None:
    """Who gets a degraded answer out of the cache is told so, by peek as well."""

    async def lesser(data: Any, context: WorkflowContext) -> int:
        context.mark_degraded()
        return 0

    cache = CachePrimitive(lesser, ttl=60)
    for data in (1, datetime.date(2026, 1, 1)):  # with a cheap form, and without
        for _ in range(2):
            context = WorkflowContext(clock=clock)
            asyncio.run(cache.execute(data, context))
            assert context.degraded
    context = WorkflowContext(clock=clock)
    assert cache.peek(1, context) == 0
    assert context.degraded


def test_hit_does_not_mark_the_caller_when_only_the_first_one_was_degraded(step: Any, clock: Any) -> None:
    """A caller that was degraded before does not taint the result."""
    cache = CachePrimitive(step, ttl=60)
    tainted = WorkflowContext(clock=clock)
    tainted.mark_degraded()
    asyncio.run(cache.execute(1, tainted))
    clean = WorkflowContext(clock=clock)
    asyncio.run(cache.execute(1, clean))
    assert not clean.degraded


# ---- invalidation ----------------------------------------------------------------------------------------------------


def test_result_is_computed_again_when_it_was_invalidated(step: Any, call: Any) -> None:
    """invalidate(data) forgets the entry of equal data, whatever the order of its keys, and no other."""
    cache = CachePrimitive(step, ttl=60)
    call(cache, {"a": 1, "b": 2})
    call(cache, 2)
    cache.invalidate({"b": 2, "a": 1})
    call(cache, {"a": 1, "b": 2})
    call(cache, 2)
    assert step.calls == 3
    cache.invalidate(99)


def test_none_is_data_like_any_other_when_it_is_invalidated(step: Any, call: Any) -> None:
    """invalidate() without arguments forgets the result for None."""
    cache = CachePrimitive(step, ttl=60)
    call(cache, None)
    call(cache, 1)
    cache.invalidate()
    call(cache, None)
    call(cache, 1)
    assert step.calls == 3


def test_everything_is_forgotten_when_the_cache_is_cleared(step: Any, call: Any) -> None:
    """clear_cache() forgets all entries of all tenants; the statistics stay."""
    cache = CachePrimitive(step, ttl=60)
    call(cache, 1, tenant="a")
    call(cache, 1)
    cache.clear_cache()
    assert cache.get_stats() == {"size": 0, "hits": 0, "misses": 2, "expirations": 0, "hit_rate": 0.0}
    call(cache, 1)
    assert step.calls == 3


def test_tenants_entry_is_forgotten_when_it_is_invalidated(step: Any, call: Any) -> None:
    """tenant= says whose entry; without it, that of the current context."""
    cache = CachePrimitive(step, ttl=60)
    for tenant in ("a", "b"):
        call(cache, 1, tenant=tenant)
    cache.invalidate(1)
    cache.invalidate(1, tenant="a")
    assert cache.get_stats()["size"] == 1
    token = running_context.set(WorkflowContext(tenant="b"))
    try:
        cache.invalidate(1, tenant="a")
        assert cache.get_stats()["size"] == 1
        cache.invalidate(1)
    finally:
        running_context.reset(token)
    assert cache.get_stats()["size"] == 0


def test_tagged_results_are_forgotten_when_their_tag_is_invalidated(step: Any, call: Any) -> None:
    """tags= names results; invalidate(tags=...) forgets those that carry one of them."""
    cache = CachePrimitive(step, ttl=60, tags=lambda data, context: {f"user:{data[0]}", "all"})
    for data in ("a1", "a2", "b1"):
        call(cache, data)
    cache.invalidate(tags=["user:a", "nobody"])
    assert cache.get_stats()["size"] == 1
    call(cache, "b1")
    assert step.calls == 3
    cache.invalidate(tags="all")
    assert cache.get_stats()["size"] == 0
    assert cache._store is not None
    assert cache._store.tags == {}


def test_data_and_tags_are_both_forgotten_when_both_are_given(step: Any, call: Any) -> None:
    """invalidate(data, tags=...) does the one and the other."""
    cache = CachePrimitive(step, ttl=60, tags=lambda data: ["odd"] if data % 2 else [])
    for data in range(4):
        call(cache, data)
    cache.invalidate(2, tags=["odd"])
    assert cache.get_stats()["size"] == 1


def test_static_tags_are_carried_by_all_results_when_given(step: Any, call: Any) -> None:
    """tags= may be names instead of a function."""
    cache = CachePrimitive(step, ttl=60, tags=["everything"])
    call(cache, 1)
    cache.invalidate(tags=["everything"])
    call(cache, 1)
    assert step.calls == 2


def test_async_twins_do_the_same_when_on_a_loop(step: Any, clock: Any) -> None:
    """ainvalidate and aclear_cache forget as their twins do; for memory the plain ones work on a loop, too."""
    cache = CachePrimitive(step, ttl=60)

    async def main() -> None:
        for forget in (
            lambda: cache.ainvalidate(1),
            lambda: cache.aclear_cache(),
            lambda: asyncio.to_thread(cache.invalidate, 1),
            lambda: asyncio.to_thread(cache.clear_cache),
        ):
            await cache.execute(1, WorkflowContext(clock=clock))
            await forget()
            assert cache.get_stats()["size"] == 0
        await cache.execute(1, WorkflowContext(clock=clock))
        cache.invalidate(1)
        await cache.execute(1, WorkflowContext(clock=clock))
        cache.clear_cache()
        assert cache.get_stats()["size"] == 0

    asyncio.run(main())


@pytest.mark.parametrize("how", ["key", "tag", "all"])
def test_late_result_is_not_stored_when_it_was_invalidated_meanwhile(clock: Any, how: str) -> None:
    """A computation that began before an invalidation answers its callers and nobody later."""
    calls: list[asyncio.Event] = []

    async def number(data: Any) -> int:
        calls.append(asyncio.Event())
        mine = len(calls)
        await calls[-1].wait()
        return mine

    cache = CachePrimitive(number, ttl=60, tags=["t"])
    forget = {"key": lambda: cache.invalidate(1), "tag": lambda: cache.invalidate(tags=["t"]), "all": cache.clear_cache}

    async def main() -> None:
        async def begin() -> asyncio.Future[int]:
            call = asyncio.ensure_future(cache.execute(1, WorkflowContext(clock=clock)))
            before = len(calls)
            while len(calls) == before:
                await asyncio.sleep(0)
            return call

        early = await begin()
        forget[how]()
        late = await begin()
        calls[1].set()
        assert await late == 2
        calls[0].set()
        assert await early == 1
        assert await cache.execute(1, WorkflowContext(clock=clock)) == 2
        assert len(calls) == 2

    asyncio.run(main())


# ---- stores that are shared ------------------------------------------------------------------------------------------


def test_caches_keep_to_their_own_keys_when_they_share_a_backend(Step: Any, call: Any, clock: Any) -> None:
    """Two caches of one backend never answer for each other, nor clear each other."""
    backend = InMemoryBackend()
    one, other = Step(lambda data: "one"), Step(lambda data: "other")
    first = CachePrimitive(one, ttl=60, backend=backend, namespace="first")
    second = CachePrimitive(other, ttl=60, backend=backend, namespace="second")
    assert (call(first), call(second), call(first), call(second)) == ("one", "other", "one", "other")
    assert (one.calls, other.calls) == (1, 1)
    assert first.get_stats()["size"] == second.get_stats()["size"] == 1
    first.clear_cache()
    assert (first.get_stats()["size"], second.get_stats()["size"]) == (0, 1)
    assert second.peek(1, WorkflowContext(clock=clock)) == "other"


def test_caches_share_entries_when_they_are_of_the_same_step_and_backend(step: Any, call: Any) -> None:
    """Two caches over one step and one store are one cache."""
    backend = InMemoryBackend()
    call(CachePrimitive(step, ttl=60, backend=backend))
    call(CachePrimitive(step, ttl=60, backend=backend))
    assert step.calls == 1
    call(CachePrimitive(step, ttl=60, backend=backend, version=2))
    assert step.calls == 2


def test_second_step_of_the_same_name_is_refused_when_the_store_is_shared(Step: Any) -> None:
    """Two different steps under one default namespace would share entries: an error that asks for namespace=."""
    backend = InMemoryBackend()
    one, other = Step(), Step()
    kept = CachePrimitive(one, backend=backend)
    with pytest.raises(ConfigurationError, match="give each cache namespace="):
        CachePrimitive(other, backend=backend)
    CachePrimitive(other, backend=backend, namespace="other")
    CachePrimitive(RetryPrimitive(one), backend=backend)
    with pytest.raises(ConfigurationError, match="give each cache namespace="):
        CachePrimitive(RetryPrimitive(other), backend=backend)
    del kept


def test_name_is_free_again_when_its_step_is_gone(Step: Any) -> None:
    """An application that is built anew, as in tests, is not refused for its predecessor's sake."""
    import gc

    backend = InMemoryBackend()
    CachePrimitive(Step(), backend=backend)
    gc.collect()
    CachePrimitive(Step(), backend=backend)


def test_step_without_a_lasting_name_is_refused_when_the_store_is_shared(step: Any) -> None:
    """Lambdas, local functions and partials have no name that other processes know."""
    import functools

    def local(data: Any) -> Any: ...

    for nameless in (lambda data: data, local, functools.partial(print, 1), step >> (lambda data: data)):
        with pytest.raises(ConfigurationError, match="give the cache namespace="):
            CachePrimitive(nameless, backend=InMemoryBackend())
        CachePrimitive(nameless, backend=InMemoryBackend(), namespace="named")


async def module_level(data: Any) -> Any:
    """A step with a lasting name."""
    return data


class Service:
    """A class whose methods are steps."""

    async def fetch(self, data: Any) -> Any:
        return data


def test_bound_method_is_the_same_step_when_it_is_looked_up_again() -> None:
    """obj.method is another object each time, and the same step."""
    backend = InMemoryBackend()
    service = Service()
    CachePrimitive(service.fetch, backend=backend)
    CachePrimitive(service.fetch, backend=backend)
    other = Service()
    with pytest.raises(ConfigurationError, match="namespace="):
        CachePrimitive(other.fetch, backend=backend)


class Slotted:
    """A foreign step that cannot be referred to weakly."""

    __slots__ = ()

    async def execute(self, data: Any, context: Any) -> Any:
        return data


def test_foreign_step_has_the_name_of_its_class_when_the_store_is_shared(call: Any) -> None:
    """Objects of other libraries are told apart like ours, also without weak references."""
    backend = InMemoryBackend()
    cache = CachePrimitive(Slotted(), backend=backend)
    assert call(cache, 5) == 5
    with pytest.raises(ConfigurationError, match="Slotted"):
        CachePrimitive(Slotted(), backend=backend)


def test_backend_keeps_copies_when_used_alone(clock: Any) -> None:
    """InMemoryBackend stores and returns copies, for ttl_seconds; get of nothing is None."""
    backend = InMemoryBackend(max_size=2, clock=clock)

    async def main() -> None:
        value = {"a": [1]}
        await backend.set("k", value, 10)
        value["a"].append(2)
        got = await backend.get("k")
        assert got == {"a": [1]}
        got["a"].append(3)
        assert await backend.get("k") == {"a": [1]}
        clock.jump(10)
        assert await backend.get("k") is None
        for key in "abc":
            await backend.set(key, 1, 10)
        assert [await backend.get(key) for key in "abc"] == [None, 1, 1]
        await backend.delete("b")
        await backend.delete("b")
        assert await backend.get("b") is None
        await backend.set("lock", threading.Lock(), 10)
        assert await backend.get("lock") is None

    asyncio.run(main())
    assert isinstance(backend, CacheBackend)


# ---- a user's own back end -------------------------------------------------------------------------------------------


class Dictionary:
    """A back end as a user of TTA.dev would write it."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.error: Exception | None = None

    async def get(self, key: str) -> Any | None:
        if self.error is not None:
            raise self.error
        return self.kept.get(key)

    async def set(self, key: str, value: Any, ttl_seconds: float) -> None:
        if self.error is not None:
            raise self.error
        self.kept[key] = value

    async def delete(self, key: str) -> None:
        if self.error is not None:
            raise self.error
        self.kept.pop(key, None)


def test_users_own_backend_is_used_when_given(Step: Any, call: Any, clock: Any) -> None:
    """Whatever has async get, set and delete keeps results, with expiry and isolation as in memory."""
    step = Step(lambda data: [data, (1, 2), None])
    cache = CachePrimitive(step, lambda data, context: str(data), 10.0, Dictionary(), namespace="n", jitter=0)
    first = call(cache)
    first.append("spoilt")
    assert call(cache) == [1, (1, 2), None]
    assert step.calls == 1
    assert cache.get_stats() == {"size": 0, "hits": 1, "misses": 1, "expirations": 0, "hit_rate": 50.0}
    clock.jump(10)
    call(cache)
    assert step.calls == 2
    assert cache.get_stats()["expirations"] == 1


def test_step_is_called_when_the_users_own_backend_fails(step: Any, call: Any, heard: list[Any]) -> None:
    """A back end that raises is passed by, with an event; only an invalidation says so."""
    backend = Dictionary()
    backend.error = OSError("disk")
    cache = CachePrimitive(step, backend=backend, namespace="n")
    assert call(cache) == {"for": 1}
    assert [event.reason for event in heard if isinstance(event, events.CacheBypassed)] == ["OSError", "OSError"]
    with pytest.raises(ConnectionError, match="Dictionary could not be told of an invalidation"):
        asyncio.run(cache.ainvalidate(1))


def test_results_are_forgotten_when_the_users_own_backend_is_told(step: Any, call: Any) -> None:
    """invalidate and clear_cache work on any back end, from sync code and on the loop."""
    backend = Dictionary()
    cache = CachePrimitive(step, backend=backend, namespace="n")
    other = CachePrimitive(step, backend=backend, namespace="other")
    call(other)
    call(cache)
    cache.invalidate(1)
    call(cache)
    assert step.calls == 3
    cache.clear_cache()
    call(cache)
    assert step.calls == 4
    asyncio.run(cache.aclear_cache())
    asyncio.run(cache.ainvalidate(1))
    call(cache)
    call(other)
    assert step.calls == 5


def test_tags_are_refused_when_the_users_own_backend_cannot_count(step: Any) -> None:
    """A store without counters has no tags, and says so at construction."""
    with pytest.raises(ConfigurationError, match="tags need memory or Redis"):
        CachePrimitive(step, backend=Dictionary(), namespace="n", tags=["a"])


def test_foreign_bytes_are_a_miss_when_the_users_own_backend_returns_them(step: Any, call: Any, heard: Any) -> None:
    """What is not ours is not believed."""
    backend = Dictionary()
    cache = CachePrimitive(step, backend=backend, namespace="n")
    call(cache)
    (name,) = (name for name in backend.kept if "#" not in name)
    for hostile in ("text", b"junk", b"TC1", backend.kept[name][:-1], 5):
        backend.kept[name] = hostile
        assert call(cache) == {"for": 1}
    assert step.calls == 6
    assert {event.reason for event in heard if isinstance(event, events.CacheMiss)} == {"absent", "foreign", "corrupt"}


def test_soft_ttl_and_stale_if_error_hold_when_the_backend_is_the_users_own(step: Any, clock: Any) -> None:
    """Staleness is the cache's business, whatever the store."""
    step.answer = lambda data: step.calls
    cache = CachePrimitive(step, ttl=100, soft_ttl=10, stale_if_error=50, jitter=0, backend=Dictionary(), namespace="n")

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        assert await cache.execute(1, context) == 1
        clock.jump(10)
        assert await cache.execute(1, context) == 1
        while await cache.execute(1, context) == 1:
            await asyncio.sleep(0)
        assert step.calls == 2
        clock.jump(100)
        step.error = OSError()
        assert await cache.execute(1, context) == 2
        assert context.degraded
        clock.jump(50)
        with pytest.raises(OSError):  # noqa: PT011  # it has no text
            await cache.execute(1, context)

    asyncio.run(main())


def test_late_result_is_not_kept_when_it_was_invalidated_while_it_was_written(step: Any) -> None:
    """A store that takes its time cannot bring back what was forgotten meanwhile."""

    class Slow(Dictionary):
        async def set(self, key: str, value: Any, ttl_seconds: float) -> None:
            writing.set()
            await written.wait()
            await super().set(key, value, ttl_seconds)

    writing, written = asyncio.Event(), asyncio.Event()
    backend = Slow()
    cache = CachePrimitive(step, backend=backend, namespace="n")

    async def main() -> None:
        call = asyncio.ensure_future(cache.execute(1, WorkflowContext()))
        await writing.wait()
        await cache.ainvalidate(1)
        written.set()
        assert await call == {"for": 1}
        assert backend.kept == {}

    asyncio.run(main())


class SlottedStore:
    """A back end that lets nobody write on it."""

    __slots__ = ("kept",)

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    async def get(self, key: str) -> Any | None:
        return self.kept.get(key)

    async def set(self, key: str, value: Any, ttl_seconds: float) -> None:
        self.kept[key] = value

    async def delete(self, key: str) -> None:
        self.kept.pop(key, None)


def test_users_own_backend_needs_no_dict_when_it_is_given(step: Any, call: Any) -> None:
    """A store with slots works like any other."""
    cache = CachePrimitive(step, backend=SlottedStore())
    call(cache)
    call(cache)
    assert step.calls == 1


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_threads_and_the_loop_agree_when_they_use_one_cache_at_once(Step: Any) -> None:
    """Peeks and invalidations on many threads beside computations on the loop lose no count and tear nothing."""
    step = Step(lambda data: [data] * 3)
    cache = CachePrimitive(step, ttl=60, max_size=20)
    stop = threading.Event()
    faults: list[BaseException] = []
    peeks = [0] * 4

    def peek(index: int) -> None:
        try:
            while not stop.is_set():
                for data in range(40):
                    value = cache.peek(data, WorkflowContext())
                    if value is not MISS:
                        assert value == [data] * 3
                        peeks[index] += 1
                    if data % 13 == index:
                        cache.invalidate(data)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=peek, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    calls = 0

    async def main() -> None:
        nonlocal calls
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            for data in range(40):
                calls += 1
                assert await cache.execute(data, WorkflowContext()) == [data] * 3
            await asyncio.sleep(0)

    try:
        asyncio.run(main())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults
    stats = cache.get_stats()
    assert stats["hits"] + stats["misses"] == calls + sum(peeks)
    assert stats["misses"] == step.calls
    assert stats["size"] <= 20
    store = cache._store
    assert store is not None
    assert store.bytes == sum(entry.size for entry in store.entries.values())
    assert set(store.forms.values()) <= set(store.entries.values())


def test_result_of_another_loop_is_taken_when_it_was_stored_a_moment_ago(step: Any) -> None:
    """A call that found nothing, and began only after somebody else had stored the result, does not compute again."""
    first = True

    def tags(data: Any) -> list[str]:  # asked between the look and the computation
        nonlocal first
        if first:
            first = False
            other = threading.Thread(target=lambda: asyncio.run(cache.execute(1, WorkflowContext())))
            other.start()
            other.join()
        return []

    cache = CachePrimitive(step, ttl=60, tags=tags)
    assert asyncio.run(cache.execute(1, WorkflowContext())) == {"for": 1}
    assert step.calls == 1


# ---- the facade and other primitives ---------------------------------------------------------------------------------


def test_hit_needs_no_hop_when_it_is_in_memory(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """run_sync of a hit in memory is answered on the caller's thread."""
    cache = CachePrimitive(step, ttl=60)
    assert cache.run_sync(1) == {"for": 1}

    async def never(self: Any, data: Any, context: Any) -> Any:
        raise AssertionError("the long way was taken")

    monkeypatch.setattr(CachePrimitive, "_run", never)
    assert cache.run_sync(1) == {"for": 1}
    assert step.calls == 1


def test_caller_step_runs_on_its_caller_when_it_is_cached() -> None:
    """A cached step that needs the waiting thread gets it."""
    threads: list[threading.Thread] = []

    @caller_step
    def where(data: Any) -> int:
        threads.append(threading.current_thread())
        return len(threads)

    cache = CachePrimitive(where, ttl=60)
    assert cache.run_sync(1) == cache.run_sync(1) == 1
    assert threads == [threading.current_thread()]


def test_next_waiter_computes_when_the_leaders_thread_has_left() -> None:
    """A flight that lost its caller's thread is taken over by a waiter who has one."""
    entered, release = threading.Event(), threading.Event()
    runs: list[str] = []

    async def slow_start(data: Any) -> Any:
        while not release.is_set():
            await asyncio.sleep(0.005)
        return data

    @caller_step
    def on_caller(data: Any) -> str:
        runs.append(threading.current_thread().name)
        return "done"

    async def begin(data: Any) -> Any:
        entered.set()
        return data

    cache = CachePrimitive(as_step(begin) >> slow_start >> on_caller, ttl=60)
    results: list[Any] = []

    def leader() -> None:
        for more in range(6):  # a machine that stalls may let the time pass before it begins
            try:
                cache.run_sync(1, timeout=0.2 * 2**more)
            except BaseException as error:
                if entered.is_set():
                    results.append(type(error).__name__)
                    return

    def follower() -> None:
        results.append(cache.run_sync(1))

    first = threading.Thread(target=leader, name="leader")
    first.start()
    assert entered.wait(10)
    second = threading.Thread(target=follower, name="follower")
    second.start()
    first.join()
    release.set()
    second.join()
    assert results == ["DeadlineExceededError", "done"]
    assert runs == ["follower"]


def test_subclass_keeps_its_meaning_when_it_overrides_execute(step: Any, clock: Any) -> None:
    """A subclass with its own execute is asked, not peeked past."""

    class Loud(CachePrimitive[Any, Any]):
        async def execute(self, data: Any, context: WorkflowContext) -> Any:
            return [await super().execute(data, context)]

    loud = Loud(step, ttl=60)
    assert loud.run_sync(1) == loud.run_sync(1) == [{"for": 1}]
    assert isinstance(loud, WorkflowPrimitive)
