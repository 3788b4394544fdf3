"""One job in flight: begun, run and ended on the loop, written down by the worker's main thread.

``phase`` and ``why`` are written on the loop only. When ``phase`` is ENDED the loop lets go, and the main thread owns
the delivery from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import threading
import traceback
from collections.abc import Callable
from typing import Any

from rq.executions import Execution
from rq.job import Job, Retry
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.timeouts import JobTimeoutException
from rq.utils import now

from tta_sync.context import WorkflowContext, current_caller
from tta_sync.exceptions import DeadlineExceededError
from tta_sync.facade import run_sync
from tta_sync.primitives.core.base import WorkflowPrimitive
from tta_sync.rq.job import bind, check_result, current_job
from tta_sync.rq.lanes import LaneCaller, Lanes
from tta_sync.rq.progress import Progress

_HANDLERS_TIMEOUT = 60  # seconds for the worker's exception handlers, all together

WAITING, RUNNING, CALLING_BACK, ENDED = range(4)

TIMED_OUT = "timed out"
STOPPED = "stopped"  # by request
DRAINED = "drained"  # the worker stops
LOST = "lost"  # somebody else has recovered it: nothing that it does counts any more


class Delivery:
    """One execution of one job."""

    __slots__ = (
        "by",
        "context",
        "counts",
        "definition",
        "error",
        "exc_string",
        "execution",
        "fn",
        "gave_up",
        "inner",
        "job",
        "number",
        "phase",
        "progress",
        "queue",
        "reported",
        "result",
        "running_key",
        "task",
        "timers",
        "why",
    )

    def __init__(self, job: Job, execution: Execution, queue: Queue, number: int) -> None:
        self.job = job
        self.execution = execution
        self.queue = queue
        self.number = number  # in order of claiming
        self.counts = job.retries_left, job.repeats_left, job.number_of_retries  # writing an end changes them
        self.fn: Any = None  # a function, or a workflow
        self.definition: Any = None  # of a workflow_job
        self.context: WorkflowContext | None = None
        self.running_key: str | None = None
        self.progress: Progress | None = None
        self.phase = WAITING
        self.why: str | None = None
        self.by: BaseException | None = None
        self.task: asyncio.Task[None] | None = None
        self.inner: asyncio.Task[Any] | None = None  # of a job in a unit of work: what its thread waits for
        self.timers: list[asyncio.TimerHandle] = []
        self.result: Any = None
        self.error: BaseException | None = None
        self.exc_string = ""
        self.gave_up = False  # it did not end when it was told to
        self.reported = False

    @property
    def sync(self) -> bool:
        """Whether it needs a thread for all its time: a plain function, or a job in a unit of work."""
        if self.definition is not None:
            return bool(self.definition.needs_thread)
        fn = self.fn
        return not isinstance(fn, WorkflowPrimitive) and not inspect.iscoroutinefunction(_plain(fn))

    @property
    def name(self) -> str:
        return self.job.description or self.job.id

    def seconds(self) -> float:
        """How long it ran."""
        job = self.job
        return (job.ended_at - job.started_at).total_seconds() if job.started_at and job.ended_at else 0.0


def _plain(fn: Any) -> Any:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


class _Inner:
    """A job's workflow that can be cancelled while a thread waits for it."""

    def __init__(self, delivery: Delivery, workflow: Any) -> None:
        self.delivery = delivery
        self.workflow = workflow

    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        if self.delivery.why is not None:
            raise asyncio.CancelledError
        self.delivery.inner = asyncio.current_task()
        try:
            return await self.workflow.execute(data, context)
        finally:
            self.delivery.inner = None


