"""Code that blocks the loop is reported while it does; a loop that only waits for its turn is not."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from tta_sync import events
from tta_sync.facade import SyncFacade
from tta_sync.runtime import native, watchdog


@pytest.fixture
def stalls() -> Iterator[list[tuple[float, events.LoopStalled]]]:
    """The stalls that were reported, each with the moment at which it was."""
    seen: list[tuple[float, events.LoopStalled]] = []

    def hook(event: events.Event) -> None:
        if isinstance(event, events.LoopStalled):
            seen.append((time.monotonic(), event))

    unsubscribe = events.bus.subscribe(hook)
    yield seen
    unsubscribe()


def spin(seconds: float) -> None:
    """Use *seconds* of processor time: what computes beside others that do is not seen by the clock on the wall."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(100))


@pytest.mark.parametrize("block", [time.sleep, spin], ids=["sleeps", "computes"])
def test_blocking_call_is_reported_while_it_lasts(
    facade: SyncFacade,
    stalls: list[tuple[float, events.LoopStalled]],
    caplog: pytest.LogCaptureFixture,
    in_thread: Callable[..., Future[Any]],
    eventually: Callable[..., Any],
    block: Callable[[float], None],
) -> None:
    """The report names task, file, line, function and how many wait, and comes before the block has ended."""
    marks: dict[str, float] = {}

    async def blocker() -> None:
        await asyncio.sleep(0.05)
        marks["begin"] = time.monotonic()
        block(1.0)
        marks["end"] = time.monotonic()

    async def wait() -> None:
        while "end" not in marks:
            await asyncio.sleep(0.01)

    with caplog.at_level(logging.WARNING, "tta_sync"):
        waiting = in_thread(facade.call_sync, wait)
        eventually(facade.in_flight)
        facade.call_sync(blocker)
        waiting.result(10)
    (when, stall), *more = stalls
    assert not more
    assert marks["begin"] < when < marks["end"]
    assert "blocker" in stall.step
    assert stall.where.startswith(f"{__file__}:")
    assert stall.waiting == 2
    assert 0 < stall.seconds < marks["end"] - marks["begin"] + watchdog.INTERVAL
    (record,) = [record for record in caplog.records if "blocked" in record.message]
    assert stall.where in record.message
    assert "blocker" in record.message
    line = int(stall.where.removeprefix(f"{__file__}:").split()[0])
    with open(__file__) as source:
        assert "block(1.0)" in source.readlines()[line - 1] or "spin" in stall.where


def test_computing_is_reported_when_other_threads_have_called_before(
    facade: SyncFacade, stalls: list[tuple[float, events.LoopStalled]], in_thread: Callable[..., Future[Any]]
) -> None:
    """Processor time is that of the thread which turns the loop now, whoever has turned it before."""
    in_thread(facade.call_sync, asyncio.sleep, 0.2).result(10)

    async def blocker() -> None:
        spin(0.6)

    facade.call_sync(blocker)
    assert len(stalls) == 1


def test_report_names_the_users_line_when_the_block_is_deep_in_a_library(
    facade: SyncFacade, stalls: list[tuple[float, events.LoopStalled]]
) -> None:
    """The innermost frame of the user's own code is named, not the library's."""

    async def blocker() -> None:
        threading.Event().wait(1.0)

    facade.call_sync(blocker)
    assert [stall.where.split(" in ")[1] for _, stall in stalls] == [
        "test_report_names_the_users_line_when_the_block_is_deep_in_a_library.<locals>.blocker"
    ]


def test_nothing_is_reported_when_a_thread_beside_computes(
    facade: SyncFacade, stalls: list[tuple[float, events.LoopStalled]], repeats: Callable[[int, int], int]
) -> None:
    """A CPU-bound thread that takes the interpreter's lock away is not the loop's fault."""
    stop = threading.Event()

    def hog() -> None:
        while not stop.is_set():
            sum(range(100))

    async def busy_a_little() -> None:
        for _ in range(20):
            await asyncio.sleep(0.001)

    thread = threading.Thread(target=hog)
    thread.start()
    try:
        end = time.monotonic() + repeats(2, 1)
        while time.monotonic() < end:
            facade.call_sync(busy_a_little)
    finally:
        stop.set()
        thread.join()
    assert stalls == []


def test_blocking_is_reported_after_the_loops_answer_was_lost(
    facade: SyncFacade,
    stalls: list[tuple[float, events.LoopStalled]],
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., Any],
) -> None:
    """What is thrown into the loop's thread may strike the answer itself: the watchdog asks again."""

    async def blocker() -> None:
        time.sleep(0.5)

    async def nothing() -> None:
        await asyncio.sleep(0)

    facade.call_sync(nothing)
    assert facade._loop is not None
    real, lost = watchdog.Watchdog._answer, []

    def answer(self: watchdog.Watchdog) -> None:
        if not lost and self is dog:
            lost.append(1)
        else:
            real(self)

    dog = facade._loop.watchdog
    monkeypatch.setattr(watchdog.Watchdog, "_answer", answer)

    async def wait() -> None:
        while not lost or dog.lag > 0.2 or not dog._answered:
            await asyncio.sleep(0.01)

    facade.call_sync(wait, timeout=20)
    facade.call_sync(blocker)
    assert len(stalls) == 1


