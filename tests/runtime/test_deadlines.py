"""Deadlines: one error type, enforced whatever the coroutine does, and nothing runs on unseen."""

import asyncio
import re
import sys
import threading
import time

import pytest

from tta_sync import WorkflowContext, current_context, run_on_caller, step
from tta_sync.context import Deadline
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError


def test_coroutine_is_cleaned_up_before_the_error_comes_out_when_its_deadline_passes(facade, expires, works):
    """DeadlineExceededError, which is a TimeoutError and knows the limit, comes after the coroutine's clean-up."""
    cleaned = []

    async def sleeper():
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.05)
            cleaned.append(1)

    caught = expires(facade.call_sync, sleeper, timeout=0.5)
    assert cleaned == [1]
    assert caught.value.deadline == 0.5
    assert isinstance(caught.value, TimeoutError)
    assert facade.stats().orphans == 0
    works(facade)


def test_call_returns_when_it_ends_before_its_deadline(facade):
    """A deadline that does not pass changes nothing."""

    async def quick():
        await asyncio.sleep(0.01)
        return 42

    assert facade.call_sync(quick, timeout=30) == 42


@pytest.mark.parametrize("timeout", [0, -1, -0.001])
def test_nothing_begins_when_the_timeout_is_spent_already(facade, timeout):
    """A call whose time is up is refused before it begins."""
    begun = []

    async def late():
        begun.append(1)

    with pytest.raises(DeadlineExceededError):
        facade.call_sync(late, timeout=timeout)
    with pytest.raises(DeadlineExceededError):
        facade.run_sync(step(lambda data: begun.append(1)), 1, timeout=timeout)
    facade.call_sync(asyncio.sleep, 0)
    assert begun == []


def test_call_has_no_limit_when_the_timeout_is_infinite_or_huge(facade):
    """math.inf means no limit, and a limit beyond what the system's clocks hold does not break the wait."""

    async def quick():
        await asyncio.sleep(0.03)
        return 42

    assert facade.call_sync(quick, timeout=float("inf")) == 42
    assert facade.call_sync(quick, timeout=1e12) == 42


def test_timeout_is_refused_when_it_is_not_a_number(facade):
    """NaN, which compares to nothing, is refused with a ConfigurationError."""
    with pytest.raises(ConfigurationError):
        facade.call_sync(asyncio.sleep, 0, timeout=float("nan"))


def test_facades_default_holds_when_a_call_names_none(make_facade):
    """default_timeout is every call's limit; a call that names its own has that instead."""
    facade = make_facade(default_timeout=0.05)
    with pytest.raises(DeadlineExceededError) as caught:
        facade.call_sync(asyncio.sleep, 3600)
    assert caught.value.deadline == 0.05
    assert facade.call_sync(asyncio.sleep, 0.1, "own", timeout=20) == "own"


@pytest.mark.parametrize(("own", "timeout", "expected"), [(0.5, 60, 0.5), (60, 0.5, 0.5), (0.5, None, 0.5)])
def test_earlier_one_holds_when_the_context_has_a_deadline_too(facade, own, timeout, expected):
    """Of the context's deadline and the call's timeout the earlier one is enforced, and the steps see it."""
    seen, context = [], WorkflowContext(deadline=Deadline.after(own))
    before = context.deadline

    @step
    async def sleeper(data, context):
        seen.append(context.deadline.remaining())
        await asyncio.sleep(3600)

    begun = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        facade.run_sync(sleeper, 1, context, timeout=timeout)
    assert time.monotonic() - begun < 20
    assert seen[0] <= expected
    assert context.deadline is before  # the caller's context is as it was


def test_deadline_carries_over_when_a_caller_step_calls_again(facade):
    """A call inside a call inherits the deadline: the inner one ends when the outer one's time is up."""
    remaining = []

    async def inner():
        remaining.append(current_context().deadline.remaining())
        await asyncio.sleep(3600)

    @step
    async def outer(data, context):
        return await run_on_caller(facade.call_sync, inner)

    begun = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        facade.run_sync(outer, 1, timeout=0.5)
    assert time.monotonic() - begun < 20
    assert 0 < remaining[0] <= 0.5


# -------------------------------------------------------------------------------------------------- late results


@pytest.mark.parametrize("answer", ["returns", "raises"])
def test_late_answer_is_discarded_when_the_cancel_is_turned_into_one(facade, expires, works, answer):
    """A coroutine that answers its cancellation with a result or an error: the deadline's error comes out."""

    async def late():
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if answer == "raises":
                raise ValueError("mine") from None
            return "late"

    caught = expires(facade.call_sync, late, timeout=0.03)
    if answer == "raises":
        assert isinstance(caught.value.__cause__, ValueError)
    works(facade)


def test_late_result_is_discarded_when_the_caller_could_not_look_in_time(facade, works):
    """A result that comes after the deadline is discarded, even if nothing let the caller notice the time."""

    async def hog():
        while time.monotonic() < begun + 0.7:
            pass
        return "late"

    works(facade)
    before = sys.getswitchinterval()
    sys.setswitchinterval(5)  # the caller gets the interpreter only when the result is there
    begun = time.monotonic()
    try:
        with pytest.raises(DeadlineExceededError):
            facade.call_sync(hog, timeout=0.5)
    finally:
        sys.setswitchinterval(before)
    works(facade)


