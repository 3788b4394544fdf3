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
from tta_sync.runtime import native
from tta_sync.runtime.pool import DaemonPool


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


class Threads:
    """Starts threads for a pool, unless the system has none to give."""

    def __init__(self) -> None:
        self.refused = False

    def start(self, target: Callable[[], object], name: str) -> None:
        if self.refused:
            raise RuntimeError("can't start new thread")
        native.start_new_thread(target, ())


@pytest.fixture
def threads() -> Threads:
    return Threads()


@pytest.fixture
def pool(threads: Threads) -> Iterator[DaemonPool]:
    """A pool of two threads."""
    pool = DaemonPool(2, "pool", threads.start)
    yield pool
    pool.shutdown(wait=False)


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


def test_work_is_refused_and_never_runs_when_no_thread_can_be_started(
    gate: Gate, facade: SyncFacade, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is told, nothing runs later, and the pool has all its threads when the system has some again."""
    asked = []

    def refuse(*_: Any) -> None:
        asked.append(1)
        raise RuntimeError("can't start new thread")

    facade.call_sync(asyncio.sleep, 0)  # the loop has its own threads
    with monkeypatch.context() as patch:
        patch.setattr(native, "start_new_thread", refuse)
        for number in range(5):  # more than the pool may have
            with pytest.raises(RuntimeError, match="can't start new thread"):
                facade.call_sync(asyncio.to_thread, gate.pass_through, f"refused {number}", timeout=20.0)
    assert len(asked) == 5

    async def both() -> list[Any]:
        running = [asyncio.ensure_future(asyncio.to_thread(gate.pass_through, number)) for number in (1, 2)]
        while len(gate.came) < 2:
            await asyncio.sleep(0.001)
        gate.open.set()
        return await asyncio.gather(*running)

    assert facade.call_sync(both, timeout=20.0) == [1, 2]
    assert sorted(gate.came) == [1, 2]


def test_work_waits_for_a_thread_there_is_when_no_other_can_be_started(
    gate: Gate, threads: Threads, pool: DaemonPool, eventually: Callable[..., Any]
) -> None:
    """It is not refused, and runs when that thread is idle again."""
    first = pool.submit(gate.pass_through, 1)
    eventually(lambda: gate.came == [1], what="the first one's begin")
    threads.refused = True
    second = pool.submit(gate.pass_through, 2)
    third = pool.submit(gate.pass_through, 3)
    assert gate.came == [1]
    gate.open.set()
    assert [future.result(20) for future in (first, second, third)] == [1, 2, 3]


def test_threads_are_started_for_all_that_waits_when_the_system_has_some_again(
    gate: Gate, threads: Threads, pool: DaemonPool, eventually: Callable[..., Any]
) -> None:
    """The next to come makes up for those that could not be started, within the limit."""
    first = pool.submit(gate.pass_through, 1)
    threads.refused = True
    waits = pool.submit(threading.get_ident)
    threads.refused = False
    comes = pool.submit(threading.get_ident)
    assert waits.result(20) == comes.result(20)  # the second thread's; the first is held
    assert not first.done()
    held = pool.submit(gate.pass_through, 2)
    eventually(lambda: sorted(gate.came) == [1, 2], what="both at once")
    waits = pool.submit(threading.get_ident)
    gate.open.set()
    assert {first.result(20), held.result(20)} == {1, 2}
    waits.result(20)


def test_work_runs_when_the_system_has_but_one_thread_to_give(
    facade: SyncFacade, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool's thread is made in two steps, and the second may be refused when the first was not."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("tta_sync-pool"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for number in range(5):
        assert facade.call_sync(asyncio.to_thread, abs, -number, timeout=20.0) == number
