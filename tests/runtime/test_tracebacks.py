"""User exceptions come out as they are: with the frames that tell the story, flat, and without reference cycles."""

import asyncio
import gc
import sys
import threading
import traceback
import weakref
from contextlib import contextmanager

import pytest

from tta_sync import caller_step, run_on_caller, step, thread_step
from tta_sync.exceptions import DeadlineExceededError, SaturatedError
from tta_sync.primitives import ParallelPrimitive


class Mine(Exception):
    """A user's own."""


def names_of(error):
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def length_of(error):
    length, entry = 0, error.__traceback__
    while entry is not None:
        length, entry = length + 1, entry.tb_next
    return length


def met(function, *args, **keywords):
    """What *function* raises, which is expected to raise."""
    try:
        function(*args, **keywords)
    except BaseException as error:
        return error
    raise AssertionError("it did not raise")


# ----------------------------------------------------------------------------------------------- the story it tells


def test_traceback_tells_callers_and_coroutines_frames_when_a_coroutine_raises(facade):
    """The traceback goes from the caller's line to the line that raised, in at most 10 frames, with its source."""

    async def deepest():
        raise Mine("deep down")

    async def outer():
        await deepest()

    def caller():
        facade.call_sync(outer)

    error = met(caller)
    names = names_of(error)
    assert [name for name in names if name in ("caller", "outer", "deepest")] == ["caller", "outer", "deepest"]
    assert names[-1] == "deepest"
    assert len(names) <= 10
    assert "deep down" in "".join(traceback.format_exception(error))
    assert error.__cause__ is None
    assert error.__context__ is None


def test_cause_and_context_are_kept_when_a_user_raises_from(facade):
    """``raise ... from ...`` inside the coroutine comes out with its cause."""
    cause = KeyError("the cause")

    async def outer():
        try:
            raise cause
        except KeyError as error:
            raise Mine from error

    assert met(facade.call_sync, outer).__cause__ is cause


def test_error_is_the_same_object_when_it_comes_out(facade):
    """User exceptions pass through as themselves, groups and BaseExceptions too."""
    for error in (Mine("a"), ExceptionGroup("g", [Mine("b")]), BaseExceptionGroup("g", [KeyboardInterrupt()])):

        async def outer(error=error):
            raise error

        assert met(facade.call_sync, outer) is error


# ---------------------------------------------------------------------------------------------- flat for ever


async def plain(error):
    raise error


async def through_helpers(error):
    def one():
        def two():
            raise error

        two()

    await asyncio.sleep(0)
    one()


async def in_a_subtask(error):
    await asyncio.gather(plain(error))


async def in_a_caller_step(error):
    def fail():
        raise error

    await run_on_caller(fail)


async def in_a_thread(error):
    def fail():
        raise error

    await asyncio.to_thread(fail)


async def caught_and_raised_again(error):
    try:
        await through_helpers(error)
    except Mine as again:
        raise again


WAYS = [plain, through_helpers, in_a_subtask, in_a_caller_step, in_a_thread, caught_and_raised_again]


def is_flat(raise_once, times=1000, longest=None):
    """Raise one object *times* times; fail if its traceback, its notes or its context grow."""
    lengths, contexts = [], []
    for number in range(times):
        error = met(raise_once)
        lengths.append(length_of(error))
        assert lengths[-1] <= 200, "it grows and grows"
        if number < 2 or number % 50 == 0:
            contexts.append(len("".join(traceback.format_exception(error))))
        error.__context__ = None  # the next raise sets it anew: only one level may come of it
    assert max(lengths[10:]) <= max(lengths[:2]), lengths[:20]
    assert max(contexts[2:]) <= max(contexts[:2]) * 1.01
    if longest is not None:
        assert max(lengths) <= longest


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_traceback_stays_flat_when_one_object_is_raised_a_thousand_times(facade, way):
    """An exception object that is raised again and again has the frames of the latest raise only."""
    error = Mine("always the same")
    is_flat(lambda: facade.call_sync(way, error), longest=10 if way is plain else 20)


FLOWS = {
    "step": lambda fail: step(fail),
    "caller_step": lambda fail: caller_step(fail),
    "thread_step": lambda fail: thread_step(fail),
    "sequence": lambda fail: step(lambda data: data) >> fail >> (lambda data: data),
    "parallel": lambda fail: ParallelPrimitive([step(fail), step(lambda data: data)]),
}


@pytest.mark.parametrize("flow", FLOWS)
def test_traceback_stays_flat_when_a_workflow_raises_one_object_a_thousand_times(facade, flow):
    """The same through run_sync and composed steps, notes included."""
    error = Mine("always the same")

    def fail(data):
        raise error

    workflow = FLOWS[flow](fail)
    is_flat(lambda: facade.run_sync(workflow, 1), longest=30)
    assert len(getattr(error, "__notes__", [])) <= 5


def test_traceback_stays_flat_when_a_nested_call_raises_one_object(facade):
    """The same through a call inside a caller step: the story has both calls, and does not grow."""
    error = Mine("always the same")

    async def outer():
        await run_on_caller(facade.call_sync, plain, error)

    names = names_of(met(facade.call_sync, outer))
    assert [name for name in names if name in ("outer", "plain")] == ["outer", "plain"]
    is_flat(lambda: facade.call_sync(outer), longest=24)


def test_story_of_a_nested_call_is_kept_when_a_helper_raises_its_error_again(facade):
    """The frames of a nested call are part of this raise, also when a helper raises its error again."""

    def again(error):
        raise error

    async def outer():
        try:
            await run_on_caller(facade.call_sync, plain, Mine("new each time"))
        except Mine as error:
            again(error)

    names = names_of(met(facade.call_sync, outer))
    assert [name for name in names if name in ("outer", "again", "plain")] == ["outer", "again", "outer", "plain"]


