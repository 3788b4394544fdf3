"""asgiref's ``async_to_sync`` on the managed loop: what code written for Flask, Django or asgiref expects of it.

The call itself is an ordinary ``call_sync``: interrupts, deadlines, forks, shutdown and statistics are its business.
Added here is asgiref's own contract:

* context variables flow into the coroutine and, however it ends, back to the caller;
* ``sync_to_async`` code inside it runs on the calling thread, from subtasks and nested calls too: asgiref finds that
  thread as ``AsyncToSync.executors.current``, an executor, which here hands its work to the waiting caller;
* the exception that the caller is handling is the one that the coroutine sees in ``sys.exc_info()``;
* a call from ``sync_to_async`` code of a foreign loop runs on that loop, ``force_new_loop`` gets a new one, and inside
  AsyncSingleThreadContext all calls share a thread. Where the managed loop is not that loop or has no one thread,
  because callers drive it, the call is left to asgiref.

One difference is meant: asgiref's loop ends with the call and cancels what is left on it; here tasks left over run on.
One is not: asgiref shows a Local's value to the thread that set it, so where callers drive the loop in turn, a
coroutine may lose sight of one that it has set itself.

Importing this module imports asgiref: that happens at the first use.

Source: asgiref 3.13, ``sync.py`` and ``current_thread_executor.py``.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import os
import sys
import threading
from asyncio import AbstractEventLoop, _get_running_loop
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from asgiref import sync
from asgiref.current_thread_executor import CurrentThreadExecutor, _WorkItem
from asgiref.local import _rehome, _Storage

from tta_sync.context import current_caller, current_pool, running_context, time_limit
from tta_sync.exceptions import NoCallerError
from tta_sync.runtime import call as calls, generation
from tta_sync.runtime.driven import DrivenLoop
from tta_sync.runtime.loop import managed_loop_of

P = ParamSpec("P")
R = TypeVar("R")


class Facade(Protocol):
    """What is needed of :class:`tta_sync.SyncFacade`."""

    drive: Any

    def call_sync(self, async_fn: Callable[[], Awaitable[R]], /) -> R: ...


@overload
def async_to_sync(
    facade: Facade, awaitable: None = None, *, force_new_loop: bool = False
) -> Callable[[Callable[P, Awaitable[R]]], AsyncToSync[P, R]]: ...
@overload
def async_to_sync(
    facade: Facade, awaitable: Callable[P, Awaitable[R]], *, force_new_loop: bool = False
) -> AsyncToSync[P, R]: ...
def async_to_sync(
    facade: Facade, awaitable: Callable[P, Awaitable[R]] | None = None, *, force_new_loop: bool = False
) -> AsyncToSync[P, R] | Callable[[Callable[P, Awaitable[R]]], AsyncToSync[P, R]]:
    """Return *awaitable* as a synchronous function that runs on *facade*'s loop, or a decorator that makes one."""
    if awaitable is None:
        return functools.partial(AsyncToSync, force_new_loop=force_new_loop, facade=facade)
    return AsyncToSync(awaitable, force_new_loop, facade=facade)


