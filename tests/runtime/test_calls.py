"""A plain call: what goes in, what comes out, and where it is refused."""

import asyncio
import contextlib
import contextvars
import gc
import math
import re
import sys
import threading
import time

import anyio
import pytest

from tta_sync import WorkflowContext, current_context, run_on_caller, step
from tta_sync.context import Deadline
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError, LoopUnavailableError, WouldDeadlockError
from tta_sync.primitives import MISS, WorkflowPrimitive
from tta_sync.runtime import driven

variable = contextvars.ContextVar("variable", default="outside")


async def add(left, right, *, extra=0):
    await asyncio.sleep(0)
    return left + right + extra


# ------------------------------------------------------------------------------------------------------- results


def test_call_returns_its_result_when_given_arguments_and_keywords(facade):
    """call_sync passes positional arguments and keywords on and returns what the coroutine function returns."""
    assert facade.call_sync(add, 1, 2, extra=39) == 42


@pytest.mark.parametrize("threads", [16])
def test_calls_get_their_own_results_when_many_threads_call_at_once(facade, in_thread, threads):
    """Every thread gets the results of its own calls, in whatever order the loop answers them."""
    start = threading.Barrier(threads)

    def caller(number):
        start.wait()
        return [facade.call_sync(add, number, index) for index in range(200)]

    futures = [in_thread(caller, number * 1000) for number in range(threads)]
    for number, future in enumerate(futures):
        assert future.result(60) == [number * 1000 + index for index in range(200)]


def test_calls_overlap_when_they_wait(facade, in_thread):
    """Calls of different threads wait side by side on one loop: all are inside before the first one ends."""
    inside, everybody = [], 32

    async def meet():
        inside.append(1)
        while len(inside) < everybody:
            await asyncio.sleep(0.001)
        return id(asyncio.get_running_loop())

    assert len({future.result(20) for future in [in_thread(facade.call_sync, meet) for _ in range(everybody)]}) == 1


def test_two_facades_answer_side_by_side_when_one_of_them_is_blocked(make_facade, in_thread):
    """Each facade has a loop of its own: one that is blocked does not keep the other from answering."""
    blocked, free = make_facade(), make_facade()
    inside, release = threading.Event(), threading.Event()

    async def block():
        inside.set()
        release.wait(20)
        return threading.get_ident()

    async def where():
        return threading.get_ident()

    blocking = in_thread(blocked.call_sync, block)
    assert inside.wait(20)
    here = free.call_sync(where, timeout=20)
    release.set()
    assert blocking.result(20) != here


def test_task_is_named_after_the_users_function_when_a_call_runs(facade):
    """asyncio's debug output names the user's function, not the facade's wrapper."""

    async def summarise():
        return asyncio.current_task().get_name()

    assert facade.call_sync(summarise) == summarise.__qualname__


def test_workflow_runs_when_it_is_foreign(facade):
    """run_sync takes any object with ``async execute(data, context)`` and gives it a context."""

    class Foreign:
        async def execute(self, data, context):
            assert isinstance(context, WorkflowContext)
            return data * 2, current_context() is context

    assert facade.run_sync(Foreign(), 21) == (42, True)


def test_context_is_handed_on_when_one_is_given(facade):
    """run_sync hands the very context that it was given to the workflow."""

    class Foreign:
        async def execute(self, data, context):
            return context

    context = WorkflowContext(tenant="acme")
    assert facade.run_sync(Foreign(), None, context) is context


@pytest.mark.parametrize("wrong", [42, None, "text"])
def test_call_names_the_mistake_when_it_is_given_no_function(facade, wrong):
    """What is no coroutine function is refused with a TypeError that says what to write, and the loop goes on."""
    with pytest.raises(TypeError):
        facade.call_sync(wrong)
    assert facade.call_sync(add, 1, 1) == 2


def test_coroutine_is_closed_when_it_is_passed_in_place_of_its_function(facade):
    """A coroutine object is refused with the remedy, and closed: no "never awaited" warning follows."""
    with pytest.raises(TypeError, match=re.escape("call_sync(fn, *args)")):
        facade.call_sync(add(1, 2))
    with pytest.raises(TypeError, match="run_sync takes an object"):
        facade.run_sync(add(1, 2))
    with pytest.raises(TypeError, match="iterate_sync takes an async generator function"):
        facade.iterate_sync(add(1, 2))
    gc.collect()


