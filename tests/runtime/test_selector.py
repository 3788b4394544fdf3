"""The loop's own selector: bells, descriptors, short waits, and the platforms and policies that have none."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import resource
import select
import selectors
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tta_sync.facade import SyncFacade
from tta_sync.runtime import driven, loop, selector
from tta_sync.runtime.selector import BellSelector


@pytest.fixture
def bell():
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def answers():
    return []


@pytest.fixture
def bells(bell, answers):
    """A selector whose answers are counted; they say that it may go on waiting where ``goes_on`` is set."""

    def answer(alone):
        answers.append("alone" if alone else "not alone")
        return made.goes_on

    with contextlib.closing(BellSelector(bell, answer)) as made:
        made.goes_on = False
        yield made


class _Spy:
    """The select module, with a note of who waited for how long."""

    EPOLLIN, EPOLLOUT = select.EPOLLIN, select.EPOLLOUT

    def __init__(self):
        self.waits = []

    def select(self, reading, writing, failing, timeout):
        self.waits.append(timeout)
        return [], [], []


# ------------------------------------------------------------------------------------------------------- the selector


def test_bell_is_answered_once_per_ring_and_never_read(bells, bell, answers):
    """Watched edge by edge: an unread bell does not ring again, the next ring does."""
    os.eventfd_write(bell, 1)
    assert bells.select(5) == []
    assert answers == ["alone"]
    assert bells.select(0) == []
    assert answers == ["alone"]
    os.eventfd_write(bell, 1)
    bells.select(5)
    assert answers == ["alone"] * 2
    assert os.eventfd_read(bell) == 2


def test_descriptors_are_reported_as_asyncio_asks_for_them(bells, answers):
    """Readable, writable, both, and none after unregistering: what the standard selector says."""
    here, there = socket.socketpair()
    with here, there:
        bells.register(here, selector.selectors.EVENT_READ, "reader")
        assert bells.select(0) == []
        there.send(b"x")
        ((key, events),) = bells.select(5)
        assert (key.data, events) == ("reader", selector.selectors.EVENT_READ)
        both = selector.selectors.EVENT_READ | selector.selectors.EVENT_WRITE
        bells.modify(here, both, "both")
        assert [(key.data, events) for key, events in bells.select(None)] == [("both", both)]
        bells.unregister(here)
        assert bells.select(0) == []
    assert answers == []


def test_short_waits_are_asked_of_what_counts_microseconds(bells, monkeypatch):
    """epoll would round 0.4 ms up to 1 ms; a wait of a second may be rounded."""
    spy = _Spy()
    monkeypatch.setattr(selector, "select", spy)
    bells.select(0.0004)
    assert spy.waits == [0.0004]
    bells._waitable = None  # a descriptor that select(2) cannot take
    bells.select(0.0004)
    assert spy.waits == [0.0004]


def test_short_wait_ends_when_a_descriptor_or_the_bell_has_news(bells, bell, answers):
    """The epoll descriptor itself is waited for, so nothing is overslept."""
    here, there = socket.socketpair()
    with here, there:
        bells.register(here, selector.selectors.EVENT_READ)
        there.send(b"x")
        assert len(bells.select(selector.SHORT * 0.99)) == 1
        bells.unregister(here)
    threading.Timer(0.01, os.eventfd_write, (bell, 1)).start()
    give_up = time.monotonic() + 5
    while not answers and time.monotonic() < give_up:
        assert bells.select(selector.SHORT * 0.99) == []
    assert answers == ["alone"]


def test_signal_that_interrupts_a_wait_is_no_news(bells, monkeypatch):
    """Where a wait was interrupted, asyncio counts the time anew."""

    class Interrupted(_Spy):
        def select(self, *arguments):
            raise InterruptedError

    monkeypatch.setattr(selector, "select", Interrupted())
    assert bells.select(0.01) == []


def test_wait_goes_on_when_the_answer_leaves_nothing_to_do(bells, bell, answers):
    """A bell ends a wait only where its answer gave the loop something to do; a descriptor always does."""
    here, there = socket.socketpair()
    real = bells._answer

    def answer(alone):
        if not answers:
            there.send(b"x")  # not before: a selector that comes late would find both at once
        return real(alone)

    with here, there:
        bells.register(here, selectors.EVENT_READ)
        bells.goes_on = True
        bells._answer = answer
        threading.Timer(0.01, os.eventfd_write, (bell, 1)).start()
        assert [key.fileobj for key, _ in bells.select(None)] == [here]
        assert answers == ["alone"]
        os.eventfd_write(bell, 1)  # both at once, and callers that never cease to ring
        assert [key.fileobj for key, _ in bells.select(None)] == [here]
        assert answers == ["alone", "not alone"]
        bells.unregister(here)
    bells.goes_on = False
    os.eventfd_write(bell, 1)
    assert bells.select(None) == []
    bells.goes_on = True
    os.eventfd_write(bell, 1)
    assert bells.select(5) == []  # the time that is left may be less now


# --------------------------------------------------------------------------------------------------- with the loop


def test_call_takes_its_first_step_in_the_turn_of_its_bell():
    """No turn of the loop lies between the ring and the coroutine, nor ends with it if that was all."""
    facade = SyncFacade()
    turns = []

    async def count_turns():
        running = asyncio.get_running_loop()
        real = running._selector.select

        def counted(timeout=None):
            found = real(timeout)
            turns.append(timeout)
            return found

        running._selector.select = counted

    async def turns_until(before):
        return len(turns) - before

    try:
        facade.call_sync(count_turns)
        # The watchdog asks for a turn of its own now and then.
        assert min(facade.call_sync(turns_until, len(turns)) for _ in range(20)) == 0
    finally:
        facade.shutdown(0)


def test_descriptor_of_a_new_reader_is_left_alone_when_a_call_closes_the_old_one(in_thread, eventually):
    """A first step runs when asyncio has dealt with what it found: its number may be another's afterwards."""
    facade = SyncFacade()
    here, there = socket.socketpair()
    new_here, new_there = socket.socketpair()
    blocked, release, heard = threading.Event(), threading.Event(), []

    async def listen():
        running = asyncio.get_running_loop()
        running.add_reader(here, here.recv, 1)

    async def block():
        await asyncio.sleep(0)  # in a later step, not in the answer to the bell
        blocked.set()
        assert release.wait(20)

    async def exchange():
        running, number = asyncio.get_running_loop(), here.fileno()
        running.remove_reader(here)
        os.dup2(new_here.fileno(), number)  # closes the old one
        running.add_reader(number, lambda: heard.append(os.read(number, 1)))

    with here, there, new_here, new_there:
        try:
            facade.call_sync(listen)
            blocking = in_thread(facade.call_sync, block)
            assert blocked.wait(20)
            there.send(b"x")
            exchanging = in_thread(facade.call_sync, exchange)
            eventually(lambda: facade._loop._queue)  # the bell and the descriptor are ready at once
            release.set()
            blocking.result(20)
            exchanging.result(20)
            new_there.send(b"y")
            eventually(lambda: heard == [b"y"])
        finally:
            facade.shutdown(0)


