"""What the primitives cost on the success path: ``make bench ARGS=primitives``.

All figures are microseconds per call over a bare await of the same step: the lower quartile of many short rounds in
turn, so that a busy moment of the machine hits all contestants alike and drops out. Contestants that are not installed
(extra ``bench``) are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import Goal, Table, machine, pinned, write_page
from tta_sync import WorkflowContext, events, run_sync, step as as_step
from tta_sync.context import Deadline
from tta_sync.primitives import (
    BulkheadPrimitive,
    CachePrimitive,
    CircuitBreakerPrimitive,
    FallbackPrimitive,
    ParallelPrimitive,
    RateLimitPrimitive,
    RetryPrimitive,
    SequentialPrimitive,
    TimeoutPrimitive,
    WorkflowPrimitive,
)

PACKAGES = ("tta-sync", "tenacity", "stamina", "hyx", "pyresilience", "aiocache", "cashews")

Call = Callable[[], Awaitable[object]]
"""One call of a contestant."""


class Limit(Goal):
    """A goal in microseconds."""

    def __init__(self, who: str, most: float) -> None:
        super().__init__(who, most)

    def text(self, own: float, peer: float) -> str:
        return f"goal ≤ {self.ratio:g} µs{'' if own <= self.ratio else ' MISSED'}"


class Quick(WorkflowPrimitive[int, int]):
    async def execute(self, data: int, context: Any) -> int:
        return data


class Waiting(WorkflowPrimitive[int, int]):
    async def execute(self, data: int, context: Any) -> int:
        await asyncio.sleep(0)
        return data


async def quick(data: int, context: Any = None) -> int:
    return data


async def waiting(data: int, context: Any = None) -> int:
    await asyncio.sleep(0)
    return data


async def backup(*args: Any, **keywords: Any) -> int:
    return 0


CONTEXT = WorkflowContext()


def ours(primitive: WorkflowPrimitive[Any, Any], context: WorkflowContext = CONTEXT, data: Any = 1) -> Call:
    execute = primitive.execute
    return lambda: execute(data, context)


def on_loop(make: Callable[[], Callable[[int], Awaitable[object]]]) -> Call:
    """Build a contestant at its first call, as hyx's timeout wants a running loop for it."""
    made: list[Callable[[int], Awaitable[object]]] = []

    def call() -> Awaitable[object]:
        if not made:
            made.append(make())
        return made[0](1)

    return call


# ---- measuring -----------------------------------------------------------------------------------------------------


async def _time(call: Call, repeat: int) -> float:
    clock = time.perf_counter
    began = clock()
    for _ in range(repeat):
        await call()
    return (clock() - began) / repeat * 1e6


ROUNDS = 40


def quartile(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=4)[0]


async def _rounds(calls: dict[str, Call], repeat: dict[str, int]) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {who: [] for who in calls}
    for number in range(ROUNDS + 2):
        for who, call in calls.items():
            figure = await _time(call, repeat[who])
            if number >= 2:  # the first ones warm up
                samples[who].append(figure)
    return samples


def measure(calls: dict[str, Call], bare: Call, repeat: int) -> dict[str, float]:
    """Return what each call costs over *bare*, in microseconds."""

    async def run() -> dict[str, float]:
        contestants = {"": bare, **calls}
        # Each gets about the same time: a slow contestant needs fewer repetitions for as good a figure.
        once = {who: max(await _time(call, 20), 0.5) for who, call in contestants.items()}
        shares = {who: max(20, int(repeat / ROUNDS / each)) for who, each in once.items()}
        gc.collect()
        gc.disable()
        try:
            samples = await _rounds(contestants, shares)
        finally:
            gc.enable()
        base = quartile(samples.pop(""))
        return {who: max(0.001, quartile(found) - base) for who, found in samples.items()}

    return asyncio.run(run())


def table(
    name: str,
    title: str,
    calls: dict[str, Call | None],
    bare: Call,
    repeat: int,
    limits: dict[str, float],
    note: str = "",
) -> Table:
    made = Table(name, title, "µs", note=note)
    figures = measure({who: call for who, call in calls.items() if call is not None}, bare, repeat)
    for who, figure in figures.items():
        made.add(who, figure, *([Limit(who, limits[who])] if who in limits else []))
    return made


# ---- contestants ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def optional() -> Iterator[None]:
    """Go on without a contestant that is not installed."""
    try:
        yield
    except ImportError as missing:
        print(f"  (without {missing.name}: pip install 'tta-sync[bench]')", file=sys.stderr)