@pytest.mark.parametrize("entry", ["call_sync", "run_sync", "iterate_sync"])
def test_coroutine_is_closed_when_it_is_passed_where_no_call_can_be_made(facade, entry):
    """Inside a running loop, the facade's own or another: the refusal is all that there is to hear."""

    async def call_here():
        with pytest.raises(WouldDeadlockError):
            getattr(facade, entry)(add(1, 2))

    asyncio.run(call_here())
    facade.call_sync(call_here)
    gc.collect()


def test_plain_function_is_an_error_of_the_call_when_it_returns_nothing_to_await(facade, works):
    """A plain function in place of a coroutine function ends in a TypeError at the caller, not in a dead loop."""
    with pytest.raises(TypeError):
        facade.call_sync(lambda: 42)
    works(facade)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_in_flight": 0},
        {"max_in_flight": math.nan},
        {"default_timeout": 0},
        {"default_timeout": -0.5},
        {"default_timeout": math.nan},
        {"grace": -1},
        {"grace": math.nan},
        {"grace": math.inf},
    ],
)
def test_facade_is_refused_when_its_settings_cannot_work(make_facade, settings):
    """Settings that cannot work are a ConfigurationError where they are written."""
    with pytest.raises(ConfigurationError):
        make_facade(**settings)


# ----------------------------------------------------------------------------- first statement of a coroutine


async def first_asyncio_timeout():
    async with asyncio.timeout(20):
        await asyncio.sleep(0)
        return "done"


async def first_task_group():
    async with asyncio.TaskGroup() as group:
        task = group.create_task(add(1, 2))
    return "done" if task.result() == 3 else None


async def first_fail_after():
    with anyio.fail_after(20):
        await anyio.sleep(0)
        return "done"


@pytest.mark.parametrize("first", [first_asyncio_timeout, first_task_group, first_fail_after])
def test_coroutine_may_begin_with_what_needs_a_task_when_called(facade, first):
    """asyncio.timeout, TaskGroup and anyio.fail_after work as the very first statement of a coroutine."""
    assert facade.call_sync(first) == "done"


@pytest.mark.parametrize("expiring", [lambda: asyncio.timeout(0.01), lambda: anyio.fail_after(0.01)])
def test_users_own_timeout_fires_when_it_is_the_first_statement(facade, expiring):
    """A user's own time limit inside the coroutine comes out as his TimeoutError, not as the call's deadline."""

    async def sleeper():
        manager = expiring()
        if hasattr(manager, "__aenter__"):
            async with manager:
                await asyncio.sleep(60)
        else:
            with manager:
                await asyncio.sleep(60)

    with pytest.raises(TimeoutError) as caught:
        facade.call_sync(sleeper, timeout=20)
    assert not isinstance(caught.value, DeadlineExceededError)


# --------------------------------------------------------------------------------------------------- contextvars


def test_callers_context_is_seen_when_the_coroutine_and_its_tasks_run(facade):
    """Context variables of the caller reach the coroutine and the tasks that it starts."""

    async def read():
        return variable.get(), await asyncio.create_task(asyncio.sleep(0, variable.get()))

    token = variable.set("the caller's")
    try:
        assert facade.call_sync(read) == ("the caller's", "the caller's")
    finally:
        variable.reset(token)


def test_context_does_not_flow_out_when_a_coroutine_changes_it(facade):
    """What a coroutine sets stays in its call: neither the caller nor the next call sees it."""

    async def change():
        variable.set("the coroutine's")

    async def read():
        return variable.get()

    facade.call_sync(change)
    assert variable.get() == "outside"
    assert facade.call_sync(read) == "outside"
    assert current_context() is None


@pytest.mark.parametrize("entry", ["call_sync", "run_sync", "run_sync with a timeout", "async_to_sync"])
@pytest.mark.parametrize("ends", ["well", "badly"])
def test_context_flows_out_when_it_is_asked_for(make_facade, works, entry, ends):
    """``context_out=True``: what the coroutine sets stays set for its caller, an error or not; ours stay inside."""
    facade = make_facade(context_out=True)

    async def sets(data=None, context=None):
        assert variable.get() == "caller's"
        variable.set("coroutine's")
        new.set("too")
        if ends == "badly":
            raise OSError("down")
        return data

    calls = {
        "call_sync": lambda: facade.call_sync(sets),
        "run_sync": lambda: facade.run_sync(step(sets), 1),
        "run_sync with a timeout": lambda: facade.run_sync(step(sets), 1, timeout=20),
        "async_to_sync": lambda: facade.async_to_sync(sets)(),
    }
    new = contextvars.ContextVar("new", default=None)

    def caller():
        variable.set("caller's")
        with contextlib.suppress(OSError):
            calls[entry]()
        assert current_context() is None
        works(facade)
        return variable.get(), new.get()

    assert contextvars.copy_context().run(caller) == ("coroutine's", "too")


