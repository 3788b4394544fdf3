"""Threads that nobody waits for: counted, named, and never more of them than the pool has."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tta_sync import SyncFacade
from tta_sync.context import WorkflowContext
from tta_sync.events import CallOrphaned, Event
from tta_sync.exceptions import StepTimeoutError
from tta_sync.primitives.core.base import ThreadPrimitive, thread_step
from tta_sync.primitives.core.threads import Errand, abandoned
from tta_sync.primitives.recovery import TimeoutPrimitive


class Gate:
    """Holds whoever comes until it is opened."""

    def __init__(self) -> None:
        self.came: list[Any] = []
        self.open = threading.Event()

    def pass_through(self, data: Any) -> Any:
        self.came.append(data)
        assert self.open.wait(30)
        return data


@pytest.fixture
def gate(eventually: Callable[..., Any]) -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()
    eventually(lambda: not abandoned, what="the end of the abandoned threads")


@pytest.fixture
def facade() -> Iterator[SyncFacade]:
    facade = SyncFacade(pool_size=2)
    yield facade
    facade.shutdown(timeout=5.0)


def test_thread_that_nobody_waits_for_is_counted_and_named(
    gate: Gate,
    facade: SyncFacade,
    caplog: pytest.LogCaptureFixture,
    workflow_events: list[Event],
    eventually: Callable[..., Any],
) -> None:
    """The error says that it runs on; the facade counts it, and a line and an event name it, until it ends."""

    def write(data: Any) -> Any:
        return gate.pass_through(data)

    flow = TimeoutPrimitive(thread_step(write, name="write"), 0.05)
    with caplog.at_level(logging.WARNING, "tta_sync"):
        while not gate.came:  # on a slow machine it may be cut before its thread has begun
            with pytest.raises(StepTimeoutError, match="cannot be interrupted"):
                facade.run_sync(flow, 1)
    assert facade.stats().orphans == 1
    assert len(abandoned) == 1
    line = next(record.getMessage() for record in caplog.records if "orphan" in record.getMessage())
    assert line.startswith("write runs on as an orphan: its thread cannot be interrupted; it stands at")
    assert f"{__file__}:" in line
    told = [event for event in workflow_events if isinstance(event, CallOrphaned)]
    assert [(event.step, event.reason) for event in told] == [("write", "its thread cannot be interrupted")]
    gate.open.set()
    eventually(lambda: not abandoned, what="the end of the thread")


def test_abandoned_threads_are_never_more_than_the_pool_has(gate: Gate, facade: SyncFacade) -> None:
    """They keep their places: what waits for one is cut in time, is told why, and then never begins."""
    flow = TimeoutPrimitive(thread_step(gate.pass_through, name="write"), 0.05)
    before = threading.active_count()
    number = 0
    while len(gate.came) < 2 or number < 6:
        with pytest.raises(StepTimeoutError):
            facade.run_sync(flow, number)
        number += 1
    with pytest.raises(StepTimeoutError, match="threads held by steps that nobody waits for: 2"):
        facade.run_sync(flow, number)
    assert len(abandoned) == 2
    assert facade.stats().orphans == 2
    assert threading.active_count() <= before + 2 + 2  # the pool's, the loop's, and its watchdog's
    gate.open.set()
    assert facade.run_sync(thread_step(gate.pass_through), "later") == "later"
    assert len(gate.came) == 3


def test_step_that_ends_in_time_is_not_counted(facade: SyncFacade) -> None:
    """Neither a result nor an error leaves anything behind."""
    assert facade.run_sync(TimeoutPrimitive(thread_step(lambda data: data), 30.0), 1) == 1
    with pytest.raises(ZeroDivisionError):
        facade.run_sync(thread_step(lambda data: 1 / 0), 1)
    assert facade.stats().orphans == 0
    assert not abandoned


def test_thread_is_counted_under_a_bare_await_too(gate: Gate, eventually: Callable[..., Any]) -> None:
    """Without a facade there is nobody to count for, and the line is written all the same."""

    async def main() -> None:
        task = asyncio.ensure_future(thread_step(gate.pass_through).execute(1, WorkflowContext()))
        while not gate.came:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(abandoned) == 1
        gate.open.set()

    asyncio.run(main())


def test_errand_that_does_not_run_on_is_not_counted() -> None:
    """Neither one that never began, nor one that is over by then."""
    errand = Errand("write", lambda: None, None)
    errand.abandon()
    assert not abandoned
    errand()
    errand.abandon()
    assert not abandoned


def test_step_without_python_code_is_named_without_a_line(
    caplog: pytest.LogCaptureFixture, facade: SyncFacade, eventually: Callable[..., Any]
) -> None:
    """A builtin that blocks has no line to show."""
    lock = threading.Lock()
    lock.acquire()
    blocks: ThreadPrimitive[Any, Any] = thread_step(lock.acquire, name="lock")
    with caplog.at_level(logging.WARNING, "tta_sync"):
        while not abandoned:
            with pytest.raises(StepTimeoutError):
                facade.run_sync(TimeoutPrimitive(blocks, 0.05), True)
    lock.release()
    eventually(lambda: not abandoned, what="the end of the thread")
    assert "it stands at an unknown place" in caplog.text


@pytest.mark.parametrize("managed", [True, False])
def test_thread_step_fails_when_it_raises_stop_iteration(facade: SyncFacade, managed: bool) -> None:
    """A future refuses that error, so whoever waits for it would wait for ever: ``next()`` of nothing is enough."""
    nothing = thread_step(lambda data: next(iter(())))

    async def main() -> Any:
        return await asyncio.wait_for(nothing.execute(1, WorkflowContext()), 30.0)

    with pytest.raises(RuntimeError, match="a thread step raised StopIteration") as caught:
        facade.call_sync(main) if managed else asyncio.run(main())
    assert isinstance(caught.value.__cause__, StopIteration)


def test_step_on_a_thread_that_cannot_be_found_is_named_with_its_first_line(
    gate: Gate, facade: SyncFacade, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under gevent a thread's frames go by another number."""
    monkeypatch.setattr(sys, "_current_frames", dict)
    flow = TimeoutPrimitive(thread_step(gate.pass_through), 0.05)
    with caplog.at_level(logging.WARNING, "tta_sync"):
        while not gate.came:
            with pytest.raises(StepTimeoutError):
                facade.run_sync(flow, 1)
    first_line = Gate.pass_through.__code__.co_firstlineno
    assert f"it stands at {__file__}:{first_line}" in caplog.text
