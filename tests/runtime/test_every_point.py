"""Interrupts, finalizers and thrown exceptions at every single point of the runtime where the interpreter lets them in.

CPython runs signal handlers, and delivers exceptions thrown from other threads, after a call returns, at a function's
entry and at backward jumps. A tracer finds these points while a call is on its way and strikes at the first, then at
the second, and so on until a call gets through untouched. No luck is involved, as it is in a storm of signals.

What strikes on the caller's thread is a real signal's handler, so that a runtime which holds signals back may do so.
"""

import asyncio
import dis
import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import tta_sync
from tta_sync import run_on_caller
from tta_sync.context import current_caller
from tta_sync.exceptions import DeadlineExceededError, LoopUnavailableError, TTASyncError
from tta_sync.facade import SyncFacade

PACKAGE = str(Path(tta_sync.__file__).parent)
CALLS = frozenset(dis.opmap[name] for name in ("CALL", "CALL_FUNCTION_EX", "RESUME"))
ENTRY = -1
POINTS = 2000  # more than any call passes


@pytest.fixture
def points(options):
    """Every point; on uvloop, where the caller runs through the very same code as on asyncio, every third."""
    return range(1, POINTS, 3 if options.get("use_uvloop") else 1)


@pytest.fixture
def later_points(points, callers_drive):
    """The same, for what shares most points with other tests: every second one where callers drive, who pass most."""
    return points[::2] if callers_drive else points


class Strike(BaseException):
    """What lands at a point."""


class First(KeyboardInterrupt):
    """What comes before it, where two are needed."""


def is_in_a_finalizer(frame):
    """Say whether the collector has called *frame*: Python swallows what is raised there."""
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


class Tracer:
    """Call *strike* at the *at*-th point that the current thread passes in the package, once."""

    def __init__(self, at, strike, *, armed=True):
        self._left = at
        self._strike = strike
        self._last = {}
        self.armed = armed
        self.where = None  # the point at which it struck

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)
        self._last.clear()

    def __call__(self, frame, event, _argument):
        if self._left <= 0 or not frame.f_code.co_filename.startswith(PACKAGE) or is_in_a_finalizer(frame):
            return None
        frame.f_trace_opcodes = True
        self._last[id(frame)] = ENTRY
        return self._step

    def _step(self, frame, event, _argument):
        if event in ("exception", "return"):
            # Nothing comes between an exception and its handler, where the tracer would upset the interpreter's stack.
            self._last.pop(id(frame), None)
        if event != "opcode" or self._left <= 0:
            return self._step
        before, now = self._last.get(id(frame)), frame.f_lasti
        self._last[id(frame)] = now
        code = frame.f_code.co_code
        if not self.armed or before is None or before == now:
            return self._step
        if before != ENTRY and now > before and code[before] not in CALLS:
            return self._step
        self._left -= 1
        if self._left == 0:
            self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_qualname}"
            self._strike()
        return self._step


def strike():
    raise Strike


@pytest.fixture
def strike_by_signal():
    """Raise Strike by a real signal's handler, on the main thread: at once, or when the runtime delivers it."""

    def handler(_signum, _frame):
        raise Strike

    before = signal.signal(signal.SIGUSR2, handler)
    yield lambda: signal.raise_signal(signal.SIGUSR2)
    assert signal.getsignal(signal.SIGUSR2) is handler, "the runtime has not put the handler back"
    signal.signal(signal.SIGUSR2, before)


def raising(error):
    def raises():
        raise error

    return raises


class Counted:
    """A coroutine function that knows how many of its coroutines run now."""

    def __init__(self, body):
        self._body = body
        self.running = 0

    async def __call__(self):
        self.running += 1
        try:
            return await self._body()
        finally:
            self.running -= 1


async def short():
    await asyncio.sleep(0)
    return 42


async def long():
    await asyncio.sleep(3600)


async def with_steps():
    return sum(await asyncio.gather(run_on_caller(int, "20"), run_on_caller(int, "22")))


async def answer():
    return "answered"


def is_sound(facade, counted, eventually, where):
    """Fail unless nothing of the struck call is left and the facade answers; *where* says what was struck."""
    eventually(lambda: counted.running == 0, what=f"the end of the coroutine struck at {where}")
    assert [record for record in facade.in_flight() if record.state != "orphaned"] == [], where
    try:
        assert facade.call_sync(answer, timeout=10) == "answered", where
    except TTASyncError as error:
        pytest.fail(f"struck at {where}: the next call ended in {error!r}")


