"""What is raised in the wait: the coroutine is cancelled and has cleaned up before that very exception comes out."""

import asyncio
import os
import re
import signal
import threading
import time

import pytest
from rq.timeouts import JobTimeoutException, TimerDeathPenalty, UnixSignalDeathPenalty

from tta_sync import run_on_caller
from tta_sync.facade import register_interrupt
from tta_sync.runtime import call as call_module, loop
from tta_sync.runtime.frames import running_frame


class Alarm(Exception):
    """A signal's exception that is an ordinary Exception, as RQ's is."""


INTERRUPTIONS = [KeyboardInterrupt("Ctrl-C"), SystemExit(7), GeneratorExit(), Alarm("a handler's own")]


def sleeper(send, cleaned, clean_up=0.0):
    """A coroutine function that sends the interrupt once it is inside, waits, and takes its time to clean up."""

    async def sleeps():
        send()
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(clean_up)
            cleaned.append(1)

    return sleeps


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_original_comes_out_after_clean_up_when_raised_in_the_wait(facade, interrupt, works, error, timeout):
    """Whatever a signal raises in the wait comes out itself, after the coroutine was cancelled and has cleaned up."""
    cleaned = []
    with pytest.raises(type(error)) as caught:
        facade.call_sync(sleeper(lambda: interrupt(error), cleaned, clean_up=0.05), timeout=timeout)
    assert caught.value is error
    assert len(cleaned) == 1  # before it came out
    assert facade.in_flight() == []
    assert facade.stats().orphans == 0
    works(facade)


def test_keyboard_interrupt_comes_out_when_ctrl_c_is_pressed(facade, works):
    """SIGINT with Python's own handler, as Ctrl-C sends it."""
    cleaned = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            facade.call_sync(sleeper(lambda: os.kill(os.getpid(), signal.SIGINT), cleaned))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(cleaned) == 1
    works(facade)


def test_jobs_timeout_comes_out_when_rqs_death_penalty_strikes(facade, alarms, works):
    """RQ's JobTimeoutException, raised by its own SIGALRM penalty after 1 s, cancels the coroutine and comes out."""
    cleaned = []
    with pytest.raises(JobTimeoutException), UnixSignalDeathPenalty(1, JobTimeoutException, job_id="job"):
        facade.call_sync(sleeper(lambda: None, cleaned, clean_up=0.05))
    assert len(cleaned) == 1
    assert facade.stats().orphans == 0
    works(facade)


def test_jobs_timeout_comes_out_when_it_strikes_inside_a_caller_step(facade, alarms, monkeypatch, works):
    """RQ's exception is an Exception: registered as an interrupt, it ends the call even from inside a caller step."""
    monkeypatch.setattr(call_module, "INTERRUPTS", call_module.INTERRUPTS)
    register_interrupt(JobTimeoutException)
    seen = []

    async def outer():
        try:
            await run_on_caller(time.sleep, 60)
        except BaseException as error:
            seen.append(type(error))
            raise

    with pytest.raises(JobTimeoutException), UnixSignalDeathPenalty(1, JobTimeoutException, job_id="job"):
        facade.call_sync(outer)
    assert seen == [asyncio.CancelledError]
    works(facade)


def test_deadline_ends_the_call_when_rqs_timer_penalty_cannot(facade, in_thread, expires, works):
    """Off the main thread no penalty interrupts a wait: the call's own deadline, enforced on the loop, does."""
    cleaned = []

    def job():
        with TimerDeathPenalty(30, JobTimeoutException, job_id="job"):
            expires(facade.call_sync, sleeper(lambda: None, cleaned), timeout=0.05)

    in_thread(job).result(20)
    assert len(cleaned) == 1
    works(facade)


# ---------------------------------------------------------------------------------------------- the bounded grace


