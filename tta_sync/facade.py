"""The synchronous face: the only place where a caller's thread and the loop's thread meet.

The order of every call: refuse what could only deadlock → check the deadline → answer by ``peek`` where a primitive
can → hop to the loop and wait.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401  # see _hook_exit
import contextlib
import contextvars
import inspect
import itertools
import math
import operator
import os
import signal
import sys
import threading
import time
from asyncio import _get_running_loop
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from tta_sync.context import (
    Deadline,
    WorkflowContext,
    context_providers,
    current_caller,
    current_context,
    ports,
    running_context,
)
from tta_sync.exceptions import (
    ConfigurationError,
    DeadlineExceededError,
    LoopUnavailableError,
    NoCallerError,
    WouldDeadlockError,
)
from tta_sync.primitives.core.base import (
    MISS,
    In,
    Out,
    WorkflowPrimitive,
    is_replaced,
    sort_arguments,
    step_name,
    with_keywords,
)
from tta_sync.runtime import generation
from tta_sync.runtime.call import Call, register_interrupt
from tta_sync.runtime.loop import ManagedLoop, Totals, living_loops, managed_loop_of, stop_all
from tta_sync.runtime.native import get_ident, threads_are_greenlets
from tta_sync.runtime.resources import OpenResources, Resource
from tta_sync.runtime.streaming import Pipe, Stream

if TYPE_CHECKING:
    from tta_sync.context import Workflow

__all__ = [
    "CallRecord",
    "FacadeStats",
    "SyncFacade",
    "async_to_sync",
    "call_sync",
    "default_facade",
    "iterate_sync",
    "register_interrupt",
    "resource",
    "run_on_caller",
    "run_sync",
]

P = ParamSpec("P")
T = TypeVar("T")

EXIT_BUDGET = 2.0
EXIT_GRACE = 1.0
"""Seconds that calls in flight get when the interpreter exits: to end by themselves, then to clean up."""


class _Exit:
    """Whether the interpreter is on its way out; set by the exit hook, before executors are joined."""

    __slots__ = ("begun", "hooked")

    def __init__(self) -> None:
        self.begun = False
        self.hooked = False


_exit = _Exit()


class _Subscriptable:
    """``stats["calls"]`` beside ``stats.calls``, for those who turn it into JSON."""

    __slots__ = ()

    def __getitem__(self, key: str) -> Any:
        try:
            return getattr(self, key)
        except AttributeError:
            raise KeyError(key) from None


@dataclass(frozen=True, slots=True)
class FacadeStats(_Subscriptable):
    """What a facade has done since its process began.

    ``orphans`` are calls, and work on pool threads, that were left behind because they ignored their cancellation;
    ``restarts`` is how often the loop was stopped or died under its callers, ``loop_lag`` how late the loop last
    answered, in seconds.
    """

    calls: int
    orphans: int
    restarts: int
    generation: int
    loop_lag: float


@dataclass(frozen=True, slots=True)
class CallRecord(_Subscriptable):
    """One call in flight. ``age`` is in seconds; ``state`` is queued, running, cancelling or orphaned."""

    name: str
    age: float
    state: str
    caller_thread: str


class SyncFacade:
    """Run async code from synchronous threads, on one managed event loop per process.

    Args:
        max_in_flight: calls that may be in flight at once; one more is refused at once with SaturatedError.
        default_timeout: seconds for a call that names no timeout; None means no limit.
        grace: seconds that a cancelled call gets to clean up before it is left behind as an orphan.
        use_uvloop: run on uvloop, which must be installed (``tta-sync[uvloop]``).
        pool_size: threads for ``thread_step``.
        drive: "thread" runs the loop on a thread of its own. "caller" lets the waiting caller drive it, which saves the
            thread switch; the price is that a coroutine that blocks holds whoever drives, beyond the deadline.
        context_out: let what a call sets in context variables be set for its caller as well, however the call ends, as
            ``async_to_sync`` always does.

    The loop starts at the first call, in whichever process makes it: building a facade at import time, preloading under
    gunicorn and forking workers are safe.
    """

    def __init__(
        self,
        *,
        max_in_flight: int | None = None,
        default_timeout: float | None = None,
        grace: float = 1.0,
        use_uvloop: bool = False,
        pool_size: int = 32,
        drive: Literal["thread", "caller"] = "thread",
        context_out: bool = False,
    ) -> None:
        if max_in_flight is not None and not max_in_flight >= 1:
            raise ConfigurationError(f"max_in_flight is {max_in_flight}: it must be at least 1, or None for no limit")
        if default_timeout is not None and not default_timeout > 0:
            raise ConfigurationError(
                f"default_timeout is {default_timeout}: give seconds above 0, or None for no limit"
            )
        if not 0 <= grace < math.inf:
            raise ConfigurationError(f"grace is {grace}: give seconds, 0 or more, and not for ever")
        if pool_size < 1:
            raise ConfigurationError(f"pool_size is {pool_size}: it must be at least 1")
        if drive not in ("thread", "caller"):
            raise ConfigurationError(f'drive is {drive!r}: write "thread" or "caller"')
        if drive == "caller" and use_uvloop:
            raise ConfigurationError('drive="caller" runs on asyncio\'s own loop: leave use_uvloop out')
        if drive == "caller" and threads_are_greenlets():
            raise ConfigurationError(
                'drive="caller" would hold all greenlets of the thread: use drive="thread" with gevent'
            )
        # What a call will need is imported now: a signal's exception in an import would leave the module locked.
        if drive == "caller":
            import tta_sync.runtime.driven  # noqa: F401
        if use_uvloop:
            with contextlib.suppress(ImportError):  # said at the first call
                import uvloop  # noqa: F401
        self._flow_out: Callable[[contextvars.Context], None] | None = None
        if context_out:
            from tta_sync.runtime.asgiref_bridge import flow_out  # imports asgiref, whose Locals flow as well

            self._flow_out = flow_out
        self.drive = drive
        self.context_out = context_out
        self.max_in_flight = max_in_flight
        self.default_timeout = default_timeout
        self.grace = grace
        self.use_uvloop = use_uvloop
        self.pool_size = pool_size
        self._peeked = itertools.count(1)
        self._peeks = 0
        self._loop: ManagedLoop | None = None  # the latest; checked before use for generation and death
        self._loops: dict[tuple[int, int], ManagedLoop | None] = {}  # by generation and how many died before
        self._totals: dict[int, Totals] = {}  # by generation
        self._closed_in: int | None = None  # the generation in which shutdown() was called

    # ---- calls -----------------------------------------------------------------------------------------------------

    @overload
    def run_sync(
        self,
        workflow: WorkflowPrimitive[In, Out],
        data: In = ...,
        context: WorkflowContext | None = ...,
        *,
        timeout: float | None = ...,
    ) -> Out: ...
    @overload
    def run_sync(
        self,
        workflow: Workflow,
        data: Any = ...,
        context: Any = ...,
        *,
        timeout: float | None = ...,
        input_data: Any = ...,
    ) -> Any: ...
    def run_sync(
        self,
        workflow: Workflow,
        data: Any = None,
        context: WorkflowContext | None = None,
        *,
        timeout: float | None = None,
        input_data: Any = None,
    ) -> Any:
        """Run a workflow and wait for its result.

        *workflow* is any object with ``async execute(data, context)``, ours or a foreign one. *context* defaults to one
        that continues the current request or job. *timeout* is the whole call's, in seconds. *input_data* is TTA.dev's
        name for *data*.

        Raises:
            DeadlineExceededError: the timeout, or the context's deadline, has passed.
            SaturatedError: ``max_in_flight`` calls are under way.
            WouldDeadlockError: called where it could only deadlock.
            LoopUnavailableError: called after shutdown.
        """
        loop = self._loop
        if loop is None or loop.generation != generation.current.number or loop.dead:
            loop = self._start()
        if get_ident() == loop.ident or _get_running_loop() is not None:
            self._refuse(loop, workflow)
        if input_data is not None:
            data, context = with_keywords(data, context, {"input_data": input_data})
        if not isinstance(context, WorkflowContext) or isinstance(data, WorkflowContext):
            if context is None and not isinstance(data, WorkflowContext):
                current = current_context()
                context = WorkflowContext() if current is None else current.next_call()
            else:
                data, context = sort_arguments(data, context)
        own_deadline = context.deadline
        deadline, limit = self._deadline(timeout, own_deadline)
        if isinstance(workflow, WorkflowPrimitive) and not is_replaced(workflow):
            if workflow.peeks:
                answer = workflow.peek(data, context)
                if answer is not MISS:
                    self._peeks = next(self._peeked)
                    return answer
            fn: Any = workflow._run
            name = workflow.name or type(workflow).__qualname__
        else:
            fn = getattr(workflow, "execute", None)
            if fn is None:
                _drop(workflow)
                raise TypeError(
                    f"run_sync takes an object with `async execute(data, context)`, not {workflow!r}: "
                    "write call_sync(function, ...) for a coroutine function, or make it a workflow with @step"
                )
            name = step_name(workflow)
        caller_context = contextvars.copy_context()
        caller_context.run(running_context.set, context)
        if deadline is None or (own_deadline is not None and own_deadline.at == deadline):
            call = loop.new_call(fn, (data, context), None, name, deadline, limit, caller_context)
            if self._flow_out is not None:
                return self._conduct_and_flow(loop, call, caller_context)
            return loop.conduct(call, self.max_in_flight)
        # The steps must see this call's limit; a context that is used for another call afterwards must not.
        context.deadline = Deadline(deadline, limit)
        context.deadline.kept = True
        try:
            call = loop.new_call(fn, (data, context), None, name, deadline, limit, caller_context)
            if self._flow_out is not None:
                return self._conduct_and_flow(loop, call, caller_context)
            return loop.conduct(call, self.max_in_flight)
        finally:
            context.deadline = own_deadline

    def call_sync(
        self, async_fn: Callable[..., Awaitable[T]], /, *args: Any, timeout: float | None = None, **keywords: Any
    ) -> T:
        """Call one coroutine function and wait for its result.

        *timeout* is in seconds and is not passed on; the current request's or job's deadline holds as well.

        Raises:
            DeadlineExceededError: the timeout has passed.
            SaturatedError: ``max_in_flight`` calls are under way.
            WouldDeadlockError: called where it could only deadlock.
            LoopUnavailableError: called after shutdown.
        """
        loop = self._loop
        if loop is None or loop.generation != generation.current.number or loop.dead:
            loop = self._start()
        if get_ident() == loop.ident or _get_running_loop() is not None:
            self._refuse(loop, async_fn)
        if not callable(async_fn):
            raise _not_a_function("call_sync", async_fn)
        current = running_context.get()
        if current is None and context_providers:
            current = current_context()
        if timeout is None and current is None and self.default_timeout is None:
            deadline = limit = None
        else:
            deadline, limit = self._deadline(timeout, None if current is None else current.deadline)
        name = getattr(async_fn, "__qualname__", None)
        context = contextvars.copy_context()
        call = loop.new_call(async_fn, args, keywords, name, deadline, limit, context)
        if self._flow_out is not None:
            return self._conduct_and_flow(loop, call, context)  # type: ignore[no-any-return]
        result: T = loop.conduct(call, self.max_in_flight)
        return result

    def iterate_sync(
        self,
        source: Any,
        /,
        *args: Any,
        buffer: int = 16,
        timeout: float | None = None,
        item_timeout: float | None = None,
        **keywords: Any,
    ) -> Stream[Any]:
        """Iterate an async generator from synchronous code.

        Args:
            source: an async generator function, called with *args* and *keywords*; or a StreamingPrimitive, called with
                ``(data, context=None)``.
            buffer: how many items the generator may run ahead of the consumer.
            timeout: seconds for the whole stream.
            item_timeout: seconds to wait for one item.

        Closing the iterator, dropping it, or interrupting its ``next()`` closes the generator on the loop.

        Raises:
            DeadlineExceededError: from ``next()``, when either time has run out.
            SaturatedError, LoopUnavailableError: as for :meth:`call_sync`.
        """
        loop = self._loop
        if loop is None or loop.generation != generation.current.number or loop.dead:
            loop = self._start()
        if get_ident() == loop.ident or _get_running_loop() is not None:
            self._refuse(loop, source)
        name = step_name(source)
        if buffer < 1:
            raise ConfigurationError(f"buffer is {buffer}: the generator must be allowed at least 1 item ahead")
        if item_timeout is not None and not item_timeout > 0:
            raise ConfigurationError(f"item_timeout is {item_timeout}: give seconds above 0, or None for no limit")
        caller_context = contextvars.copy_context()
        if isinstance(source, WorkflowPrimitive):
            stream = getattr(source, "stream", None)
            if stream is None:
                raise TypeError(f"{source!r} does not stream: iterate_sync takes a StreamingPrimitive; use run_sync")
            data, context = _stream_arguments(args, keywords)
            deadline, limit = self._deadline(timeout, context.deadline)
            if deadline is not None and (context.deadline is None or context.deadline.at != deadline):
                context.deadline = Deadline(deadline, limit)
            caller_context.run(running_context.set, context)
            args, keywords = (data, context), {}
        else:
            stream = source
            if not callable(stream):
                if hasattr(stream, "__aiter__"):
                    given = stream
                    stream = lambda: given  # noqa: E731  # an async generator that was called already
                else:
                    _drop(source)
                    raise TypeError(f"iterate_sync takes an async generator function, not {source!r}")
            current = current_context()
            deadline, limit = self._deadline(timeout, None if current is None else current.deadline)
        pipe: Pipe[Any] = Pipe(stream, buffer)
        call = loop.new_call(pipe.pump, args, keywords, name, deadline, limit, caller_context)
        return Stream(self, loop, pipe, call, item_timeout, self.max_in_flight)

    @overload
    def async_to_sync(
        self, awaitable: None = None, *, force_new_loop: bool = False
    ) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, T]]: ...
    @overload
    def async_to_sync(
        self, awaitable: Callable[P, Awaitable[T]], *, force_new_loop: bool = False
    ) -> Callable[P, T]: ...
    def async_to_sync(self, awaitable: Any = None, *, force_new_loop: bool = False) -> Any:
        """Make a synchronous function of a coroutine function: a drop-in for :func:`asgiref.sync.async_to_sync`.

        Context variables flow in and back out, ``sync_to_async`` code inside runs on the calling thread, and the
        coroutine runs on the managed loop, where tasks left over run on. Also a decorator, with or without arguments.
        """
        from tta_sync.runtime import asgiref_bridge  # imports asgiref

        return asgiref_bridge.async_to_sync(self, awaitable, force_new_loop=force_new_loop)

    def resource(self, factory: Callable[[], AbstractAsyncContextManager[T]]) -> Resource[T]:
        """Promise a loop-bound object that is opened once per process and closed at shutdown.

        ``await`` the returned promise inside a coroutine to get the opened object. Opened and closed in one task, again
        in a forked child; a factory that fails is tried again at the next use.
        """
        return Resource(factory, _opened_here)

    def _conduct_and_flow(self, loop: ManagedLoop, call: Call, context: contextvars.Context) -> Any:
        try:
            return loop.conduct(call, self.max_in_flight)
        finally:
            assert self._flow_out is not None
            self._flow_out(context)

    def _deadline(self, timeout: float | None, own: Deadline | None) -> tuple[float | None, float | None]:
        """Return the call's deadline on ``time.monotonic()`` and its length, both None without a limit."""
        if timeout is None:
            timeout = self.default_timeout
        if timeout is not None and timeout != math.inf:
            if not timeout > 0:
                if timeout != timeout:
                    raise ConfigurationError("timeout is not a number: give seconds, or None for no limit")
                raise DeadlineExceededError(timeout)
            at = time.monotonic() + timeout
            if own is None or at < own.at:
                return at, timeout
        if own is None:
            return None, None
        if own.remaining() <= 0:
            own.raise_exceeded()
        own.kept = True
        return own.at, own.seconds

    def _refuse(self, loop: ManagedLoop, given: Any) -> None:
        """Refuse what could only deadlock."""
        name = step_name(given)
        if get_ident() == loop.ident:
            _drop(given)
            raise WouldDeadlockError(
                f"{name} was called from the loop thread, which would wait for itself: await it instead"
            )
        if threads_are_greenlets() and asyncio.current_task(_get_running_loop()) is None:
            return  # the running loop belongs to another greenlet of this thread, which is not in it now
        _drop(given)
        raise WouldDeadlockError(
            f"{name} was called inside a running event loop, which would stand still meanwhile: await it instead, "
            "or call it from a thread (asyncio.to_thread)"
        )

    # ---- life ------------------------------------------------------------------------------------------------------

    def _start(self) -> ManagedLoop:
        """Return this process's loop, making it where there is none.

        Without a lock: a signal may strike, or a finalizer call, while this thread is in here. Whoever comes first in
        ``setdefault`` has made the loop; another one's is thrown away unstarted.
        """
        if _exit.begun or sys.is_finalizing():
            raise LoopUnavailableError("the interpreter is exiting: no call can be run any more")
        _hook_exit()
        number = generation.current.number
        died = 0
        while (number, died) in self._loops:
            loop = self._loops[number, died]
            if loop is not None and not loop.dead:
                loop.start()
                self._loop = loop
                return loop
            self._loops[number, died] = None  # let go of it, but not of the count
            died += 1
        if self._closed_in == number:
            raise LoopUnavailableError("this facade was shut down: make a new SyncFacade, or shut down later")
        made = self._make_loop(self._totals_of(number))
        loop = self._loops.setdefault((number, died), made)
        if loop is not made:
            made.discard()
            if loop is None:  # it died at once
                return self._start()
        loop.start()
        self._loop = loop
        if loop is made and self._closed_in == number and not loop.refusing:  # shut down before it could see this loop
            loop.shutdown(0.0)
        return loop

    def _make_loop(self, totals: Totals) -> ManagedLoop:
        kind: type[ManagedLoop] = ManagedLoop
        if self.drive == "caller":
            from tta_sync.runtime.driven import DrivenLoop

            kind = DrivenLoop
        elif threads_are_greenlets():
            from tta_sync.runtime.gevent import GeventLoop

            kind = GeventLoop
        return kind(grace=self.grace, use_uvloop=self.use_uvloop, pool_size=self.pool_size, totals=totals)

    def _totals_of(self, number: int) -> Totals:
        return self._totals.setdefault(number, Totals())

    def shutdown(self, timeout: float = 5.0) -> None:
        """Refuse new calls, wait up to *timeout* seconds for those in flight, cancel the rest, close the resources.

        Returns within *timeout* + grace + 1 s. Calls made afterwards raise LoopUnavailableError; in a child that is
        forked later the facade works again.
        """
        self._closed_in = generation.current.number
        loops = self._living()
        if any(get_ident() == loop.ident for loop in loops):
            raise WouldDeadlockError("shutdown() was called from the loop thread: call it from another")
        stop_all(loops, timeout, self.grace)

    def __del__(self) -> None:
        if not getattr(_exit, "begun", True) and hasattr(self, "_loops"):  # None when the interpreter ends
            for loop in self._living():
                loop.refuse()  # nobody can call it any more
                loop.discard_unstarted()
                if not loop.dead:
                    loop.begin_stopping(loop.grace)

    def _living(self) -> list[ManagedLoop]:
        """Return this process's loop, if it lives; a first call that was interrupted may have left it in here only."""
        number = generation.current.number
        loops = [loop for (made_in, _), loop in list(self._loops.items()) if made_in == number]
        return [loop for loop in loops if loop is not None and not loop.dead]

    # ---- introspection ---------------------------------------------------------------------------------------------

    def stats(self) -> FacadeStats:
        """Return the totals of this process."""
        number = generation.current.number
        totals = self._totals.get(number) or self._totals_of(number)
        loop = self._loop
        calls, lag = totals.calls + self._peeks, 0.0
        if loop is not None and loop.generation == number:
            calls += loop.begun
            lag = loop.watchdog.lag
        return FacadeStats(calls, totals.orphans, totals.restarts, number, lag)

    def left_over(self) -> list[str]:
        """Return the names of the tasks that run on, beyond the call that made them."""
        loop = self._loop
        if loop is None or loop.generation != generation.current.number or loop.dead:
            return []
        return [task.get_name() for task in loop.left_over()]

    def in_flight(self) -> list[CallRecord]:
        """Return the calls that are under way now, the oldest first, orphans included."""
        loop = self._loop
        if loop is None or loop.generation != generation.current.number:
            return []
        calls = sorted({*loop.calls, *loop.orphans}, key=_started)
        if not calls:
            return []
        now, threads = time.monotonic(), _thread_names()
        return [self._record(call, now, threads) for call in calls if not call.done]

    def dump(self) -> str:
        """Return what is under way, for people: the totals, then a line per call with the place where it stands."""
        loop = self._loop
        lines = [f"{self.stats()}"]
        if loop is not None and loop.generation == generation.current.number:
            for call in sorted({*loop.calls, *loop.orphans}, key=_started):
                if not call.done:
                    record = self._record(call, time.monotonic(), _thread_names())
                    lines.append(
                        f"{record.name}: {record.state} for {record.age:.3f} s, called by {record.caller_thread}, "
                        f"{loop.where(call)}"
                    )
            lines += [f"left over: {name}" for name in self.left_over()]
        return "\n".join(lines) + "\n"

    def dump_on_signal(self, signum: int, descriptor: int = 2) -> None:
        """Write :meth:`dump` to a file descriptor, stderr by default, whenever *signum* arrives. Main thread only.

        A handler that was there before is called afterwards.
        """
        before = signal.getsignal(signum)

        def handler(number: int, frame: Any) -> None:
            # Not through logging or sys.stderr: the signal may have struck while this thread holds their locks.
            os.write(descriptor, self.dump().encode(errors="backslashreplace"))
            if callable(before):
                before(number, frame)

        signal.signal(signum, handler)

    def _record(self, call: Call, now: float, threads: dict[int | None, str]) -> CallRecord:
        if call.left:
            state = "orphaned"
        elif not call.began:
            state = "queued"
        else:
            state = "running" if call.why is None else "cancelling"
        caller = threads.get(call.ident, "a thread that has ended")
        return CallRecord(call.name or "a call", now - call.started, state, caller)


