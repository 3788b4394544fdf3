"""A cache without a step, in a chain: what it caches, and that this is settled once."""

from __future__ import annotations

import asyncio
import threading
import warnings
from typing import Any

import pytest

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives import (
    CompositionWarning,
    FallbackPrimitive,
    InMemoryBackend,
    RetryPrimitive,
    SequentialPrimitive,
    TimeoutPrimitive,
)
from tta_sync.primitives.core.base import MISS
from tta_sync.primitives.core.conditional import ConditionalPrimitive
from tta_sync.primitives.performance import CachePrimitive


async def add(data: int) -> int:
    return data + 1


async def double(data: int) -> int:
    return data * 2


def run(flow: Any, data: Any, context: WorkflowContext | None = None) -> Any:
    return asyncio.run(flow.execute(data, context or WorkflowContext()))


def test_cache_at_the_head_caches_all_that_follows_when_the_chain_grows(Step: Any) -> None:
    """CachePrimitive(ttl) >> a >> b is a cache of a >> b."""
    first, second = Step(lambda data: data + 1), Step(lambda data: data * 2)
    cache = CachePrimitive(ttl=60)
    flow = cache >> first >> second
    assert run(flow, 3) == run(flow, 3) == 8
    assert (first.calls, second.calls) == (1, 1)
    assert cache.get_stats() == {"size": 1, "hits": 1, "misses": 1, "expirations": 0, "hit_rate": 50.0}
    assert cache.get_hit_rate() == 50.0


def test_cache_at_the_tail_caches_all_before_it(Step: Any) -> None:
    """a >> b >> CachePrimitive(ttl) is a cache of a >> b, not of nothing."""
    first, second = Step(lambda data: data + 1), Step(lambda data: data * 2)
    flow = first >> second >> CachePrimitive(ttl=60)
    assert run(flow, 3) == run(flow, 3) == 8
    assert (first.calls, second.calls) == (1, 1)


def test_left_cache_is_the_outer_one_when_two_stand_around_a_step(step: Any) -> None:
    """outer >> step >> inner: what the outer one forgets, the inner one still knows."""
    outer, inner = CachePrimitive(ttl=60), CachePrimitive(ttl=600)
    flow = outer >> step >> inner
    run(flow, 1)
    outer.clear_cache()
    context = WorkflowContext()
    run(flow, 1, context)
    assert context.state == {"cache_misses": 1, "cache_hits": 1}
    assert step.calls == 1
    inner.clear_cache()  # reaches the outer one: nothing above may know what is forgotten below
    run(flow, 1)
    assert step.calls == 2
    outer.invalidate(1)  # a wrong answer is wrong in every layer
    run(flow, 1)
    assert step.calls == 3


def test_hit_is_peeked_at_when_a_chain_is_headed_by_a_cache_of_the_rest(Step: Any) -> None:
    """A bound chain answers a hit without the loop."""
    flow = CachePrimitive(ttl=60) >> Step() >> Step()
    context = WorkflowContext()
    assert flow.peek(1, context) is MISS
    answer = run(flow, 1)
    assert flow.peek(1, context) == answer
    assert context.state == {"cache_hits": 1}


def test_inner_chain_keeps_its_extent_when_it_stands_in_brackets(Step: Any) -> None:
    """a >> (cache >> b) caches b alone."""
    first, second = Step(lambda data: data), Step(lambda data: data * 2)
    flow = first >> (CachePrimitive(ttl=60) >> second)
    assert run(flow, 3) == run(flow, 3) == 6
    assert (first.calls, second.calls) == (2, 1)


def test_steps_on_both_sides_are_refused_where_they_are_written(Step: Any) -> None:
    """A cache in the middle could mean either side: the error names both remedies."""
    with pytest.raises(ConfigurationError, match="has steps on both sides"):
        Step() >> CachePrimitive(ttl=60) >> Step()


def test_unbound_cache_is_not_changed_when_a_chain_binds_it(step: Any) -> None:
    """What stands in the chain is another object with a store of its own; the first one forwards to it."""
    cache = CachePrimitive(ttl=60)
    flow = cache >> step
    run(flow, 1)
    assert cache.unbound
    assert cache.primitive is None
    bound = cache.bind(step)
    assert bound is cache.bind(step)
    assert not bound.unbound
    assert bound.get_stats() == cache.get_stats()
    assert cache.evict_expired() == 0
    with pytest.raises(ConfigurationError, match="already caches"):
        bound.bind(step)


def test_one_cache_is_refused_when_it_stands_in_two_chains(Step: Any) -> None:
    """What an unbound cache caches is settled by the first call; another extent is an error there."""
    cache, first, second = CachePrimitive(ttl=60), Step(), Step()
    one, other, longer = cache >> first, cache >> second, cache >> first >> second
    run(one, 1)
    for flow in (other, longer):
        with pytest.raises(ConfigurationError, match="one cache has one extent"):
            run(flow, 1)
    run(cache >> first, 1)  # the same extent, written again
    assert first.calls == 1


def test_other_wrappers_are_another_extent_when_they_stand_around_the_same_step(step: Any) -> None:
    """The same step with a retry is not the same as with a timeout."""
    cache = CachePrimitive(ttl=60)
    run(cache >> RetryPrimitive(step), 1)
    with pytest.raises(ConfigurationError, match="one cache has one extent"):
        run(cache >> TimeoutPrimitive(step, timeout_seconds=5), 1)


