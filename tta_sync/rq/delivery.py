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
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from rq.executions import Execution
from rq.job import Job, JobStatus, Retry
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.timeouts import JobTimeoutException
from rq.utils import now, utcformat

from tta_sync.context import WorkflowContext, current_caller
from tta_sync.exceptions import DeadlineExceededError
from tta_sync.facade import run_sync
from tta_sync.primitives.core.base import CallerPrimitive, WorkflowPrimitive
from tta_sync.rq.job import bind, check_result, context_of, current_job
from tta_sync.rq.lanes import LaneCaller, Lanes
from tta_sync.rq.progress import Progress

logger = logging.getLogger("rq.worker")

_IMPORTERS = 4  # threads in which the modules of jobs are imported
_FENCE_POLL = 0.02  # seconds

_HANDLERS_TIMEOUT = 60  # seconds for the worker's exception handlers, all together

WAITING, RUNNING, CALLING_BACK, ENDED = range(4)

TIMED_OUT = "timed out"
STOPPED = "stopped"  # by request
DRAINED = "drained"  # the worker stops
LOST = "lost"  # somebody else has recovered it: nothing that it does counts any more


class WorkerStoppedError(Exception):
    """The worker was told to stop, and the job, which cannot be interrupted, did not end in time."""


class Delivery:
    """One execution of one job."""

    __slots__ = (
        "asked",
        "by",
        "context",
        "counts",
        "definition",
        "enqueued_at",
        "error",
        "exc_string",
        "execution",
        "fn",
        "gave_up",
        "in_thread",
        "inner",
        "job",
        "limit",
        "number",
        "outcome",
        "phase",
        "progress",
        "queue",
        "reported",
        "result",
        "running_key",
        "task",
        "timers",
        "unanswered",
        "webhook",
        "why",
    )

    def __init__(self, job: Job, execution: Execution, queue: Queue, number: int) -> None:
        self.job = job
        self.execution = execution
        self.queue = queue
        self.number = number  # in order of claiming
        self.counts = job.retries_left, job.repeats_left, job.number_of_retries  # writing an end changes them
        self.enqueued_at = utcformat(job.enqueued_at) if job.enqueued_at is not None else ""  # and so is this
        self.fn: Any = None  # a function, or a workflow; None while its module has not been imported
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
        self.limit: Exception | None = None  # what it ends with when its time is over
        self.result: Any = None
        self.error: BaseException | None = None
        self.exc_string = ""
        self.gave_up = False  # it did not end when it was told to
        self.reported = False
        self.in_thread = False  # its function, or its unit of work, has begun on a thread, and not ended
        self.outcome: BaseException | None = None  # of its function, while callbacks run
        self.asked = False  # somebody wants it to end, and it was told so; the main thread's
        self.unanswered = False  # its end was sent to Redis, which has not answered; the main thread's
        self.webhook: tuple[str, str] | None = None  # status and error, once that is written; the main thread's

    @property
    def sync(self) -> bool:
        """Whether it needs a thread for all its time: a plain function, or a job in a unit of work."""
        if self.definition is not None:
            return bool(self.definition.needs_thread)
        fn = self.fn
        return not isinstance(fn, WorkflowPrimitive) and not inspect.iscoroutinefunction(_plain(fn))

    @property
    def plain(self) -> bool:
        """Whether it is synchronous code and nothing else, which cannot be interrupted."""
        return self.definition is None or type(self.definition.workflow) is CallerPrimitive

    def seconds(self) -> float:
        """How long it ran."""
        job = self.job
        return (job.ended_at - job.started_at).total_seconds() if job.started_at and job.ended_at else 0.0


