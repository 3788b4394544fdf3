"""The loop is stopped, or its thread dies: every waiter hears of it, and the next call works."""

import asyncio
import gc
import os
import sys
import threading
import time
from collections import Counter

import pytest

from tta_sync.exceptions import LoopUnavailableError
from tta_sync.runtime import driven as driven_module, loop as loop_module

HEARD_WITHIN = 4.0


@pytest.fixture
def waiters(facade, in_thread, eventually):
    """Four calls that wait for ``waiters.release()``; ``waiters.hear()``: what each got, within 4 s each."""

    class Waiters:
        def __init__(self):
            self.waiting = []
            self.released = False
            self.calls = [in_thread(facade.call_sync, self.wait) for _ in range(4)]

        async def wait(self):
            future = asyncio.get_running_loop().create_future()
            self.waiting.append(future)
            return await future

        def release(self):
            self.released = True
            for future in self.waiting:
                try:
                    future.get_loop().call_soon_threadsafe(self.let_go, future)
                except RuntimeError:
                    pass  # its loop is closed

        def let_go(self, future):
            if not future.done():
                future.set_result("ok")

        def hear(self):
            give_up = time.monotonic() + HEARD_WITHIN
            while not all(call.done() for call in self.calls) and time.monotonic() < give_up:
                time.sleep(0.01)
                if self.released:
                    self.release()  # again: the first one may have been struck by an exception
            return [call.exception(0) or call.result() for call in self.calls]

    waiters = Waiters()
    eventually(lambda: len(waiters.waiting) == 4)
    yield waiters
    waiters.release()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("mine"), GeneratorExit("mine")], ids=repr)
def test_exception_reaches_its_caller_alone_when_a_coroutine_raises_what_ends_programs(facade, waiters, works, error):
    """SystemExit and the like, raised inside a coroutine, reach that caller unchanged and harm no other call."""

    async def leave():
        await asyncio.sleep(0)
        raise error

    with pytest.raises(type(error)) as caught:
        facade.call_sync(leave)
    assert caught.value is error
    works(facade)
    waiters.release()
    assert waiters.hear() == ["ok"] * 4
    assert facade.stats().restarts == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_other_calls_go_on_when_a_task_of_a_coroutine_raises_system_exit(facade, waiters, works):
    """asyncio lets a subtask's SystemExit through to the loop's thread: only the one who awaits it gets it."""

    async def leave():
        raise SystemExit(5)

    async def outer():
        await asyncio.gather(leave())

    with pytest.raises(SystemExit) as caught:
        facade.call_sync(outer)
    assert caught.value.code == 5
    works(facade)
    waiters.release()
    assert waiters.hear() == ["ok"] * 4
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_other_calls_go_on_when_a_callback_raises_system_exit(facade, waiters, works):
    """SystemExit of a plain callback on the loop ends nothing."""

    async def plant():
        asyncio.get_running_loop().call_soon(exit_now)
        await asyncio.sleep(0.01)

    def exit_now():
        raise SystemExit(6)

    facade.call_sync(plant)
    works(facade)
    waiters.release()
    assert waiters.hear() == ["ok"] * 4


@pytest.mark.parametrize("how", ["in the coroutine", "soon", "from another thread"])
def test_waiters_get_their_results_when_somebody_stops_the_loop(facade, waiters, works, how):
    """loop.stop() by a user's code: the loop is resumed, everything in flight goes on, and the restart is counted."""

    async def stop():
        loop = asyncio.get_running_loop()
        if how == "in the coroutine":
            loop.stop()
        elif how == "soon":
            loop.call_soon(loop.stop)
        return loop

    loop = facade.call_sync(stop)
    if how == "from another thread":
        loop.call_soon_threadsafe(loop.stop)
    works(facade)
    waiters.release()
    assert waiters.hear() == ["ok"] * 4
    assert facade.stats().restarts == 1


def test_all_is_well_when_the_loop_is_stopped_again_and_again(facade, works, eventually):
    """However often user code stops the loop, it is resumed: a stop is no failure."""

    async def stop():
        asyncio.get_running_loop().stop()

    for number in range(20):
        facade.call_sync(stop, timeout=20)
        eventually(lambda number=number: facade.stats().restarts == number + 1, what="the count of the restart")
    works(facade)