def test_context_is_each_callers_own_when_threads_call_at_once(facade, in_thread):
    """Calls that run at the same time each see their own caller's context, before and after an await."""

    async def read():
        before = variable.get()
        await asyncio.sleep(0.001)
        return before, variable.get()

    def caller(value):
        variable.set(value)
        return [facade.call_sync(read) for _ in range(50)]

    for number, future in enumerate([in_thread(caller, number) for number in range(8)]):
        assert set(future.result(20)) == {(number, number)}


class Secret(Exception):
    """What one caller handles is no business of another's."""


@pytest.fixture
def patient_callers(monkeypatch):
    """Callers that stand aside wait for a driver for as long as the machine may stall."""
    monkeypatch.setattr(driven, "LOOK_AGAIN", 1000.0)


def test_coroutines_see_no_callers_exception_when_one_calls_while_it_handles_it(facade, in_thread, patient_callers):
    """Nobody's coroutine, task or error learns what a caller is handling, whoever turns the loop."""
    begun, release, seen = threading.Event(), threading.Event(), []

    async def look():
        for _ in range(3):
            seen.append(sys.exception())
            await asyncio.sleep(0)

    async def wait():
        begun.set()
        tasks.append(asyncio.create_task(look()))
        while not release.is_set():
            await asyncio.sleep(0.001)
        await look()

    async def fail():
        await look()
        raise KeyError("another's own")

    def handle():
        try:
            raise Secret
        except Secret:
            facade.call_sync(wait, timeout=20)

    tasks = []
    handling = in_thread(handle)
    assert begun.wait(20)
    with pytest.raises(KeyError) as caught:
        facade.call_sync(fail, timeout=20)
    release.set()
    handling.result(20)
    assert tasks[0].done()
    assert seen == [None] * 9
    assert caught.value.__context__ is None


def test_callers_are_answered_when_all_of_them_handle_exceptions(facade, in_thread, patient_callers):
    """Callers that turn no loop are no less served: from the first call on, with caller steps and nested calls."""

    async def steps(depth):
        await asyncio.sleep(0)
        return 0 if depth == 0 else 1 + await run_on_caller(facade.call_sync, steps, depth - 1)

    def handle():
        try:
            raise Secret
        except Secret:
            return [facade.call_sync(steps, depth % 3, timeout=20) for depth in range(30)]

    for future in [in_thread(handle) for _ in range(8)]:
        assert future.result(20) == [0, 1, 2] * 10


def test_deadline_holds_when_the_caller_handles_an_exception(facade, expires):
    """A caller that turns no loop hears of its deadline, and its coroutine is cancelled."""
    cancelled = []

    async def wait():
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.append(1)

    try:
        raise Secret
    except Secret:
        expires(facade.call_sync, wait, timeout=0.05)
    assert cancelled


def test_async_generator_is_closed_on_the_loop_when_the_call_that_began_it_is_over(facade, eventually):
    """Also where that call ended with its first step; and the caller's thread is left as it was."""
    closed = []

    async def numbers():
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            closed.append(asyncio.get_running_loop())

    async def first():
        assert asyncio.get_running_loop().is_running()
        return await anext(numbers())

    assert facade.call_sync(first) == 1
    assert sys.get_asyncgen_hooks() == (None, None)
    eventually(lambda: closed)
    assert closed == [facade._loop.loop]


# ------------------------------------------------------------------------------------------------------- refusal


def test_call_is_refused_when_made_on_the_loop_thread(facade, works):
    """A call from the loop thread, which could only wait for itself, is refused with the remedy in its text."""

    async def outer():
        return facade.call_sync(add, 1, 2)

    with pytest.raises(LoopUnavailableError, match="await it instead"):
        facade.call_sync(outer)
    works(facade)


def test_call_is_refused_when_made_in_a_callback_of_the_loop(facade, eventually, works):
    """A call from a callback of the loop, where no task is running, is refused as well."""
    seen = []

    def callback():
        try:
            seen.append(facade.call_sync(add, 1, 2))
        except LoopUnavailableError as error:
            seen.append(error)

    async def outer():
        asyncio.get_running_loop().call_soon(callback)

    facade.call_sync(outer)
    assert isinstance(eventually(lambda: seen)[0], LoopUnavailableError)
    works(facade)


def test_call_is_refused_when_made_on_another_facades_loop(make_facade, works):
    """A call that would block another facade's loop is refused."""
    one, other = make_facade(), make_facade()

    async def outer():
        return other.call_sync(add, 1, 2)

    with pytest.raises(LoopUnavailableError):
        one.call_sync(outer)
    works(one)
    works(other)