_started = operator.attrgetter("started")


def _thread_names() -> dict[int | None, str]:
    return {thread.ident: thread.name for thread in threading.enumerate()}


def _drop(given: object) -> None:
    """Close a coroutine that nobody will await, so that Python does not complain of that as well."""
    if inspect.iscoroutine(given):
        given.close()


def _not_a_function(name: str, given: object) -> TypeError:
    _drop(given)
    if inspect.iscoroutine(given):
        return TypeError(f"{name} takes the coroutine function, not the coroutine: write {name}(fn, *args)")
    return TypeError(f"{name} takes a coroutine function, not {given!r}")


def _stream_arguments(args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, WorkflowContext]:
    if len(args) > 2:
        raise TypeError("a StreamingPrimitive takes (data, context=None)")
    data = args[0] if args else keywords.pop("data", None)
    context = args[1] if len(args) > 1 else keywords.pop("context", None)
    if context is None and not isinstance(data, WorkflowContext):
        current = current_context()
        context = WorkflowContext() if current is None else current.next_call()
    return sort_arguments(data, context, keywords)


def _opened_here() -> OpenResources | None:
    managed = managed_loop_of(asyncio.get_running_loop())
    return None if managed is None else managed.resources


# ---- exit ----------------------------------------------------------------------------------------------------------