def test_nothing_is_reported_when_calls_only_wait(
    facade: SyncFacade, stalls: list[tuple[float, events.LoopStalled]]
) -> None:
    """A loop that sleeps in its selector is well."""
    facade.call_sync(asyncio.sleep, 0.6)
    assert stalls == []
    assert facade.stats().loop_lag < 5


def test_watchdog_parks_when_nothing_happens_and_wakes_with_the_next_call(
    facade: SyncFacade, stalls: list[tuple[float, events.LoopStalled]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle process is not woken every 50 ms; the watch goes on with the next call."""
    monkeypatch.setattr(watchdog, "QUIET_ROUNDS", 4)  # a fifth of a second

    async def blocker() -> None:
        time.sleep(1.0)  # on purpose: it blocks the loop

    facade.call_sync(asyncio.sleep, 0)
    loop = facade._loop
    assert loop is not None
    give_up = time.monotonic() + 20
    while not loop.watchdog.parked:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    facade.call_sync(blocker)
    assert len(stalls) == 1


def test_watching_costs_less_than_a_hundredth_of_a_core(facade: SyncFacade, repeats: Callable[[int, int], int]) -> None:
    """A second or two with a call in flight use next to no processor time."""
    facade.call_sync(asyncio.sleep, 0)
    before = time.process_time()
    facade.call_sync(asyncio.sleep, repeats(2, 1))
    assert time.process_time() - before < 0.1  # 1 % would be 0.02; a loaded machine gets slack


def test_process_goes_on_when_the_collector_meets_thread_locals_while_frames_are_looked_at(
    run_program: Callable[..., Any],
) -> None:
    """CPython locks its list of threads to show their frames: no collection may free a thread-local meanwhile."""
    ended = run_program(
        """
        from tta_sync.runtime.frames import running_frame
        class Holder: pass
        gc.set_threshold(1)
        for _ in range(300):
            holder = Holder()
            holder.local, holder.me = threading.local(), holder
            holder.local.value = 1
            del holder
            assert running_frame(threading.get_ident()) is not None
        assert gc.isenabled()
        gc.disable()
        running_frame(threading.get_ident())
        assert not gc.isenabled()
        say("looked")
        """
    )
    assert ended.said == ["looked"]


@pytest.mark.parametrize("who", ["the watchdog", "a step's thread"])
def test_collector_rests_when_another_threads_frames_are_looked_at(run_program: Callable[..., Any], who: str) -> None:
    """A finalizer may let that thread run on while CPython makes an object of one of its frames: of memory, then."""
    ended = run_program(
        f"""
        from tta_sync.primitives.core.threads import Errand
        from tta_sync.runtime.frames import running_frame, user_frame

        class Litter:
            def __del__(self):
                frame = sys._getframe(1)
                seen.append(frame.f_lineno if frame.f_code in looks else None)
                if looking:
                    leave()

        def leave():
            litter = Litter()
            litter.me = litter

        # As deep in Python's own code as its file's name says: none of these frames is the user's.
        code = "def go(depth, wait): go(depth - 1, wait) if depth else wait()"
        exec(compile(code, threading.__file__, "exec"), deep := {{}})
        gate = threading.Barrier(2, timeout=20)
        thread = threading.Thread(target=deep["go"], args=(200, gate.wait))
        thread.start()
        until(lambda: gate.n_waiting)
        errand = Errand("leave", leave, leave.__code__)
        errand._thread = thread.ident
        looks, looking, seen = (user_frame.__code__, Errand._where.__code__), True, []
        leave()
        gc.set_threshold(1)
        if {who!r} == "the watchdog":
            running_frame(thread.ident, user_frame)
        else:
            errand._where()
        assert gc.isenabled()
        gc.set_threshold(700)
        looking = False
        gc.collect()
        assert seen
        gate.wait()
        thread.join()
        say("collected in lines", [line for line in seen if line])
        """
    )
    assert ended.said == ["collected in lines []"]


def test_calls_are_made_without_it_when_its_thread_cannot_be_started(
    make_facade: Callable[..., SyncFacade], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may have no thread to give, for a moment: better a loop that nobody watches than none."""
    start = native.start_new_thread

    def reluctant(function: Any, arguments: tuple[Any, ...], *rest: Any) -> int:
        if "tta_sync-watchdog" in arguments:
            raise RuntimeError("can't start new thread")
        return start(function, arguments, *rest)

    monkeypatch.setattr(native, "start_new_thread", reluctant)
    facade = make_facade()
    assert facade.call_sync(asyncio.sleep, 0, 42, timeout=20) == 42