class AsyncToSync(sync.AsyncToSync[P, R]):
    """A coroutine function as a synchronous one: :class:`asgiref.sync.AsyncToSync` on the managed loop."""

    def __init__(self, awaitable: Callable[P, Awaitable[R]], force_new_loop: bool = False, *, facade: Facade) -> None:
        super().__init__(awaitable, force_new_loop)
        self._facade = facade
        self._name = _name_of(awaitable)
        self._only_makes_a_coroutine = _only_makes_a_coroutine(awaitable)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the coroutine and return its result, on a thread where no loop runs.

        Raises:
            WouldDeadlockError: called where it could only deadlock. A RuntimeError, as asgiref's.
            LoopUnavailableError: called after shutdown.
            DeadlineExceededError: the current request's or job's deadline, or the facade's default, has passed.
            SaturatedError: ``max_in_flight`` calls are under way.
        """
        __traceback_hide__ = True  # noqa: F841  # read by debuggers, as in asgiref's own frames
        noted = sync.SyncToAsync.threadlocal.__dict__  # by the sync_to_async that this thread works for
        outer = _loop_that_waits(noted) if noted else None
        if (
            self.force_new_loop
            or (outer is not None and managed_loop_of(outer) is None)
            or (self._facade.drive == "caller" and outer is None and self.async_single_thread_context.get(None))
        ):
            return super().__call__(*args, **kwargs)
        relatives: list[asyncio.Task[Any] | None] | None = noted.get("task_context")
        handled = sys.exc_info()[1]
        traceback = None if handled is None else handled.__traceback__
        begin: Callable[[], Awaitable[R]] = functools.partial(self.awaitable, *args, **kwargs)
        awaitable: Awaitable[R] | None = None
        executor = CallerExecutor(_current_executor())

        async def body() -> R:
            __traceback_hide__ = True  # noqa: F841
            running = executor.open()
            # The sync_to_async that waits for this call hands its own cancellation on to the task that it finds here.
            beside = relatives if relatives is not None and running is outer else []
            me = asyncio.current_task()
            beside.append(me)
            try:
                if handled is None:
                    return await begin()
                try:
                    raise handled
                except BaseException:
                    # Without this frame, which the raise has added. Not by the exception's own class, which may be
                    # a frozen dataclass, or have a with_traceback of its own.
                    BaseException.with_traceback(handled, traceback)
                    return await begin()
            finally:
                beside.remove(me)
                if executor.close():
                    await executor.finish()

        body.__qualname__ = self._name
        try:
            if not self._only_makes_a_coroutine:
                awaitable = begin()  # its own code belongs on this thread
                begin = functools.partial(_return, awaitable)
            return self._facade.call_sync(body)
        finally:
            executor.leave()
            handled = traceback = None  # an exception that comes out holds this frame: no cycle
            if inspect.iscoroutine(awaitable) and inspect.getcoroutinestate(awaitable) == inspect.CORO_CREATED:
                awaitable.close()  # the call was refused, or ended before it began


class CallerExecutor(CurrentThreadExecutor):
    """The thread that waits for one call, as asgiref knows it: an executor that runs there what it is given.

    asgiref's own executors walk up a chain of ``_old_executor`` to one that still takes work, and use the underscored
    attributes of those they meet; ours take part in that.

    Who owns what: ``context`` is written by the loop before the call is done and read by the caller after it;
    ``pending`` is the loop thread's; ``_foreign`` is anybody's (set operations are atomic); the rest is written once.
    """

    def __init__(self, old: CurrentThreadExecutor | None) -> None:
        # Not asgiref's, which makes a condition variable: a signal's exception could leave that locked.
        self.context: contextvars.Context | None = None
        self.pending: set[asyncio.Task[Any]] = set()
        self._old_executor = old
        self._ident = threading.get_ident()  # a greenlet's own, under gevent
        self._generation = generation.current.number
        self._loop: AbstractEventLoop | None = None
        self._caller: calls.Call | None = None
        self._foreign: set[_WorkItem] = set()
        self._open = False

    # ---- for the call that it belongs to -----------------------------------------------------------------------------

    def open(self) -> AbstractEventLoop:
        """Take work from now on, for the call that the current task carries; return its loop. Loop thread only."""
        self._loop = running = asyncio.get_running_loop()
        self._caller = cast(calls.Call, current_caller.get())
        self._open = True
        _move_locals_here()
        _executors.set(_Storage(threading.get_ident(), {"current": self}))
        if isinstance(self._caller.loop, DrivenLoop):
            _loop_has_no_thread(running)
            _executor.set(self)
        return running

    def close(self) -> bool:
        """Take no more work, since the coroutine has ended; say whether to :meth:`finish` some. Loop thread only."""
        self._open = False
        if _get_running_loop() is not self._loop:
            return False  # the loop has died, and the garbage collector closes the coroutine, wherever that runs
        _executors.set(_Storage(threading.get_ident(), {"current": self._old_executor}))
        self.context = contextvars.copy_context()
        # A caller that gives up does no more work: what is under way finds another, who may wait for this call to end.
        return bool(self.pending) and self._caller is not None and self._caller.why is None

    async def finish(self) -> None:
        """See the work done that was taken, though the coroutine did not wait for it. So does asgiref."""
        while self.pending:
            await asyncio.wait(self.pending)

    def leave(self) -> None:
        """Give the caller's context what the coroutine has set in its own. Caller's thread only."""
        context, self.context = self.context, None
        caller, self._caller = self._caller, None
        if context is not None:
            flow_out(context)
        if self._foreign and caller is not None and caller.loop.dead:
            for item in self._foreign.copy():
                _settle(item, None)

    # ---- as an executor ----------------------------------------------------------------------------------------------

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run *fn* on the thread that waits; if it waits no more, on the next one up the chain that does.

        On the call's own loop the answer is an asyncio future, which ``loop.run_in_executor`` takes as it is.

        Raises:
            NoCallerError: nobody waits any more. A RuntimeError, as asgiref's.
        """
        running = _get_running_loop()
        inner = self._call_within(running)
        if inner is not None:
            return cast("Future[R]", self._start_within(inner, functools.partial(fn, *args, **kwargs)))
        if running is not self._loop and threading.get_ident() == self._ident:
            raise RuntimeError("this is the calling thread, which would wait for itself: call the function directly")
        if self._broken:
            if self._old_executor is None:
                raise NoCallerError(_GONE)
            return self._old_executor.submit(fn, *args, **kwargs)
        if running is self._loop:
            return cast("Future[R]", self._start(functools.partial(fn, *args, **kwargs)))
        item = _WorkItem(Future(), functools.partial(fn, *args, **kwargs))
        self.append(item)
        return cast("Future[R]", item.future)

    def append(self, item: _WorkItem) -> None:
        """Take an item from another loop, or from a thread. Any thread but the caller's."""
        assert self._loop is not None
        self._foreign.add(item)
        try:
            self._loop.call_soon_threadsafe(self._serve, item)
        except RuntimeError:  # the loop is closed
            self._foreign.discard(item)
            _settle(item, None)

    # What asgiref's executors below this one do:
    #     with old._work_ready: if not old._broken: old._work_items.append(item); old._work_ready.notify()

    _broken = property(
        lambda self: not self._open or self._generation != generation.current.number,
    )
    _work_items = property(lambda self: self)
    _work_ready = property(lambda self: self)

    def __enter__(self) -> None:  # type: ignore[override]  # a condition's face, not an executor's
        """Guard nothing: what can go wrong between a look at ``_broken`` and ``append`` is seen to in ``_run``."""

    def __exit__(self, *exc_info: object) -> None: ...

    def notify(self) -> None: ...

    # ---- for calls within the call -----------------------------------------------------------------------------------

    def _call_within(self, running: AbstractEventLoop | None) -> calls.Call | None:
        """Return the call, made by work on the thread of this one, that the code on the *running* loop belongs to.

        It inherits this executor with its context. The thread waits for the innermost call, and for no other.
        """
        call = current_caller.get()
        if not isinstance(call, calls.Call) or call is self._caller or call.ident != self._ident:
            return None
        if call.loop.loop is not running or call.done or call.has_left() or call.why is not None:
            return None  # it does no more work, and the thread will soon be back in the call around it
        return call

    def _start_within(self, inner: calls.Call, work: Callable[[], R]) -> asyncio.Task[R]:
        if inner.loop.loop is self._loop and self._open:
            return self._start(work, inner)
        loop: AbstractEventLoop = inner.loop.loop
        return loop.create_task(self._run(work, inner), name="sync_to_async")

    # ---- on its way --------------------------------------------------------------------------------------------------

    def _start(self, work: Callable[[], R], inner: calls.Call | None = None) -> asyncio.Task[R]:
        assert self._loop is not None
        task = self._loop.create_task(self._run(work, inner), name="sync_to_async")
        self.pending.add(task)
        task.add_done_callback(self.pending.discard)
        return task

    async def _run(self, work: Callable[[], R], inner: calls.Call | None = None) -> R:
        """Run *work* on the thread that waits: for the *inner* call, for this executor's, or for one around it."""
        began = False

        def on_caller() -> R:
            nonlocal began
            began = True
            return _guarded(work)

        if inner is not None:
            try:
                return await inner.run(on_caller)
            except NoCallerError:
                if began:
                    raise
            return await asyncio.wrap_future(self.submit(work))
        if self._caller is not None:
            try:
                return await self._caller.run(on_caller)
            except NoCallerError:
                if began:
                    raise
        if self._old_executor is None:
            raise NoCallerError(_GONE)
        return await asyncio.wrap_future(self._old_executor.submit(work))

    def _serve(self, item: _WorkItem) -> None:
        # The item's future has a lock, which an interrupt on the caller's thread could leave locked. So: settled here.
        task = self._start(functools.partial(item.fn, *item.args, **item.kwargs))

        def settle(task: asyncio.Task[Any]) -> None:
            self._foreign.discard(item)
            _settle(item, task)

        def follow(future: Future[Any]) -> None:
            if future.cancelled() and self._caller is not None:
                self._caller.loop.post(task.cancel)

        task.add_done_callback(settle)
        item.future.add_done_callback(follow)