def stubborn_until(release, inside=lambda: None):
    async def stubborn():
        inside()
        while not release.is_set():
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                pass

    return stubborn


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda error: type(error).__name__)
def test_orphan_is_counted_named_and_logged_when_the_cancel_is_swallowed(
    make_facade, interrupt, eventually, caplog, workflow_events, works, error
):
    """A coroutine that swallows the cancel holds the caller no longer than the grace, and is not left silently."""
    facade = make_facade(grace=0.2)
    release = threading.Event()
    stubborn = stubborn_until(release, lambda: interrupt(error))
    before = time.monotonic()
    with pytest.raises(type(error)) as caught:
        facade.call_sync(stubborn)
    took = time.monotonic() - before
    assert caught.value is error
    assert 0.15 < took < 5
    assert facade.stats().orphans == 1
    assert [(record.name, record.state) for record in facade.in_flight()] == [(stubborn.__qualname__, "orphaned")]

    (record,) = [record for record in caplog.records if record.name == "tta_sync"]
    assert record.levelname == "WARNING"
    line = re.search(re.escape(__file__) + r":(\d+) in (\S+)", record.getMessage())
    assert line is not None, record.getMessage()
    assert line[2].endswith("stubborn")
    assert 0 <= int(line[1]) - stubborn.__code__.co_firstlineno <= 6
    assert stubborn.__qualname__ in record.getMessage()
    assert [event.step for event in workflow_events if type(event).__name__ == "CallOrphaned"] == [
        stubborn.__qualname__
    ]

    works(facade)
    release.set()
    eventually(lambda: facade.in_flight() == [], what="the orphan's end")
    assert facade.stats().orphans == 1


@pytest.fixture
def until_blocked(eventually):
    """``until_blocked(inside)``: return when a thread that has set *inside* stands still in ``Event.wait``.

    A signal that comes just before the system's wait begins is noticed by CPython only when that wait ends.
    """

    def frames():
        return [running_frame(thread.ident) for thread in threading.enumerate()]

    def wait(inside):
        assert inside.wait(20)
        eventually(lambda: threading.Condition.wait.__code__ in {frame.f_code for frame in frames() if frame})
        time.sleep(0.02)

    return wait


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("when", ["before", "during"])
def test_original_comes_out_soon_when_the_coroutine_blocks(
    make_facade, interrupt, in_thread, until_blocked, works, error, when
):
    """Code that blocks the loop holds no interrupt back, whether it came before the block began or later."""
    facade = make_facade(grace=0.05)
    inside, release = threading.Event(), threading.Event()

    async def blocks():
        if when == "before":
            interrupt(error)
        inside.set()
        release.wait(20)

    def strike():
        until_blocked(inside)
        interrupt(error)

    if when == "during":
        in_thread(strike)
    before = time.monotonic()
    try:
        with pytest.raises(type(error)) as caught:
            facade.call_sync(blocks)
    finally:
        release.set()
    assert caught.value is error
    assert time.monotonic() - before < 10
    works(facade)


@pytest.mark.parametrize("order", [["raises", "notes"], ["notes", "raises"]], ids=lambda order: order[0])
@pytest.mark.parametrize("blocks", [False, True], ids=["waits", "blocks"])
def test_every_handler_is_called_when_signals_come_together_and_one_raises(
    make_facade, interrupt, in_thread, until_blocked, eventually, works, order, blocks
):
    """A handler that raises keeps none from being called: a server's SIGTERM is not lost behind a job's timeout."""
    facade = make_facade(grace=0.05)
    noted, error, inside, release = [], Alarm(), threading.Event(), threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append((number, frame.f_code is not None)))

    async def waits():
        inside.set()
        if blocks:
            release.wait(20)
        await asyncio.sleep(3600)

    def send():
        if blocks:
            until_blocked(inside)
        assert inside.wait(20)
        for what in order:
            if what == "raises":
                interrupt(error)
            else:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    in_thread(send)
    try:
        with pytest.raises(Alarm) as caught:
            facade.call_sync(waits)
        assert caught.value is error
        eventually(lambda: noted == [(signal.SIGTERM, True)])
    finally:
        release.set()
        signal.signal(signal.SIGTERM, before)
    works(facade)