def test_loop_has_time_for_others_when_calls_never_cease():
    """Calls that come while others do their first steps wait until the loop has looked at all else."""
    facade = SyncFacade()
    stopped = threading.Event()

    async def again():
        if not stopped.is_set():
            managed.submit(managed.new_call(again, (), None, None, None, None, contextvars.copy_context()))

    try:
        facade.call_sync(asyncio.sleep, 0)
        managed = facade._loop
        facade.call_sync(again)
        managed.post(stopped.set)
        assert stopped.wait(20)
    finally:
        stopped.set()
        facade.shutdown(0)


def test_call_is_found_when_an_exception_struck_while_its_bell_was_answered(monkeypatch):
    """The edge is gone with the exception: the loop looks into the queue when it goes on."""
    monkeypatch.setattr(loop, "FIRST_WAIT", 60.0)  # the caller's own look would find it too
    facade = SyncFacade()

    async def answer():
        return 42

    try:
        assert facade.call_sync(answer) == 42
        managed = facade._loop
        real, struck = managed._drain, []

        def strike(alone):
            if not struck:
                struck.append(1)
                raise ZeroDivisionError("thrown into the loop thread")
            real()

        managed.loop._selector._answer = strike
        begun = time.monotonic()
        while not struck and time.monotonic() - begun < 20:
            # The loop may still be busy with the call before, and find this one without its bell.
            assert facade.call_sync(answer) == 42
        assert struck
        assert time.monotonic() - begun < 30
    finally:
        facade.shutdown(0)


