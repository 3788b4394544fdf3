"""Exceptions from outside that meet the thread which turns the loop: whose they are, and what they leave behind."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from tta_sync.exceptions import DeadlineExceededError, LoopUnavailableError
from tta_sync.facade import SyncFacade, run_on_caller
from tta_sync.runtime import driven, loop, native


class Struck(TimeoutError):
    """As a job's timeout may be: an OSError, which the loop's own failures are as well."""


@pytest.fixture
def driven_facade():
    facade = SyncFacade(drive="caller")
    yield facade
    facade.shutdown(0)


async def answer():
    await asyncio.sleep(0)
    return 42


async def nap():
    await asyncio.sleep(30)


@pytest.mark.parametrize("name", ["SIGABRT", "SIGPIPE"])
def test_original_comes_out_when_it_could_be_the_loops_own_failure(run_program, name):
    """A handler's TimeoutError, by whichever signal: it comes out of the wait, and harms nobody beside."""
    ended = run_program(
        f"""
        class Struck(TimeoutError): pass

        def handler(*_):
            raise Struck

        def strike():
            until(lambda: any("work" in one.name and one.state == "running" for one in facade.in_flight()))
            signal.pthread_kill(threading.main_thread().ident, signal.{name})

        async def work():
            try:
                await asyncio.sleep(10)
            finally:
                cleaned.append(1)

        signal.signal(signal.{name}, handler)
        cleaned, struck, beside = [], [], []
        for _ in range(10):
            threads = [
                threading.Thread(target=lambda: beside.append(facade.call_sync(asyncio.sleep, 0.02, 1))),
                threading.Thread(target=strike),
            ]
            for thread in threads: thread.start()
            try:
                facade.call_sync(work)
            except Struck:
                struck.append(1)
            for thread in threads: thread.join()
        say(len(struck), len(cleaned), len(beside), facade.stats().restarts)
        last()
        """
    )
    assert ended.said == ["10 10 10 0"]


def test_original_comes_out_when_it_strikes_while_the_bell_is_rung(monkeypatch, works, eventually):
    """A handler's TimeoutError in the middle of the ring is no trouble with the bell: it is not taken for one."""
    facade = SyncFacade()
    works(facade)
    eventually(lambda: not facade._loop._armed)  # else nobody rings for the next call: the loop is about to look
    ring = os.eventfd_write

    def struck(*arguments):
        monkeypatch.undo()
        ring(*arguments)
        raise Struck

    async def works_on():
        await nap()

    try:
        monkeypatch.setattr(loop.os, "eventfd_write", struck)
        with pytest.raises(Struck):
            facade.call_sync(works_on, timeout=20)
        works(facade)
    finally:
        facade.shutdown(0)


def strike_when_running(facade, name, number):
    give_up = time.monotonic() + 20
    while not any(name in record.name and record.state == "running" for record in facade.in_flight()):
        assert time.monotonic() < give_up
        time.sleep(0.001)
    signal.pthread_kill(threading.main_thread().ident, number)


def test_loop_goes_on_when_callers_are_struck_again_and_again(driven_facade, works):
    """What is thrown into a caller that drives is the caller's: five in a moment are no reason to bury the loop."""
    facade = driven_facade
    works(facade)
    turning = facade._loop.loop
    real, left = turning.run_forever, []

    def struck():
        if left and facade._loop.driver is not None:  # not the standby driver
            left.pop()
            raise Struck
        real()

    turning.run_forever = struck
    with ThreadPoolExecutor(1) as pool:  # off the main thread, as a worker's timer does it
        for _ in range(5):
            left.append(1)
            with pytest.raises(Struck):
                pool.submit(facade.call_sync, answer).result(20)
    assert facade.call_sync(answer) == 42
    assert facade.stats().restarts == 0
    assert facade._loop.loop is turning