SCENARIOS = {
    "plain": (short, None),
    "with a timeout": (short, 30.0),
    "with caller steps": (with_steps, None),
    "past its deadline": (long, 0.01),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_call_is_cancelled_and_forgotten_when_an_interrupt_lands_at_any_point(
    make_facade, eventually, points, scenario, strike_by_signal
):
    """Wherever in the caller's way an interrupt lands: it comes out itself, nothing runs on, no place stays taken."""
    body, timeout = SCENARIOS[scenario]
    facade = make_facade(max_in_flight=1)
    facade.call_sync(answer)
    counted = Counted(body)
    for at in points:
        came_out = None
        with Tracer(at, strike_by_signal) as tracer:
            try:
                facade.call_sync(counted, timeout=timeout)
            except Strike as error:
                came_out = error
            except DeadlineExceededError:
                assert body is long
        if tracer.where is None:
            break
        assert came_out is not None, f"struck at {tracer.where}: the interrupt was lost"
        is_sound(facade, counted, eventually, tracer.where)
    assert at > 12, "the tracer found no points: it tests nothing"
    assert facade.stats().orphans == 0 or body is not long


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # loops that were struck unborn
def test_facade_is_sound_when_an_interrupt_lands_at_any_point_of_its_first_call(
    make_facade, threads_end, eventually, points, strike_by_signal
):
    """The same for the call that starts the loop: the next one is answered, and no thread is left in the end."""
    for at in points:
        facade, counted = make_facade(max_in_flight=1), Counted(short)
        came_out = None
        with Tracer(at, strike_by_signal) as tracer:
            try:
                facade.call_sync(counted)
            except Strike as error:
                came_out = error
        if tracer.where is None:
            break
        assert came_out is not None, f"struck at {tracer.where}: the interrupt was lost"
        is_sound(facade, counted, eventually, tracer.where)
        facade.shutdown(0.0)
        threads_end()
    assert at > 25, "the tracer found no points: it tests nothing"
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # loops that were struck unborn
def test_shutdown_ends_all_threads_when_an_interrupt_landed_at_any_point_of_the_first_call(
    options, threads_end, later_points, strike_by_signal
):
    """A first call that was cut off leaves no loop behind that nobody knows of: shutdown ends what it has started."""
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    for at in later_points:
        facade = SyncFacade(**options)  # which nobody keeps
        with Tracer(at, strike_by_signal) as tracer:
            try:
                facade.call_sync(short)
            except Strike:
                pass
        facade.shutdown(0.0)
        if tracer.where is None:
            break
        threads_end()
    assert at > 25, "the tracer found no points: it tests nothing"
    del facade
    gc.collect()
    # Those that were struck in the moment in which they had been made, a few, are closed when the process exits.
    assert len(os.listdir("/proc/self/fd")) < descriptors + 40


@pytest.fixture
def on_signal():
    """``on_signal(fn)``: have the main thread call *fn* when ``hit()`` is called, on whatever thread."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda fn: signal.signal(signal.SIGUSR1, lambda *_: fn())
    signal.signal(signal.SIGUSR1, before)


def hit():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)


async def hit_in_the_wait():
    hit()
    await asyncio.sleep(3600)


async def hit_in_a_step():
    await asyncio.gather(run_on_caller(hit), run_on_caller(time.sleep, 20))


@pytest.mark.parametrize("body", [hit_in_the_wait, hit_in_a_step], ids=lambda body: body.__name__)
def test_nothing_runs_on_silently_when_a_second_interrupt_lands_at_any_point(
    make_facade, eventually, caplog, on_signal, later_points, strike_by_signal, body
):
    """A second interrupt anywhere behind the first: one of the two comes out, and the coroutine is cancelled still."""
    caplog.set_level("CRITICAL")  # orphans for a moment, by the dozen
    facade, counted = make_facade(max_in_flight=1), Counted(body)
    facade.call_sync(answer)
    for at in later_points:
        tracer = Tracer(at, strike_by_signal, armed=False)

        def first(tracer=tracer):
            tracer.armed = True
            raise First

        on_signal(first)
        came_out = None
        with tracer:
            try:
                facade.call_sync(counted)
            except (First, Strike) as error:
                came_out = error
            tracer.armed = False
        assert came_out is not None, f"struck at {tracer.where}: the interrupts were lost"
        if tracer.where is None:
            break
        eventually(lambda: facade.in_flight() == [], what=f"the end of the orphan struck at {tracer.where}")
        is_sound(facade, counted, eventually, tracer.where)
    assert at > 5, "the tracer found no points: it tests nothing"


def test_finalizer_never_waits_for_its_own_thread_when_it_calls_at_any_point(
    make_facade, callers_drive, points, in_thread
):
    """A finalizer, or a handler, that calls the facade at any point of a call on the same thread gets its answer.

    Where this thread turns the loop just then, it gets the error that is named for it.
    """

    def finalizer(facade, answers):
        try:
            answers.append(facade.call_sync(answer))
        except LoopUnavailableError:
            answers.append("refused")

    def first_calls():
        for at in points:
            facade, answers = make_facade(), []
            with Tracer(at, lambda facade=facade, answers=answers: finalizer(facade, answers)) as tracer:
                now.append(tracer)
                assert facade.call_sync(short) == 42
            facade.shutdown(0.0)
            if tracer.where is None:
                return
            got.append((tracer.where, answers))

    def later_calls():
        facade = make_facade()
        facade.call_sync(answer)
        for at in points:
            answers = []
            with Tracer(at, lambda answers=answers: finalizer(facade, answers)) as tracer:
                now.append(tracer)
                assert facade.call_sync(with_steps) == 42
            if tracer.where is None:
                return
            got.append((tracer.where, answers))

    for calls in (later_calls, first_calls):
        now, got = [], []
        try:
            in_thread(calls).result(60)
        except TimeoutError:
            pytest.fail(f"it hangs when a finalizer calls at {now[-1].where}")
        assert sum(answers == ["answered"] for _, answers in got) > 3
        assert [entry for entry in got if entry[1] not in (["answered"], ["refused"] if callers_drive else None)] == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coroutines that were struck unborn
def test_every_waiter_hears_when_an_exception_is_thrown_into_the_loop_thread_at_any_point(
    make_facade, in_thread, points, caplog, callers_drive
):
    """Wherever on the loop's thread it lands: the caller gets a result or an error within 4 s; so does the next one."""
    caplog.set_level("CRITICAL")
    facade = make_facade()
    facade.call_sync(answer)
    slowest, at = 0.0, 0

    async def traced(tracer, inside, release):
        # On the thread that turns the loop, and where callers drive this call's own thread goes on turning it for the
        # others: frames that begin from now on are traced.
        while callers_drive and threading.get_ident() != current_caller.get().ident:
            await asyncio.sleep(0.002)  # another drives, or the standby driver, until this call's thread wants to
        sys.settrace(tracer)
        inside.set()
        try:
            while not release.is_set():
                await asyncio.sleep(0.002)
        finally:
            if sys.gettrace() is tracer:  # the struck one may end late, when its successor has set another
                sys.settrace(None)

    for at in points:
        tracer = Tracer(at, raising(Strike()), armed=False)
        inside, release = threading.Event(), threading.Event()
        turning = in_thread(facade.call_sync, traced, tracer, inside, release)
        assert inside.wait(20)
        tracer.armed = True
        begun = time.monotonic()
        calls = [in_thread(facade.call_sync, short), in_thread(facade.call_sync, with_steps)]
        outcomes = []
        for call in calls:
            try:
                outcomes.append(call.exception(10) or call.result())
            except TimeoutError:
                pytest.fail(f"a caller hangs after an exception at {tracer.where}")
        slowest = max(slowest, time.monotonic() - begun)
        assert slowest < 4, f"{slowest:.1f} s after an exception at {tracer.where}"
        assert all(outcome == 42 or isinstance(outcome, (Strike, TTASyncError)) for outcome in outcomes), (
            tracer.where,
            outcomes,
        )
        tracer.armed = False
        release.set()
        assert isinstance(turning.exception(20), (type(None), Strike, TTASyncError)), tracer.where
        if tracer.where is None:
            break
    assert at > 12, "the tracer found no points: it tests nothing"
    gc.collect()
