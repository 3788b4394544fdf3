"""``async_to_sync`` keeps asgiref's contract on the managed loop."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import functools
import gc
import inspect
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import asgiref.sync
import pytest
from asgiref.local import Local
from asgiref.sync import sync_to_async

from tests.runtime.test_every_point import POINTS, Strike as Struck, Tracer, strike
from tta_sync import caller_step, current_context, run_on_caller
from tta_sync.context import current_caller
from tta_sync.exceptions import (
    DeadlineExceededError,
    LoopUnavailableError,
    NoCallerError,
    SaturatedError,
    TTASyncError,
    WouldDeadlockError,
)
from tta_sync.facade import SyncFacade, register_interrupt
from tta_sync.primitives import WorkflowContext

FACADES: dict[str, dict[str, Any]] = {"thread": {}, "uvloop": {"use_uvloop": True}, "caller": {"drive": "caller"}}
PATIENCE = 20.0  # seconds after which something hangs, whatever the machine does beside

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.fixture(params=FACADES)
def facade(request: pytest.FixtureRequest) -> Iterator[SyncFacade]:
    """One facade of each kind."""
    facade = SyncFacade(**FACADES[request.param])
    yield facade
    facade.shutdown(0.0)


@pytest.fixture
def threaded() -> Iterator[SyncFacade]:
    """A facade with a loop thread, for what cannot differ between the kinds."""
    facade = SyncFacade()
    yield facade
    facade.shutdown(0.0)


@pytest.fixture(scope="module", autouse=True)
def _asgirefs_one_thread() -> None:
    """Start the thread that asgiref keeps for good, before a test is blamed for it."""
    asgiref.sync.SyncToAsync.single_thread_executor.submit(here).result(PATIENCE)


@pytest.fixture(autouse=True)
def _the_caller_is_left_as_it_was() -> Iterator[None]:
    """A test whose calls leave anything of theirs in the caller's context fails."""
    yield
    assert getattr(asgiref.sync.AsyncToSync.executors, "current", None) is None
    assert current_caller.get() is None


def here() -> int:
    return threading.get_ident()


on_caller = sync_to_async(here)


# ------------------------------------------------------------------------------------------------------- context


def test_context_flows_in_and_out_when_the_coroutine_returns(facade: SyncFacade) -> None:
    """The coroutine sees the caller's variables, and the caller afterwards what it set."""

    async def change() -> str:
        seen = variable.get()
        await asyncio.sleep(0)
        variable.set("from the coroutine")
        return seen

    def call() -> tuple[str, str]:
        variable.set("from the caller")
        return facade.async_to_sync(change)(), variable.get()

    assert contextvars.copy_context().run(call) == ("from the caller", "from the coroutine")


def test_context_flows_out_when_the_coroutine_raises(facade: SyncFacade) -> None:
    """What the coroutine set before it raised reaches the caller."""

    async def fail() -> None:
        variable.set("from the coroutine")
        raise ValueError("as it should")

    def call() -> str:
        with pytest.raises(ValueError, match="as it should"):
            facade.async_to_sync(fail)()
        return variable.get()

    assert contextvars.copy_context().run(call) == "from the coroutine"


def test_context_flows_through_all_levels_when_calls_are_nested(facade: SyncFacade) -> None:
    """A variable set by the innermost synchronous code reaches the outermost caller."""

    async def outer() -> None:
        await sync_to_async(facade.async_to_sync(inner))()

    async def inner() -> None:
        await sync_to_async(variable.set)("from the depth")

    def call() -> str:
        facade.async_to_sync(outer)()
        return variable.get()

    assert contextvars.copy_context().run(call) == "from the depth"


def test_nothing_of_ours_flows_out_when_the_call_ends(facade: SyncFacade) -> None:
    """What says who runs now stays inside: afterwards the caller is no step of anything."""

    async def look() -> bool:
        return current_caller.get() is not None

    def call() -> list[object]:
        assert facade.async_to_sync(look)()
        ours = [v.name for v in contextvars.copy_context() if v.name.startswith("tta_sync") and v.get() is not None]
        return [*ours, current_context()]

    assert contextvars.copy_context().run(call) == [None]


def test_an_asgiref_local_flows_in_and_out_when_it_is_set(threaded: SyncFacade) -> None:
    """asgiref's own Local is the caller's inside the coroutine, and the coroutine's afterwards."""
    local = Local()

    async def change() -> str:
        seen = str(local.value)
        await asyncio.create_task(asyncio.sleep(0))
        local.value = "from the coroutine"
        return seen

    def call() -> tuple[str, str]:
        local.value = "from the caller"
        return threaded.async_to_sync(change)(), local.value

    assert contextvars.copy_context().run(call) == ("from the caller", "from the coroutine")


# -------------------------------------------------------------------------------------------------------- thread


def test_thread_sensitive_code_runs_on_the_calling_thread_when_awaited_anywhere(facade: SyncFacade) -> None:
    """sync_to_async code runs on the calling thread: from the coroutine, a task, a gather and a task group."""

    async def ask() -> set[int]:
        threads = {await on_caller(), await asyncio.create_task(on_caller())}
        threads |= set(await asyncio.gather(on_caller(), on_caller()))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(on_caller()) for _ in range(3)]
        return threads | {task.result() for task in tasks}

    for _ in range(2):
        assert facade.async_to_sync(ask)() == {here()}


def test_each_call_keeps_its_own_thread_when_many_run_at_once(facade: SyncFacade) -> None:
    """Thread-sensitive code of concurrent calls never runs on another call's thread."""
    strays: list[int] = []
    barrier = threading.Barrier(6)

    async def ask() -> None:
        mine = await on_caller()
        for _ in range(10):
            await asyncio.sleep(0)
            strays.extend(there for there in await asyncio.gather(on_caller(), on_caller()) if there != mine)

    def call() -> None:
        barrier.wait(PATIENCE)

        async def checked() -> None:
            await ask()
            if await on_caller() != mine:
                strays.append(mine)

        mine = here()
        facade.async_to_sync(checked)()

    callers = [threading.Thread(target=call, daemon=True) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE)
        assert not caller.is_alive()
    assert strays == []


def test_nested_calls_stay_on_the_calling_thread_when_sync_and_async_alternate(facade: SyncFacade) -> None:
    """Synchronous code under a coroutine under synchronous code, and so on, all runs on the first caller's thread."""
    threads: list[int] = []

    def down(levels: int) -> None:
        threads.append(here())
        if levels:
            facade.async_to_sync(through)(levels - 1)

    async def through(levels: int) -> None:
        await asyncio.create_task(sync_to_async(down)(levels))

    down(4)
    assert threads == [here()] * 5