RAIN = """
import ctypes, logging, random
logging.getLogger("tta_sync").addHandler(logging.NullHandler())
class Thrown(Exception): pass
def throw():
    managed = facade._loop
    if managed.ident and not managed.dead:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(managed.ident), ctypes.py_object({error}))
facade.call_sync(answer)
"""


@pytest.mark.parametrize("error", ["Thrown", "SystemExit"])
def test_waiters_hear_when_exceptions_are_thrown_into_the_loop_thread(run_program, error):
    """Six exceptions thrown into the loop's thread in a row: results or typed errors, and a facade that works."""
    ended = run_program(
        RAIN.format(error=error)
        + f"""
waiting, outcomes = [], {{}}
async def wait():
    waiting.append(asyncio.get_running_loop().create_future())
    return await waiting[-1]
def caller(number):
    while number not in outcomes:
        try:
            try:
                outcomes[number] = facade.call_sync(wait)
            except (TTASyncError, {error}):
                outcomes[number] = "an error"
        except {error}:
            pass  # where callers drive it is thrown at them, and may land outside their call
def let_go():
    for future in waiting:
        if not future.done():
            future.set_result("ok")
threads = [threading.Thread(target=caller, args=(number,), daemon=True) for number in range(4)]
for thread in threads: thread.start()
until(lambda: len(waiting) == 4)
for _ in range(6):
    throw()
    time.sleep(0.06)  # it lands with the next Python code on that thread: the watchdog's question, say
asked = time.monotonic()
while len(outcomes) < 4:
    assert time.monotonic() < asked + {HEARD_WITHIN}, outcomes
    for future in waiting:
        try:
            future.get_loop().call_soon_threadsafe(let_go)  # again and again: an exception may strike this, too
        except RuntimeError:
            pass  # that loop is closed
    time.sleep(0.02)
assert set(outcomes.values()) <= {{"ok", "an error"}}, outcomes
for number in range(100):
    assert facade.call_sync(answer, number, timeout=10) == number
say("works")
""",
        quiet=False,
    )
    assert ended.said == ["works"]


@pytest.mark.parametrize("error", ["Thrown", "SystemExit"])
def test_every_call_ends_when_exceptions_rain_on_the_loop_thread(run_program, error):
    """Calls of four threads under 100 exceptions a second at random moments: each ends within 4 s, as it should."""
    ended = run_program(
        RAIN.format(error=error)
        + f"""
end, luck = time.monotonic() + (0.5 if OPTIONS.get("use_uvloop") else 1), random.Random(1)
counts, slowest, wrong = [0] * 4, [0.0] * 4, []
def caller(number):
    while time.monotonic() < end:
        try:
            while time.monotonic() < end:
                one(number)
        except {error}:
            pass  # where callers drive it is thrown at them, and may land outside their call
def one(number):
    begun = time.monotonic()
    try:
        facade.call_sync(answer)
    except (TTASyncError, {error}):
        pass
    except BaseException as error:
        wrong.append(error)
    counts[number] += 1
    slowest[number] = max(slowest[number], time.monotonic() - begun)
threads = [threading.Thread(target=caller, args=(number,), daemon=True) for number in range(4)]
for thread in threads: thread.start()
while time.monotonic() < end:
    throw()
    time.sleep(luck.uniform(0, 0.02))
for thread in threads:
    thread.join({HEARD_WITHIN})
    assert not thread.is_alive(), "a caller hangs"
assert not wrong, wrong
assert min(counts) > 10, counts
assert max(slowest) < {HEARD_WITHIN}, slowest
for number in range(100):
    assert facade.call_sync(answer, number, timeout=10) == number
say("works")
""",
        quiet=False,
    )
    assert ended.said == ["works"]


@pytest.fixture
def looks_often(monkeypatch):
    """Callers look after their calls every 50 ms, not every second."""
    for module in (loop_module, driven_module):
        monkeypatch.setattr(module, "LOOK_AGAIN", 0.05)


class Struck(Exception):
    """What is thrown into the loop thread."""