def test_traceback_stays_bounded_when_eight_threads_raise_one_object_at_once(facade, in_thread):
    """One object raised to several callers at once: nobody's traceback grows without bound, nothing breaks."""
    error = Mine("shared")

    def caller():
        return max(length_of(met(facade.call_sync, plain, error)) for _ in range(300))

    assert max(future.result(30) for future in [in_thread(caller) for _ in range(8)]) <= 100
    facade.call_sync(asyncio.sleep, 0)
    assert length_of(met(facade.call_sync, plain, error)) <= 100


# ------------------------------------------------------------------------------------------ no reference cycles


@contextmanager
def collector_off():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Thing:
    """Something that can be referred to weakly."""


class Raised(Exception):
    """An error that knows a thing, as errors know responses and frames know clients."""


def leave_the_loop_time(facade):
    """The loop lets go of a call's task a moment after it has answered."""
    for _ in range(3):
        facade.call_sync(asyncio.sleep, 0)


async def returns_its_argument(thing):
    await asyncio.sleep(0)
    return thing


async def raises_with(thing):
    kept = thing
    raise Raised(kept)


async def raises_in_a_step_with(thing):
    def fail():
        raise Raised(thing)

    await run_on_caller(fail)


async def gathers(thing):
    await asyncio.gather(raises_with(thing), asyncio.sleep(0), return_exceptions=False)


async def sleeps_with(thing):
    await asyncio.sleep(3600)
    return thing


async def answers_late_with(thing):
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        raise Raised(thing) from None


def nested(facade):
    async def nested(thing):
        await run_on_caller(facade.call_sync, raises_with, thing)

    return nested


CASES = {
    "result": (lambda facade: returns_its_argument, None, ()),
    "error": (lambda facade: raises_with, None, Raised),
    "error in a caller step": (lambda facade: raises_in_a_step_with, None, Raised),
    "error in a subtask": (lambda facade: gathers, None, Raised),
    "error in a nested call": (nested, None, Raised),
    "deadline": (lambda facade: sleeps_with, 0.01, DeadlineExceededError),
    "late error": (lambda facade: answers_late_with, 0.01, DeadlineExceededError),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_for_the_collector_when_a_call_is_over(facade, eventually, case):
    """What a call was given, and the error that it raised, are free as soon as the caller lets go of them."""
    make, timeout, expected = CASES[case]
    function = make(facade)
    facade.call_sync(asyncio.sleep, 0)

    def once():
        thing = Thing()
        refs = [weakref.ref(thing)]
        try:
            facade.call_sync(function, thing, timeout=timeout)
        except expected as error:
            refs.append(weakref.ref(error))
        return refs

    with collector_off():
        refs = once()
        leave_the_loop_time(facade)
        assert len(refs) == (1 if expected == () else 2)
        eventually(lambda: not any(ref() for ref in refs), within=20, what="the end of what only the call referred to")


def test_nothing_waits_for_the_collector_when_a_call_was_interrupted(facade, interrupt, eventually):
    """The same for an interrupt in the wait."""

    def once():
        thing = Thing()

        async def interrupted():
            interrupt(KeyboardInterrupt())
            await sleeps_with(thing)

        refs = [weakref.ref(thing)]
        try:
            facade.call_sync(interrupted)
        except KeyboardInterrupt as error:
            refs.append(weakref.ref(error.__traceback__.tb_frame.f_code))  # alive: proves only that it came
            del error
        return refs[:1]

    with collector_off():
        refs = once()
        leave_the_loop_time(facade)
        eventually(lambda: not any(ref() for ref in refs), within=2)


def test_nothing_waits_for_the_collector_when_a_call_was_refused(make_facade, in_thread, eventually):
    """The same for a call that found the facade full."""
    facade, release, inside = make_facade(max_in_flight=1), threading.Event(), threading.Event()

    async def hold():
        inside.set()
        while not release.is_set():
            await asyncio.sleep(0.002)

    holding = in_thread(facade.call_sync, hold)
    assert inside.wait(20)

    def once():
        thing = Thing()
        refs = [weakref.ref(thing)]
        try:
            facade.call_sync(returns_its_argument, thing)
        except SaturatedError as error:
            refs.append(weakref.ref(error))
        return refs

    with collector_off():
        refs = once()
        assert len(refs) == 2
        eventually(lambda: not any(ref() for ref in refs), within=2)
    release.set()
    holding.result(20)


def test_workflow_and_context_are_free_when_run_sync_is_over(facade, eventually):
    """The same for run_sync: the data, and a result that nobody keeps."""

    def once():
        thing = Thing()
        facade.run_sync(step(lambda data: data) >> caller_step(lambda data: data), thing)
        return weakref.ref(thing)

    with collector_off():
        ref = once()
        leave_the_loop_time(facade)
        eventually(lambda: ref() is None, within=2)


def test_collector_finds_nothing_when_a_thousand_calls_are_over(facade):
    """A thousand calls and raises leave no garbage that is ours for the collector to find."""
    facade.call_sync(asyncio.sleep, 0)

    def once():
        facade.call_sync(returns_its_argument, None)
        met(facade.call_sync, raises_with, None)

    once()
    with collector_off():
        before = sys.getrefcount(facade)
        for _ in range(500):
            once()
        leave_the_loop_time(facade)
        assert sys.getrefcount(facade) <= before + 2
        assert gc.collect() < 100  # one object left by each call would make a thousand
