"""run_on_caller and caller_step: work for the thread that waits."""

import asyncio
import contextvars
import gc
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from tta_sync import WorkflowContext, caller_step, run_on_caller, step
from tta_sync.context import current_caller
from tta_sync.exceptions import DeadlineExceededError, NoCallerError
from tta_sync.primitives import ParallelPrimitive

variable = contextvars.ContextVar("variable", default="outside")


def here():
    return threading.get_ident()


async def answer():
    return "answered"


def test_function_runs_on_the_waiting_thread_when_asked_from_a_coroutine(facade, in_thread):
    """run_on_caller runs a function with its arguments on the very thread that waits, whichever that is."""

    async def outer():
        return await run_on_caller(here), await run_on_caller(divmod, 42, 10)

    def caller():
        on_caller, result = facade.call_sync(outer)
        return on_caller == here(), result

    assert caller() == (True, (4, 2))
    assert in_thread(caller).result(20) == (True, (4, 2))


def test_thread_locals_of_the_caller_are_seen_when_a_caller_step_runs_in_a_workflow(facade):
    """A caller_step sees the caller's thread-locals, as sessions and scoped registries need, and returns its value."""
    local = threading.local()
    local.session = "the caller's session"

    @caller_step
    def read(data, context):
        assert isinstance(context, WorkflowContext)
        return data, local.session

    assert facade.run_sync(step(lambda data: data + 1) >> read, 1) == (2, "the caller's session")


def test_steps_run_one_at_a_time_in_order_when_asked_from_subtasks(facade):
    """From 50 subtasks: one at a time, in the order in which they were asked."""
    ran, inside = [], []

    def work(number):
        inside.append(number)
        assert len(inside) == 1
        ran.append(number)
        time.sleep(0.0002)
        inside.pop()
        return number, here()

    async def outer():
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run_on_caller(work, number)) for number in range(50)]
        return [task.result() for task in tasks]

    assert facade.call_sync(outer) == [(number, here()) for number in range(50)]
    assert ran == list(range(50))


def test_parallel_branches_share_the_caller_when_each_has_a_caller_step(facade):
    """Branches of a ParallelPrimitive have their caller steps run on the one caller, in order."""
    ran = []

    def branch(name):
        @caller_step(name=name)
        def run(data):
            ran.append((name, here()))
            return name

        return step(lambda data: data) >> run

    flow = ParallelPrimitive([branch("a"), branch("b"), branch("c")])
    assert list(facade.run_sync(flow, 1)) == ["a", "b", "c"]
    assert ran == [("a", here()), ("b", here()), ("c", here())]


def test_each_caller_runs_its_own_steps_when_many_threads_call(facade, in_thread):
    """Sixteen callers at once: each one's steps run on its own thread."""

    async def outer():
        return [await run_on_caller(here) for _ in range(20)]

    def caller():
        return {*facade.call_sync(outer)} == {here()}

    assert all(future.result(20) for future in [in_thread(caller) for _ in range(16)])


# ---------------------------------------------------------------------------------------------------- re-entrance


def test_caller_step_may_call_again_when_nested_deeply(facade):
    """A caller step may call the facade again, whose workflow has caller steps again, thirty calls deep."""

    async def descend(depth):
        if depth == 0:
            return [await run_on_caller(here)]
        return [*await run_on_caller(facade.call_sync, descend, depth - 1), await run_on_caller(here)]

    assert facade.call_sync(descend, 30) == [here()] * 31


def test_steps_of_both_calls_are_done_when_an_inner_call_waits_for_time(facade):
    """While a step of the outer call waits in an inner one, the outer call's other steps wait for their turn."""
    ran = []

    async def inner():
        await asyncio.sleep(0.02)
        await run_on_caller(ran.append, "inner")
        return "inner's result"

    async def outer():
        return await asyncio.gather(
            run_on_caller(facade.call_sync, inner), *(run_on_caller(ran.append, number) for number in range(3))
        )

    assert facade.call_sync(outer) == ["inner's result", None, None, None]
    assert ran == ["inner", 0, 1, 2]