@pytest.mark.parametrize("where", ["before it says so", "before it wakes the caller"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_caller_hears_when_an_exception_strikes_the_last_moment_of_its_call(
    facade, looks_often, works, monkeypatch, where
):
    """Thrown into the loop thread as a call ends: its caller gets what it ended with, or the exception."""
    works(facade)
    kind = facade._loop.call_class
    real, strikes = kind.finish, [1]

    def finish(self, result, error):
        if strikes and strikes.pop():
            if where == "before it wakes the caller":
                self.lock = Ringless(self.lock)
            else:
                raise Struck
        real(self, result, error)

    class Ringless:
        def __init__(self, lock):
            self.acquire = lock.acquire

        def release(self):
            raise Struck

    async def answer():
        return 42

    monkeypatch.setattr(kind, "finish", finish)
    begun = time.monotonic()
    try:
        assert facade.call_sync(answer) == 42
    except Struck:
        assert where == "before it says so"
    assert time.monotonic() - begun < HEARD_WITHIN
    works(facade)


@pytest.mark.parametrize("struck_too", ["nothing", "_recover", "_drain", "_queued_steps"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_caller_hears_when_an_exception_took_the_next_step_of_its_task(
    facade, options, callers_drive, looks_often, works, monkeypatch, struck_too
):
    """Thrown into the loop thread as asyncio takes a step from its queue: the caller gets the named error.

    Even if the search for it is struck as well.
    """
    if options.get("use_uvloop"):
        pytest.skip("uvloop takes steps from its queue in C, where no exception can be thrown in between")

    def steal(task):
        loop = asyncio.get_running_loop()
        for index, handle in enumerate(loop._ready):
            if getattr(handle._callback, "__self__", None) is task:
                loop._ready[index] = asyncio.Handle(int, (), loop)

    async def victim():
        if struck_too != "nothing":
            strike_once(facade._loop, struck_too)
        asyncio.get_running_loop().call_soon(steal, asyncio.current_task())
        await asyncio.sleep(0)

    def strike_once(managed, name):
        real, strikes = getattr(managed, name), [1]

        def method(*args):
            searching = name == "_recover" or sys._getframe(1).f_code.co_name == "_recover"
            if searching and strikes and strikes.pop():
                raise Struck
            return real(*args)

        monkeypatch.setattr(managed, name, method)

    begun = time.monotonic()
    with pytest.raises((LoopUnavailableError, Struck)) as caught:
        facade.call_sync(victim)
    assert time.monotonic() - begun < HEARD_WITHIN
    if caught.type is Struck:
        assert callers_drive  # it struck the caller's own thread
    else:
        assert "thrown into the loop thread" in str(caught.value)
    works(facade)


def test_loop_is_asked_once_when_many_callers_look_while_it_is_blocked(facade, in_thread, eventually, monkeypatch):
    """What callers in doubt give a blocked loop to do does not grow with their number, nor with the time."""
    monkeypatch.setattr(loop_module, "LOOK_AGAIN", 1000.0)
    blocked, release, looks, asked = threading.Event(), threading.Event(), Counter(), []

    async def block():
        blocked.set()
        assert release.wait(20)

    async def answer(number):
        return number

    blocking = in_thread(facade.call_sync, block)
    assert blocked.wait(20)
    managed = facade._loop
    look, post = managed.look, managed.post

    def counted_look(call):
        wait = look(call)
        looks[call] += 1
        return wait

    def counted_post(callback, *args):
        if callback.__name__ == "_recover":
            asked.append(args)
        post(callback, *args)

    monkeypatch.setattr(managed, "look", counted_look)
    monkeypatch.setattr(managed, "post", counted_post)
    calls = [in_thread(facade.call_sync, answer, number) for number in range(20)]
    eventually(lambda: sum(count >= 3 for count in looks.copy().values()) >= 20, what="three looks of every caller")
    asked_while_blocked = len(asked)
    release.set()
    assert asked_while_blocked <= 1
    assert [call.result(20) for call in calls] == list(range(20))
    blocking.result(20)


# ------------------------------------------------------------------------------------------- a loop beyond repair


@pytest.fixture
def break_loop(facade, options):
    """``break_loop()``: close the epoll descriptor under the loop, as a stray os.close would."""
    if options.get("use_uvloop"):
        pytest.skip("libuv aborts the whole process when its descriptor is gone")

    async def close():
        os.close(asyncio.get_running_loop()._selector.fileno())

    def break_it():
        with pytest.raises(LoopUnavailableError):
            facade.call_sync(close_and_wait)

    async def close_and_wait():
        await close()
        await asyncio.sleep(60)

    return break_it


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_waiters_get_the_named_error_when_the_loop_breaks(
    facade, break_loop, waiters, works, caplog, workflow_events, eventually
):
    """A loop that cannot go on fails all its waiters within 4 s, says so once with the cause, and is replaced."""
    begun = time.monotonic()
    break_loop()
    outcomes = waiters.hear()
    assert time.monotonic() - begun < HEARD_WITHIN
    for outcome in outcomes:
        assert isinstance(outcome, LoopUnavailableError)
        assert isinstance(outcome.__cause__, OSError)
    assert len({id(outcome) for outcome in outcomes}) == 4  # each caller its own
    works(facade)
    stats = facade.stats()
    assert stats.restarts >= 1
    (event,) = eventually(lambda: [event for event in workflow_events if type(event).__name__ == "LoopRestarted"])
    assert event.waiting == 5
    (record,) = [record for record in caplog.records if record.name == "tta_sync" and record.levelname == "ERROR"]
    assert "5 calls" in record.getMessage()
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_next_call_works_and_nothing_leaks_when_the_loop_breaks_again_and_again(
    facade, break_loop, works, caplog, eventually
):
    """Fifteen deaths in a row: each time the very next call is answered; threads and descriptors stay flat."""
    caplog.set_level("CRITICAL")

    def held():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def once():
        break_loop()
        works(facade)

    for _ in range(3):
        once()
    eventually(lambda: len([thread for thread in threading.enumerate() if thread.name.startswith("tta_sync-")]) >= 2)
    before = held()
    for _ in range(15):
        once()
    give_up = time.monotonic() + 5
    while (after := held()) > before and time.monotonic() < give_up:
        time.sleep(0.01)
    assert after <= before, (before, after)
    assert facade.stats().restarts >= 15
    assert facade.stats().calls >= 18


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_descriptor_of_a_stranger_stays_open_when_a_broken_loop_is_buried(facade, break_loop, works, caplog, tmp_path):
    """The dead loop's descriptor numbers may belong to others by now: burying it closes none of them."""
    caplog.set_level("CRITICAL")
    for number in range(10):
        break_loop()
        with open(tmp_path / str(number), "w") as opened:
            time.sleep(0.005)
            os.fstat(opened.fileno())  # OSError if somebody else closed it
        works(facade)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_resource_is_opened_again_when_the_loop_was_replaced(facade, break_loop, caplog):
    """A resource belongs to the loop on which it was opened: the next loop opens its own."""
    from contextlib import asynccontextmanager

    caplog.set_level("CRITICAL")
    opened = []

    @asynccontextmanager
    async def client():
        opened.append(asyncio.get_running_loop())
        yield len(opened)

    shared = facade.resource(client)

    async def use():
        return await shared

    assert facade.call_sync(use) == 1
    break_loop()
    assert facade.call_sync(use) == 2
    assert opened[0] is not opened[1]


# ----------------------------------------------------------------------------------------- a task killed by others


def test_caller_hears_when_others_cancel_its_task(facade, works):
    """A coroutine that is cancelled from within the loop ends its caller's wait with CancelledError."""

    async def cancel_me():
        asyncio.current_task().cancel()
        await asyncio.sleep(60)

    with pytest.raises(asyncio.CancelledError):
        facade.call_sync(cancel_me)
    works(facade)


def test_caller_hears_when_others_cancel_its_task_before_its_first_step(facade, in_thread, works, eventually):
    """A task cancelled before its first step never enters the coroutine: its caller hears of it all the same."""
    entered, queued = threading.Event(), threading.Event()

    async def victim():
        return "result"

    async def killer():
        entered.set()
        assert queued.wait(20)
        for _ in range(4):
            await asyncio.sleep(0)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    killing = in_thread(facade.call_sync, killer)
    assert entered.wait(20)
    call = in_thread(facade.call_sync, victim)
    eventually(lambda: any(record.state == "queued" for record in facade.in_flight()))
    queued.set()
    assert isinstance(call.exception(HEARD_WITHIN), (asyncio.CancelledError, type(None)))
    killing.result(20)
    works(facade)
