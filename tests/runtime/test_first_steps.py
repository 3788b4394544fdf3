"""The loop that hands out the first step of a task: to whom, when, and what is as ever."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref

import pytest

from tta_sync.runtime.first_steps import FirstStepLoop


@pytest.fixture
def loop():
    made = FirstStepLoop()
    yield made
    made.close()


async def answer():
    await asyncio.sleep(0)
    return asyncio.current_task().get_name()


def in_turn(loop, what):
    """Run *what* as the selector does: while the loop runs, and no task does."""
    done = loop.create_future()
    loop.call_soon(lambda: done.set_result(what()))
    return loop.run_until_complete(done)


def test_first_step_is_handed_out_and_the_others_are_not(loop):
    """Whoever asks for the task runs its first step; the loop runs the rest."""
    seen = []

    async def two_steps():
        seen.append(1)
        await asyncio.sleep(0)
        seen.append(2)

    def begin():
        context = contextvars.copy_context()
        task, first_step = loop.new_task(two_steps(), "mine", context)
        assert seen == []
        context.run(first_step)
        assert seen == [1]
        return task

    task = in_turn(loop, begin)
    loop.run_until_complete(task)
    assert seen == [1, 2]
    assert task.get_name() == "mine"


def test_task_of_somebody_else_is_queued_as_ever(loop):
    """Before and after: only the task that was asked for is special."""
    for _ in range(3):
        assert loop.run_until_complete(loop.create_task(answer(), name="theirs")) == "theirs"
        context = contextvars.copy_context()
        task, first_step = in_turn(loop, lambda context=context: loop.new_task(answer(), "mine", context))
        loop.call_soon(first_step, context=context)
        assert loop.run_until_complete(task) == "mine"


def test_callback_of_a_finalizer_is_queued_when_it_comes_while_a_task_is_made(loop):
    """The collector may run anything in the middle of that: it is not taken for the first step."""
    called = []

    class Name:
        """Asked for its text while the task is made, as a finalizer might be run then."""

        def __str__(self):
            loop.call_soon(called.append, "the finalizer's")
            self.other = loop.create_task(answer(), name="the finalizer's")
            return "mine"

    name = Name()
    context = contextvars.copy_context()

    def begin():
        task, first_step = loop.new_task(answer(), name, context)
        assert called == []
        context.run(first_step)
        return task

    assert loop.run_until_complete(in_turn(loop, begin)) == "mine"
    assert called == ["the finalizer's"]
    assert loop.run_until_complete(name.other) == "the finalizer's"


def test_call_soon_that_somebody_has_exchanged_stays_what_it_is(loop):
    """Whoever traces the loop's callbacks goes on doing so, and sees all but the first step."""
    seen, real = [], loop.call_soon

    def traced(callback, *args, context=None):
        seen.append(callback)
        return real(callback, *args, context=context)

    loop.call_soon = traced
    context = contextvars.copy_context()
    task, first_step = in_turn(loop, lambda: loop.new_task(answer(), "mine", context))
    assert loop.call_soon is traced
    assert first_step not in seen
    loop.call_soon(first_step, context=context)
    assert loop.run_until_complete(task) == "mine"
    assert len(seen) > 2


def test_loop_is_as_ever_when_a_task_could_not_be_made(loop):
    """An exception from a signal may strike there."""

    class Struck:
        def __str__(self):
            raise KeyError("struck")

    coroutine = answer()
    with pytest.raises(KeyError):
        loop.new_task(coroutine, Struck(), contextvars.copy_context())
    coroutine.close()
    assert loop.run_until_complete(loop.create_task(answer(), name="next")) == "next"


def test_loop_says_what_it_has_to_do(loop):
    """A callback, a timer, a wish to stop: each is something to do."""
    assert loop.has_nothing_to_do()
    handle = loop.call_soon(int)
    assert not loop.has_nothing_to_do()
    handle.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    timer = loop.call_later(60, int)
    assert not loop.has_nothing_to_do()
    timer.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    assert loop.has_nothing_to_do()
    loop.stop()
    assert not loop.has_nothing_to_do()
    loop.run_forever()
    assert loop.has_nothing_to_do()


def test_closed_loop_is_freed_at_once_and_refuses_callbacks():
    """It leaves nothing to the collector, and may be closed twice."""
    loop = FirstStepLoop()
    loop.close()
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.call_soon(int)
    gone = weakref.ref(loop)
    gc.disable()
    try:
        del loop
        assert gone() is None
    finally:
        gc.enable()