@pytest.mark.parametrize("inner_facade", ["same", "another", "another, driven by its callers"])
@pytest.mark.parametrize("hand_over", [run_on_caller, sync_to_async], ids=lambda way: way.__name__)
def test_sync_to_async_is_answered_in_a_plain_call_when_work_on_the_calling_thread_made_that(
    facade: SyncFacade, hand_over: Any, inner_facade: str
) -> None:
    """A call_sync inside an async_to_sync call keeps that call's thread waiting: the inner one is served there."""
    inner = facade if inner_facade == "same" else SyncFacade(drive="caller" if "driven" in inner_facade else "thread")

    async def ask() -> set[int]:
        return {await on_caller(), *await asyncio.gather(on_caller(), on_caller())}

    def work() -> set[int]:
        return inner.call_sync(ask, timeout=PATIENCE)

    async def view() -> tuple[set[int], int]:
        there = await (run_on_caller(work) if hand_over is run_on_caller else sync_to_async(work)())
        return there, await on_caller()

    try:
        there, after = facade.async_to_sync(view)()
        assert after == here()
        # Else asgiref may lose sight of the calling thread, and use its own.
        if inner is facade and (hand_over is run_on_caller or facade.drive == "caller"):
            assert there == {here()}
    finally:
        if inner is not facade:
            inner.shutdown(0.0)


def test_late_work_of_a_plain_call_finds_the_outer_caller_when_that_call_has_returned(facade: SyncFacade) -> None:
    """A task that an inner call left behind is served by the call around it, whose thread waits again."""
    late: list[asyncio.Task[int]] = []
    returned = threading.Event()

    async def inner() -> None:
        async def leave() -> int:
            while not returned.is_set():
                await asyncio.sleep(0)
            return await on_caller()

        late.append(asyncio.create_task(leave()))

    async def outer() -> int:
        await run_on_caller(facade.call_sync, inner)
        returned.set()
        return await late[0]

    assert facade.async_to_sync(outer)() == here()


def test_insensitive_code_runs_elsewhere_when_asked_for(facade: SyncFacade) -> None:
    """thread_sensitive=False leaves the calling thread alone."""

    async def ask() -> int:
        return await sync_to_async(here, thread_sensitive=False)()

    assert facade.async_to_sync(ask)() != here()


def test_our_own_caller_steps_work_when_called_inside(facade: SyncFacade) -> None:
    """run_on_caller and caller_step reach the same thread as sync_to_async."""
    there = caller_step(lambda data: (data, here()))

    async def ask() -> object:
        return await run_on_caller(here), await there.execute("data", WorkflowContext()), await on_caller()

    assert facade.async_to_sync(ask)() == (here(), ("data", here()), here())


def test_work_is_done_before_the_call_returns_when_nobody_waits_for_it(facade: SyncFacade) -> None:
    """sync_to_async code that was handed over before the coroutine ended runs before its caller goes on, in order."""
    done: list[int] = []

    async def leave() -> None:
        for number in range(3):
            task = asyncio.create_task(sync_to_async(done.append)(number))
            task.add_done_callback(lambda task: task.exception())
        await asyncio.sleep(0)

    facade.async_to_sync(leave)()
    assert done == [0, 1, 2]


def test_a_call_returns_when_a_task_it_has_left_never_stops_handing_over_work(facade: SyncFacade) -> None:
    """The caller does what was handed over before the coroutine ended, and nothing that comes after."""
    refused: list[type[BaseException]] = []
    told = threading.Event()

    async def endless() -> None:
        try:
            while True:
                await on_caller()
        except RuntimeError as error:
            refused.append(type(error))
        told.set()

    async def leave() -> None:
        kept.append(asyncio.create_task(endless()))
        await on_caller()

    async def finish() -> None:
        await asyncio.wait(kept)

    kept: list[asyncio.Task[None]] = []
    facade.async_to_sync(leave)()
    facade.call_sync(finish)
    assert told.is_set()
    assert refused == [NoCallerError]


def test_late_work_is_refused_when_the_caller_has_gone(facade: SyncFacade) -> None:
    """A task that outlives the call gets NoCallerError from sync_to_async, at once."""
    refused: list[BaseException | None] = []
    told = threading.Event()
    go = asyncio.Event()

    async def late() -> None:
        await go.wait()
        try:
            await on_caller()
        except RuntimeError as error:
            refused.append(error)
        told.set()

    async def leave() -> asyncio.Task[None]:
        return asyncio.create_task(late())

    async def release() -> None:
        go.set()

    task = facade.async_to_sync(leave)()
    facade.call_sync(release)
    assert told.wait(PATIENCE)
    assert [type(error) for error in refused] == [NoCallerError]
    assert "thread_sensitive=False" in str(refused[0])
    del task


def test_late_work_finds_the_outer_caller_when_the_inner_has_gone(facade: SyncFacade) -> None:
    """A task left over by a nested call hands its work to the caller of the outer call, which still waits."""

    async def inner() -> asyncio.Task[int]:
        async def late() -> int:
            await gone.wait()
            return await on_caller()

        gone = asyncio.Event()
        loop = asyncio.get_running_loop()
        outlasts.append(lambda: loop.call_soon_threadsafe(gone.set))
        return asyncio.create_task(late())

    async def outer() -> int:
        task = await sync_to_async(facade.async_to_sync(inner))()
        outlasts.pop()()
        return await task

    outlasts: list[Callable[[], object]] = []
    assert facade.async_to_sync(outer)() == here()


def test_queued_work_finds_the_outer_caller_when_the_inner_was_interrupted(facade: SyncFacade) -> None:
    """Work that the nested call's caller did not come to is done by the outer caller, not lost and not done twice."""
    tasks: list[asyncio.Task[int]] = []

    def strike() -> None:
        raise KeyboardInterrupt

    async def inner() -> None:
        struck = sync_to_async(strike)()
        tasks.append(asyncio.create_task(on_caller()))
        await struck

    def nested() -> None:
        with pytest.raises(KeyboardInterrupt):
            facade.async_to_sync(inner)()

    async def outer() -> int:
        await sync_to_async(nested)()
        return await tasks[0]

    assert facade.async_to_sync(outer)() == here()
    assert facade.stats().orphans == 0, "the nested call has waited for its own caller"


def test_an_error_like_ours_is_the_codes_own_when_that_has_run(facade: SyncFacade) -> None:
    """A function that raises NoCallerError has run, and is not taken to another caller."""
    ran: list[int] = []

    def fail() -> None:
        ran.append(here())
        raise NoCallerError("its own")

    async def ask() -> None:
        await sync_to_async(fail)()

    async def outer() -> None:
        await sync_to_async(facade.async_to_sync(ask))()

    with pytest.raises(NoCallerError, match="its own"):
        facade.async_to_sync(outer)()
    assert ran == [here()]


