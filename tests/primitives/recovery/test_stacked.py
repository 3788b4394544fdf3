"""The recovery primitives together: the documented order, through the facade, shared by many, light to import."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import tta_sync.primitives as primitives
from tta_sync import events, run_sync
from tta_sync.context import WorkflowContext
from tta_sync.exceptions import BulkheadFullError, CircuitOpenError, DeadlineExceededError
from tta_sync.primitives import recovery
from tta_sync.primitives.core.base import MISS, step
from tta_sync.primitives.performance import CachePrimitive
from tta_sync.primitives.recovery import (
    BulkheadPrimitive,
    ChaosPrimitive,
    CircuitBreakerPrimitive,
    CompensationPrimitive,
    FallbackPrimitive,
    HedgePrimitive,
    RateLimitPrimitive,
    RetryPrimitive,
    SagaPrimitive,
    TimeoutPrimitive,
    forks,
)
from tta_sync.testing import FakeClock

CALL = step(lambda data: data, name="call", idempotent=True)


def stack(call: Any, **breaker: Any) -> Any:
    """The documented order: Fallback, Cache, total Timeout, Retry, RateLimit, CircuitBreaker, Bulkhead, Timeout."""
    attempt = TimeoutPrimitive(call, 1.0)
    guarded = CircuitBreakerPrimitive(BulkheadPrimitive(attempt, 10), **breaker)
    tried = RetryPrimitive(RateLimitPrimitive(guarded, rate=1000, burst=1000), max_retries=2)
    cached = CachePrimitive(TimeoutPrimitive(tried, 10.0), ttl=60, namespace="stack")
    return FallbackPrimitive(cached, lambda data: "backup")


def test_documented_order_builds_without_a_warning_and_works() -> None:
    """Attempts are cut and retried, the circuit opens, the fallback answers, hits are cached."""
    calls: list[float] = []

    async def hang(data: Any, context: WorkflowContext) -> None:
        calls.append(context.clock.monotonic())
        await context.clock.sleep(3600)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        broken, good = stack(hang, failure_threshold=4, name="dep"), stack(lambda data: data)

    async def main() -> None:
        clock = FakeClock()
        context = WorkflowContext(clock=clock)
        assert await broken.execute("a", context) == "backup"
        assert len(calls) == 3
        assert await broken.execute("b", context) == "backup"
        assert len(calls) == 4
        assert context.degraded
        fresh = WorkflowContext(clock=clock)
        assert await good.execute("a", fresh) == "a"
        assert good.peek("a", fresh) == "a"
        assert good.peek("b", fresh) is MISS
        assert not fresh.degraded

    asyncio.run(main())


def test_chaos_is_withstood_by_the_stack(run_shuffled: Callable[..., Any]) -> None:
    """With a third of the calls failing and all of them slow, every caller gets an answer, and nothing stays taken."""
    bulkheads: list[BulkheadPrimitive[Any, Any]] = []

    async def main(seed: int) -> None:
        shaky = ChaosPrimitive(lambda data: data, failure_ratio=0.33, latency=(0.0, 1.5), seed=seed)
        bulkhead = BulkheadPrimitive(TimeoutPrimitive(shaky, 1.0), 5, 50, 20.0)
        bulkheads.append(bulkhead)
        breaker = CircuitBreakerPrimitive(bulkhead, window=20, failure_ratio=0.9)
        tried = RetryPrimitive(RateLimitPrimitive(breaker, 50, 50, mode="wait"), max_retries=5)
        workflow = FallbackPrimitive(TimeoutPrimitive(tried, 30.0), lambda data: "backup")
        clock = FakeClock()
        answers = await asyncio.gather(
            *(workflow.execute(number, WorkflowContext(clock=clock)) for number in range(100))
        )
        assert all(answer in (number, "backup") for number, answer in enumerate(answers))
        assert sum(answer != "backup" for answer in answers) > 50
        assert (bulkhead.in_use, bulkhead.waiting) == (0, 0)

    for seed in range(5):
        run_shuffled(main(seed), seed)


def test_errors_and_events_name_the_call_and_not_its_wrappers(workflow_events: list[events.Event]) -> None:
    """In a stack each part speaks of the innermost call; a wrapper with a name of its own keeps it."""

    async def hang(data: Any, context: WorkflowContext) -> None:
        await context.clock.sleep(3600)

    call = step(hang, name="fetch")
    breaker: Any = CircuitBreakerPrimitive(TimeoutPrimitive(call, 1.0), failure_threshold=1)
    workflow = FallbackPrimitive(RetryPrimitive(breaker, max_retries=1), step(lambda data: 1, name="backup"))
    assert asyncio.run(workflow.execute(1, WorkflowContext(clock=FakeClock()))) == 1
    assert breaker.name == "fetch"
    assert {event.step for event in workflow_events} == {"fetch"}
    used = next(event for event in workflow_events if isinstance(event, events.FallbackUsed))
    assert (used.failed, used.used) == ("fetch", "backup")
    named: Any = CircuitBreakerPrimitive(CircuitBreakerPrimitive(call, name="inner"))
    assert named.name == "inner"
    assert CircuitBreakerPrimitive(call >> call).name == "SequentialPrimitive"


@pytest.mark.parametrize(
    "build",
    [
        lambda **name: RetryPrimitive(CALL, **name),
        lambda **name: TimeoutPrimitive(CALL, 1.0, **name),
        lambda **name: FallbackPrimitive(CALL, CALL, **name),
        lambda **name: CircuitBreakerPrimitive(CALL, **name),
        lambda **name: SagaPrimitive([(CALL, None)], **name),
        lambda **name: BulkheadPrimitive(CALL, 1, **name),
        lambda **name: RateLimitPrimitive(CALL, 1, **name),
        lambda **name: HedgePrimitive(CALL, 1.0, **name),
        lambda **name: ChaosPrimitive(CALL, **name),
    ],
)
def test_primitive_has_the_name_that_it_is_given(build: Callable[..., Any]) -> None:
    """name= names the step for sequences, errors and diagrams; without it the wrapped call's name does."""
    assert build(name="mine").name == "mine"
    assert build().name in (None, "call")


