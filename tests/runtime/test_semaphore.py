"""What callers wait on: no wake-up is lost, none is counted twice, and a lock does where there is no such thing."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any

import pytest

from tta_sync import SyncFacade
from tta_sync.runtime import native
from tta_sync.runtime.semaphore import Semaphore


def test_waiter_goes_on_when_released_before_or_after_it_waits(in_thread: Any) -> None:
    """A release is not lost when it comes first."""
    semaphore = Semaphore()
    semaphore.release()
    semaphore.acquire(True, 20)
    waiting = in_thread(semaphore.acquire, True, -1)
    time.sleep(0.01)  # most likely it waits by now; the promise holds either way
    semaphore.release()
    waiting.result(20)


def test_releases_are_one_hint_when_nobody_has_looked() -> None:
    """A thousand releases end one wait; the next one is for news that come after it."""
    semaphore = Semaphore()
    for _ in range(1000):
        semaphore.release()
    semaphore.acquire(True, 20)
    began = time.monotonic()
    semaphore.acquire(True, 0.05)
    assert time.monotonic() - began >= 0.05


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.02])
def test_wait_ends_when_its_time_is_over(seconds: float) -> None:
    """In seconds, and not before."""
    semaphore = Semaphore()
    began = time.monotonic()
    semaphore.acquire(True, seconds)
    assert seconds <= time.monotonic() - began < 10


def wait_for_ever(semaphore: Semaphore, timeout: float) -> None:
    while True:  # it may return early
        semaphore.acquire(True, timeout)


def test_exception_of_a_signal_comes_out_of_the_wait_and_the_next_hint_is_heard() -> None:
    """As from a lock: RQ's alarm, Ctrl-C."""
    semaphore = Semaphore()

    class StruckError(Exception):
        pass

    def strike(number: int, frame: Any) -> None:
        raise StruckError

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for timeout in (-1, 60.0):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with pytest.raises(StruckError):
                wait_for_ever(semaphore, timeout)
            semaphore.release()
            semaphore.acquire(True, 20)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_no_news_are_missed_when_releases_race_with_looks(in_thread: Any) -> None:
    """Two threads hand each other 20,000 turns; a lost one would cost its waiter a minute."""
    turn, ends = [0], [Semaphore(), Semaphore()]
    interval = sys.getswitchinterval()

    def play(who: int) -> int:
        looks = 0
        for number in range(10_000):
            while turn[0] != 2 * number + who:
                ends[who].acquire(True, 60)
                looks += 1
            turn[0] += 1
            ends[1 - who].release()
        return looks

    sys.setswitchinterval(1e-5)
    try:
        began = time.monotonic()
        for looks in [player.result(50) for player in [in_thread(play, 0), in_thread(play, 1)]]:
            assert looks < 25_000
        assert time.monotonic() - began < 50
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("threads", [1, 8])
def test_calls_are_answered_when_there_is_no_such_thing(
    monkeypatch: pytest.MonkeyPatch, in_thread: Any, threads: int
) -> None:
    """Another platform, another C library: a raw lock does, more slowly."""
    monkeypatch.setattr(native, "Semaphore", None)
    assert type(native.new_waiter()) is type(threading.Lock())
    facade = SyncFacade()

    async def echo(value: int) -> int:
        return value

    try:
        calls = [in_thread(lambda: [facade.call_sync(echo, n) for n in range(100)]) for _ in range(threads)]
        assert [call.result(20) for call in calls] == [list(range(100))] * threads
    finally:
        facade.shutdown()