class _ExecutorOfTheCall(CurrentThreadExecutor):
    """The executor of a loop whose callers drive it in turn.

    asgiref shows a Local's value to one thread only, so it loses sight of ``executors.current`` when another caller
    takes over the loop, and looks here instead.
    """

    def __init__(self) -> None:
        pass

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        executor = _executor.get()
        return (executor or sync.SyncToAsync.single_thread_executor).submit(fn, *args, **kwargs)


_executor: contextvars.ContextVar[CallerExecutor | None] = contextvars.ContextVar("tta_sync_executor", default=None)
_executor_of_the_call = _ExecutorOfTheCall()


def _loop_has_no_thread(loop: AbstractEventLoop) -> None:
    known = sync.AsyncToSync.loop_thread_executors
    if loop not in known:
        for other in [other for other, executor in known.items() if executor is _executor_of_the_call]:
            if other.is_closed():
                del known[other]
        known[loop] = _executor_of_the_call


_GONE = (
    "the thread that called async_to_sync waits no more: await what uses sync_to_async before the coroutine returns, "
    "or give it thread_sensitive=False"
)


def _settle(item: _WorkItem, task: asyncio.Task[Any] | None) -> None:
    """Give the outcome to whoever waits for *item*. Without a task, or if that was cancelled, the caller has gone."""
    try:
        if task is None or task.cancelled():
            item.future.set_exception(NoCallerError(_GONE))
        elif (error := task.exception()) is not None:
            item.future.set_exception(error)
        else:
            item.future.set_result(task.result())
    except InvalidStateError:
        pass  # it has been cancelled