def _hook_exit() -> None:
    if _exit.hooked:
        return
    # threading's own exit list runs before executors are joined, the only moment at which to_thread still works in
    # clean-up code. concurrent.futures.thread, imported above, is on that list before us: it is worked off backwards.
    register = getattr(threading, "_register_atexit", None)
    if register is None:  # a Python without the private function
        import atexit

        atexit.register(_at_exit)
    else:
        try:
            register(_at_exit)
        except RuntimeError:
            raise LoopUnavailableError("the interpreter is exiting: no call can be run any more") from None
    _exit.hooked = True


def _at_exit() -> None:
    _exit.begun = True
    previous = threading.excepthook

    def quiet(args: Any, /) -> None:
        # A thread whose call was cut off by the exit has been told so; a traceback would tell nobody anything.
        if not isinstance(args.exc_value, LoopUnavailableError):
            previous(args)

    threading.excepthook = quiet
    stop_all(living_loops(), EXIT_BUDGET, EXIT_GRACE)


# ---- the default facade --------------------------------------------------------------------------------------------

_default = SyncFacade()


def default_facade() -> SyncFacade:
    """Return the facade that the module's functions use."""
    return _default


@overload
def run_sync(
    workflow: WorkflowPrimitive[In, Out],
    data: In = ...,
    context: WorkflowContext | None = ...,
    *,
    timeout: float | None = ...,
) -> Out: ...
@overload
def run_sync(
    workflow: Workflow, data: Any = ..., context: Any = ..., *, timeout: float | None = ..., input_data: Any = ...
) -> Any: ...
def run_sync(
    workflow: Workflow,
    data: Any = None,
    context: WorkflowContext | None = None,
    *,
    timeout: float | None = None,
    input_data: Any = None,
) -> Any:
    """Run a workflow on the default facade: :meth:`SyncFacade.run_sync`."""
    return _default.run_sync(workflow, data, context, timeout=timeout, input_data=input_data)


