"""Map against a naive account of who may run when, and wrong twins that this account finds out."""

from __future__ import annotations

import asyncio
import heapq
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from tta_sync.context import WorkflowContext
from tta_sync.primitives.core import branches, mapping
from tta_sync.primitives.core.mapping import MapPrimitive
from tta_sync.testing import FakeClock

# How long each item takes, in quarters of a second so that sums are exact, and whether it then fails.
ITEMS = st.lists(st.tuples(st.integers(0, 8).map(lambda quarters: quarters / 4), st.booleans()), max_size=12)


def account(items: list[tuple[float, bool]], limit: int) -> list[tuple[float, float]]:
    """When each item begins and ends, if the next one takes a place as soon as one is free."""
    places = [0.0] * limit
    times = []
    for duration, _ in items:
        begin = heapq.heappop(places)
        times.append((begin, begin + duration))
        heapq.heappush(places, begin + duration)
    return times


def observe(items: list[tuple[float, bool]], limit: int, on_error: Any) -> tuple[Any, float, dict[int, Any], int]:
    """Run a map over the items; return result or error, the time it took, when each item ran, and how many at once."""
    context = WorkflowContext(clock=FakeClock())
    ran: dict[int, Any] = {}
    running = peak = 0

    async def work(number: int, context: WorkflowContext) -> int:
        nonlocal running, peak
        begin = context.clock.monotonic()
        running += 1
        peak = max(peak, running)
        try:
            await context.clock.sleep(items[number][0])
        finally:
            running -= 1
        ran[number] = begin, context.clock.monotonic()
        if items[number][1]:
            raise ValueError(number)
        return number

    flow = MapPrimitive(work, max_concurrency=limit, on_error=on_error)
    try:
        result: Any = asyncio.run(flow.execute(range(len(items)), context))
    except ValueError as error:
        result = error
    return result, context.clock.monotonic(), ran, peak


def check_collect(items: list[tuple[float, bool]], limit: int) -> None:
    result, took, ran, peak = observe(items, limit, "collect")
    times = account(items, limit)
    assert [value.args[0] if failed else value for value, (_, failed) in zip(result, items, strict=True)] == list(
        range(len(items))
    )
    assert [isinstance(value, ValueError) for value in result] == [failed for _, failed in items]
    assert [ran[number] for number in range(len(items))] == times
    assert took == max((end for _, end in times), default=0.0)
    assert peak <= limit


def check_raise(items: list[tuple[float, bool]], limit: int) -> None:
    result, took, ran, peak = observe(items, limit, "raise")
    times = account(items, limit)
    ends = [end for (_, end), (_, failed) in zip(times, items, strict=True) if failed]
    if not ends:
        assert result == list(range(len(items)))
        return
    assert isinstance(result, ValueError)
    assert took == min(ends)
    assert times[result.args[0]][1] == min(ends)
    assert all(end <= took for _, end in ran.values())
    assert peak <= limit


@settings(max_examples=60, deadline=None)
@given(items=ITEMS, limit=st.integers(1, 4))
def test_items_run_as_a_naive_account_has_them(items: list[tuple[float, bool]], limit: int) -> None:
    """Each item begins and ends when the account says; no place stays empty, and none is taken twice."""
    check_collect(items, limit)


@settings(max_examples=60, deadline=None)
@given(items=ITEMS, limit=st.integers(1, 4))
def test_first_failure_ends_the_map_at_its_own_moment(items: list[tuple[float, bool]], limit: int) -> None:
    """The error is that of the item which fails first, at its moment; nothing ends after it."""
    check_raise(items, limit)


def without_limit(calls: Any, total: int, limit: int, *rest: Any) -> Any:
    return branches.run_windowed(calls, total, total, *rest)


def one_too_few(calls: Any, total: int, limit: int, *rest: Any) -> Any:
    return branches.run_windowed(calls, total, max(1, limit - 1), *rest)


async def without_cancelling(calls: Any, total: int, limit: int, label: Any, collect: bool, progress: Any) -> Any:
    results = await branches.run_windowed(calls, total, limit, label, True, progress)
    errors = [] if collect else [result for result in results if isinstance(result, Exception)]
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("twin", [without_limit, one_too_few, without_cancelling])
def test_wrong_twin_is_found_out(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that ignores its limit, wastes a place, or lets the others run on does not pass."""
    monkeypatch.setattr(mapping, "run_windowed", twin)
    items = [(1.0, False), (0.25, True), (0.5, False), (2.0, False)]

    def check() -> None:
        check_collect(items, 2)
        check_raise(items, 2)

    with pytest.raises(AssertionError):
        check()