def retry(repeat: int) -> Table:
    calls: dict[str, Call | None] = {"tta_sync Retry": ours(RetryPrimitive(Quick()))}
    with optional():
        from hyx.retry import retry as hyx_retry

        hyx = hyx_retry(on=OSError, attempts=3)(quick)
        calls["hyx retry"] = lambda: hyx(1)
    with optional():
        import tenacity

        decorated = tenacity.retry(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_random_exponential())(quick)
        calls["tenacity retry"] = lambda: decorated(1)
    with optional():
        import stamina

        stamina_quick = stamina.retry(on=OSError, attempts=3)(quick)
        calls["stamina retry"] = lambda: stamina_quick(1)
    with optional():
        import pyresilience

        resilient = pyresilience.resilient(retry=pyresilience.RetryConfig(max_attempts=3))(quick)
        calls["pyresilience retry"] = lambda: resilient(1)
    return table(
        "primitives-retry", "Retry, first attempt succeeds", calls, lambda: quick(1), repeat, {"tta_sync Retry": 0.5}
    )


def timeout(repeat: int, step: Any, primitive: WorkflowPrimitive[Any, Any], what: str) -> Table:
    covered = WorkflowContext(deadline=Deadline.after(3600.0))

    async def with_timeout() -> None:
        async with asyncio.timeout(60.0):
            await step(1)

    calls: dict[str, Call | None] = {
        "tta_sync Timeout": ours(TimeoutPrimitive(primitive, 60.0)),
        "tta_sync Timeout, deadline earlier": ours(TimeoutPrimitive(primitive, 7200.0), covered),
        "asyncio.timeout": with_timeout,
        "asyncio.wait_for": lambda: asyncio.wait_for(step(1), 60.0),
    }
    with optional():
        from hyx.timeout import timeout as hyx_timeout

        calls["hyx timeout"] = on_loop(lambda: hyx_timeout(60.0)(step))
    with optional():
        import pyresilience

        resilient = pyresilience.resilient(timeout=pyresilience.TimeoutConfig(seconds=60.0))(step)
        calls["pyresilience timeout"] = lambda: resilient(1)
    limits = {"tta_sync Timeout": 3.5}
    if step is quick:
        limits["tta_sync Timeout, deadline earlier"] = 0.5
    return table(f"primitives-timeout-{what}", f"Timeout, a step that {what}", calls, lambda: step(1), repeat, limits)