@pytest.mark.parametrize("where", ["asyncio's own callback", "the runtime's"])
def test_driver_hears_of_what_struck_in_a_callback_of_the_runtime(driven_facade, works, caplog, where):
    """asyncio logs what its callbacks raise; what was thrown in there from outside ends the driver's call."""
    facade = driven_facade
    works(facade)
    managed = facade._loop

    def strike(*_):
        managed.loop.__dict__.pop("_process_self_data", None)  # once
        raise Struck

    async def work():
        if where == "the runtime's":
            asyncio.get_running_loop().call_soon(strike.__get__(managed))
        else:
            turning = asyncio.get_running_loop()
            turning._process_self_data = strike
            turning.call_soon_threadsafe(int)
        await nap()

    with ThreadPoolExecutor(1) as pool, pytest.raises(Struck):
        pool.submit(facade.call_sync, work, timeout=20).result(30)
    assert [record for record in caplog.records if record.name == "asyncio"] == []
    works(facade)


def test_item_timeout_ends_the_wait_when_the_first_item_does_not_come(make_facade, monkeypatch, works):
    """A stream that has not begun is no reason to wait longer: the driver's wait ends with the item's time."""
    monkeypatch.setattr(driven, "LOOK_AGAIN", 60.0)  # nothing else may end the wait
    monkeypatch.setattr(loop, "LOOK_AGAIN", 60.0)
    facade = make_facade()

    async def late():
        await nap()
        yield 1

    begun = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        next(facade.iterate_sync(late, item_timeout=0.05))
    assert time.monotonic() - begun < 20
    works(facade)


def test_signal_handlers_of_the_loop_are_refused(facade, works):
    """The loop is not the main thread's, whoever turns it: it takes no signal handlers, and keeps no trace of them."""

    async def install():
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, int)

    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises((RuntimeError, ValueError)):
        facade.call_sync(install)
    assert signal.getsignal(signal.SIGUSR1) is before
    works(facade)


def test_handler_may_call_the_facade_when_it_interrupts_a_call(facade, in_thread, works):
    """A signal's handler that raises nothing may itself wait for a call; the interrupted one goes on."""
    heard = []

    async def works_on():
        while not heard:
            await asyncio.sleep(0.001)
        return "went on"

    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(facade.call_sync(answer)))
    try:
        in_thread(strike_when_running, facade, "works_on", signal.SIGUSR1)
        assert facade.call_sync(works_on, timeout=20) == "went on"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [42]
    works(facade)


def test_descriptor_of_a_stranger_stays_open_when_a_child_collects_its_parents_loop(facade, in_child, works):
    """A daemon closes what it inherited and opens its own: the parent's dead loop must not close that number."""
    works(facade)
    managed = facade._loop
    assert managed._bell >= 0
    facade.shutdown(1)

    def daemonise():
        os.close(managed._bell)
        null = os.open(os.devnull, os.O_RDONLY)
        if null != managed._bell:
            os.dup2(null, managed._bell)
        managed.__del__()
        os.fstat(managed._bell)  # OSError if it was closed
        return "open"

    assert in_child(daemonise) == "open"


def test_other_threads_are_answered_when_a_storm_of_signals_met_the_first_call(run_program):
    """A process whose very first calls are cut off by signals, in whatever they import: it works, and so do others."""
    ended = run_program(
        """
        class Alarm(Exception): pass

        def storm():
            while time.monotonic() < end:
                facade.call_sync(answer)

        def handler(number, frame):
            while frame is not None:
                if frame.f_code is storm.__code__:
                    raise Alarm
                frame = frame.f_back

        signal.signal(signal.SIGALRM, handler)
        end = time.monotonic() + 0.7
        signal.setitimer(signal.ITIMER_REAL, 0.0004, 0.0004)
        while time.monotonic() < end:
            try:
                storm()
            except Alarm:
                pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        heard = []
        def call():
            heard.append(facade.call_sync(answer))
        threads = [threading.Thread(target=call, daemon=True) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(15)
        say(heard, facade.call_sync(answer))
        last()
        """,
        quiet=False,
    )
    assert ended.said == ["[42, 42, 42, 42] 42"]