def test_background_work_goes_on_while_callers_drive_without_pause():
    """Callers look at the descriptors every few turns: a reader is served between two of their calls."""
    facade = SyncFacade(drive="caller")
    here, there = socket.socketpair()
    heard = asyncio.Event()

    async def listen():
        asyncio.get_running_loop().add_reader(here, heard.set)

    async def nothing():
        pass

    try:
        with here, there:
            facade.call_sync(listen)
            there.send(b"x")
            for _ in range(driven.UNPOLLED + 2):
                facade.call_sync(nothing)
            assert heard.is_set()

            async def stop_listening():
                asyncio.get_running_loop().remove_reader(here)

            facade.call_sync(stop_listening)
    finally:
        facade.shutdown(0)


def test_callbacks_go_on_while_callers_drive_without_pause():
    """What is queued waits for so many calls at most that end with their first steps; none of these halts the loop."""
    facade, called = SyncFacade(drive="caller"), []

    async def queue():
        asyncio.get_running_loop().call_soon(called.append, 1)

    async def nothing():
        pass

    try:
        for _ in range(3):
            facade.call_sync(queue)
            for _ in range(driven.UNPOLLED):
                facade.call_sync(nothing)
                assert not facade._loop.loop._stopping
            assert called.pop()
            assert not called
    finally:
        facade.shutdown(0)


@pytest.mark.parametrize("drive", ["thread", "caller"])
def test_loop_works_where_its_descriptor_is_too_high_for_select(drive):
    """select(2) takes descriptors below 1024: beyond, short waits are asked of epoll as everywhere else."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2048:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    facade = SyncFacade(drive=drive)
    filling = [os.open(os.devnull, os.O_RDONLY) for _ in range(selector.SELECTABLE)]

    async def nap():
        await asyncio.sleep(0.001)
        return asyncio.get_running_loop()._selector.fileno()

    try:
        assert facade.call_sync(nap, timeout=20) >= selector.SELECTABLE
    finally:
        for descriptor in filling:
            os.close(descriptor)
        facade.shutdown(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ------------------------------------------------------------------------------------------------- other platforms

CALLS = """
    import asyncio, threading
    from tta_sync import SyncFacade

    async def where():
        await asyncio.sleep(0.001)
        loop = asyncio.get_running_loop()
        return type(loop).__module__, type(getattr(loop, "_selector", None)).__name__

    for options in OPTIONS:
        facade = SyncFacade(**options)
        print(*facade.call_sync(where))
        threads = [threading.Thread(target=facade.call_sync, args=(where,)) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert facade.stats().calls == 9
        facade.shutdown(0)
"""


@pytest.mark.parametrize(
    ("before", "options", "expected"),
    [
        ("", "[{}, {'drive': 'caller'}]", ["BellSelector", "BellSelector"]),
        ("import os; del os.eventfd", "[{}, {'drive': 'caller'}]", ["EpollSelector", "EpollSelector"]),
        (
            "import selectors; del selectors.EpollSelector; selectors.DefaultSelector = selectors.PollSelector",
            "[{}, {'drive': 'caller'}]",
            ["PollSelector", "PollSelector"],
        ),
        ("import uvloop; uvloop.install()", "[{}]", ["uvloop"]),
    ],
    ids=["linux", "no eventfd", "no epoll", "uvloop as the policy"],
)
def test_calls_are_answered_where_the_platform_or_the_policy_differs(before, options, expected):
    """Without eventfd, without epoll, under another policy: the same facade, a little slower."""
    source = f"{before}\nOPTIONS = {options}\n{textwrap.dedent(CALLS)}"
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    for line, word in zip(ended.stdout.splitlines(), expected, strict=True):
        assert word in line