def test_caller_step_may_call_another_facade_when_both_call_back(make_facade):
    """Two facades that call each other through caller steps do not take each other's wake-ups."""
    one, other = make_facade(), make_facade()

    async def inner(number):
        await asyncio.sleep(0)
        return await run_on_caller(lambda: (number, here()))

    async def outer(number):
        return await run_on_caller(other.call_sync, inner, number)

    assert [one.call_sync(outer, number) for number in range(100)] == [(number, here()) for number in range(100)]


# --------------------------------------------------------------------------------------------------------- errors


class Mine(Exception):
    """A user's own."""


def test_exception_keeps_type_identity_and_traceback_when_a_step_raises(facade):
    """What a step raises reaches the coroutine, and the caller, as the same object, with the step's own frames."""
    error, seen = Mine("mine"), []

    def raises_it():
        raise error

    async def outer():
        try:
            await run_on_caller(raises_it)
        except Mine as met:
            seen.append(met)
            raise

    with pytest.raises(Mine) as caught:
        facade.call_sync(outer)
    assert caught.value is error
    assert seen == [error]
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "raises_it" in names
    assert "outer" in names


@pytest.mark.parametrize("error", [StopIteration(7), StopAsyncIteration(), asyncio.CancelledError()], ids=repr)
def test_coroutine_goes_on_when_a_step_raises_what_futures_refuse(facade, error):
    """A step that raises StopIteration, say, ends in an error that the coroutine can catch, never in a hang."""

    def raises_it():
        raise error

    async def outer():
        try:
            await run_on_caller(raises_it)
        except BaseException as met:
            return met
        return "nothing"

    met = facade.call_sync(outer, timeout=20)
    assert met is error or met.__cause__ is error


def test_coroutine_may_catch_and_go_on_when_a_step_failed(facade):
    """An error of a step is the coroutine's to handle; the caller serves it on."""

    async def outer():
        with pytest.raises(ZeroDivisionError):
            await run_on_caller(divmod, 1, 0)
        return await run_on_caller(here)

    assert facade.call_sync(outer) == here()


# ---------------------------------------------------------------------------------------------------- who has left


def test_no_caller_error_is_raised_when_the_caller_has_left(facade, eventually):
    """A task that outlives its call finds nobody waiting: NoCallerError, naming the remedy."""
    met, tasks = [], set()

    async def late():
        await asyncio.sleep(0.02)
        try:
            await run_on_caller(here)
        except NoCallerError as error:
            met.append(str(error))

    async def outer():
        tasks.add(asyncio.create_task(late()))

    facade.call_sync(outer)
    assert "thread_step" in eventually(lambda: met)[0]


def test_no_caller_error_is_raised_when_nobody_waits_at_all():
    """Under a bare asyncio.run there is no caller: NoCallerError, for run_on_caller and for caller steps."""
    with pytest.raises(NoCallerError):
        asyncio.run(run_on_caller(here))
    with pytest.raises(NoCallerError):
        asyncio.run(caller_step(lambda data: data).execute(1))


def test_no_caller_error_is_raised_when_the_caller_leaves_between_look_and_append(make_facade, in_thread, eventually):
    """The poster looks again after appending: a step that arrives as the caller leaves is refused, not lost."""
    facade = make_facade(grace=0.05)
    gone, met = threading.Event(), []
    inside, late = threading.Event(), threading.Event()

    async def turn():
        inside.set()
        while not met:
            await asyncio.sleep(0.002)

    class Late:
        """The call's queue, which lets the caller leave just before the append."""

        def __init__(self, real):
            self.real = real

        def append(self, work):
            gone.wait(20)
            self.real.append(work)

        def __getattr__(self, name):
            return getattr(self.real, name)

        def __len__(self):
            return len(self.real)

    async def outer():
        await run_on_caller(int)  # makes the queue
        call = current_caller.get()
        call.work = Late(call.work)
        late.set()
        try:
            await run_on_caller(met.append, "ran")
        except NoCallerError as error:
            met.append(error)

    turning = in_thread(facade.call_sync, turn)  # where callers drive, this one does: the other is free to leave
    assert inside.wait(20)
    for more in range(8):  # a machine that stalls may let the time pass before the queue is exchanged
        with pytest.raises(DeadlineExceededError):
            facade.call_sync(outer, timeout=0.05 * 2**more)
        if late.is_set():
            break
    gone.set()
    assert isinstance(eventually(lambda: met)[0], NoCallerError)
    turning.result(20)