@pytest.mark.parametrize("where", ["before", "after"])
def test_coroutine_is_cleaned_up_when_its_caller_was_struck_as_it_put_the_baton_down(monkeypatch, works, where):
    """The baton lies in the hands of a thread that does not know of it, and that has to drive the clean-up."""
    facade = SyncFacade(drive="caller", grace=0.9)  # within a second nobody else looks whether it lies there
    works(facade)
    real, left, cleaned_up = driven.DrivenLoop._pass_on, [], []

    def struck(self, mark):
        if self._baton.get("holder") is mark and left and steps:
            left.pop()
            if where == "after":
                self._vacant_since = time.monotonic()
            raise Struck
        real(self, mark)

    async def many_steps():
        try:
            while True:
                await run_on_caller(steps.append, 1)
        finally:
            cleaned_up.append(1)

    monkeypatch.setattr(driven.DrivenLoop, "_pass_on", struck)
    try:
        for count in (1, 2, 3):
            steps = []
            left.append(1)
            with pytest.raises(Struck):
                facade.call_sync(many_steps)
            assert len(cleaned_up) == count
            works(facade)
        assert facade.stats().orphans == 0
    finally:
        facade.shutdown(0)


def test_lost_steps_are_looked_for_while_others_queue_theirs(driven_facade, works):
    """The loop's queue grows under whoever looks through it: that is no error, and no caller's."""
    works(driven_facade)
    managed = driven_facade._loop

    async def look():
        nobodys = SimpleNamespace(_fut_waiter=None)
        for _ in range(20_000):  # it takes longer to look through than a thread may run on
            managed.loop.call_soon(int)
        return all(managed._has_lost_its_step(nobodys, managed._queued_steps()) for _ in range(20))

    stop = []

    def queue_on():
        while not stop:
            managed.loop.call_soon_threadsafe(int)

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(queue_on)
        try:
            assert driven_facade.call_sync(look)
        finally:
            stop.append(1)
            busy.result(20)


def test_caller_drives_when_it_handles_an_exception_and_nobody_else_comes(
    driven_facade, works, replace_standby, monkeypatch
):
    """A standby driver that does not come leaves no caller without an answer."""
    monkeypatch.setattr(driven, "LOOK_AGAIN", 0.05)
    works(driven_facade)
    idle, release = threading.Event(), threading.Event()
    replace_standby(driven_facade._loop, lambda: (idle.set(), release.wait(20)))
    assert idle.wait(20)
    try:
        raise Struck
    except Struck:
        works(driven_facade)
    finally:
        release.set()


def test_call_is_told_of_the_loop_when_that_was_closed_while_nobody_turned_it(
    driven_facade, works, replace_standby, eventually
):
    """Not by asyncio's own error, which would look like one of the coroutine's; the next call gets a new loop."""
    works(driven_facade)
    managed = driven_facade._loop
    idle = threading.Event()

    def wait():  # until the caller has found out: else the standby driver may
        idle.set()
        eventually(lambda: managed._broken, what="the word of the caller")

    replace_standby(managed, wait)
    assert idle.wait(20)

    async def queue():
        asyncio.get_running_loop().call_soon(int)

    managed.loop.close()
    with pytest.raises(LoopUnavailableError):
        driven_facade.call_sync(queue, timeout=20)
    works(driven_facade)


def test_next_call_gets_a_new_loop_when_the_standby_driver_is_struck(driven_facade, works, replace_standby, eventually):
    """What is thrown into it ends the loop, in order: even where it held the baton, and could not put it down."""

    class Thrown(BaseException):
        pass

    works(driven_facade)
    managed = driven_facade._loop

    def struck():
        if managed._take([native.get_ident()]):
            raise Thrown

    replace_standby(managed, struck)
    eventually(lambda: managed.dead, what="the end of the loop")
    assert isinstance(managed.death, Thrown)
    works(driven_facade)
