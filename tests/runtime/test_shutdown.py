"""shutdown(): in order, within its time, whatever runs."""

import asyncio
import contextvars
import gc
import os
import threading
import time

import pytest

from tta_sync import run_on_caller, step, thread_step
from tta_sync.exceptions import LoopUnavailableError
from tta_sync.facade import SyncFacade
from tta_sync.runtime.loop import ManagedLoop

MARGIN = 1.0  # seconds that shutdown() may take beyond timeout + grace
NOISE = 2.0  # what a busy machine may add


async def answer():
    return 42


def timed(function, *args):
    begun = time.monotonic()
    function(*args)
    return time.monotonic() - begun


def test_calls_raise_loop_unavailable_when_made_after_shutdown(facade, works):
    """After shutdown every entry is refused, by name, and nothing starts again."""
    works(facade)
    facade.shutdown()
    for _ in range(2):
        with pytest.raises(LoopUnavailableError, match="shut down"):
            facade.call_sync(answer)
        with pytest.raises(LoopUnavailableError):
            facade.run_sync(step(lambda data: data), 1)
    facade.shutdown()  # again is no error


def test_calls_raise_loop_unavailable_when_shut_down_before_the_first_one(facade):
    """A facade that never ran and was shut down does not start any more."""
    facade.shutdown()
    with pytest.raises(LoopUnavailableError):
        facade.call_sync(answer)


@pytest.mark.parametrize("ending", ["shut down", "dropped"])
def test_threads_and_descriptors_are_gone_when_facades_come_and_go(options, threads_end, eventually, ending):
    """Thirty facades made, used and shut down, or just dropped, leave no thread and no descriptor."""

    def life():
        facade = SyncFacade(**options)
        facade.call_sync(answer)
        facade.run_sync(thread_step(lambda data: data), 1)
        if ending == "shut down":
            facade.shutdown()

    life()
    threads_end()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        life()
    threads_end()
    gc.collect()
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 2, within=5, what="the return of the descriptors")


def test_call_in_flight_gets_its_result_when_it_ends_in_time(facade, in_thread, eventually):
    """shutdown() waits for work in flight: a call that ends within the timeout returns its result."""
    release = threading.Event()

    async def work():
        while not release.is_set():
            await asyncio.sleep(0.002)
        return "result"

    calls = [in_thread(facade.call_sync, work) for _ in range(4)]
    eventually(lambda: len(facade.in_flight()) == 4)
    closing = in_thread(facade.shutdown, 30.0)
    eventually(lambda: refused(facade), what="the refusal of new calls")
    release.set()
    assert [call.result(20) for call in calls] == ["result"] * 4
    closing.result(20)


def refused(facade):
    try:
        facade.call_sync(answer)
    except LoopUnavailableError:
        return True
    return False


def test_call_in_flight_is_cancelled_and_cleaned_up_when_the_time_is_over(facade, in_thread, threads_end, eventually):
    """What does not end in time is cancelled; it cleans up; its caller gets LoopUnavailableError."""
    cleaned = []

    async def work():
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.05)
            cleaned.append(1)

    calls = [in_thread(facade.call_sync, work) for _ in range(4)]
    eventually(lambda: [record.state for record in facade.in_flight()] == ["running"] * 4)
    assert timed(facade.shutdown, 0.1) < 0.1 + 1.0 + MARGIN + NOISE
    assert cleaned == [1] * 4
    for call in calls:
        with pytest.raises(LoopUnavailableError, match="shut down"):
            call.result(20)
    threads_end()


def test_shutdown_returns_in_time_when_the_cancel_is_swallowed(make_facade, in_thread, threads_end, eventually):
    """A coroutine that swallows its cancellation holds shutdown() no longer than timeout + grace + 1 s."""
    facade = make_facade(grace=0.3)
    release = threading.Event()

    async def stubborn():
        while not release.is_set():
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                pass

    call = in_thread(facade.call_sync, stubborn)
    eventually(lambda: [record.state for record in facade.in_flight()] == ["running"])
    assert timed(facade.shutdown, 0.2) < 0.2 + 0.3 + MARGIN + NOISE
    with pytest.raises(LoopUnavailableError):
        call.result(20)
    release.set()
    threads_end()


def test_shutdown_returns_in_time_when_the_loop_is_blocked(
    make_facade, callers_drive, in_thread, threads_end, eventually
):
    """A blocked loop holds shutdown() no longer either; its callers are told; it ends when it comes free."""
    facade = make_facade(grace=0.2)
    inside, release = threading.Event(), threading.Event()

    async def blocks():
        inside.set()
        release.wait(20)

    blocking = in_thread(facade.call_sync, blocks)
    assert inside.wait(20)
    behind = in_thread(facade.call_sync, answer)
    eventually(lambda: len(facade.in_flight()) == 2)
    assert timed(facade.shutdown, 0.1) < 0.1 + 0.2 + MARGIN + NOISE
    with pytest.raises(LoopUnavailableError):
        behind.result(20)
    with pytest.raises(LoopUnavailableError):
        facade.call_sync(answer)
    if callers_drive:
        release.set()  # it blocks its own caller, who hears of nothing before, but then may have its result
        assert isinstance(blocking.exception(20), (LoopUnavailableError, type(None)))
    else:
        with pytest.raises(LoopUnavailableError):
            blocking.result(20)
    release.set()
    threads_end()
    del blocking, behind
    gc.collect()  # a coroutine that was never awaited would be found here