def call_sync(async_fn: Callable[..., Awaitable[T]], /, *args: Any, timeout: float | None = None, **keywords: Any) -> T:
    """Call a coroutine function on the default facade: :meth:`SyncFacade.call_sync`."""
    return _default.call_sync(async_fn, *args, timeout=timeout, **keywords)


def iterate_sync(
    source: Any,
    /,
    *args: Any,
    buffer: int = 16,
    timeout: float | None = None,
    item_timeout: float | None = None,
    **keywords: Any,
) -> Stream[Any]:
    """Iterate an async generator on the default facade: :meth:`SyncFacade.iterate_sync`."""
    return _default.iterate_sync(source, *args, buffer=buffer, timeout=timeout, item_timeout=item_timeout, **keywords)


@overload
def async_to_sync(
    awaitable: None = None, *, force_new_loop: bool = False
) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, T]]: ...
@overload
def async_to_sync(awaitable: Callable[P, Awaitable[T]], *, force_new_loop: bool = False) -> Callable[P, T]: ...
def async_to_sync(awaitable: Any = None, *, force_new_loop: bool = False) -> Any:
    """Make a synchronous function of a coroutine function, as asgiref's does: :meth:`SyncFacade.async_to_sync`."""
    return _default.async_to_sync(awaitable, force_new_loop=force_new_loop)


def resource(factory: Callable[[], AbstractAsyncContextManager[T]]) -> Resource[T]:
    """Promise a loop-bound object: :meth:`SyncFacade.resource`."""
    return _default.resource(factory)


async def run_on_caller(fn: Callable[..., T], *args: Any) -> T:
    """Run *fn* on the thread that waits for this workflow, and return its result.

    From subtasks and parallel branches too: one at a time, in the order of asking. *fn* may itself call ``run_sync``.

    Raises:
        NoCallerError: nobody waits, or the caller has left.
    """
    caller = current_caller.get()
    if caller is None:
        raise NoCallerError("nobody waits in run_sync: run_on_caller works in what run_sync or call_sync runs")
    return await caller.run(fn, *args)


def _run_method(workflow: Workflow, data: Any, context: WorkflowContext | None, timeout: float | None) -> Any:
    return _default.run_sync(workflow, data, context, timeout=timeout)


ports.sync_entry = _run_method
