"""One workflow of everything, from 64 threads and the managed loop at once."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any

from tta_sync import events, run_sync
from tta_sync.context import WorkflowContext
from tta_sync.primitives import (
    BulkheadPrimitive,
    ChaosPrimitive,
    CircuitBreakerPrimitive,
    ConditionalPrimitive,
    FallbackPrimitive,
    HedgePrimitive,
    MapPrimitive,
    RateLimitPrimitive,
    RetryBudget,
    RetryPrimitive,
    RouterPrimitive,
    SagaPrimitive,
    SwitchPrimitive,
    TimeoutPrimitive,
    step,
)

THREADS = 64
CALLS = 4


def at_once(work: Any) -> None:
    """Call ``work(number)`` on 64 threads, which begin together."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(THREADS)

    def body(number: int) -> None:
        try:
            barrier.wait(30)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_crowd_of_threads_and_the_loop_share_one_workflow() -> None:
    """Every call gets its own answer, and in the end no permit, no place and no probe is out."""

    @step(idempotent=True)
    async def fetch(number: int, context: WorkflowContext) -> int:
        await asyncio.sleep(0)
        context.state["seen"] = number
        return number

    shaky = ChaosPrimitive(fetch, failure_ratio=0.2, seed=1)
    bulkhead = BulkheadPrimitive(TimeoutPrimitive(shaky, 30.0), 8, 100_000)
    breaker = CircuitBreakerPrimitive(bulkhead, window=1000, failure_ratio=0.9)
    limited = RateLimitPrimitive(breaker, 1e6, 1_000_000)
    tried = RetryPrimitive(limited, max_retries=8, backoff_strategy="constant", budget=RetryBudget(100_000))
    hedged = HedgePrimitive(tried, 20.0)
    saga = SagaPrimitive([(hedged, None), (lambda number: number, lambda number: None)])
    chosen = SwitchPrimitive(lambda number: "all", {"all": ConditionalPrimitive(lambda number: True, saga)})
    routed = RouterPrimitive({"one": chosen}, lambda number: "one")
    flow: Any = TimeoutPrimitive(FallbackPrimitive(routed, lambda number: ("backup", number)), 60.0)
    every = flow >> (lambda number: [number, number]) >> MapPrimitive(flow | (lambda number: number))

    def work(thread: int) -> None:
        for call in range(CALLS):
            number = thread * 1000 + call
            here = every.execute(number, WorkflowContext())
            for answer in run_sync(every, number), asyncio.run(here):
                assert answer in ([[number, number]] * 2, [[("backup", number), number]] * 2), answer

    at_once(work)
    assert (bulkhead.in_use, bulkhead.waiting) == (0, 0)
    assert not breaker._leases
    assert str(breaker.state) == "closed"


def test_chaos_fails_as_many_calls_from_many_threads_as_from_one() -> None:
    """The seed decides how many of so many calls fail, and how long they wait, whoever makes them."""

    def told(chaos: ChaosPrimitive[int, int], count: Counter[str]) -> None:
        try:
            asyncio.run(chaos.execute(1, WorkflowContext()))
        except ConnectionError:
            count["failed"] += 1  # atomic enough: compared as a sum of per-thread counters below

    def build() -> ChaosPrimitive[int, int]:
        return ChaosPrimitive(lambda number: number, failure_ratio=0.4, latency=(0.0, 1e-6), seed=11)

    alone: Counter[str] = Counter()
    chaos = build()
    for _ in range(THREADS * CALLS):
        told(chaos, alone)

    shared, counts = build(), [Counter[str]() for _ in range(THREADS)]
    at_once(lambda thread: [told(shared, counts[thread]) for _ in range(CALLS)])
    assert sum(counts, Counter()) == alone
    assert shared._chance.getstate() == chaos._chance.getstate()


def test_hook_that_fails_fails_no_workflow_and_keeps_nothing() -> None:
    """Whatever a hook raises in whatever primitive, the calls go on, and the next hook hears of all."""
    heard: Counter[str] = Counter()

    def broken(event: events.Event) -> None:
        raise RuntimeError("a hook of somebody's")

    answers = iter([OSError("first"), TimeoutError("second"), *[None] * 100])

    @step(idempotent=True)
    async def fetch(number: int) -> int:
        answer = next(answers)
        if answer is not None:
            raise answer
        return number

    bulkhead = BulkheadPrimitive(fetch, 1)
    breaker = CircuitBreakerPrimitive(bulkhead, failure_threshold=2, recovery_timeout=0.001, success_threshold=1)
    tried = RetryPrimitive(HedgePrimitive(RateLimitPrimitive(breaker, 1e6), 5.0), backoff_strategy="constant")
    flow = MapPrimitive(FallbackPrimitive(TimeoutPrimitive(tried, 30.0), lambda number: -1))
    remove = [events.bus.subscribe(broken), events.bus.subscribe(lambda event: heard.update([type(event).__name__]))]
    try:
        assert run_sync(flow, [7]) == [7]
    finally:
        for unsubscribe in remove:
            unsubscribe()
    assert bulkhead.in_use == 0
    assert {"RetryScheduled", "BreakerOpened", "BreakerHalfOpened", "BreakerClosed", "MapProgressed"} <= set(heard)
