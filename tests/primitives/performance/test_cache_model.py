"""The cache against a model: a dict and a clock. Every store must behave like it, whatever the order of events."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tta_sync.context import WorkflowContext
from tta_sync.primitives import MISS
from tta_sync.primitives.performance import CachePrimitive, InMemoryBackend
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
def client(patient_redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(patient_redis_url) as client:
        yield client


def test_redis_behaves_like_the_model_whatever_happens(client: redis.Redis) -> None:
    """So is one in Redis: nobody can tell from the answers where the results are kept."""
    number = itertools.count()
    check(
        lambda step, **options: CachePrimitive(step, storage=client, namespace=f"n{next(number)}", **options),
        examples=40,
    )


# ---- memory over Redis, in two processes -----------------------------------------------------------------------------

SHORT = 4.0  # seconds that memory may go on with what Redis has forgotten by itself


class Process:
    """What one process has: a loop, and memory over the Redis that both share."""

    def __init__(self, step: Callable[[Any], Any], client: redis.Redis, namespace: str) -> None:
        self.client = client
        self.runner = asyncio.Runner()
        self.memory: CachePrimitive[Any, Any] = CachePrimitive(ttl=SHORT, jitter=0)
        self.shared: CachePrimitive[Any, Any] = CachePrimitive(
            ttl=TTL, jitter=0, storage=client, namespace=namespace, tags=lambda data: [tag_of(data), "all"]
        )
        self.flow = self.memory >> step >> self.shared
        self.kept: dict[Any, tuple[int, float, frozenset[str]]] = {}  # the model of its memory

    def call(self, data: Any, context: WorkflowContext) -> Any:
        return self.runner.run(self.flow.execute(data, context))

    def hear(self) -> None:
        """Wait until every invalidation so far was heard: until then, staleness is what is stated."""
        bound = self.shared._acting()
        layer: Any = None if bound is None else bound._layer
        if layer is None or layer._last_news is None:
            return  # it has never asked, so it has nothing to forget

        async def wait() -> None:
            async with asyncio.timeout(20):
                while layer._last_news != int(self.client.get(layer._news) or 0):
                    await asyncio.sleep(0.001)

        self.runner.run(wait())

    def forget(self, wanted: Callable[[Any, frozenset[str]], bool]) -> None:
        self.kept = {name: entry for name, entry in self.kept.items() if not wanted(name, entry[2])}

    def close(self) -> None:
        self.runner.run(self.shared.aclear_cache())
        self.runner.close()


def layered(client: redis.Redis, number: Iterator[int]) -> type[RuleBasedStateMachine]:
    class LayersMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.clock = FakeClock(start=1000.0, autojump_threshold=None)
            self.made = self.expected = 0
            namespace = f"l{next(number)}"

            def maker() -> Callable[[Any], Any]:
                async def make(data: Any) -> list[int]:
                    self.made += 1
                    return [self.made]

                return make

            self.processes = [Process(maker(), client, namespace) for _ in range(2)]
            self.stored: dict[Any, tuple[int, float, frozenset[str]]] = {}  # the model of Redis

        def teardown(self) -> None:
            for process in self.processes:
                process.close()

        def model(self, process: Process, name: Any, tags: frozenset[str]) -> int:
            now = self.clock.monotonic()
            kept, stored = process.kept.get(name), self.stored.get(name)
            if kept is not None and now < kept[1] + SHORT:
                return kept[0]
            if stored is None or now >= stored[1] + TTL:
                self.expected += 1
                stored = self.stored[name] = (self.expected, now, tags)
            process.kept[name] = (stored[0], now, tags)
            return stored[0]

        @rule(which=st.booleans(), data=KEYS, tenant=TENANTS, by_peek=st.booleans())
        def call(self, which: bool, data: Any, tenant: str | None, by_peek: bool) -> None:
            process = self.processes[which]
            context = WorkflowContext(clock=self.clock, tenant=tenant)
            answer = process.flow.peek(data, context) if by_peek else MISS
            if answer is MISS:
                assert context.state == {}
                answer = process.call(data, context)
            assert answer == [self.model(process, named(data, tenant), frozenset({tag_of(data), "all"}))]
            assert self.made == self.expected
            answer.append("spoilt")

        @rule(seconds=st.sampled_from([0.5, 3.99, 4.0, 6.0, 10.0]))
        def wait(self, seconds: float) -> None:
            self.clock.jump(seconds)

        def told(self, which: bool, wanted: Callable[[Any, frozenset[str]], bool]) -> None:
            self.stored = {name: entry for name, entry in self.stored.items() if not wanted(name, entry[2])}
            for process in self.processes:
                process.hear()
                process.forget(wanted)

        @rule(which=st.booleans(), data=KEYS, tenant=TENANTS, outer=st.booleans())
        def invalidate(self, which: bool, data: Any, tenant: str | None, outer: bool) -> None:
            process = self.processes[which]
            process.call(data, WorkflowContext(clock=self.clock, tenant=tenant))  # an unbound cache has nothing yet
            self.model(process, named(data, tenant), frozenset({tag_of(data), "all"}))
            cache = process.memory if outer else process.shared
            process.runner.run(cache.ainvalidate(data, tenant=tenant))
            self.told(which, lambda name, tags: bool(name == named(data, tenant)))

        @rule(which=st.booleans(), tag=st.sampled_from(["int", "dict", "all", "nobody"]))
        def invalidate_tag(self, which: bool, tag: str) -> None:
            process = self.processes[which]
            process.call(0, WorkflowContext(clock=self.clock))
            self.model(process, named(0, None), frozenset({"int", "all"}))
            process.runner.run(process.shared.ainvalidate(tags=[tag]))
            self.told(which, lambda name, tags: tag in tags)

        @rule(which=st.booleans())
        def clear(self, which: bool) -> None:
            process = self.processes[which]
            process.call(0, WorkflowContext(clock=self.clock))
            self.model(process, named(0, None), frozenset({"int", "all"}))
            process.runner.run(process.shared.aclear_cache())
            self.told(which, lambda name, tags: True)

        @rule(which=st.booleans())
        def clear_memory_alone(self, which: bool) -> None:
            process = self.processes[which]
            process.runner.run(process.memory.aclear_cache())
            process.forget(lambda name, tags: True)

    return LayersMachine


def test_two_processes_behave_like_the_model_whatever_happens(client: redis.Redis) -> None:
    """Memory over Redis in two processes: exactly the stated staleness, and after an invalidation none."""
    run_state_machine_as_test(
        layered(client, itertools.count()),
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("in_redis.RedisLayer._forget_above", lambda self, tags: None),
        ("in_redis.RedisLayer._counters", lambda self, tags: (self._epoch,)),
        ("cache.CachePrimitive.lifetime", lambda self: self.ttl * 3 + 30.0),
        ("keys.prefix", lambda *parts: "n:"),
    ],
)
def test_model_finds_out_when_something_is_wrong(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch, what: str, wrong: Any
) -> None:
    """News that are not heard, tags that do not count, results that live too long, tenants that share a key."""
    monkeypatch.setattr(f"tta_sync.primitives.performance.{what}", wrong)
    with pytest.raises((AssertionError, TimeoutError, ExceptionGroup)):
        run_state_machine_as_test(
            layered(client, itertools.count()),
            settings=settings(
                max_examples=400,
                stateful_step_count=30,
                deadline=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )
    client.flushall()