@pytest.mark.parametrize("blocks", [False, True], ids=["waits", "blocks"])
def test_call_goes_on_when_a_handler_does_not_raise(facade, in_thread, blocks):
    """A handler that only takes note is called at once, while the coroutine waits or blocks, and harms no call."""
    inside, noted = threading.Event(), threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: noted.set())

    async def goes_on():
        inside.set()
        give_up = time.monotonic() + 20
        while not noted.is_set() and time.monotonic() < give_up:
            if blocks:
                noted.wait(0.5)
            else:
                await asyncio.sleep(0.5)
        return time.monotonic() < give_up

    def send():
        assert inside.wait(20)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    in_thread(send)
    try:
        assert facade.call_sync(goes_on) is True
    finally:
        signal.signal(signal.SIGTERM, before)


def test_jobs_timeout_comes_out_when_rqs_timer_penalty_strikes(run_program):
    """Off the main thread RQ throws its exception into the waiting thread: it comes out, after the clean-up.

    In a program of its own: while one thread has an exception to come, CPython 3.11 lets no other one that is traced,
    for coverage say, begin a function.
    """
    ended = run_program(
        """
        from rq.timeouts import JobTimeoutException, TimerDeathPenalty
        from tta_sync.runtime import loop as loop_module
        loop_module.LOOK_AGAIN = 0.05
        begun = threading.Event()
        class Penalty(TimerDeathPenalty):
            def handle_death_penalty(self):
                begun.wait(20)  # a machine that stalls may let the time pass before: then nothing has to clean up
                super().handle_death_penalty()
        async def sleep():
            begun.set()
            try:
                await asyncio.sleep(3600)
            finally:
                say("cleaned up")
        def job():
            try:
                with Penalty(0.1, JobTimeoutException, job_id="job"):
                    facade.call_sync(sleep)
            except JobTimeoutException:
                say("timed out")
        thread = threading.Thread(target=job, daemon=True)
        thread.start()
        thread.join(20)
        say(facade.call_sync(answer))
        """
    )
    assert ended.said == ["cleaned up", "timed out", "42"]


def test_grace_is_one_second_when_nothing_else_is_said(facade, interrupt):
    """The default grace is 1 s: the clean-up of a coroutine that takes half of it is waited for."""
    cleaned = []
    with pytest.raises(Alarm):
        facade.call_sync(sleeper(lambda: interrupt(Alarm()), cleaned, clean_up=0.5))
    assert len(cleaned) == 1
    assert facade.grace == 1.0


def test_clean_up_that_raises_does_not_hide_the_interrupt_when_it_fails(facade, interrupt, works):
    """The signal's exception survives a clean-up that raises its own."""

    async def fails():
        interrupt(error)
        try:
            await asyncio.sleep(3600)
        finally:
            raise ValueError("the clean-up failed")

    error = Alarm()
    with pytest.raises(Alarm) as caught:
        facade.call_sync(fails)
    assert caught.value is error
    works(facade)


def test_result_does_not_hide_the_interrupt_when_the_coroutine_returns_one(facade, interrupt, works):
    """A coroutine that answers its cancellation with a result does not turn the interrupt into one."""

    async def answers():
        interrupt(Alarm())
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return 42

    with pytest.raises(Alarm):
        facade.call_sync(answers)
    works(facade)


def test_second_interrupt_ends_the_grace_when_it_comes_during_it(make_facade, interrupt, eventually, works):
    """A second interrupt during a long grace comes out at once; what then goes on is an orphan, counted."""
    facade = make_facade(grace=60.0)
    release, first, second = threading.Event(), Alarm("first"), Alarm("second")
    told = []

    async def stubborn():
        interrupt(first)
        while not release.is_set():
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                if not told:
                    told.append(1)
                    interrupt(second)

    before = time.monotonic()
    with pytest.raises(Alarm) as caught:
        facade.call_sync(stubborn)
    assert caught.value is second
    assert caught.value.__context__ is first
    assert time.monotonic() - before < 20
    assert facade.stats().orphans == 1
    assert [record.state for record in facade.in_flight()] == ["orphaned"]
    works(facade)
    release.set()
    eventually(lambda: facade.in_flight() == [])


