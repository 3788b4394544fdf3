"""max_in_flight: a limit that holds, and a refusal that does not wait."""

import asyncio
import threading
import time

import pytest

from tta_sync.exceptions import DeadlineExceededError, SaturatedError


def test_call_is_refused_at_once_when_the_facade_is_full(make_facade, in_thread, works, eventually):
    """One call too many is refused at once, with a positive retry_after in seconds; a free place is taken again."""
    facade = make_facade(max_in_flight=2)
    inside, release, begun = [], threading.Event(), []

    async def hold():
        inside.append(1)
        while not release.is_set():
            await asyncio.sleep(0.002)

    async def never():
        begun.append(1)

    held = [in_thread(facade.call_sync, hold) for _ in range(2)]
    eventually(lambda: len(inside) == 2)
    before = time.monotonic()
    with pytest.raises(SaturatedError) as caught:
        facade.call_sync(never)
    assert time.monotonic() - before < 2  # refused, not queued: the places stay taken until `release`
    assert caught.value.retry_after > 0
    assert caught.value.limit == 2
    release.set()
    for future in held:
        future.result(20)
    works(facade)
    assert begun == []


def test_limit_is_never_exceeded_when_many_threads_call(make_facade, in_thread, many_switches):
    """However 32 threads are interleaved, never more than the limit are inside at once, and some always get in."""
    facade = make_facade(max_in_flight=3)
    inside, highest, done, refused = [0], [0], [], []
    least, most = time.monotonic() + 0.8, time.monotonic() + 20

    async def work():
        inside[0] += 1
        highest[0] = max(highest[0], inside[0])
        await asyncio.sleep(0)
        inside[0] -= 1

    def goes_on():  # on a busy machine longer
        now = time.monotonic()
        return now < least or (now < most and not (len(done) > 10 and len(refused) > 10))

    def caller():
        while goes_on():
            try:
                facade.call_sync(work)
                done.append(1)
            except SaturatedError:
                refused.append(1)

    for future in [in_thread(caller) for _ in range(32)]:
        future.result(30)
    assert len(done) > 10
    assert len(refused) > 10
    assert highest[0] <= 3


def test_nobody_is_refused_when_as_many_threads_call_as_may(make_facade, in_thread, many_switches):
    """As many callers as the limit allows, each with one call at a time, are never refused."""
    facade = make_facade(max_in_flight=4)

    async def work():
        await asyncio.sleep(0)

    def caller():
        for _ in range(300):
            facade.call_sync(work)

    for future in [in_thread(caller) for _ in range(4)]:
        future.result(60)


def test_late_thread_is_refused_when_it_was_preempted_on_its_way_in(make_facade, in_thread, monkeypatch, eventually):
    """A thread that is preempted anywhere between its first step and its admission does not get in over the limit."""
    facade = make_facade(max_in_flight=1)
    inside, release = [], threading.Event()

    async def work():
        inside.append(1)
        while not release.is_set():
            await asyncio.sleep(0.002)

    async def nothing():
        pass

    facade.call_sync(nothing)
    held, go_on = threading.Event(), threading.Event()
    real, slow = time.monotonic, []

    def slow_clock():
        now = real()
        if threading.get_ident() in slow and not go_on.is_set():
            held.set()
            go_on.wait(20)
        return now

    def preempted():
        slow.append(threading.get_ident())
        facade.call_sync(work)

    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", slow_clock)
        early = in_thread(preempted)
        held.wait(3)  # where nobody looks at the clock on the way in, there is nothing to be preempted
        late = in_thread(facade.call_sync, work)
        eventually(lambda: inside)
        go_on.set()
        eventually(lambda: early.done() or late.done() or len(inside) > 1)
    release.set()
    outcomes = [future.exception(20) for future in (early, late)]
    assert len(inside) == 1, f"{len(inside)} calls were inside at once"
    assert sum(isinstance(outcome, SaturatedError) for outcome in outcomes) == 1


def test_one_is_admitted_when_two_come_for_the_last_place_at_once(make_facade, in_thread, works, monkeypatch):
    """Of two callers that are both on their way in before either is judged, exactly one gets the place."""
    facade = make_facade(max_in_flight=1)
    works(facade)
    both, real = threading.Barrier(2), facade._loop.admit
    done = threading.Barrier(2)

    def admit(call, limit):
        both.wait(20)
        try:
            real(call, limit)
        finally:
            done.wait(20)

    monkeypatch.setattr(facade._loop, "admit", admit)
    for _ in range(50):
        outcomes = [
            future.exception(20) for future in [in_thread(facade.call_sync, asyncio.sleep, 0) for _ in range(2)]
        ]
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType", "SaturatedError"]


def test_place_stays_taken_when_an_orphan_runs_on(make_facade, eventually, expires, works):
    """An orphan still counts against the limit, until it ends; then its place is free again."""
    facade = make_facade(max_in_flight=1, grace=0.05)
    release = threading.Event()

    async def stubborn():
        while not release.is_set():
            try:
                await asyncio.sleep(0.002)
            except asyncio.CancelledError:
                pass

    async def nothing():
        pass

    expires(facade.call_sync, stubborn, timeout=0.05)
    with pytest.raises(SaturatedError):
        facade.call_sync(nothing)
    release.set()
    eventually(lambda: not facade.in_flight())
    works(facade)


def test_place_is_free_again_when_a_call_was_given_up_before_it_began(make_facade, in_thread, eventually):
    """A call that never began, because the loop was blocked, leaves no place taken behind."""
    facade = make_facade(max_in_flight=2, grace=0.05)
    inside, release = threading.Event(), threading.Event()

    async def block():
        inside.set()
        release.wait(20)

    async def one():
        return 1

    blocking = in_thread(facade.call_sync, block)
    assert inside.wait(20)
    with pytest.raises(DeadlineExceededError):
        facade.call_sync(one, timeout=0.05)
    release.set()
    blocking.result(20)
    eventually(lambda: not facade.in_flight())

    meeting = threading.Barrier(2)

    async def meet():
        await asyncio.to_thread(meeting.wait, 10)

    for future in [in_thread(facade.call_sync, meet) for _ in range(2)]:
        future.result(20)  # both places can be held at once


@pytest.mark.parametrize("nested", [1])
def test_nested_call_is_refused_when_its_outer_call_took_the_last_place(make_facade, works, nested):
    """A caller step that calls again counts as a call of its own: refused when full, not a deadlock."""
    from tta_sync import run_on_caller

    facade = make_facade(max_in_flight=nested)

    async def inner():
        return 1

    async def outer():
        return await run_on_caller(facade.call_sync, inner)

    with pytest.raises(SaturatedError):
        facade.call_sync(outer)
    works(facade)