def nested_timeout(repeat: int) -> Table:
    """Measure, from inside, what a limit costs where an earlier one, or run_sync, will cut the call."""

    async def inside(data: Any, context: WorkflowContext) -> float:
        inner = TimeoutPrimitive(Quick(), 7200.0).execute
        calls: dict[str, Call] = {"inner": lambda: inner(1, context), "bare": lambda: quick(1)}
        samples = await _rounds(calls, dict.fromkeys(calls, repeat // ROUNDS))
        return max(0.001, quartile(samples["inner"]) - quartile(samples["bare"]))

    nested = Table("primitives-timeout-nested", "Timeout where something earlier cuts the call", "µs")
    for who, cost in {
        "tta_sync Timeout inside an earlier one": asyncio.run(
            TimeoutPrimitive(inside, 3600.0).execute(1, WorkflowContext())
        ),
        "tta_sync Timeout under run_sync": run_sync(as_step(inside), 1, timeout=3600.0),
    }.items():
        nested.add(who, cost, Limit(who, 0.5))
    return nested


def breaker(repeat: int) -> Table:
    calls: dict[str, Call | None] = {
        "tta_sync CircuitBreaker": ours(CircuitBreakerPrimitive(Quick())),
        "tta_sync CircuitBreaker, window of 100 calls": ours(CircuitBreakerPrimitive(Quick(), window=100)),
        "tta_sync CircuitBreaker, window of 30 s": ours(CircuitBreakerPrimitive(Quick(), window=30.0)),
    }
    with optional():
        from hyx.circuitbreaker import consecutive_breaker

        hyx = consecutive_breaker()(quick)
        calls["hyx breaker"] = lambda: hyx(1)
    with optional():
        import pyresilience

        resilient = pyresilience.resilient(circuit_breaker=pyresilience.CircuitBreakerConfig())(quick)
        calls["pyresilience breaker"] = lambda: resilient(1)
    limits = {who: 0.8 for who in calls if who.startswith("tta_sync")}
    return table("primitives-breaker", "Circuit breaker, closed", calls, lambda: quick(1), repeat, limits)


def fallback(repeat: int) -> Table:
    calls: dict[str, Call | None] = {"tta_sync Fallback": ours(FallbackPrimitive(Quick(), Quick()))}
    with optional():
        from hyx.fallback import fallback as hyx_fallback

        hyx = hyx_fallback(backup)(quick)
        calls["hyx fallback"] = lambda: hyx(1)
    with optional():
        import pyresilience

        resilient = pyresilience.resilient(fallback=pyresilience.FallbackConfig(handler=backup))(quick)
        calls["pyresilience fallback"] = lambda: resilient(1)
    return table(
        "primitives-fallback", "Fallback, primary answers", calls, lambda: quick(1), repeat, {"tta_sync Fallback": 0.4}
    )


def bulkhead(repeat: int) -> Table:
    async def with_semaphore() -> None:
        async with semaphore:
            await quick(1)

    semaphore = asyncio.Semaphore(10)
    calls: dict[str, Call | None] = {
        "tta_sync Bulkhead": ours(BulkheadPrimitive(Quick(), 10)),
        "asyncio.Semaphore (one loop only)": with_semaphore,
    }
    with optional():
        from hyx.bulkhead import bulkhead as hyx_bulkhead

        hyx = hyx_bulkhead(10, 10)(quick)
        calls["hyx bulkhead"] = lambda: hyx(1)
    with optional():
        import pyresilience

        resilient = pyresilience.resilient(bulkhead=pyresilience.BulkheadConfig(max_concurrent=10))(quick)
        calls["pyresilience bulkhead"] = lambda: resilient(1)
    return table(
        "primitives-bulkhead", "Bulkhead, not full", calls, lambda: quick(1), repeat, {"tta_sync Bulkhead": 1.0}
    )


def rate_limit(repeat: int) -> Table:
    calls: dict[str, Call | None] = {"tta_sync RateLimit": ours(RateLimitPrimitive(Quick(), 1e9, 1_000_000))}
    with optional():
        from hyx.ratelimit import api as hyx_ratelimit

        calls["hyx token bucket"] = on_loop(lambda: hyx_ratelimit.tokenbucket(1e9, 1, 1_000_000)(quick))
    with optional():
        import pyresilience

        config = pyresilience.RateLimiterConfig(max_calls=1_000_000_000)
        resilient = pyresilience.resilient(rate_limiter=config)(quick)
        calls["pyresilience rate limiter"] = lambda: resilient(1)
    return table(
        "primitives-rate-limit", "Rate limit, not reached", calls, lambda: quick(1), repeat, {"tta_sync RateLimit": 0.3}
    )


def cache(repeat: int) -> list[Table]:
    small, large = {"answer": 42, "ok": True}, {f"key {number}": "x" * 10 for number in range(45)}
    tables = []
    calls: dict[str, Call | None] = {}
    for name, value in (("≤ 100 bytes", small), ("1 KB", large)):

        async def load(data: Any, value: Any = value) -> Any:
            return value

        primitive = CachePrimitive(load, ttl=3600, namespace=name)
        asyncio.run(primitive.execute("key", CONTEXT))
        calls[f"tta_sync Cache, {name}"] = ours(primitive, data="key")
        peeked = Table(f"primitives-peek-{len(value)}", f"Cache hit in memory from sync code, {name}", "µs")
        began = time.perf_counter()
        for _ in range(repeat):
            primitive.peek("key", CONTEXT)
        cost = (time.perf_counter() - began) / repeat * 1e6
        peeked.add("tta_sync peek", cost, Limit("tta_sync peek", 2.0 if value is small else 10.0))
        tables.append(peeked)
    with optional():
        from aiocache import Cache

        memory = Cache(Cache.MEMORY)
        asyncio.run(memory.set("key", small))
        calls["aiocache get"] = lambda: memory.get("key")
    with optional():
        from cashews import Cache as Cashews

        cashews = Cashews()
        cashews.setup("mem://?check_interval=0")

        @cashews(ttl="1h")
        async def cached(data: str) -> Any:
            return small

        asyncio.run(cached("key"))
        calls["cashews decorator"] = lambda: cached("key")
    hit = table(
        "primitives-cache",
        "Cache hit in memory, on the loop",
        calls,
        lambda: quick(1),
        repeat,
        {"tta_sync Cache, ≤ 100 bytes": 2.0},
    )
    return [hit, *tables]


def sequence(repeat: int) -> Table:
    def plain(data: int) -> int:
        return data

    calls: dict[str, Call | None] = {
        "tta_sync Sequential of 3": ours(SequentialPrimitive([Quick(), Quick(), Quick()])),
        "tta_sync Sequential of 3 async functions": ours(SequentialPrimitive([quick, quick, quick])),
        "tta_sync Sequential of 3 plain functions": ours(SequentialPrimitive([plain, plain, plain])),
    }

    async def three() -> int:
        return await quick(await quick(await quick(1)))

    return table(
        "primitives-sequential",
        "Sequential of 3, over three bare awaits",
        calls,
        three,
        repeat,
        dict.fromkeys(calls, 1.5),
    )


def parallel(repeat: int) -> Table:
    async def nothing() -> None:
        pass

    calls: dict[str, Call | None] = {
        "bare gather of 3": lambda: asyncio.gather(quick(1), quick(1), quick(1)),
        "tta_sync Parallel of 3": ours(ParallelPrimitive([Quick(), Quick(), Quick()])),
    }
    made = table("primitives-parallel", "Parallel of 3", calls, nothing, repeat, {})
    made.goals["tta_sync Parallel of 3"] = [Goal("bare gather of 3", 1.2)]
    return made


def stacked(repeat: int, step: Any, primitive: WorkflowPrimitive[Any, Any], what: str) -> Table:
    workflow = FallbackPrimitive(RetryPrimitive(CircuitBreakerPrimitive(TimeoutPrimitive(primitive, 60.0))), Quick())
    calls: dict[str, Call | None] = {"tta_sync stack": ours(workflow)}
    with optional():
        import pyresilience

        resilient = pyresilience.resilient(
            retry=pyresilience.RetryConfig(),
            timeout=pyresilience.TimeoutConfig(seconds=60.0),
            circuit_breaker=pyresilience.CircuitBreakerConfig(),
            fallback=pyresilience.FallbackConfig(handler=backup),
        )(step)
        calls["pyresilience stack"] = lambda: resilient(1)
    with optional():
        from hyx.circuitbreaker import consecutive_breaker
        from hyx.fallback import fallback as hyx_fallback
        from hyx.retry import retry as hyx_retry
        from hyx.timeout import timeout as hyx_timeout

        calls["hyx stack"] = on_loop(
            lambda: hyx_fallback(backup)(hyx_retry(on=OSError)(consecutive_breaker()(hyx_timeout(60.0)(step))))
        )
    title = f"Retry + Timeout + CircuitBreaker + Fallback, a step that {what}"
    return table(f"primitives-stack-{what}", title, calls, lambda: step(1), repeat, {"tta_sync stack": 5.5})


def hooks(repeat: int) -> Table:
    """What an event costs where nobody listens: one attribute test."""
    made = Table("primitives-events", "An event that nobody hears", "µs")
    bus = events.bus

    def emitting() -> None:
        for _ in range(repeat):
            if bus.emit is not None:
                raise AssertionError

    def idle() -> None:
        for _ in range(repeat):
            pass

    def seconds(run: Callable[[], None]) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    cost = statistics.median(seconds(emitting) for _ in range(5)) - statistics.median(seconds(idle) for _ in range(5))
    made.add("tta_sync event", max(0.001, cost / repeat * 1e6), Limit("tta_sync event", 0.05))
    return made


def main(arguments: list[str]) -> list[Table]:
    parser = argparse.ArgumentParser(prog="make bench ARGS=primitives", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the repetitions")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks-primitives.md and its pictures")
    options = parser.parse_args(arguments)
    repeat = 20_000 if options.quick else 200_000
    tables: list[Table] = []

    def done(*made: Table) -> None:
        for each in made:
            each.show()
            tables.append(each)

    with pinned():
        done(retry(repeat))
        done(timeout(repeat, quick, Quick(), "answers"), timeout(repeat, waiting, Waiting(), "waits"))
        done(nested_timeout(repeat))
        done(breaker(repeat), fallback(repeat), bulkhead(repeat), rate_limit(repeat))
        done(*cache(repeat))
        done(sequence(repeat), parallel(repeat))
        done(stacked(repeat, quick, Quick(), "answers"), stacked(repeat, waiting, Waiting(), "waits"))
        done(hooks(repeat))
    versions = machine(*PACKAGES)
    if options.json:
        figures = {each.name: {"title": each.title, "figures": each.figures, "goals": _goals(each)} for each in tables}
        Path(options.json).write_text(json.dumps({"measured_on": versions, "tables": figures}, indent=2) + "\n")
    if options.write:
        write_page(
            "benchmarks-primitives",
            "Benchmarks of the primitives",
            "Microseconds per call on the success path, over a bare await of the same step. All figures of one table "
            "come from one run, pinned to one core; compare within a table only. "
            "`make bench ARGS='primitives --write'` makes this page.",
            tables,
            versions,
        )
    return tables


def _goals(table: Table) -> dict[str, list[dict[str, Any]]]:
    return {who: [asdict(goal) for goal in goals] for who, goals in table.goals.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