def test_queued_call_never_begins_when_its_caller_is_interrupted(facade, interrupt, in_thread, works, eventually):
    """A call that the interrupt meets in the queue, behind a blocked loop, is given up and never begun."""
    inside, release, begun = threading.Event(), threading.Event(), []

    async def block():
        inside.set()
        release.wait(20)

    async def late():
        begun.append(1)

    blocking = in_thread(facade.call_sync, block)
    assert inside.wait(20)

    def strike():
        eventually(lambda: any(record.state == "queued" for record in facade.in_flight()))
        interrupt(Alarm())

    striking = in_thread(strike)
    with pytest.raises(Alarm):
        facade.call_sync(late)
    release.set()
    striking.result(20)
    blocking.result(20)
    works(facade)
    assert begun == []


# ------------------------------------------------------------------------------------------- inside a caller step


@pytest.mark.parametrize("error", INTERRUPTIONS[:3], ids=lambda error: type(error).__name__)
def test_call_ends_when_an_interrupt_lands_inside_a_caller_step(facade, works, error):
    """An interrupt inside user code on the caller's thread ends the call; the step only learns of a cancellation."""
    seen = []

    def step():
        raise error

    async def outer():
        try:
            await run_on_caller(step)
        except BaseException as met:
            seen.append(type(met))
            raise

    with pytest.raises(type(error)) as caught:
        facade.call_sync(outer)
    assert caught.value is error
    assert seen == [asyncio.CancelledError]
    works(facade)


def test_registered_type_ends_the_call_when_it_lands_inside_a_caller_step(facade, interrupt, monkeypatch, works):
    """A registered type is an interrupt although it is an Exception; one that is not is the step's own error."""
    monkeypatch.setattr(call_module, "INTERRUPTS", call_module.INTERRUPTS)
    seen = []

    def step():
        interrupt(Alarm())
        time.sleep(20)

    async def outer():
        try:
            await run_on_caller(step)
        except Exception as met:
            seen.append(type(met))
            return "went on"

    assert facade.call_sync(outer) == "went on"
    assert seen == [Alarm]
    register_interrupt(Alarm)
    with pytest.raises(Alarm):
        facade.call_sync(outer)
    assert seen == [Alarm]
    works(facade)


def test_both_calls_are_cleaned_up_when_an_interrupt_meets_a_nested_one(facade, interrupt, works):
    """An interrupt in a call inside a caller step inside a call: both coroutines clean up, and it comes out itself."""
    cleaned, error = [], KeyboardInterrupt()

    async def inner():
        interrupt(error)
        try:
            await asyncio.sleep(3600)
        finally:
            cleaned.append("inner")

    async def outer():
        try:
            await run_on_caller(facade.call_sync, inner)
        finally:
            await asyncio.sleep(0.01)
            cleaned.append("outer")

    with pytest.raises(KeyboardInterrupt) as caught:
        facade.call_sync(outer)
    assert caught.value is error
    assert cleaned == ["inner", "outer"]
    works(facade)


@pytest.mark.parametrize("in_a_task", [False, True])
def test_clean_up_is_not_cut_when_the_loop_is_faster_than_the_caller(facade, monkeypatch, works, in_a_task):
    """The coroutine learns that its step was interrupted before the caller has given the call up: one cancellation."""
    cleaning, steps = threading.Event(), []
    abandon = loop.ManagedLoop.abandon

    def late(self, call, *why):
        steps.append(cleaning.wait(20))
        return abandon(self, call, *why)

    def strike():
        raise KeyboardInterrupt

    async def outer():
        try:
            if in_a_task:
                async with asyncio.TaskGroup() as group:
                    group.create_task(run_on_caller(strike))
            else:
                await run_on_caller(strike)
        finally:
            cleaning.set()
            await asyncio.sleep(0.05)
            steps.append("cleaned")

    if facade.drive == "caller":
        cleaning.set()  # the loop turns no faster than the caller turns it
    monkeypatch.setattr(loop.ManagedLoop, "abandon", late)
    with pytest.raises(KeyboardInterrupt):
        facade.call_sync(outer)
    assert steps == [True, "cleaned"]
    monkeypatch.undo()
    works(facade)


def test_waiting_steps_never_start_when_the_caller_was_interrupted(facade, works):
    """No user code runs on the caller's thread after it was told to stop: steps in its queue are refused."""
    started = []

    def strike():
        raise KeyboardInterrupt

    async def outer():
        await asyncio.gather(*(run_on_caller(fn) for fn in (strike, lambda: started.append(1))))

    with pytest.raises(KeyboardInterrupt):
        facade.call_sync(outer)
    works(facade)
    assert started == []