def test_functions_are_the_same_extent_when_they_are_written_again() -> None:
    """A plain function becomes a new step in each chain, and stays the same extent."""
    cache = CachePrimitive(ttl=60)
    assert run(cache >> add >> double, 3) == run(cache >> add >> double, 3) == 8
    assert cache.get_stats()["hits"] == 1
    with pytest.raises(ConfigurationError, match="one cache has one extent"):
        run(cache >> double >> add, 3)


def test_invalidation_reaches_the_chain_when_it_is_told_to_the_unbound_cache(step: Any) -> None:
    """invalidate and clear_cache on the object that the user holds, from sync code and on the loop."""
    cache = CachePrimitive(ttl=60, tags=["t"])
    flow = cache >> step
    for forget in (
        lambda: cache.invalidate(1),
        lambda: cache.invalidate(tags="t"),
        cache.clear_cache,
        lambda: asyncio.run(cache.ainvalidate(1)),
        lambda: asyncio.run(cache.aclear_cache()),
    ):
        before = step.calls
        run(flow, 1)
        run(flow, 1)
        assert step.calls == before + 1
        forget()


def test_threads_get_one_cache_when_they_bind_it_at_once(Step: Any) -> None:
    """Two first calls at the same time end with one store."""
    for _ in range(20):
        cache, step = CachePrimitive(ttl=60), Step()
        chain = SequentialPrimitive([cache, step])
        both = threading.Barrier(4)

        def first(chain: Any = chain, both: threading.Barrier = both) -> None:
            both.wait(10)
            run(chain, 1)

        threads = [threading.Thread(target=first) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert cache.get_stats()["misses"] + cache.get_stats()["hits"] == 4
        assert cache.get_stats()["size"] == 1


def test_shared_store_needs_a_name_when_the_chain_has_none() -> None:
    """The default namespace is the names of all steps that are cached; a lambda has none."""
    backend = InMemoryBackend()
    flow = CachePrimitive(ttl=60, storage=backend) >> add >> double
    assert run(flow, 1) == 4
    (name,) = backend.store.claims
    assert name == f"SequentialPrimitive({__name__}.add>{__name__}.double)"
    with pytest.raises(ConfigurationError, match="namespace="):
        run(CachePrimitive(ttl=60, storage=backend) >> add >> (lambda data: data), 1)


def test_three_caches_forget_together_when_they_stand_one_in_another(step: Any) -> None:
    """Invalidation goes through every cache that stands directly above or below."""
    caches = [CachePrimitive(ttl=60) for _ in range(3)]
    flow = caches[0] >> caches[1] >> step >> caches[2]
    for cache in caches:
        run(flow, 1)
        before = step.calls
        cache.invalidate(1)
        run(flow, 1)
        assert step.calls == before + 1
    caches[1].clear_cache()
    assert [cache.get_stats()["size"] for cache in caches] == [0, 0, 1]


def test_workflow_that_contains_itself_has_a_name_in_a_shared_store() -> None:
    """Its default namespace and its identity are those of its other steps."""
    tree = ConditionalPrimitive(bool, add, double)
    tree.else_primitive = tree
    store = InMemoryBackend()
    assert run(CachePrimitive(tree, ttl=60, backend=store), 1) == 2
    assert run(CachePrimitive(tree, ttl=60, backend=store), 1) == 2


# ---- what defeats itself ---------------------------------------------------------------------------------------------


def lesser() -> FallbackPrimitive[Any, Any]:
    return FallbackPrimitive(str.upper, str.lower)


@pytest.mark.parametrize(
    "build",
    [
        lambda: CachePrimitive(ttl=3) >> lesser(),
        lambda: lesser() >> CachePrimitive(ttl=3),
        lambda: CachePrimitive(ttl=3) >> lesser() >> CachePrimitive(ttl=30),
        lambda: CachePrimitive(ttl=3) >> TimeoutPrimitive(lesser(), 1.0),
        lambda: str.strip >> (CachePrimitive(ttl=3) >> lesser()),
        lambda: SequentialPrimitive([CachePrimitive(ttl=3), lesser()]),
        lambda: CachePrimitive(ttl=3) >> lesser() >> str.strip,
    ],
    ids=["head", "tail", "both", "below a wrapper", "in brackets", "in a list", "before another"],
)
def test_warning_comes_once_when_a_cache_in_a_chain_stands_around_a_fallback(build: Any) -> None:
    """The chain says what the constructor says, where it is built, and not again when it grows or runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chain = build()
        asyncio.run(chain.execute("a", WorkflowContext()))
    (warning,) = [one for one in caught if "keeps what the fallback answered" in str(one.message)]
    assert warning.category is CompositionWarning
    assert warning.filename == __file__


def test_no_warning_where_a_cache_in_a_chain_stands_beside_or_inside_a_fallback() -> None:
    """A fallback around the cache, or behind it, keeps nothing that it should not."""
    FallbackPrimitive(CachePrimitive(ttl=3) >> str.upper, str.lower)
    CachePrimitive(ttl=3) >> str.strip >> lesser()
    (CachePrimitive(ttl=3) >> str.strip) >> RetryPrimitive(str.upper)
    CachePrimitive(ttl=3) >> CachePrimitive(ttl=30)