def test_left_over_tasks_are_cancelled_and_cleaned_up_when_shut_down(facade):
    """Tasks that outlive their calls run on, and are cancelled at shutdown, with time to clean up."""
    cleaned, tasks = [], set()

    async def background():
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.02)
            cleaned.append(await asyncio.to_thread(threading.get_ident))

    async def leave():
        tasks.update(asyncio.create_task(background()) for _ in range(3))

    facade.call_sync(leave)
    facade.call_sync(answer)
    assert cleaned == []
    facade.shutdown(0.0)
    assert len(cleaned) == 3


def test_all_ends_when_a_task_cancels_all_others_at_shutdown(facade, threads_end):
    """Code that answers its cancellation by cancelling all tasks does not keep resources open and the loop alive."""
    from contextlib import asynccontextmanager

    log, tasks = [], set()

    @asynccontextmanager
    async def client():
        try:
            yield "client"
        finally:
            log.append("closed")

    shared = facade.resource(client)

    async def background():
        try:
            await asyncio.sleep(3600)
        finally:
            for task in asyncio.all_tasks():
                task.cancel()

    async def leave():
        await shared
        tasks.add(asyncio.create_task(background()))

    facade.call_sync(leave)
    facade.shutdown(0.0)
    assert log == ["closed"]
    threads_end()


@pytest.mark.parametrize("slow", ["_new_local", "start"])
def test_nothing_is_left_when_shut_down_during_the_first_call(make_facade, in_thread, threads_end, monkeypatch, slow):
    """A shutdown that comes while another thread makes or starts the loop: that call is refused, no thread is left."""
    facade = make_facade()
    entered, go_on = threading.Event(), threading.Event()
    real = getattr(ManagedLoop, slow)

    def slowly(self):
        entered.set()
        go_on.wait(20)
        return real(self)

    monkeypatch.setattr(ManagedLoop, slow, slowly)
    first = in_thread(facade.call_sync, answer)
    assert entered.wait(20)
    facade.shutdown(0.0)
    go_on.set()
    assert isinstance(first.exception(20), LoopUnavailableError)
    threads_end()


def test_shutdown_returns_when_two_threads_ask_for_it_at_once(facade, in_thread, eventually):
    """Several threads that shut down at once all return in time, and resources are closed once, to their end."""
    from contextlib import asynccontextmanager

    log = []

    @asynccontextmanager
    async def client():
        yield "client"
        await asyncio.sleep(0.1)
        log.append("closed")

    shared = facade.resource(client)

    async def use():
        return await shared

    async def work():
        await asyncio.sleep(3600)

    facade.call_sync(use)
    call = in_thread(facade.call_sync, work)
    eventually(lambda: len(facade.in_flight()) == 1)
    start = threading.Barrier(4)

    def shut():
        start.wait()
        return timed(facade.shutdown, 0.1)

    assert max(future.result(20) for future in [in_thread(shut) for _ in range(4)]) < 0.1 + 1.0 + MARGIN + NOISE
    assert log == ["closed"]
    with pytest.raises(LoopUnavailableError):
        call.result(20)


def test_first_shutdown_goes_on_when_a_second_one_comes_in_the_middle(facade, in_thread):
    """A second shutdown() while the first one is closing a resource does not cut that short."""
    from contextlib import asynccontextmanager

    log, begun = [], threading.Event()

    @asynccontextmanager
    async def client():
        yield "client"
        begun.set()
        await asyncio.sleep(0.2)
        log.append("closed")

    shared = facade.resource(client)

    async def use():
        return await shared

    facade.call_sync(use)
    first = in_thread(facade.shutdown, 0.0)
    assert begun.wait(20)
    facade.shutdown(0.0)
    first.result(20)
    assert log == ["closed"]


def test_shutdown_is_refused_when_called_on_the_loop_thread(facade, works):
    """shutdown() on the loop's own thread, which would wait for itself, is refused by name."""

    async def suicide():
        facade.shutdown()

    with pytest.raises(LoopUnavailableError, match="loop thread"):
        facade.call_sync(suicide)


def test_shutdown_returns_in_time_when_a_caller_step_asks_for_it(facade):
    """A caller step that shuts down waits for its own call no longer than the timeout; the call is cut off."""
    took = []

    async def outer():
        return await run_on_caller(lambda: took.append(timed(facade.shutdown, 0.1)))

    with pytest.raises(LoopUnavailableError):
        facade.call_sync(outer)
    assert took[0] < 0.1 + 1.0 + MARGIN + NOISE


def test_callers_are_answered_or_told_when_shut_down_under_load(make_facade, in_thread, eventually):
    """Sixteen threads that call all the time: each call ends with its result or LoopUnavailableError."""
    for _ in range(10):
        facade = make_facade()
        counts = []

        def caller(facade=facade, counts=counts):
            done = 0
            try:
                while True:
                    assert facade.call_sync(answer) == 42
                    done += 1
            except LoopUnavailableError:
                counts.append(done)

        callers = [in_thread(caller) for _ in range(16)]
        eventually(lambda facade=facade: facade.stats().calls > 50)
        facade.shutdown(1.0)
        for future in callers:
            future.result(20)
        assert len(counts) == 16


def test_other_facade_works_when_one_is_shut_down(make_facade, works):
    """Two facades at once: each has its own life."""
    one, other = make_facade(), make_facade()
    works(one)
    works(other)
    one.shutdown()
    works(other)
    with pytest.raises(LoopUnavailableError):
        one.call_sync(answer)
    assert other.stats().calls >= 2


def test_shutdown_does_not_wait_for_a_result_that_nobody_comes_for(facade):
    """A caller struck twice at the end of its call may leave it in the books: that is no work in flight."""
    facade.call_sync(answer)
    managed = facade._loop
    left = managed.new_call(answer, (), None, None, None, None, contextvars.copy_context())
    left.done = True
    managed.calls[left] = None
    assert timed(facade.shutdown, 20) < 10