def test_late_result_of_a_caller_step_is_discarded_when_it_took_too_long(facade, expires, works):
    """A running caller step cannot be interrupted: the call ends when it returns, with the deadline's error."""
    cleaned, ended = [], []

    def slow():
        give_up = time.monotonic() + 20
        while not cleaned and time.monotonic() < give_up:  # the loop watches the clock while the step runs
            time.sleep(0.01)
        ended.append(1)
        return "late"

    async def outer():
        try:
            return await run_on_caller(slow)
        except asyncio.CancelledError:
            cleaned.append(list(ended))
            raise

    expires(facade.call_sync, outer, timeout=0.5)
    assert ended == [1]
    assert cleaned == [[]]  # cancelled while the step still ran
    works(facade)


def test_queued_caller_steps_never_start_when_the_deadline_has_passed(facade, works):
    """Steps that wait behind the one in which the deadline passed are not begun any more."""
    started = []

    def slow():
        started.append("slow")
        while time.monotonic() < begun + 0.7:
            time.sleep(0.01)

    async def outer():
        await asyncio.gather(run_on_caller(slow), run_on_caller(started.append, "queued"))

    begun = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        facade.call_sync(outer, timeout=0.5)
    works(facade)
    assert started == ["slow"]


def test_queued_caller_steps_never_start_when_the_loop_is_late_to_notice_the_deadline(
    facade, in_thread, works, eventually
):
    """The same while the loop, which watches the clock, is blocked: the caller looks itself before each step."""
    started, inside, release = [], threading.Event(), threading.Event()

    async def turn():
        while not inside.is_set():
            await asyncio.sleep(0.002)
        release.wait(20)  # on purpose: it blocks the loop

    def slow():
        started.append("slow")
        inside.set()
        while time.monotonic() < begun + 0.7:
            time.sleep(0.01)

    async def outer():
        await asyncio.gather(run_on_caller(slow), run_on_caller(started.append, "queued"))

    turning = in_thread(facade.call_sync, turn)
    eventually(facade.in_flight)
    threading.Timer(0.9, release.set).start()
    begun = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        facade.call_sync(outer, timeout=0.5)
    turning.result(20)
    works(facade)
    assert started == ["slow"]


# ------------------------------------------------------------------------------------------- orphans, blocked loops


def test_caller_is_told_when_its_coroutine_blocks_the_loop_past_the_deadline(facade, works):
    """Whatever a blocked loop lets through: when it comes free the answer is the deadline's error, not the result."""

    async def blocks():
        time.sleep(0.2)
        return "late"

    with pytest.raises(DeadlineExceededError):
        facade.call_sync(blocks, timeout=0.05)
    works(facade)


def test_caller_is_told_by_deadline_plus_grace_when_a_coroutine_blocks_the_loop(
    make_facade, callers_drive, eventually, caplog, workflow_events, works
):
    """With the loop blocked the caller is told all the same; the coroutine is an orphan: counted, named, located."""
    if callers_drive:
        pytest.skip("what blocks the loop blocks the caller itself, who turns it: the price of drive='caller'")
    facade = make_facade(grace=0.2)
    release = threading.Event()

    async def blocks():
        release.wait(20)

    begun = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        facade.call_sync(blocks, timeout=0.5)
    took = time.monotonic() - begun
    try:
        assert 0.65 < took < 5
        assert facade.stats().orphans == 1
        assert [record.state for record in facade.in_flight()] == ["orphaned"]
        messages = [record.getMessage() for record in caplog.records if "orphan" in record.getMessage()]
        assert len(messages) == 1
        assert blocks.__qualname__ in messages[0]
        found = re.search(re.escape(__file__) + r":(\d+) in (\S+)", messages[0])
        assert int(found[1]) == blocks.__code__.co_firstlineno + 1
        assert found[2].endswith("blocks")
        (event,) = [event for event in workflow_events if type(event).__name__ == "CallOrphaned"]
        assert event.step == blocks.__qualname__
    finally:
        release.set()
    eventually(lambda: facade.in_flight() == [])
    works(facade)
    assert facade.stats().orphans == 1


def test_other_callers_are_told_in_time_when_one_coroutine_blocks_the_loop(make_facade, in_thread, works):
    """A call that waits behind a blocked loop ends by deadline + grace too, and its coroutine is never begun."""
    facade = make_facade(grace=0.1)
    inside, release, begun = threading.Event(), threading.Event(), []

    async def blocks():
        inside.set()
        release.wait(20)

    async def behind():
        begun.append(1)

    blocking = in_thread(facade.call_sync, blocks)
    assert inside.wait(20)
    before = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        facade.call_sync(behind, timeout=0.1)
    assert time.monotonic() - before < 5
    release.set()
    blocking.result(20)
    works(facade)
    assert begun == []


def test_orphan_is_counted_when_the_cancel_is_swallowed(make_facade, eventually, expires, caplog, works):
    """A coroutine that swallows the deadline's cancel keeps its caller no longer than the grace."""
    facade = make_facade(grace=0.1)
    release, orphans_before = threading.Event(), []

    async def stubborn():
        orphans_before.append(facade.stats().orphans)
        while not release.is_set():
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                pass

    begun = time.monotonic()
    expires(facade.call_sync, stubborn, timeout=0.05)
    assert time.monotonic() - begun < 15
    assert facade.stats().orphans == orphans_before[0] + 1
    assert any(stubborn.__qualname__ in record.getMessage() for record in caplog.records)
    works(facade)
    release.set()
    eventually(lambda: facade.in_flight() == [])


def test_deadline_is_exact_enough_when_many_calls_have_one_each(facade, in_thread):
    """Fifty callers with deadlines of their own: each is told after its own, not with the last one."""

    def caller(timeout):
        begun = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            facade.call_sync(asyncio.sleep, 3600, timeout=timeout)
        return time.monotonic() - begun - timeout

    late = [future.result(30) for future in [in_thread(caller, 0.05 + number / 50) for number in range(25)]]
    assert min(late) >= -0.001
    assert sorted(late)[12] < 0.5