def test_a_nested_call_is_cancelled_when_the_task_above_it_is(facade: SyncFacade) -> None:
    """Cancelling a task that waits for sync_to_async code cancels what that code waits for, as with asgiref."""
    seen: list[str] = []

    async def inner() -> None:
        began.set()
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            seen.append("inner")
            raise

    async def outer() -> None:
        task = asyncio.create_task(sync_to_async(facade.async_to_sync(inner))())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        seen.append("outer")

    began = asyncio.Event()
    facade.async_to_sync(outer)()
    assert seen == ["inner", "outer"]


def test_a_call_of_another_facade_is_let_be_when_the_task_above_it_is_cancelled(facade: SyncFacade) -> None:
    """A nested call on another facade's loop is not touched from this one: its code returns when it is done."""
    other = SyncFacade()
    began, go, ended = threading.Event(), threading.Event(), threading.Event()

    async def inner() -> None:
        began.set()
        while not go.is_set():
            await asyncio.sleep(0.001)
        ended.set()

    async def outer() -> None:
        task = asyncio.create_task(sync_to_async(other.async_to_sync(inner), thread_sensitive=False)())
        while not began.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()

    try:
        facade.async_to_sync(outer)()
        assert ended.wait(PATIENCE)
    finally:
        other.shutdown(1.0)