# ---- through the facade -----------------------------------------------


def test_open_circuit_and_full_bulkhead_are_told_without_a_hop() -> None:
    """run_sync raises on the caller's own thread; nothing is submitted to the loop."""
    from tta_sync.facade import default_facade

    breaker: Any = CircuitBreakerPrimitive(lambda data: data)
    breaker.force_open()
    full: Any = BulkheadPrimitive(lambda data: data, 1)
    full._in_use = 1
    run_sync(step(lambda data: data), 1)
    before = default_facade().stats()["calls"]
    with pytest.raises(CircuitOpenError):
        run_sync(TimeoutPrimitive(breaker, 1.0), 1)
    with pytest.raises(BulkheadFullError):
        run_sync(full, 1)
    assert default_facade().stats()["calls"] == before


def test_call_cut_by_the_facades_deadline_counts_as_a_failure() -> None:
    """run_sync's timeout says why it cancels, so a breaker with no timeout in sight opens too."""
    begun: list[Any] = []

    async def hang(data: Any) -> None:
        begun.append(data)
        await asyncio.sleep(60)

    breaker: Any = CircuitBreakerPrimitive(hang, failure_threshold=1)
    for more in range(8):  # a machine that stalls may let the time pass before it begins
        with pytest.raises(DeadlineExceededError):
            run_sync(breaker, 1, timeout=0.05 * 2**more)
        if begun:
            break
    assert breaker.state == "open"


def test_interrupted_call_is_neutral_for_a_breaker() -> None:
    """A caller who is stopped by a signal says nothing about the dependency."""
    entered = threading.Event()

    async def hang(data: Any) -> None:
        entered.set()
        await asyncio.sleep(60)

    breaker: Any = CircuitBreakerPrimitive(hang, failure_threshold=1)

    class Alarm(BaseException):
        pass

    def ring(*args: Any) -> None:
        raise Alarm

    import signal

    before = signal.signal(signal.SIGALRM, ring)

    def when_entered() -> None:
        entered.wait(20)
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    watcher = threading.Thread(target=when_entered)
    watcher.start()
    try:
        with pytest.raises(Alarm):
            run_sync(breaker, 1, timeout=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        watcher.join()
    assert (breaker.state, breaker.failure_count) == ("closed", 0)


def test_retry_inside_a_deadline_gives_up_in_time() -> None:
    """A Retry-After beyond run_sync's timeout is not waited for: the step's own error comes out at once."""

    class Busy(Exception):
        retry_after = 30.0

    async def busy(data: Any) -> None:
        raise Busy

    began = time.monotonic()
    with pytest.raises(Busy):
        run_sync(RetryPrimitive(busy), 1, timeout=20)
    assert time.monotonic() - began < 10


def test_one_breaker_serves_the_managed_loop_and_a_tests_own() -> None:
    """asyncio.run in a test and run_sync share its count."""

    async def fail(data: Any) -> None:
        raise BlockingIOError

    breaker: Any = CircuitBreakerPrimitive(fail, failure_threshold=2)
    with pytest.raises(BlockingIOError):
        run_sync(breaker, 1)
    with pytest.raises(BlockingIOError):
        asyncio.run(breaker.execute(1))
    assert breaker.state == "open"


# ---- names, imports, forks --------------------------------------------


def test_every_name_of_the_package_can_be_imported_from_both_places() -> None:
    """`recovery` and `primitives` export the same objects; unknown names are AttributeErrors."""
    for name in recovery.__all__:
        assert getattr(recovery, name) is not None
        assert name in dir(recovery)
        if name.endswith("Primitive"):
            assert getattr(primitives, name) is getattr(recovery, name)
    with pytest.raises(AttributeError, match="Retries"):
        recovery.Retries


def test_package_loads_no_module_before_a_name_is_used() -> None:
    """`import tta_sync.primitives.recovery` costs nothing; dir() loads nothing either."""
    program = """
import sys, tta_sync.primitives.recovery as recovery
dir(recovery)
print([name for name in sys.modules if name.startswith("tta_sync.primitives.recovery.") or name == "tenacity"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_building_at_import_time_needs_no_loop() -> None:
    """All of them can be built in a module's body, in a thread without a loop."""
    built: list[Any] = []

    def build() -> None:
        call = step(lambda data: data, idempotent=True)
        built.extend(
            [
                stack(call),
                HedgePrimitive(call, 1.0),
                SagaPrimitive([(call, None)]),
                CompensationPrimitive(call, call),
                ChaosPrimitive(call),
            ]
        )

    thread = threading.Thread(target=build)
    thread.start()
    thread.join()
    assert len(built) == 5


def test_fork_hook_renews_every_living_state() -> None:
    """What the hook does in a child: fresh locks, no permits, no leases, no line."""
    call = step(lambda data: data, idempotent=True)
    shared: list[Any] = [
        CircuitBreakerPrimitive(call),
        BulkheadPrimitive(call, 1),
        RateLimitPrimitive(call, 1),
        HedgePrimitive(call, 1.0),
        ChaosPrimitive(call),
        recovery.RetryBudget(),
    ]
    locks = [each._lock for each in shared]
    shared[0]._leases[object()] = 1.0
    shared[1]._in_use = 1
    forks._in_child()
    assert all(each._lock is not lock for each, lock in zip(shared, locks, strict=True))
    assert not shared[0]._leases
    assert shared[1].in_use == 0