def test_step_is_refused_when_an_orphan_asks_for_one(make_facade, expires):
    """An orphan's caller has left: its steps are refused, never run by whoever calls next on that thread."""
    facade = make_facade(grace=0.05)
    release, met = threading.Event(), []

    async def stubborn():
        while not release.is_set():
            try:
                await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                pass
        try:
            await run_on_caller(met.append, "ran")
        except NoCallerError as error:
            met.append(error)

    expires(facade.call_sync, stubborn, timeout=0.02)
    release.set()
    while not met:
        facade.call_sync(answer)
    assert isinstance(met[0], NoCallerError)


def test_step_never_starts_when_it_was_cancelled_in_the_queue(facade):
    """A step whose awaiter is cancelled while it waits for its turn is not begun."""
    ran = []
    first_runs, cancelled = threading.Event(), threading.Event()

    def first():
        first_runs.set()
        assert cancelled.wait(20)
        ran.append("first")

    async def outer():
        one = asyncio.create_task(run_on_caller(first))
        two = asyncio.create_task(run_on_caller(ran.append, "second"))
        await asyncio.sleep(0)
        while not first_runs.is_set():
            await asyncio.sleep(0.001)
        two.cancel()
        await asyncio.wait([two])
        cancelled.set()
        await one
        return two.cancelled()

    assert facade.call_sync(outer) is True
    assert ran == ["first"]


def test_result_of_a_running_step_is_dropped_when_its_awaiter_was_cancelled(facade):
    """A running step cannot be stopped: when its awaiter is gone it ends, and the call goes on."""
    inside, release = threading.Event(), threading.Event()

    def slow():
        inside.set()
        assert release.wait(20)
        return "nobody's"

    async def outer():
        task = asyncio.create_task(run_on_caller(slow))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        release.set()
        return await run_on_caller(here)

    assert facade.call_sync(outer) == here()


# ---------------------------------------------------------------------------------------------- context and races


def test_step_sees_the_coroutines_context_when_it_runs(facade):
    """A step runs in a copy of the asking task's context, and the caller's own context stays as it was."""

    def read_and_change():
        before = variable.get()
        variable.set("changed by the step")
        return before

    async def outer():
        variable.set("the coroutine's")
        return await run_on_caller(read_and_change), variable.get()

    assert facade.call_sync(outer) == ("the coroutine's", "the coroutine's")
    assert variable.get() == "outside"


def test_no_step_is_lost_when_calls_and_steps_race(facade, in_thread):
    """Eight callers, each with three tasks that ask for steps all the time: every answer comes, and rightly."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    async def asks(number):
        return [await run_on_caller(lambda: (number, here())) for _ in range(60)]

    async def outer():
        return await asyncio.gather(*(asks(number) for number in range(3)))

    def caller():
        for _ in range(5):
            assert facade.call_sync(outer, timeout=60) == [[(number, here())] * 60 for number in range(3)]

    try:
        for future in [in_thread(caller) for _ in range(8)]:
            future.result(60)
    finally:
        sys.setswitchinterval(before)


def test_pool_threads_wait_for_nobody_when_they_call_back(facade):
    """A thread of a user's pool may wait for a call while the main thread waits for another one."""

    async def outer():
        with ThreadPoolExecutor(4) as pool:
            loop = asyncio.get_running_loop()
            return await asyncio.gather(*(loop.run_in_executor(pool, facade.call_sync, answer) for _ in range(16)))

    assert facade.call_sync(outer) == ["answered"] * 16
    gc.collect()