# ------------------------------------------------------------------------------------------------ a storm of them


def test_facade_is_usable_when_a_storm_of_signals_is_over(run_program):
    """2,700 signals a second, each raising in the wait: afterwards nothing runs, and calls are answered."""
    ended = run_program(
        """
        import logging
        logging.getLogger("tta_sync").addHandler(logging.NullHandler())
        facade = SyncFacade(**OPTIONS, max_in_flight=3)
        class Storm(Exception): pass
        armed = running = 0
        def handler(*_):
            if armed: raise Storm
        async def work(seconds):
            global running
            running += 1
            try:
                await asyncio.sleep(seconds)
            finally:
                running -= 1
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 1 / 2700, 1 / 2700)
        end = time.monotonic() + (1 if OPTIONS else 2)
        done = interrupted = refused = 0
        while time.monotonic() < end:
            try:
                armed = 1
                try:
                    timeout = 30 if interrupted % 4 > 1 else None
                    facade.call_sync(work, 0 if interrupted % 2 else 0.003, timeout=timeout)
                    done += 1
                finally:
                    armed = 0
            except Storm:
                armed = 0
                interrupted += 1
            except SaturatedError:
                refused += 1
                time.sleep(0.001)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert interrupted > 100, (done, interrupted, refused)
        until(lambda: not facade.in_flight() and not running)
        for number in range(200):
            assert facade.call_sync(answer, number, timeout=20) == number
        barrier = threading.Barrier(3)
        async def meet():
            await asyncio.to_thread(barrier.wait, 20)
        threads = [threading.Thread(target=facade.call_sync, args=(meet,)) for _ in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not barrier.broken  # no place of the three was lost
        assert sum(thread.name.startswith("tta_sync-loop") for thread in threading.enumerate()) <= 1
        say("usable")
        last()
        """,
        quiet=False,
    )
    assert ended.said == ["usable"]


def test_first_call_of_facades_is_usable_when_a_storm_of_signals_meets_it(run_program):
    """The same while facades are made, started and shut down: none is wedged, no loop thread is left without owner."""
    ended = run_program(
        """
        import logging
        logging.getLogger("tta_sync").addHandler(logging.NullHandler())
        class Storm(Exception): pass
        armed = 0
        def handler(*_):
            if armed: raise Storm
        signal.signal(signal.SIGALRM, handler)
        end = time.monotonic() + (0.5 if OPTIONS else 1)
        rounds = interrupted = 0
        while time.monotonic() < end:
            one = SyncFacade(**OPTIONS)
            signal.setitimer(signal.ITIMER_REAL, 1 / 2700, 1 / 2700)
            for _ in range(4):
                try:
                    armed = 1
                    try:
                        one.call_sync(answer)
                    finally:
                        armed = 0
                except Storm:
                    armed = 0
                    interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert one.call_sync(answer, timeout=20) == 42
            one.shutdown()
            rounds += 1
        assert interrupted > 10, (rounds, interrupted)
        until(lambda: not any("tta_sync-" in thread.name for thread in threading.enumerate()))
        say("usable")
        last()
        """,
        quiet=False,
    )
    assert ended.said == ["usable"]


def test_call_is_answered_when_a_signal_ate_the_wake_up(facade, in_thread, monkeypatch, works):
    """A signal between arming and ringing leaves the flag armed and the bell silent: the next call looks for itself."""
    inside, release = threading.Event(), threading.Event()

    async def turn():
        inside.set()
        while not release.is_set():
            await asyncio.sleep(0.2)

    turning = in_thread(facade.call_sync, turn)  # where callers drive, this one does: the others have to ring
    assert inside.wait(20)
    loop = facade._loop
    real, eaten = loop._ring, []

    def ring():
        if not eaten:
            eaten.append(1)
            raise Alarm
        real()

    monkeypatch.setattr(loop, "_ring", ring)
    with pytest.raises(Alarm):
        facade.call_sync(asyncio.sleep, 0)
    assert eaten
    loop._armed = True
    works(facade)
    release.set()
    turning.result(20)