def _guarded(work: Callable[[], R]) -> R:
    """Run *work*, and undo what asgiref leaves on the thread. Caller's thread only.

    It leaves ``main_event_loop``, and its own async_to_sync would, called later on this thread, move to our loop.
    """
    left = sync.SyncToAsync.threadlocal.__dict__
    before = left.copy()
    try:
        return work()
    finally:
        left.clear()
        left.update(before)


def _loop_that_waits(noted: dict[str, Any]) -> AbstractEventLoop | None:
    """Return the loop whose coroutine waits for the code on this thread."""
    loop: AbstractEventLoop | None = noted.get("main_event_loop")
    if loop is None or noted.get("main_event_loop_pid") != os.getpid():
        return None
    # A loop that does not run will never answer; a managed one runs whenever it is needed.
    return loop if loop.is_running() or managed_loop_of(loop) is not None else None


# ---- context ---------------------------------------------------------------------------------------------------------

_OURS = frozenset({current_caller, current_pool, running_context, time_limit, _executor})
"""Context variables that say what runs now, and so never flow out of it."""


_executors: contextvars.ContextVar[_Storage] = sync.AsyncToSync.executors._storage._data
"""Where the Local ``AsyncToSync.executors`` keeps its value. The Local itself takes a lock, which an interrupt on a
caller's thread could leave locked for good, and every loop would stand still at it."""


def _current_executor() -> CurrentThreadExecutor | None:
    """Return ``AsyncToSync.executors.current``: that of the call which this thread works for."""
    storage = _executors.get(None)
    if storage is None or storage.thread_id != threading.get_ident():
        return None
    executor: CurrentThreadExecutor | None = storage.data.get("current")
    return executor


def _move_locals_here() -> None:
    """Make the asgiref.local.Local values of the current context visible on this thread. Loop thread only."""
    for variable, value in contextvars.copy_context().items():
        if type(value) is _Storage:
            variable.set(_rehome(value))


def flow_out(context: contextvars.Context) -> None:
    """Set here what is set in *context*: asgiref's ``_restore_context``, without what is ours."""
    for variable, value in context.items():
        if variable in _OURS:
            continue
        if type(value) is _Storage:
            value = _rehome(value)
        try:
            if variable.get() is value:
                continue
        except LookupError:
            pass
        variable.set(value)


# ---- functions -------------------------------------------------------------------------------------------------------


def _return(awaitable: Awaitable[R]) -> Awaitable[R]:
    return awaitable


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


def _only_makes_a_coroutine(function: Any) -> bool:
    """Say whether calling *function* runs none of its code: it is an ``async def``, not a function around one."""
    while isinstance(function, functools.partial):
        function = function.func
    if not hasattr(function, "__code__"):
        function = type(function).__call__
    code = getattr(function, "__code__", None)
    return code is not None and bool(code.co_flags & inspect.CO_COROUTINE)
