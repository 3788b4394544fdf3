"""The cache against a model: a dict and a clock. Every store must behave like it, whatever the order of events."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tta_sync.context import WorkflowContext
from tta_sync.primitives.performance import CachePrimitive, InMemoryBackend
from tta_sync.primitives.performance.wire import LIMIT
from tta_sync.redis import endpoint
from tta_sync.testing.clock import FakeClock

TTL, SOFT, STALE, NEGATIVE = 10.0, 6.0, 5.0, 2.0


class NotFound(LookupError):
    """The error that is remembered."""


@dataclasses.dataclass
class Entry:
    """What the model knows of one result."""

    value: int
    stored: float
    tags: frozenset[str]
    error: bool = False


class Backend:
    """A user's own back end."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    async def get(self, key: str) -> Any | None:
        return self.kept.get(key)

    async def set(self, key: str, value: Any, ttl_seconds: float) -> None:
        self.kept[key] = value

    async def delete(self, key: str) -> None:
        self.kept.pop(key, None)


KEYS = st.sampled_from([1, 1.0, {"a": 1, "b": 2}, {"b": 2, "a": 1}])
TENANTS = st.sampled_from([None, None, None, "t"])


def named(data: Any, tenant: str | None) -> Any:
    """The model's key: equal for equal data, types included."""
    return (type(data).__name__, repr(sorted(data.items())) if isinstance(data, dict) else repr(data), tenant)


def tag_of(data: Any) -> str:
    return type(data).__name__


def machine(build: Callable[..., CachePrimitive[Any, Any]], tagged: bool) -> type[RuleBasedStateMachine]:
    """A state machine for the caches that *build* makes."""

    class CacheMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.clock = FakeClock(start=1000.0, autojump_threshold=None)
            self.entries: dict[Any, Entry] = {}
            self.failing = False
            self.made = 0  # by the step
            self.expected = 0  # by the model's step
            self.runner = asyncio.Runner()
            self.hits = self.misses = 0

            async def make(data: Any) -> list[int]:
                self.made += 1
                if self.failing:
                    raise NotFound(self.made)
                return [self.made]

            options: dict[str, Any] = {"tags": lambda data: [tag_of(data), "all"]} if tagged else {}
            self.cache = build(
                make,
                ttl=TTL,
                soft_ttl=SOFT,
                stale_if_error=STALE,
                negative_ttl=NEGATIVE,
                negative_for=NotFound,
                jitter=0,
                **options,
            )

        def teardown(self) -> None:
            self.runner.run(self.cache.aclear_cache())
            self.runner.close()

        def model(self, name: Any, tags: frozenset[str]) -> tuple[list[int] | None, bool]:
            """What a call answers (None: the error), and whether it is a hit."""
            now = self.clock.monotonic()
            entry = self.entries.get(name)
            if entry is not None and now < entry.stored + (NEGATIVE if entry.error else TTL):
                if entry.error:
                    return None, True
                if now >= entry.stored + SOFT:
                    self.compute(name, tags, refresh=True)
                return [entry.value], True
            old = entry
            if self.compute(name, tags, refresh=False):
                return [self.expected], False
            if old is not None and not old.error and now < old.stored + TTL + STALE:
                self.entries[name] = old
                return [old.value], False
            return None, False

        def compute(self, name: Any, tags: frozenset[str], refresh: bool) -> bool:
            self.expected += 1
            if self.failing and not refresh:
                self.entries[name] = Entry(self.expected, self.clock.monotonic(), tags, error=True)
            if not self.failing:
                self.entries[name] = Entry(self.expected, self.clock.monotonic(), tags)
            return not self.failing

        @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 6.0, 9.99, 10.0, 14.99]))
        def call_again(self, seconds: float) -> None:
            self.clock.jump(seconds)
            self.call(1, None)

        @rule(data=KEYS, tenant=TENANTS)
        def call(self, data: Any, tenant: str | None) -> None:
            expected, hit = self.model(named(data, tenant), frozenset({tag_of(data), "all"}))
            context = WorkflowContext(clock=self.clock, tenant=tenant)

            async def ask() -> Any:
                try:
                    answer = await self.cache.execute(data, context)
                except NotFound:
                    answer = None
                while self.cache.flights._all:  # a refresh
                    await asyncio.sleep(0)
                return answer

            answer = self.runner.run(ask())
            assert answer == expected
            assert self.made == self.expected
            assert context.state == ({"cache_hits": 1} if hit else {"cache_misses": 1})
            self.hits += hit
            self.misses += not hit
            if answer is not None:
                answer.append("spoilt")

        @rule(seconds=st.sampled_from([1.0, 4.0, 10.0]))
        def wait(self, seconds: float) -> None:
            self.clock.jump(seconds)

        @rule()
        def break_or_mend(self) -> None:
            self.failing = not self.failing

        @rule(data=KEYS, tenant=TENANTS)
        def invalidate(self, data: Any, tenant: str | None) -> None:
            self.runner.run(self.cache.ainvalidate(data, tenant=tenant))
            self.entries.pop(named(data, tenant), None)

        @precondition(lambda self: tagged)
        @rule(tag=st.sampled_from(["int", "dict", "all", "nobody"]))
        def invalidate_tag(self, tag: str) -> None:
            self.runner.run(self.cache.ainvalidate(tags=[tag]))
            self.entries = {name: entry for name, entry in self.entries.items() if tag not in entry.tags}

        @rule()
        def clear(self) -> None:
            self.runner.run(self.cache.aclear_cache())
            self.entries.clear()

        @rule()
        def evict(self) -> None:
            self.cache.evict_expired()

        @invariant()
        def counts_agree(self) -> None:
            stats = self.cache.get_stats()
            assert (stats["hits"], stats["misses"]) == (self.hits, self.misses)

    return CacheMachine


def check(build: Callable[..., CachePrimitive[Any, Any]], tagged: bool = True, examples: int = 60) -> None:
    run_state_machine_as_test(
        machine(build, tagged),
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_memory_behaves_like_the_model_whatever_happens() -> None:
    """The cache in memory is a dict with a clock."""
    check(CachePrimitive)


def test_shared_memory_behaves_like_the_model_whatever_happens() -> None:
    """So is one in a store that it shares with others."""
    backend, number = InMemoryBackend(), itertools.count()
    check(lambda step, **options: CachePrimitive(step, backend=backend, namespace=f"n{next(number)}", **options))


def test_own_backend_behaves_like_the_model_whatever_happens() -> None:
    """So is one in a store of the user's own, but for tags."""
    backend, number = Backend(), itertools.count()
    check(
        lambda step, **options: CachePrimitive(step, backend=backend, namespace=f"n{next(number)}", **options),
        tagged=False,
    )


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    place = endpoint(redis_url)
    place.bounds.limit = 10.0  # this is not about time
    with redis.Redis.from_url(redis_url) as client:
        yield client
    place.bounds.limit = LIMIT


def test_redis_behaves_like_the_model_whatever_happens(client: redis.Redis) -> None:
    """So is one in Redis: nobody can tell from the answers where the results are kept."""
    number = itertools.count()
    check(
        lambda step, **options: CachePrimitive(step, storage=client, namespace=f"n{next(number)}", **options),
        examples=40,
    )
