"""in_flight() and stats(): what goes on, by name, in every state that a call can be in."""

import asyncio
import threading
import time

import pytest

from tta_sync import run_on_caller, step
from tta_sync.primitives import WorkflowPrimitive


async def answer():
    return 42


def test_stats_count_from_nothing_when_a_facade_is_new(facade):
    """A new facade has done nothing; keys work like attributes."""
    stats = facade.stats()
    assert (stats.calls, stats.orphans, stats.restarts) == (0, 0, 0)
    for name in ("calls", "orphans", "restarts", "generation", "loop_lag"):
        assert stats[name] == getattr(stats, name)
    with pytest.raises(KeyError):
        stats["nonsense"]
    assert facade.in_flight() == []


def test_calls_are_counted_exactly_when_many_threads_call(facade, in_thread):
    """Every call that began is counted once, from 16 threads too, run_sync as well as call_sync."""

    def caller():
        for _ in range(100):
            facade.call_sync(answer)
        facade.run_sync(step(lambda data: data), 1)

    for future in [in_thread(caller) for _ in range(16)]:
        future.result(30)
    assert facade.stats().calls == 16 * 101


def test_call_is_counted_when_it_was_answered_without_the_loop(facade):
    """A call that peek answered is a call like any other."""

    class Peeks(WorkflowPrimitive):
        peeks = True

        def peek(self, data, context):
            return data

        async def execute(self, data, context):
            raise AssertionError("peek has an answer")

    assert [facade.run_sync(Peeks(), number) for number in range(3)] == [0, 1, 2]
    assert facade.stats().calls == 3


def test_calls_stay_counted_when_the_facade_is_shut_down(facade):
    """The totals outlive the loop."""
    for _ in range(5):
        facade.call_sync(answer)
    facade.shutdown()
    assert facade.stats().calls == 5


def test_call_is_listed_with_name_age_state_and_thread_when_it_runs(facade, in_thread, eventually):
    """A record has the user function's qualified name, its age in seconds, its state, and its caller's thread."""
    release = threading.Event()

    async def summarise():
        while not release.is_set():
            await asyncio.sleep(0.002)

    call = in_thread(facade.call_sync, summarise)
    (record,) = eventually(lambda: [r for r in facade.in_flight() if r.state == "running"])
    assert record.name == summarise.__qualname__
    assert record.caller_thread == "caller-0"
    assert 0 <= record.age < 20
    assert record["name"] == record.name
    time.sleep(0.02)
    assert facade.in_flight()[0].age >= record.age + 0.02
    release.set()
    call.result(20)
    assert facade.in_flight() == []


def test_workflow_is_listed_by_its_own_name_when_it_has_one(facade, in_thread, eventually):
    """run_sync lists a primitive by its name."""
    release = threading.Event()

    @step(name="summary")
    async def anything(data):
        while not release.is_set():
            await asyncio.sleep(0.002)

    call = in_thread(facade.run_sync, anything, 1)
    assert eventually(facade.in_flight)[0].name == "summary"
    release.set()
    call.result(20)


def test_oldest_is_listed_first_when_several_are_in_flight(facade, in_thread, eventually):
    """Records come in the order of age."""
    release = threading.Event()

    async def wait():
        while not release.is_set():
            await asyncio.sleep(0.002)

    calls = []
    for number in range(5):
        calls.append(in_thread(facade.call_sync, wait))
        eventually(lambda number=number: len(facade.in_flight()) == number + 1)
    records = facade.in_flight()
    assert [record.caller_thread for record in records] == [f"caller-{number}" for number in range(5)]
    assert [record.age for record in records] == sorted((record.age for record in records), reverse=True)
    release.set()
    for call in calls:
        call.result(20)