class Runner:
    """Runs deliveries on the loop. All methods but those said otherwise: the loop's thread only.

    Args:
        report: called with each delivery that has ended, on the loop's thread.
        grace: seconds in which what was cancelled may clean up.
    """

    def __init__(
        self,
        report: Callable[[Delivery], None],
        *,
        sync_threads: int,
        session_threads: int,
        grace: float,
        exception_handlers: list[Callable[..., Any]],
    ) -> None:
        self.report = report
        self.grace = grace
        self.sync_lanes = Lanes(sync_threads, "tta_sync-job")
        self.session_lanes = Lanes(session_threads, "tta_sync-session")
        self.orphans: set[asyncio.Task[None]] = set()  # cancelled, and not ended in time
        self._handlers = exception_handlers
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed: asyncio.Event | None = None
        self.ready = threading.Event()
        self._base = contextvars.Context()

    # ---- life

    async def serve(self) -> None:
        """Be there until :meth:`close`."""
        self._loop = asyncio.get_running_loop()
        self._closed = asyncio.Event()
        self._base = contextvars.copy_context()
        self.ready.set()
        try:
            await self._closed.wait()
        finally:
            self.sync_lanes.close()
            self.session_lanes.close()

    def post(self, fn: Callable[..., object], *args: Any) -> None:
        """Call *fn* on the loop's thread, soon. Any thread.

        Raises:
            RuntimeError: the loop is gone.
        """
        assert self._loop is not None
        self._loop.call_soon_threadsafe(fn, *args)

    def close(self) -> None:
        assert self._closed is not None
        self._closed.set()

    @property
    def abandoned(self) -> int:
        """How many threads were given up and still run."""
        return self.sync_lanes.count_abandoned() + self.session_lanes.count_abandoned()

    # ---- one job

    def launch(self, deliveries: list[Delivery]) -> None:
        assert self._loop is not None
        for delivery in deliveries:
            if delivery.why is not None:  # stopped before it began
                self._end(delivery, delivery.by or asyncio.CancelledError())
                continue
            context = self._base.copy()
            coroutine = self._run(delivery)
            delivery.task = asyncio.Task(coroutine, loop=self._loop, name=delivery.job.id, context=context)

    async def _run(self, delivery: Delivery) -> None:
        job = delivery.job
        delivery.phase = RUNNING
        result, error = None, None
        try:
            result = await self._perform(delivery)
        except BaseException as raised:  # SystemExit too, as RQ does it: a job's error is its own
            error = raised
        if delivery.reported:  # it was given up long ago
            if delivery.task is not None:
                self.orphans.discard(delivery.task)
                delivery.task = None
            return
        for timer in delivery.timers:
            timer.cancel()
        error = self._verdict(delivery, error)
        job.ended_at = now()
        delivery.result = None if error is not None else result
        if error is not None and delivery.why not in (DRAINED, LOST):
            # The task is being cancelled, perhaps: what follows is not the job's any more.
            self._call_back(delivery, error, result)
        elif error is None and (job._success_callback_name or job._failure_callback_name):
            self._call_back(delivery, None, result)
        else:
            self._end(delivery, error)

    async def _perform(self, delivery: Delivery) -> Any:
        job, context = delivery.job, delivery.context
        if delivery.error is not None:
            raise delivery.error
        assert context is not None
        with bind(job, context) as delivery.progress:
            return await self._call(delivery, context)

    async def _call(self, delivery: Delivery, context: WorkflowContext) -> Any:
        job, fn, definition = delivery.job, delivery.fn, delivery.definition
        assert fn is not None
        if delivery.sync:
            lanes = self.sync_lanes if definition is None else self.session_lanes
            call = functools.partial(fn, *job.args, **job.kwargs)
            if definition is not None:
                enter = functools.partial(self._enter, delivery)
                call = functools.partial(definition.run, *job.args, context=context, enter=enter, **job.kwargs)
            lane = await lanes.take()
            try:
                self._start_clock(delivery)
                result: Any = await lane.run(call)
                if not inspect.isawaitable(result):
                    return self._checked(job, result)
            finally:
                lanes.give_back(lane)
            caller = LaneCaller(self.session_lanes)
            current_caller.set(caller)
            try:
                return self._checked(job, await result)  # a plain function around a coroutine
            finally:
                caller.leave()
        caller = LaneCaller(self.session_lanes)
        current_caller.set(caller)
        self._start_clock(delivery)
        try:
            if definition is not None:
                result = await definition.execute(*job.args, context=context, **job.kwargs)
            elif isinstance(fn, WorkflowPrimitive):
                result = await fn.execute(*job.args, **{"context": context, **job.kwargs})
            else:
                result = await fn(*job.args, **job.kwargs)
            return self._checked(job, result)
        finally:
            caller.leave()

    def _enter(self, delivery: Delivery, workflow: Any, data: Any, context: WorkflowContext) -> Any:
        """Run *workflow* for the job's own thread, so that it can be cancelled. That thread only."""
        return run_sync(_Inner(delivery, workflow), data, context)

    def _checked(self, job: Job, result: Any) -> Any:
        if job.serializer is JSONSerializer:
            check_result(job.func_name, result)
        return result

    def _start_clock(self, delivery: Delivery) -> None:
        job, context = delivery.job, delivery.context
        assert self._loop is not None
        assert context is not None
        timeout = float(job.timeout or Queue.DEFAULT_TIMEOUT)
        deadline = context.deadline
        if timeout > 0:
            limit: BaseException = JobTimeoutException(f"Task exceeded maximum timeout value ({timeout:g} seconds)")
            if deadline is not None and deadline.remaining() < timeout - 0.5:  # it came with the job, and comes first
                timeout, limit = deadline.remaining(), DeadlineExceededError(deadline.seconds)
        elif deadline is not None:
            timeout, limit = deadline.remaining(), DeadlineExceededError(deadline.seconds)
        else:
            return
        if timeout <= 0:
            raise limit
        delivery.timers.append(self._loop.call_later(timeout, self.cancel, delivery, TIMED_OUT, limit))

    def cancel(self, delivery: Delivery, why: str, by: BaseException | None = None) -> None:
        """Cancel the job; what it returns from now on does not count. The first reason stands, but for LOST."""
        if delivery.phase == ENDED or (delivery.why is not None and why != LOST):
            return
        if delivery.phase == CALLING_BACK:
            return  # it has ended; its callbacks have a timeout of their own
        again = delivery.why is not None
        delivery.why, delivery.by = why, by
        task = delivery.inner or delivery.task
        if task is None or again:
            return
        assert self._loop is not None
        patience = self.grace
        if why == TIMED_OUT and delivery.inner is not None:
            # The call that its thread waits in has the same deadline. To be cancelled twice would cut its clean-up.
            patience += 0.5
        else:
            context = delivery.context
            if why == TIMED_OUT and context is not None and context.deadline is not None:
                context.deadline.struck = True  # a breaker inside will ask why it was cancelled
            task.cancel()
        delivery.timers.append(self._loop.call_later(patience, self._give_up, delivery))

    def _give_up(self, delivery: Delivery) -> None:
        if delivery.phase != RUNNING:
            return
        delivery.gave_up = True
        assert delivery.task is not None
        self.orphans.add(delivery.task)
        delivery.task.cancel()  # whatever still waits for a thread need not
        delivery.reported = True
        delivery.job.ended_at = now()
        self._end(delivery, self._verdict(delivery, None))

    def _verdict(self, delivery: Delivery, error: BaseException | None) -> BaseException | None:
        """Return the error to record for a job that ended with *error*, given why it was cancelled, if it was."""
        if delivery.why is None:
            return error
        if delivery.why == TIMED_OUT or (delivery.why == STOPPED and (error is not None or delivery.gave_up)):
            verdict = delivery.by or asyncio.CancelledError()
            if error is not None and not isinstance(error, asyncio.CancelledError) and error is not verdict:
                verdict.__cause__ = error
            return verdict
        if error is None and not delivery.gave_up:
            delivery.why = None  # it was quicker: the result stands
            return None
        return error or asyncio.CancelledError()

    # ---- its end

    def _call_back(self, delivery: Delivery, error: BaseException | None, result: Any) -> None:
        """Call what the job's author and the worker's want to be called, in a thread, and end the delivery."""
        job = delivery.job
        if error is None or job._failure_callback_name or self._handlers or job._stopped_callback_name:
            delivery.phase = CALLING_BACK
            assert self._loop is not None
            task = self._loop.create_task(self._callbacks(delivery, error, result), context=self._base.copy())
            delivery.task = task
        else:
            self._end(delivery, error)

    async def _callbacks(self, delivery: Delivery, error: BaseException | None, result: Any) -> None:
        job = delivery.job
        current_job.set(job)
        try:
            if error is None and job._success_callback_name:
                callback = job.success_callback
                await self._limited(job.success_callback_timeout, callback, job, job.connection, result)
        except BaseException as raised:
            error = raised
        if error is not None:
            try:
                if delivery.why == STOPPED:
                    if job._stopped_callback_name:
                        await self._limited(job.stopped_callback_timeout, job.stopped_callback, job, job.connection)
                elif job._failure_callback_name:
                    told = job, job.connection, type(error), error, error.__traceback__
                    await self._limited(job.failure_callback_timeout, job.failure_callback, *told)
            except BaseException as raised:
                error = raised
            if self._handlers and delivery.why != STOPPED:
                with contextlib.suppress(BaseException):
                    await self._limited(_HANDLERS_TIMEOUT, self._handle, job, error)
        self._end(delivery, error)

    def _handle(self, job: Job, error: BaseException) -> None:
        for handler in self._handlers:
            fall_through = handler(job, type(error), error, error.__traceback__)
            if fall_through is not None and not fall_through:
                break

    async def _limited(self, seconds: float, call: Any, *args: Any) -> Any:
        lane = await self.sync_lanes.take()
        try:
            async with asyncio.timeout(seconds if seconds > 0 else None):
                return await lane.run(call, *args)
        except TimeoutError as error:
            raise JobTimeoutException(f"Task exceeded maximum timeout value ({seconds} seconds)") from error
        finally:
            self.sync_lanes.give_back(lane)

    def _end(self, delivery: Delivery, error: BaseException | None) -> None:
        if delivery.phase == ENDED:
            return
        delivery.phase = ENDED
        delivery.error = error
        if error is not None:
            delivery.result = None
            delivery.exc_string = "".join(traceback.format_exception(error))
            error.__traceback__ = None  # it holds the frames of the job, and they the world
        for timer in delivery.timers:
            timer.cancel()
        delivery.timers.clear()
        if not delivery.gave_up:
            delivery.task = None
        delivery.context = None
        self.report(delivery)


def is_retry(result: Any) -> bool:
    """Whether a job asks for another run, in RQ's own way."""
    return isinstance(result, Retry)