@pytest.mark.parametrize("warm", [True, False])
def test_call_is_refused_when_made_inside_asyncio_run(facade, warm, works):
    """A call inside a running event loop, which would stand still, is refused, before and after the first call."""
    if warm:
        works(facade)
    entered = []

    async def inner():
        entered.append(1)

    async def main():
        with pytest.raises(LoopUnavailableError, match="to_thread"):
            facade.call_sync(inner)
        with pytest.raises(LoopUnavailableError):
            facade.run_sync(Always())
        return await asyncio.to_thread(facade.call_sync, add, 20, 22)

    assert asyncio.run(main()) == 42
    assert entered == []


def test_call_is_answered_when_the_thread_has_the_ident_of_a_dead_loop_thread(facade, in_thread, works):
    """Thread idents are reused: a thread with the ident of one that turned a loop, long gone, is not taken for it."""

    async def who():
        return threading.get_ident()

    dead = in_thread(facade.call_sync, who).result(20)
    facade._loop.shutdown(0.0)
    answers, give_up = [], time.monotonic() + 0.5

    def caller():
        answers.append((threading.get_ident(), facade.call_sync(add, 1, 2)))

    while time.monotonic() < give_up:
        in_thread(caller).result(20)
        if answers[-1][0] == dead:
            break
    assert {answer for _, answer in answers} == {3}


def test_finalizer_is_refused_when_the_collector_runs_it_on_the_loop_thread(facade, works):
    """A finalizer that calls the facade and happens to run on the loop thread gets the error and does not wait."""
    seen = []

    class Holder:
        def __init__(self):
            self.me = self

        def __del__(self):
            try:
                seen.append(facade.call_sync(add, 1, 2))
            except LoopUnavailableError as error:
                seen.append(error)

    async def litter():
        Holder()
        gc.collect()

    facade.call_sync(litter, timeout=20)
    assert [type(entry) for entry in seen] == [WouldDeadlockError]
    works(facade)


# ------------------------------------------------------------------------------------------------------ no-hop


class Always(WorkflowPrimitive):
    """Answers without the loop, always."""

    peeks = True

    def __init__(self):
        self.executed = 0

    def peek(self, data, context):
        if isinstance(data, Exception):
            raise data
        return MISS if data == "miss" else ("peeked", data)

    async def execute(self, data, context):
        self.executed += 1
        return "executed", data


def test_peek_answers_on_the_caller_when_it_can(facade, in_thread):
    """A primitive that can answer without the loop does so on the caller's thread, even while the loop is blocked."""
    inside, release = threading.Event(), threading.Event()

    async def block():
        inside.set()
        release.wait(20)

    blocking = in_thread(facade.call_sync, block)
    assert inside.wait(20)
    flow = Always()
    assert facade.run_sync(flow, 1) == ("peeked", 1)
    assert flow.executed == 0
    release.set()
    blocking.result(20)


def test_loop_answers_when_peek_misses(facade):
    """Where peek returns MISS, the workflow runs on the loop."""
    flow = Always()
    assert facade.run_sync(flow, "miss") == ("executed", "miss")
    assert flow.executed == 1


def test_peeks_error_comes_out_when_it_raises(facade):
    """What peek raises is the call's error, without a hop."""
    flow = Always()
    with pytest.raises(ValueError, match="no"):
        facade.run_sync(flow, ValueError("no"))
    assert flow.executed == 0


def test_deadline_comes_before_peek_when_it_has_passed(facade):
    """A call whose deadline has passed is refused, though peek would have an answer."""
    context = WorkflowContext(deadline=Deadline.after(-1.0))
    with pytest.raises(DeadlineExceededError):
        facade.run_sync(Always(), 1, context)


def test_method_of_the_users_own_is_left_alone_when_it_is_named_peek(facade):
    """Only types that declare it are asked: a user's own method named peek is never called."""

    class Own(WorkflowPrimitive):
        def peek(self, *_):
            raise AssertionError("the user's own method was called")

        async def execute(self, data, context):
            return data

    class Foreign:
        peek = Own.peek

        async def execute(self, data, context):
            return data

    assert facade.run_sync(Own(), 1) == facade.run_sync(Foreign(), 1) == 1


def test_stop_iteration_from_a_pools_thread_comes_out(facade):
    """asyncio's future refuses it: to_thread(next, ...) would wait for ever, as on asyncio's own loop in 3.11."""
    with pytest.raises(RuntimeError, match="raised StopIteration") as caught:
        facade.call_sync(asyncio.to_thread, next, iter(()), timeout=30)
    assert isinstance(caught.value.__cause__, StopIteration)