def test_call_is_queued_when_the_loop_is_blocked(facade, in_thread, eventually):
    """A call that has not begun is listed as queued."""
    inside, release = threading.Event(), threading.Event()

    async def blocks():
        inside.set()
        release.wait(20)

    blocking = in_thread(facade.call_sync, blocks)
    assert inside.wait(20)
    behind = in_thread(facade.call_sync, answer)
    states = eventually(lambda: len(facade.in_flight()) == 2 and [record.state for record in facade.in_flight()])
    assert states == ["running", "queued"]
    release.set()
    blocking.result(20)
    behind.result(20)


def test_call_is_cancelling_then_orphaned_when_it_ignores_its_cancellation(make_facade, in_thread, eventually, expires):
    """A call that was told to stop is listed as cancelling; after the grace as orphaned, until it ends."""
    facade = make_facade(grace=60.0)
    release, orphans_before = threading.Event(), []

    async def stubborn():
        orphans_before.append(facade.stats().orphans)
        while not release.is_set():
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                pass

    call = in_thread(expires, facade.call_sync, stubborn, timeout=0.05)
    eventually(lambda: orphans_before and [record.state for record in facade.in_flight()] == ["cancelling"])
    facade._loop.grace = 0.0  # it is over: the caller finds out when it looks again
    call.result(20)
    (record,) = facade.in_flight()
    assert record.state == "orphaned"
    assert record.name == stubborn.__qualname__
    assert facade.stats().orphans == orphans_before[0] + 1
    release.set()
    eventually(lambda: facade.in_flight() == [])
    assert facade.stats().orphans == orphans_before[0] + 1


def test_record_says_so_when_the_calling_thread_has_ended(make_facade, in_thread, eventually, expires):
    """An orphan's caller may be gone: the record says so instead of naming a stranger or failing."""
    facade = make_facade(grace=0.02)
    release = threading.Event()

    async def stubborn():
        while not release.is_set():
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                pass

    in_thread(expires, facade.call_sync, stubborn, timeout=0.02).result(20)
    eventually(lambda: not any(thread.name == "caller-0" for thread in threading.enumerate()))
    assert "caller-0" not in facade.in_flight()[0].caller_thread
    release.set()
    eventually(lambda: facade.in_flight() == [])


def test_introspection_never_waits_when_the_loop_is_blocked(facade, in_thread):
    """stats() and in_flight() answer at once whatever the loop does, from a caller step as well."""
    inside, release = threading.Event(), threading.Event()

    async def blocks():
        inside.set()
        release.wait(20)

    blocking = in_thread(facade.call_sync, blocks)
    assert inside.wait(20)
    begun = time.monotonic()
    assert facade.stats().calls == 1
    assert len(facade.in_flight()) == 1
    assert time.monotonic() - begun < 2
    release.set()
    blocking.result(20)

    async def outer():
        return await run_on_caller(facade.in_flight)

    (record,) = facade.call_sync(outer)
    assert record.name == outer.__qualname__


def test_introspection_is_consistent_when_read_while_threads_call(facade, in_thread):
    """Reading while 8 threads call never fails, and what is listed is a call."""
    ended = threading.Event()

    def caller():
        while not ended.is_set():
            facade.call_sync(answer)

    callers = [in_thread(caller) for _ in range(8)]
    last = 0
    for _ in range(500):
        calls = facade.stats().calls
        assert calls >= last
        last = calls
        assert all(record.name == "answer" for record in facade.in_flight())
    ended.set()
    for future in callers:
        future.result(20)


def test_generation_grows_by_one_when_forked(facade, in_child):
    """stats().generation tells processes apart."""
    facade.call_sync(answer)
    assert in_child(lambda: facade.stats().generation) == str(facade.stats().generation + 1)


def test_lag_is_measured_in_seconds_when_the_loop_is_late(facade, in_thread, eventually):
    """loop_lag is small while the loop is free, and grows while it is blocked."""
    facade.call_sync(answer)
    assert 0 <= facade.stats().loop_lag < 5
    release = threading.Event()

    async def blocks():
        release.wait(20)

    call = in_thread(facade.call_sync, blocks)
    try:
        eventually(lambda: facade.stats().loop_lag > 0.15, what="a lag that grows while the loop is blocked")
    finally:
        release.set()
    call.result(20)