def test_work_is_dropped_when_the_task_that_wants_it_is_cancelled(facade: SyncFacade) -> None:
    """Code that waits for its turn, handed over by our loop or by a foreign one, never starts after a cancellation."""
    ran: list[str] = []
    hold = threading.Event()

    async def foreign() -> None:
        task = asyncio.create_task(sync_to_async(ran.append)("foreign"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def ask() -> None:
        holding = asyncio.create_task(sync_to_async(hold.wait)(PATIENCE))
        ours = asyncio.create_task(sync_to_async(ran.append)("ours"))
        await asyncio.sleep(0)
        ours.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ours
        await sync_to_async(asyncio.run, thread_sensitive=False)(foreign())
        hold.set()
        await holding

    facade.async_to_sync(ask)()
    assert ran == []


def test_a_thread_of_its_own_keeps_to_itself_when_its_caller_has_gone(facade: SyncFacade) -> None:
    """What a plain thread's call leaves over is not taken to a caller above: asgiref's rule for Locals."""

    async def inner() -> asyncio.Task[int]:
        async def late() -> int:
            await gone.wait()
            return await on_caller()

        return asyncio.create_task(late())

    async def outer() -> None:
        task = await asyncio.to_thread(facade.async_to_sync(inner))
        gone.set()
        with pytest.raises(NoCallerError):
            await task

    gone = asyncio.Event()
    facade.async_to_sync(outer)()


def test_work_comes_from_a_foreign_loop_when_it_runs_below(facade: SyncFacade) -> None:
    """A loop of its own on a pool thread, below the call, reaches the calling thread too, results and errors alike."""

    async def foreign() -> int:
        with pytest.raises(ValueError, match="invalid literal"):
            await sync_to_async(int)("no number")
        return await on_caller()

    async def ask() -> int:
        there = await sync_to_async(asyncio.run, thread_sensitive=False)(foreign())
        executor = asgiref.sync.AsyncToSync.executors.current
        async with asyncio.timeout(PATIENCE):
            while executor._foreign or executor.pending:  # a long call would grow with all the work that it has done
                await asyncio.sleep(0.001)
        return there

    assert facade.async_to_sync(ask)() == here()


def test_the_caller_is_not_made_to_wait_for_itself_when_its_code_runs_a_loop(facade: SyncFacade) -> None:
    """sync_to_async inside asyncio.run inside sync_to_async, all on the calling thread, is an error and no deadlock."""

    async def ask() -> int:
        return await sync_to_async(asyncio.run)(on_caller())

    with pytest.raises(RuntimeError, match="calling thread"):
        facade.async_to_sync(ask)()


def test_asgirefs_own_async_to_sync_gets_along_when_called_inside(facade: SyncFacade) -> None:
    """asgiref's own below ours runs on the same loop, and its thread-sensitive code on the same thread."""

    async def inner() -> tuple[object, int]:
        return asyncio.get_running_loop(), await on_caller()

    async def outer() -> tuple[object, tuple[object, int]]:
        return asyncio.get_running_loop(), await sync_to_async(asgiref.sync.async_to_sync(inner))()

    loop, (loop_below, there) = facade.async_to_sync(outer)()
    assert (loop_below, there) == (loop, here())


def test_asgirefs_executors_find_our_caller_when_theirs_has_gone(threaded: SyncFacade) -> None:
    """A task left over by asgiref's own async_to_sync below ours hands its work to our caller."""

    async def inner() -> asyncio.Task[int]:
        return asyncio.create_task(on_caller())

    async def outer() -> int:
        task = await sync_to_async(asgiref.sync.async_to_sync(inner))()
        return await task

    assert threaded.async_to_sync(outer)() == here()


def test_the_calling_thread_is_left_as_it_was_when_code_ran_on_it(facade: SyncFacade) -> None:
    """asgiref's mark of a main event loop is gone afterwards, also when the code raised: no later call follows it."""
    noted = asgiref.sync.SyncToAsync.threadlocal.__dict__
    seen: list[bool] = []

    def look() -> None:
        seen.append("main_event_loop" in noted)
        raise ValueError("as it should")

    async def ask() -> object:
        with pytest.raises(ValueError, match="as it should"):
            await sync_to_async(look)()
        return asyncio.get_running_loop()

    before = noted.copy()
    loop = facade.async_to_sync(ask)()
    assert seen == [True]
    assert noted == before

    async def which() -> object:
        return asyncio.get_running_loop()

    assert asgiref.sync.async_to_sync(which)() is not loop


# -------------------------------------------------------------------------------------------- which loop it runs on


async def running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_the_managed_loop_is_used_when_called_from_synchronous_code(facade: SyncFacade) -> None:
    """All calls share the facade's loop, nested ones too."""

    async def nested() -> object:
        return await sync_to_async(facade.async_to_sync(running_loop))()

    loops = {facade.call_sync(running_loop), facade.async_to_sync(running_loop)(), facade.async_to_sync(nested)()}
    assert len(loops) == 1


def test_a_foreign_loop_is_used_when_its_coroutine_waits_for_the_call(facade: SyncFacade) -> None:
    """Called from sync_to_async code of another loop, the coroutine runs on that loop, as with asgiref."""

    async def foreign() -> bool:
        return await sync_to_async(facade.async_to_sync(running_loop))() is asyncio.get_running_loop()

    assert asyncio.run(foreign())
    assert facade.stats().calls == 0


def test_the_managed_loop_is_used_when_the_foreign_one_has_stopped(facade: SyncFacade) -> None:
    """A thread that once worked for a loop which runs no more is not made to wait for it."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(on_caller())  # on asgiref's own thread, where it leaves the loop's mark
    used = asgiref.sync.SyncToAsync.single_thread_executor.submit(facade.async_to_sync(running_loop)).result(PATIENCE)
    loop.close()
    assert used is facade.call_sync(running_loop)


def test_a_new_loop_is_used_when_asked_for(facade: SyncFacade) -> None:
    """force_new_loop runs the coroutine on a loop of its own, which ends with the call."""
    loop = facade.async_to_sync(running_loop, force_new_loop=True)()
    assert loop.is_closed()
    assert facade.stats().calls == 0


def test_one_thread_is_used_when_asgirefs_single_thread_context_asks_for_it(facade: SyncFacade) -> None:
    """Inside AsyncSingleThreadContext all coroutines run on the same thread, which is not the caller's."""

    async def there() -> int:
        return here()

    with asgiref.sync.AsyncSingleThreadContext():
        threads = {facade.async_to_sync(there)() for _ in range(3)}
    assert len(threads) == 1
    assert here() not in threads


def test_it_is_refused_when_called_inside_a_running_loop(facade: SyncFacade) -> None:
    """Called where a loop runs it raises, as asgiref's, and makes no coroutine that nobody awaits."""
    made: list[Any] = []

    async def answer() -> None: ...

    def make() -> Any:
        made.append(answer())
        return made[-1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `make` is no coroutine function
        call = facade.async_to_sync(make)

    async def inside() -> None:
        call()

    with pytest.raises(RuntimeError, match="await it instead") as refused:
        asyncio.run(inside())
    assert refused.type is WouldDeadlockError
    assert inspect.getcoroutinestate(made[0]) == inspect.CORO_CLOSED


# --------------------------------------------------------------------------------------------------------- forms


def test_it_decorates_functions_and_methods_when_written_above_them(facade: SyncFacade) -> None:
    """It works as a decorator, bare and with arguments, of functions and of methods."""

    @facade.async_to_sync
    async def bare(value: int) -> int:
        return value

    @facade.async_to_sync(force_new_loop=False)
    async def with_arguments(value: int) -> int:
        return value

    class Holder:
        factor = 2

        @facade.async_to_sync
        async def method(self, value: int) -> int:
            """Double."""
            return value * self.factor

    assert (bare(1), with_arguments(2), Holder().method(3)) == (1, 2, 6)
    assert Holder().method.__doc__ == "Double."
    assert isinstance(bare, asgiref.sync.AsyncToSync)
    assert facade.stats().calls == 3


def test_it_takes_every_callable_when_it_gives_an_awaitable(facade: SyncFacade) -> None:
    """Partials, bound methods, callable objects, and any keyword: what asgiref takes."""

    class Callable_:
        async def __call__(self, **keywords: int) -> dict[str, int]:
            return keywords

        async def method(self, *values: int) -> tuple[int, ...]:
            return values

    instance = Callable_()
    bound = facade.async_to_sync(instance.method)
    assert bound(1) == (1,)
    assert bound.__self__ is instance
    assert facade.async_to_sync(functools.partial(instance.method, 1))(2) == (1, 2)
    keywords = {"timeout": 1, "context": 2, "awaitable": 3, "async_fn": 4}
    assert facade.async_to_sync(instance)(**keywords) == keywords


def test_a_function_around_a_coroutine_runs_on_the_calling_thread_when_called(facade: SyncFacade) -> None:
    """The code of a plain function that returns an awaitable is the caller's; a warning says what it is not."""
    threads: list[int] = []

    async def answer(value: int) -> int:
        return value

    def around(value: int) -> Any:
        threads.append(here())
        return answer(value)

    with pytest.warns(UserWarning, match="non-async-marked"):
        call = facade.async_to_sync(around)
    assert call(42) == 42
    assert threads == [here()]


def test_wrong_arguments_are_told_when_it_is_called(facade: SyncFacade) -> None:
    """A TypeError names the function that was called wrongly."""

    async def two(first: int, second: int) -> None: ...

    with pytest.raises(TypeError, match="two"):
        facade.async_to_sync(two)(1)  # type: ignore[call-arg]


# -------------------------------------------------------------------------------------------------------- errors


def frames(error: BaseException) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def test_an_exception_shows_both_sides_when_it_comes_out(facade: SyncFacade) -> None:
    """The traceback holds the caller's and the coroutine's frames, and at most 10 in all."""

    async def fail() -> None:
        raise ValueError("as it should")

    with pytest.raises(ValueError, match="as it should") as raised:
        facade.async_to_sync(fail)()
    shown = frames(raised.value)
    assert shown[0] == "test_an_exception_shows_both_sides_when_it_comes_out"
    assert shown[-1] == "fail"
    assert len(shown) <= 10


def test_a_traceback_stays_as_it_is_when_one_exception_is_raised_again_and_again(facade: SyncFacade) -> None:
    """1,000 raises of the same object leave the frames of the last."""
    same = ValueError("the same")

    async def fail() -> None:
        raise same

    call = facade.async_to_sync(fail)
    lengths = set()
    for _ in range(1_000):
        try:
            call()
        except ValueError as error:
            lengths.add(len(frames(error)))
    assert len(lengths) == 1
    assert lengths.pop() <= 10


def test_an_exception_comes_through_synchronous_code_when_that_raised_it(facade: SyncFacade) -> None:
    """What sync_to_async code raises reaches the coroutine, and the caller, as itself."""
    same = KeyError("the same")

    def fail() -> None:
        raise same

    async def ask() -> None:
        await sync_to_async(fail)()

    call = facade.async_to_sync(ask)
    lengths = set()
    for _ in range(100):
        with pytest.raises(KeyError) as raised:
            call()
        assert raised.value is same
        lengths.add(len(frames(same)))
        assert frames(same)[-1] == "fail"
    assert len(lengths) == 1


def test_the_handled_exception_is_seen_inside_when_called_from_an_except_block(facade: SyncFacade) -> None:
    """sys.exc_info() and chaining work as in the caller, and the handled exception's traceback does not grow."""

    async def look() -> BaseException | None:
        await asyncio.sleep(0)
        return sys.exc_info()[1]

    async def fail() -> None:
        raise ValueError("while handling")

    def handle() -> None:
        try:
            raise KeyError("handled")
        except KeyError as error:
            lengths = [len(frames(error))]
            for _ in range(100):
                seen.add(facade.async_to_sync(look)())
                lengths.append(len(frames(error)))
            grown.extend(length for length in lengths if length != lengths[0])
            facade.async_to_sync(fail)()

    seen: set[BaseException | None] = set()
    grown: list[int] = []
    assert facade.async_to_sync(look)() is None
    with pytest.raises(ValueError, match="while handling") as raised:
        handle()
    assert seen == {raised.value.__context__}
    assert grown == []


def test_the_handled_exception_is_seen_inside_when_its_attributes_cannot_be_set(facade: SyncFacade) -> None:
    """A frozen dataclass is an exception like any other."""

    @dataclasses.dataclass(frozen=True)
    class Frozen(Exception):
        code: int

    async def look() -> BaseException | None:
        return sys.exc_info()[1]

    def fail() -> None:
        raise Frozen(7)

    def handle() -> tuple[BaseException | None, BaseException, int]:
        try:
            fail()
        except Frozen as error:
            return facade.async_to_sync(look)(), error, len(frames(error))
        raise AssertionError

    seen, handled, length = handle()
    assert seen is handled
    assert length == 2


def test_no_garbage_is_left_when_calls_end(threaded: SyncFacade) -> None:
    """Nothing of a call, returned or raised, is left to the cyclic garbage collector."""

    async def answer() -> int:
        return await on_caller()

    async def fail() -> None:
        raise ValueError("as it should")

    async def reraise() -> None:
        raise

    def once() -> None:
        threaded.async_to_sync(answer)()
        try:
            threaded.async_to_sync(fail)()
        except ValueError:
            pass

    def handling() -> None:
        try:
            raise KeyError("handled")
        except KeyError:
            try:
                threaded.async_to_sync(reraise)()
            except KeyError:
                pass

    once()
    handling()
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            once()
            handling()
        ours = _garbage()
    finally:
        gc.enable()
    assert ours == []


def _garbage() -> list[object]:
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return [
            found
            for found in gc.garbage
            if type(found).__name__ in ("Call", "CallerExecutor", "ValueError", "KeyError")
        ]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


# ---------------------------------------------------------------------------------------------------- interrupts


class Interrupt(Exception):
    """What a signal handler raises here; registered, as RQ's timeouts are."""


register_interrupt(Interrupt)


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """``interrupt()``: from any thread, have Interrupt raised on the main thread by a real signal's handler."""

    def handler(_signum: int, _frame: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, handler)
    yield lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)  # type: ignore[arg-type]
    signal.signal(signal.SIGUSR1, before)


def test_the_coroutine_is_cancelled_and_cleaned_up_when_a_signal_ends_the_wait(
    facade: SyncFacade, interrupt: Callable[[], None]
) -> None:
    """The signal's exception comes out after the coroutine's finally block, whose variables flow out as well."""
    seen: list[str] = []

    async def wait() -> None:
        asyncio.get_running_loop().call_soon(interrupt)
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        finally:
            await asyncio.sleep(0.01)
            variable.set("from the clean-up")
            seen.append("cleaned up")

    def call() -> str:
        with pytest.raises(Interrupt):
            facade.async_to_sync(wait)()
        return variable.get()

    assert contextvars.copy_context().run(call) == "from the clean-up"
    assert seen == ["cancelled", "cleaned up"]
    assert facade.call_sync(running_loop)


@pytest.mark.parametrize("raised", [Interrupt, KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_the_call_when_it_lands_in_synchronous_code(
    facade: SyncFacade, raised: type[BaseException]
) -> None:
    """What ends a call is never a sync_to_async function's error: the coroutine only sees that it was cancelled."""
    seen: list[type[BaseException]] = []

    def strike() -> None:
        raise raised

    async def ask() -> None:
        try:
            await sync_to_async(strike)()
        except BaseException as error:
            seen.append(type(error))
            raise

    with pytest.raises(raised):
        facade.async_to_sync(ask)()
    assert seen == [asyncio.CancelledError]


def test_an_interrupt_ends_the_call_when_it_lands_in_work_from_a_foreign_loop(facade: SyncFacade) -> None:
    """The same holds for work that another loop has handed over; that loop is told that the caller has gone."""
    seen: list[type[BaseException]] = []
    told = threading.Event()

    def strike() -> None:
        raise Interrupt

    async def foreign() -> None:
        try:
            await sync_to_async(strike)()
        except BaseException as error:
            seen.append(type(error))
        told.set()

    async def ask() -> None:
        await sync_to_async(asyncio.run, thread_sensitive=False)(foreign())

    with pytest.raises(Interrupt):
        facade.async_to_sync(ask)()
    assert told.wait(PATIENCE)
    assert seen == [NoCallerError]


def test_work_that_waits_its_turn_is_refused_when_the_call_is_interrupted(facade: SyncFacade) -> None:
    """No synchronous code starts on a caller that was told to stop."""
    ran: list[int] = []

    def strike() -> None:
        raise Interrupt

    async def ask() -> None:
        await asyncio.gather(sync_to_async(strike)(), *(sync_to_async(ran.append)(number) for number in range(3)))

    with pytest.raises(Interrupt):
        facade.async_to_sync(ask)()
    assert ran == []


def test_left_over_work_is_told_that_its_caller_has_gone_when_the_call_is_interrupted(
    facade: SyncFacade, caplog: pytest.LogCaptureFixture
) -> None:
    """Work of a task that nobody cancels, and of a foreign loop, is not left waiting; cancelled work is forgotten."""
    refused: list[type[BaseException]] = []
    told, foreign_told, hold = threading.Event(), threading.Event(), threading.Event()

    def strike() -> None:
        hold.wait(PATIENCE)
        raise KeyboardInterrupt

    async def note(event: threading.Event) -> None:
        try:
            await on_caller()
        except RuntimeError as error:
            refused.append(type(error))
        event.set()

    async def foreign() -> None:
        forgotten = asyncio.create_task(on_caller())
        noted = asyncio.create_task(note(foreign_told))
        await asyncio.sleep(0)
        forgotten.cancel()
        with pytest.raises(asyncio.CancelledError):
            await forgotten
        hold.set()
        await noted

    async def ask() -> None:
        struck = sync_to_async(strike)()
        kept.append(asyncio.create_task(note(told)))
        kept.append(asyncio.create_task(sync_to_async(asyncio.run, thread_sensitive=False)(foreign())))
        await struck

    kept: list[asyncio.Task[None]] = []
    with pytest.raises(KeyboardInterrupt):
        facade.async_to_sync(ask)()
    assert told.wait(PATIENCE)
    assert foreign_told.wait(PATIENCE)
    assert refused == [NoCallerError, NoCallerError]
    facade.call_sync(asyncio.wait, kept)
    assert [record for record in caplog.records if "Exception in callback" in record.getMessage()] == []


def test_work_is_refused_when_its_caller_left_before_the_loop_could_take_it() -> None:
    """What a foreign loop posts to a blocked loop is refused once that goes on, if the caller's deadline has passed."""

    def refused_after(timeout: float) -> list[type[BaseException]] | None:
        """What was refused; None if the time was over before the loop was blocked."""
        refused: list[type[BaseException]] = []
        ready, go, told, left = (threading.Event() for _ in range(4))

        async def foreign() -> None:
            ready.set()
            go.wait(PATIENCE)
            try:
                await on_caller()
            except RuntimeError as error:
                refused.append(type(error))
            told.set()

        async def block() -> None:
            below = asyncio.create_task(sync_to_async(lambda: asyncio.run(foreign()), thread_sensitive=False)())
            await asyncio.to_thread(ready.wait, PATIENCE)
            go.set()
            left.wait(PATIENCE)  # the loop stands still
            await asyncio.shield(below)

        facade = SyncFacade(default_timeout=timeout, grace=0.05)
        try:
            with pytest.raises(DeadlineExceededError):
                facade.async_to_sync(block)()
            if not go.is_set():
                return None
            left.set()
            assert told.wait(PATIENCE)
            return refused
        finally:
            go.set()
            left.set()
            facade.shutdown(1.0)

    # A machine that stalls may let the time pass before the loop is blocked: then it gets more.
    outcomes = (refused_after(0.2 * 2**more) for more in range(6))
    assert next((refused for refused in outcomes if refused is not None), None) == [NoCallerError]


async def _short() -> int:
    await asyncio.sleep(0)
    return 42


async def _with_work() -> int:
    return sum(await asyncio.gather(sync_to_async(int)("20"), sync_to_async(int)("22")))


async def _with_a_nested_call() -> int:
    nested: int = await sync_to_async(asgiref.sync.async_to_sync(_short))()
    return nested


class _Instance:
    """An object that is called as *function* is."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    async def __call__(self) -> Any:
        return await self.function()


@pytest.mark.parametrize(
    ("form", "body"),
    [
        pytest.param(lambda function: function, _short, id="a coroutine function"),
        pytest.param(lambda function: function, _with_work, id="with work for the caller"),
        pytest.param(lambda function: function, _with_a_nested_call, id="with a nested call"),
        pytest.param(functools.partial, _short, id="a partial"),
        pytest.param(_Instance, _short, id="a callable object"),
        # What a function has just returned nobody can hold on to when an interrupt lands there.
        pytest.param(
            lambda function: lambda: function(),
            _short,
            id="a function",
            marks=pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:async_to_sync was passed:UserWarning")
def test_everything_is_as_it_was_when_an_interrupt_lands_at_any_point(
    threaded: SyncFacade, eventually: Callable[..., Any], form: Callable[[Any], Any], body: Callable[[], Any]
) -> None:
    """Wherever on the caller's way an interrupt lands: it comes out, nothing runs on, nothing is left un-awaited."""
    running: list[None] = []

    async def counted() -> int:
        running.append(None)
        try:
            result: int = await body()
        finally:
            running.pop()
        return result

    call = threaded.async_to_sync(form(counted))
    assert call() == 42
    for at in range(1, POINTS):
        came_out = None
        with Tracer(at, strike) as tracer:
            try:
                contextvars.copy_context().run(call)
            except Struck as error:
                came_out = error
        if tracer.where is None:
            break
        assert came_out is not None, f"struck at {tracer.where}: the interrupt was lost"
        eventually(lambda: not running, what=f"the end of the coroutine struck at {tracer.where}")
        assert call() == 42, tracer.where
    assert at > 12, "the tracer found no points: it tests nothing"
    gc.collect()  # complains of a coroutine that was never awaited


class _Watched:
    """A lock that notes which threads take it."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self.taken_by: set[int] = set()

    def acquire(self) -> Any:
        self.taken_by.add(here())
        return self.lock.acquire()

    def release(self) -> None:
        self.lock.release()


def test_the_caller_takes_no_lock_of_asgirefs_when_it_calls(threaded: SyncFacade) -> None:
    """An interrupt on the calling thread cannot leave the lock locked at which all sync_to_async code would stop."""
    executors = asgiref.sync.AsyncToSync.executors
    lock = executors._lock  # type: ignore[attr-defined]
    watched = _Watched(lock)
    object.__setattr__(executors, "_lock", watched)
    try:
        assert threaded.async_to_sync(_with_work)() == 42
    finally:
        object.__setattr__(executors, "_lock", lock)
    assert watched.taken_by
    assert here() not in watched.taken_by


# ---------------------------------------------------------------------------------------------- as every other call


def test_the_facades_limits_hold_when_called_through_it(facade: SyncFacade) -> None:
    """The default timeout ends it with DeadlineExceededError, max_in_flight refuses it with SaturatedError."""
    kind: dict[str, Any] = {"drive": facade.drive, "use_uvloop": facade.use_uvloop}
    narrow, short = SyncFacade(max_in_flight=1, **kind), SyncFacade(default_timeout=0.05, **kind)

    async def nested() -> None:
        with pytest.raises(SaturatedError):
            await sync_to_async(narrow.async_to_sync(running_loop))()

    async def forever() -> None:
        await asyncio.sleep(PATIENCE)

    try:
        narrow.async_to_sync(nested)()
        with pytest.raises(DeadlineExceededError):
            short.async_to_sync(forever)()
    finally:
        narrow.shutdown(0.0)
        short.shutdown(0.0)


def test_it_is_counted_and_listed_by_the_users_name_when_it_runs(facade: SyncFacade) -> None:
    """stats() counts the calls, in_flight() lists each under the function's own name."""

    async def look() -> list[str]:
        return [record.name for record in facade.in_flight()]

    class Callable_:
        async def __call__(self) -> list[str]:
            return await look()

    before = facade.stats().calls
    assert facade.async_to_sync(look)() == [look.__qualname__]
    assert facade.async_to_sync(functools.partial(look))() == [look.__qualname__]
    assert facade.async_to_sync(Callable_())() == [Callable_.__qualname__]
    assert facade.stats().calls == before + 3


def test_tasks_left_over_run_on_and_are_counted_when_the_call_has_returned(facade: SyncFacade) -> None:
    """A task that the coroutine does not wait for is not cancelled: it goes on, and is listed until it ends."""
    told = threading.Event()

    async def leave() -> asyncio.Event:
        async def background() -> None:
            await go.wait()
            told.set()

        go = asyncio.Event()
        kept.append(asyncio.create_task(background()))
        return go

    async def release(go: asyncio.Event) -> None:
        go.set()

    kept: list[asyncio.Task[None]] = []
    go = facade.async_to_sync(leave)()
    assert len(facade.left_over()) == 1
    facade.call_sync(release, go)
    assert told.wait(PATIENCE)
    facade.call_sync(asyncio.wait, kept)
    assert facade.left_over() == []


# ---------------------------------------------------------------------------------------------- life of the loop


def test_a_forked_child_can_call_when_its_parent_has(facade: SyncFacade) -> None:
    """After a fork, idle or out of code on the calling thread, the child's calls run on a loop of its own."""

    async def ask() -> tuple[int, object]:
        return await on_caller(), asyncio.get_running_loop()

    def call() -> bool:
        return facade.async_to_sync(ask)() == (here(), facade.call_sync(running_loop))

    def in_child() -> str:
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(PATIENCE))
            try:
                os.write(into, b"right" if call() else b"wrong thread, or loop")
            except BaseException as error:
                os.write(into, repr(error).encode())
            finally:
                os._exit(0)
        os.close(into)
        with os.fdopen(out, "rb") as said:
            answer = said.read().decode()
        return f"{answer}, status {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}"

    async def fork_inside() -> str:
        return await sync_to_async(in_child)()

    assert call()
    assert in_child() == "right, status 0"
    assert facade.async_to_sync(fork_inside)() == "right, status 0"
    assert call()


def test_late_work_in_a_forked_child_is_refused_when_only_the_parent_waits(facade: SyncFacade) -> None:
    """The executor of a call that waits in the parent takes nothing in the child, where nobody would ever do it."""

    def submit_in_child() -> int:
        executor = asgiref.sync.AsyncToSync.executors.current
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                asking = threading.Thread(target=lambda: refused.append(_refusal(executor)), daemon=True)
                asking.start()
                asking.join(PATIENCE)
                status = 0 if refused == ["NoCallerError"] else 2
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    refused: list[str] = []

    async def ask() -> int:
        return await sync_to_async(submit_in_child)()

    assert facade.async_to_sync(ask)() == 0


def _refusal(executor: Any) -> str:
    try:
        executor.submit(here).result(PATIENCE)
    except RuntimeError as error:
        return type(error).__name__
    return "none"


def _broken() -> None:
    raise OSError("the selector is gone")


@pytest.fixture
def collect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``collect(weakref, ...)``: see the tasks of a dead loop collected, in this context and no other.

    asgiref restores the context of its own suspended coroutines where they are collected: not into a later test's.
    """
    # pytest would keep the record of the death, with its traceback, and so the loop.
    monkeypatch.setattr(logging.getLogger("tta_sync"), "disabled", True)

    def poll(*tasks: weakref.ref[asyncio.Task[Any]]) -> None:
        give_up = time.monotonic() + PATIENCE
        while any(task() is not None for task in tasks):  # the dying thread may still hold them
            assert time.monotonic() < give_up, "what the loop has left is never collected"
            gc.collect()

    return poll


def _this_task() -> weakref.ref[asyncio.Task[Any]]:
    task = asyncio.current_task()
    assert task is not None
    return weakref.ref(task)


def test_every_waiter_is_told_when_the_loop_dies(collect: Callable[..., None], eventually: Callable[..., Any]) -> None:
    """The call, and a foreign loop that waits for its caller's thread, get an error; the next call gets a new loop."""
    facade = SyncFacade()
    left: list[weakref.ref[asyncio.Task[Any]]] = []
    seen: list[type[BaseException]] = []
    ready, go, told = threading.Event(), threading.Event(), threading.Event()

    async def foreign() -> None:
        ready.set()
        go.wait(PATIENCE)
        try:
            await on_caller()
        except BaseException as error:
            seen.append(type(error))
        told.set()

    async def die() -> None:
        below = asyncio.create_task(sync_to_async(asyncio.run, thread_sensitive=False)(foreign()))
        left.extend([_this_task(), weakref.ref(below)])
        await asyncio.to_thread(ready.wait, PATIENCE)
        asyncio.get_running_loop()._run_once = _broken  # type: ignore[attr-defined]  # from the next turn on
        go.set()
        executor = asgiref.sync.AsyncToSync.executors.current
        eventually(lambda: executor._foreign)  # no turn: it is posted, and never taken
        await below

    with pytest.raises(TTASyncError):
        facade.async_to_sync(die)()
    assert told.wait(PATIENCE)
    assert seen == [NoCallerError]
    assert facade.async_to_sync(running_loop)()
    facade.shutdown(0.0)
    del facade
    contextvars.copy_context().run(collect, *left)


def test_work_is_refused_at_once_when_the_loop_has_died_under_a_busy_caller(
    collect: Callable[..., None], eventually: Callable[..., Any]
) -> None:
    """A thread that hands work to a caller whose loop is closed is told so, also while that caller is still busy."""
    facade = SyncFacade()
    left: list[weakref.ref[asyncio.Task[Any]]] = []
    refused: list[str] = []

    def outlive(loop: Any) -> None:
        executor = asgiref.sync.AsyncToSync.executors.current
        loop._run_once = _broken
        loop.call_soon_threadsafe(int)
        eventually(loop.is_closed)
        asking = threading.Thread(target=lambda: refused.append(_refusal(executor)), daemon=True)
        asking.start()
        asking.join(PATIENCE)

    async def die() -> None:
        left.append(_this_task())
        await sync_to_async(outlive)(asyncio.get_running_loop())

    with pytest.raises(TTASyncError):
        facade.async_to_sync(die)()
    assert refused == ["NoCallerError"]
    facade.shutdown(0.0)
    del facade
    contextvars.copy_context().run(collect, *left)


def test_the_collector_changes_nothing_when_it_closes_what_a_dead_loop_has_left(collect: Callable[..., None]) -> None:
    """A coroutine that is closed where the collector happens to run does not touch the context of that place."""
    facade = SyncFacade()
    left: list[weakref.ref[asyncio.Task[Any]]] = []

    async def die() -> None:
        left.append(_this_task())
        asyncio.get_running_loop()._run_once = _broken  # type: ignore[attr-defined]
        await asyncio.sleep(PATIENCE)

    with pytest.raises(TTASyncError):
        facade.async_to_sync(die)()
    facade.shutdown(0.0)
    del facade

    def elsewhere() -> object:
        asgiref.sync.AsyncToSync.executors.current = "elsewhere"  # type: ignore[misc]
        collect(*left)
        return asgiref.sync.AsyncToSync.executors.current

    assert contextvars.copy_context().run(elsewhere) == "elsewhere"


def test_calls_in_flight_end_when_the_facade_is_shut_down(facade: SyncFacade) -> None:
    """A call that waits, for itself or for code on its own thread, gets LoopUnavailableError, and the code its end."""
    raised: list[type[BaseException]] = []
    waiting, busy, free = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        busy.set()
        free.wait(PATIENCE)

    async def wait() -> None:
        asyncio.get_running_loop().call_soon(waiting.set)
        await asyncio.sleep(PATIENCE)

    async def wait_for_code() -> None:
        await sync_to_async(hold)()

    def call(function: Callable[[], Any]) -> None:
        try:
            facade.async_to_sync(function)()
        except TTASyncError as error:
            raised.append(type(error))

    callers = [threading.Thread(target=call, args=(function,), daemon=True) for function in (wait, wait_for_code)]
    for caller in callers:
        caller.start()
    assert waiting.wait(PATIENCE)
    assert busy.wait(PATIENCE)
    facade.shutdown(0.0)
    free.set()
    for caller in callers:
        caller.join(PATIENCE)
        assert not caller.is_alive()
    assert raised == [LoopUnavailableError, LoopUnavailableError]


def test_it_is_refused_when_the_facade_was_shut_down(facade: SyncFacade) -> None:
    """After shutdown() it raises LoopUnavailableError, and makes no coroutine."""
    facade.shutdown(0.0)
    with pytest.raises(LoopUnavailableError):
        facade.async_to_sync(running_loop)()


def run_program(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run *body* as a program of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_process_ends_in_silence_when_tasks_and_calls_are_left() -> None:
    """A fresh process with a call in flight and a task left over exits with status 0, and says nothing."""
    ended = run_program(
        """
        import asyncio, threading
        from asgiref.sync import sync_to_async
        from tta_sync import async_to_sync

        in_flight = threading.Event()

        @async_to_sync
        async def leave():
            kept.append(asyncio.create_task(asyncio.sleep(60)))

        @async_to_sync
        async def wait():
            await sync_to_async(in_flight.set)()
            await asyncio.sleep(60)

        kept = []
        leave()
        threading.Thread(target=wait, daemon=True).start()
        in_flight.wait()
        """
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize("kind", FACADES)
def test_calls_are_answered_when_a_storm_of_signals_is_over(kind: str) -> None:
    """After a second of signals that raise wherever they land, calls with thread-sensitive code return as before."""
    ended = run_program(
        """
        import asyncio, logging, signal, sys, threading, time
        from asgiref.sync import sync_to_async
        from tta_sync.facade import SyncFacade

        class Struck(BaseException): ...

        async def with_work():
            return sum(await asyncio.gather(sync_to_async(int)("20"), sync_to_async(int)("22")))

        def handler(*_):
            if phase == "storm":
                raise Struck

        def storm():
            global phase
            while phase == "calm":
                time.sleep(0.001)
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                signal.pthread_kill(main, signal.SIGUSR1)
                time.sleep(0.0005)
            phase = "over"

        def call_on():
            global struck
            while phase == "storm":
                try:
                    while phase == "storm":
                        call()
                except Struck:
                    struck += 1

        logging.disable(logging.CRITICAL)  # orphans for a moment, by the dozen
        sys.unraisablehook = lambda _: None  # what lands in a weak reference's callback
        main, phase, struck = threading.main_thread().ident, "calm", 0  # no Event: it has a lock
        facade = SyncFacade(**eval(sys.argv[1]))
        call = facade.async_to_sync(with_work)
        signal.signal(signal.SIGUSR1, handler)
        threading.Thread(target=storm, daemon=True).start()
        phase = "storm"
        while phase == "storm":
            try:
                call_on()
            except Struck:
                pass  # it landed between two calls
        assert struck > 10
        assert call() == 42
        until = time.monotonic() + 20
        while facade.in_flight() or facade.left_over():
            assert time.monotonic() < until, (facade.in_flight(), facade.stats())
            time.sleep(0.01)
        print("usable")
        """,
        repr(FACADES[kind]),
    )
    assert (ended.returncode, ended.stdout) == (0, "usable\n"), ended.stderr


def test_asgiref_is_not_imported_when_nobody_has_asked_for_it() -> None:
    """Importing tta_sync, and a call of another kind, load nothing of asgiref; the first use of async_to_sync does."""
    ended = run_program(
        """
        import sys, tta_sync
        async def answer(): return 42
        tta_sync.call_sync(answer)
        assert not [name for name in sys.modules if name.startswith("asgiref")]
        assert tta_sync.async_to_sync(answer)() == 42
        assert "asgiref.sync" in sys.modules
        """
    )
    assert ended.returncode == 0, ended.stderr


def test_greenlets_keep_their_own_code_when_gevent_has_patched_the_process() -> None:
    """Under gevent, thread-sensitive code runs in the greenlet that called, and 50 of them wait at once."""
    ended = run_program(
        """
        from gevent import monkey; monkey.patch_all()
        import asyncio, threading, time, gevent
        from asgiref.sync import sync_to_async
        from tta_sync import async_to_sync

        @async_to_sync
        async def ask():
            await asyncio.sleep(0.2)
            first = await sync_to_async(threading.get_ident)()
            return {first, await asyncio.create_task(sync_to_async(threading.get_ident)())}

        def call():
            return ask() == {threading.get_ident()}

        started = time.monotonic()
        greenlets = [gevent.spawn(call) for _ in range(50)]
        gevent.joinall(greenlets, timeout=20)
        assert [greenlet.value for greenlet in greenlets] == [True] * 50, [g.value for g in greenlets]
        assert time.monotonic() - started < 5, "one after the other they take 10 s"
        """
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_loops_are_let_go_when_callers_drove_them() -> None:
    """What asgiref is told about a loop without a thread of its own is taken back once the loop is closed."""
    for _ in range(3):
        facade = SyncFacade(drive="caller")
        facade.async_to_sync(on_caller)()
        facade.shutdown(0.0)
    facade = SyncFacade(drive="caller")
    try:
        facade.async_to_sync(on_caller)()
        assert [loop for loop in asgiref.sync.AsyncToSync.loop_thread_executors if loop.is_closed()] == []
    finally:
        facade.shutdown(0.0)


def test_insensitive_code_elsewhere_keeps_asgirefs_rules_when_callers_drive_the_loop() -> None:
    """sync_to_async below a plain call_sync runs on asgiref's one thread, whoever drives the loop."""
    facade = SyncFacade(drive="caller")
    one_thread = asgiref.sync.SyncToAsync.single_thread_executor.submit(here).result(PATIENCE)
    try:
        assert facade.async_to_sync(on_caller)() == here()
        assert facade.call_sync(on_caller) == one_thread
    finally:
        facade.shutdown(0.0)