def imported(job: Job) -> Any:
    """Return the job's function if its module has been imported already, else None."""
    module_name, _, name = (job.func_name or "").rpartition(".")
    module = sys.modules.get(module_name)
    if module is None or job.instance or getattr(getattr(module, "__spec__", None), "_initializing", False):
        return None
    return getattr(module, name, None)


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
        self.import_lanes = Lanes(_IMPORTERS, "tta_sync-import")
        self.lease_until = 0.0  # on time.monotonic(): until then nobody takes the worker for dead
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
            for lanes in self._all_lanes:
                lanes.close()

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
    def _all_lanes(self) -> tuple[Lanes, ...]:
        return self.sync_lanes, self.session_lanes, self.import_lanes

    @property
    def abandoned(self) -> int:
        """How many threads were given up and still run."""
        return sum(lanes.count_abandoned() for lanes in self._all_lanes)

    @property
    def exhausted(self) -> bool:
        """Whether so many threads were given up that jobs may have to wait for ever."""
        return any(lanes.exhausted for lanes in self._all_lanes)

    def renew(self, until: float) -> None:
        """Take note that the lease holds until then; what was taken from this worker before has been said before."""
        self.lease_until = until

    async def _fence(self) -> None:
        """Wait while the worker may have been taken for dead, and its jobs may be begun elsewhere."""
        while time.monotonic() >= self.lease_until:  # noqa: ASYNC110  # the clock closes it, at any moment
            await asyncio.sleep(_FENCE_POLL)

    # ---- one job

    def launch(self, deliveries: list[Delivery]) -> None:
        assert self._loop is not None
        for delivery in deliveries:
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
        deadline = None if delivery.context is None else delivery.context.deadline
        late = deadline is not None and deadline.remaining() <= 0
        if late and isinstance(error, DeadlineExceededError) and delivery.why is None and delivery.limit is not None:
            delivery.why, delivery.by = TIMED_OUT, delivery.limit  # a step has noticed before us
        error = self._verdict(delivery, error)
        job.ended_at = now()
        delivery.result = None if error is not None else result
        delivery.outcome = error
        if self._wants_to_be_told(delivery, error):
            # The task is being cancelled, perhaps: what follows is not the job's any more.
            delivery.phase = CALLING_BACK
            assert self._loop is not None
            context = self._base.copy()
            delivery.task = self._loop.create_task(self._callbacks(delivery, error, result), context=context)
        else:
            self._end(delivery, error)

    async def _perform(self, delivery: Delivery) -> Any:
        job, context = delivery.job, delivery.context
        if delivery.why is not None:  # it was stopped before it began
            raise asyncio.CancelledError
        if delivery.error is not None:
            raise delivery.error
        assert context is not None
        if delivery.fn is None:
            await self._import(delivery)
        with bind(job, context) as delivery.progress:
            return await self._call(delivery, context)

    async def _import(self, delivery: Delivery) -> None:
        """Import the job's module, and decode a pickle: that is its author's code, and may take its time, or hang."""
        job = delivery.job

        def load() -> Any:
            job.args, job.kwargs  # noqa: B018  # decoded here
            return job.func

        lane = await self.import_lanes.take()
        try:
            self._start_clock(delivery)
            fn = await lane.run(load)
        finally:
            self.import_lanes.give_back(lane)
        if fn is None:
            raise ValueError("this job has no function")
        delivery.fn, delivery.definition = fn, getattr(fn, "_tta_job", None)

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
                await self._fence()
                self._start_clock(delivery)
                delivery.in_thread = True
                result: Any = await lane.run(call)
                if not inspect.isawaitable(result):
                    return self._checked(job, result)
            finally:
                lanes.give_back(lane)
            delivery.in_thread = False
            caller = LaneCaller(self.session_lanes)
            current_caller.set(caller)
            try:
                return self._checked(job, await result)  # a plain function around a coroutine
            finally:
                caller.leave()
        caller = LaneCaller(self.session_lanes)
        current_caller.set(caller)
        await self._fence()
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
        limit: Exception
        if delivery.timers:  # it began with the import of its module
            return
        timeout = float(job.timeout or Queue.DEFAULT_TIMEOUT)
        deadline = context.deadline
        if deadline is not None and deadline.seconds is not None and deadline.remaining() < timeout - 0.1:
            context.deadline = deadline = context_of(job).deadline  # it waited for a thread: that is not the job's time
        if deadline is not None and (deadline.seconds is None or timeout <= 0):  # it came with the job, and comes first
            timeout, limit = deadline.remaining(), DeadlineExceededError(deadline.seconds)
        elif timeout > 0:
            limit = JobTimeoutException(f"Task exceeded maximum timeout value ({timeout:g} seconds)")
        else:
            return
        if timeout <= 0:
            raise limit
        delivery.limit = limit
        delivery.timers.append(self._loop.call_later(timeout, self.cancel, delivery, TIMED_OUT, limit))

    def cancel(self, delivery: Delivery, why: str, by: BaseException | None = None) -> None:
        """Cancel the job; what it returns from now on does not count. The first reason stands, but for LOST."""
        if delivery.phase == ENDED or (delivery.why is not None and why != LOST):
            return
        assert self._loop is not None
        if delivery.phase == CALLING_BACK:
            # It has ended; its callbacks have a timeout of their own, for which a worker that stops does not wait.
            if why == DRAINED:
                delivery.timers.append(self._loop.call_later(self.grace, self._leave_callbacks, delivery))
            return
        again = delivery.why is not None
        delivery.why, delivery.by = why, by
        task = delivery.inner or delivery.task
        if task is None or again or delivery.phase == WAITING:  # to cancel a task that has not begun is to lose it
            return
        patience = self.grace
        if why == TIMED_OUT and delivery.inner is not None:
            # The call that its thread waits in has the same deadline. To be cancelled twice would cut its clean-up.
            patience += 0.5
        elif delivery.in_thread and delivery.inner is None and not delivery.plain:
            pass  # its thread begins or ends the transaction, which must not be left behind; it begins nothing further
        else:
            context = delivery.context
            if why == TIMED_OUT and context is not None and context.deadline is not None:
                context.deadline.struck = True  # a breaker inside will ask why it was cancelled
            task.cancel()
        delivery.timers.append(self._loop.call_later(patience, self._give_up, delivery))

    def drain(self, delivery: Delivery, seconds: float) -> None:
        """End what has not ended within the *seconds* that a worker which stops has left it."""
        if delivery.in_thread and delivery.plain:
            limit = f"the worker was stopped, and this job did not end within {seconds:g} s"
            self.cancel(delivery, TIMED_OUT, WorkerStoppedError(limit))
        else:
            self.cancel(delivery, DRAINED)

    def _leave_callbacks(self, delivery: Delivery) -> None:
        if delivery.phase == CALLING_BACK:
            logger.warning("job %s: its callbacks did not end before the worker did", delivery.job.id)
            self._end(delivery, delivery.outcome)

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
        if delivery.why in (TIMED_OUT, STOPPED):  # whatever it made of that
            verdict = delivery.by or asyncio.CancelledError()
            if error is not None and not isinstance(error, asyncio.CancelledError) and error is not verdict:
                verdict.__cause__ = error
            return verdict
        if error is None and not delivery.gave_up:
            delivery.why = None  # it was quicker: the result stands
            return None
        return error or asyncio.CancelledError()

    # ---- its end

    def _wants_to_be_told(self, delivery: Delivery, error: BaseException | None) -> bool:
        job = delivery.job
        if error is None:
            return bool(job._success_callback_name)
        if delivery.why in (DRAINED, LOST):
            return False
        if delivery.why == STOPPED:
            return bool(job._stopped_callback_name)
        return bool(job._failure_callback_name or self._handlers)

    async def _callbacks(self, delivery: Delivery, error: BaseException | None, result: Any) -> None:
        """Call what the job's author and the worker's want to be called, in a thread, and end the delivery."""
        job = delivery.job
        current_job.set(job)
        try:
            if error is None:
                job._status, job._result = JobStatus.FINISHED, result
                await self._limited(job.success_callback_timeout, _call, job, "success_callback", result)
        except BaseException as raised:
            error = raised
        if error is not None and delivery.phase != ENDED:
            try:
                if delivery.why == STOPPED:
                    await self._limited(job.stopped_callback_timeout, _call, job, "stopped_callback")
                else:
                    await self._tell_of_failure(job, error)
            except BaseException as raised:
                error = raised
        self._end(delivery, error)

    async def _tell_of_failure(self, job: Job, error: BaseException) -> None:
        """Call the failure callback, then the worker's handlers, which are told what the callback raised if it did."""
        job._status = JobStatus.FAILED
        try:
            if job._failure_callback_name:
                told = type(error), error, error.__traceback__
                await self._limited(job.failure_callback_timeout, _call, job, "failure_callback", *told)
        except BaseException as raised:
            error = raised
            raise
        finally:
            if self._handlers:
                with contextlib.suppress(BaseException):
                    await self._limited(_HANDLERS_TIMEOUT, self._handle, job, error)

    def tell_of_death(self, job: Job, error: BaseException) -> None:
        """Call what the author of a job whose worker has died wants called; the job has ended already."""
        if job._failure_callback_name or self._handlers:
            assert self._loop is not None
            task = self._loop.create_task(self._tell_of_death(job, error), context=self._base.copy())
            self.orphans.add(task)
            task.add_done_callback(self.orphans.discard)

    async def _tell_of_death(self, job: Job, error: BaseException) -> None:
        current_job.set(job)
        try:
            await self._tell_of_failure(job, error)
        except Exception:
            logger.exception("a callback of job %s failed", job.id)

    def _handle(self, job: Job, error: BaseException) -> None:
        for handler in self._handlers:
            fall_through = handler(job, type(error), error, error.__traceback__)
            if fall_through is not None and not fall_through:
                break

    async def _limited(self, seconds: float, call: Any, *args: Any) -> Any:
        lane = await self.sync_lanes.take()
        try:
            async with asyncio.timeout(seconds if seconds > 0 else None) as limit:
                return await lane.run(call, *args)
        except TimeoutError as error:
            if not limit.expired():
                raise  # the callback's own
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
            delivery.exc_string = _described(error)
            # It holds the frames of the job, and they the world. A frozen dataclass refuses to have it assigned.
            BaseException.with_traceback(error, None)
        for timer in delivery.timers:
            timer.cancel()
        delivery.timers.clear()
        if not delivery.gave_up:
            delivery.task = None
        delivery.context = delivery.outcome = None
        self.report(delivery)


def _call(job: Job, name: str, *args: Any) -> None:
    """Import the job's callback of that name, and call it."""
    callback = getattr(job, name)
    if callback is not None:
        callback(job, job.connection, *args)


def _described(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except Exception as broken:  # what the error has of its own is not in order
        return f"{type(error).__qualname__} (it cannot be shown: {type(broken).__qualname__})\n"


def is_retry(result: Any) -> bool:
    """Whether a job asks for another run, in RQ's own way."""
    return isinstance(result, Retry)
