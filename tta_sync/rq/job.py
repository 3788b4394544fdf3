"""A job that runs coroutines on the process's managed loop, on RQ's stock workers.

``rq worker --job-class tta_sync.rq.WorkflowJob high default low``
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import rq.job
from rq.exceptions import ShutDownImminentException, StopRequested
from rq.job import Job, Retry
from rq.serializers import JSONSerializer
from rq.timeouts import BaseTimeoutException

from tta_sync.context import Deadline, WorkflowContext, context_providers
from tta_sync.exceptions import DeadlineExceededError, JobCancelledError
from tta_sync.facade import call_sync, register_interrupt, run_sync
from tta_sync.primitives.core.base import WorkflowPrimitive
from tta_sync.rq.control import end_as_stopped
from tta_sync.rq.progress import Progress
from tta_sync.rq.watch import WatchedJob, process, watched_job

META = "tta_sync"  # our key in job.meta

_running: ContextVar[tuple[str, WorkflowContext] | None] = ContextVar("tta_sync_job", default=None)
"""The id and the context of the job that runs here; always reset when the job ends."""


current_job: ContextVar[Job | None] = ContextVar("tta_sync_rq_job", default=None)
"""The job that runs in this thread or task."""


class _JobStack:
    """Stands in for RQ's stack of jobs, which is one per thread: a coroutine runs on another, and shares it.

    So ``rq.get_current_job()`` is right in both.
    """

    def __init__(self, stack: Any) -> None:
        self._stack = stack

    @property
    def top(self) -> Any:
        return current_job.get() or self._stack.top

    def push(self, job: Any) -> Any:
        return self._stack.push(job)

    def pop(self) -> Any:
        return self._stack.pop()


if not isinstance(rq.job._job_stack, _JobStack):
    rq.job._job_stack = _JobStack(rq.job._job_stack)  # type: ignore[assignment]  # private: a test fails if it changes


def _context_of_job() -> WorkflowContext | None:
    bound = _running.get()
    return None if bound is None else bound[1]


if _context_of_job not in context_providers:
    context_providers.append(_context_of_job)

# RQ raises these in whatever the worker's thread is doing. Two of them are plain Exceptions, which a step's retry or
# fallback would take for the step's own.
for _interrupt in (BaseTimeoutException, ShutDownImminentException, StopRequested):
    register_interrupt(_interrupt)


def context_of(job: Job) -> WorkflowContext:
    """Rebuild the context that was enqueued with *job*; the job's timeout is its deadline, if that comes first."""
    kept = job.meta.get(META)
    fields = kept.get("context") if isinstance(kept, Mapping) else None
    context = WorkflowContext()
    if isinstance(fields, Mapping):
        known = context.to_dict()  # a newer release may have enqueued more than this one knows
        context = WorkflowContext.from_dict({name: value for name, value in fields.items() if name in known})
    if job.timeout is not None and job.timeout > 0:
        own = Deadline.after(float(job.timeout))
        if context.deadline is None or own.at < context.deadline.at:
            context.deadline = own
    return context


class bind:  # noqa: N801  # used as a function
    """Make *context* the current one, and its progress the job's, for as long as *job* runs in this thread or task.

    Nothing is written: that is up to whoever runs the job, with what this yields.
    """

    # No generator: contextlib assigns to the error that passes through, which a frozen dataclass refuses.

    def __init__(self, job: Job, context: WorkflowContext) -> None:
        self._job = job
        self._context = context

    def __enter__(self) -> Progress:
        job, context = self._job, self._context
        context.reporter = progress = Progress(job.id, job.connection, job)
        self._token, self._job_token = _running.set((job.id, context)), current_job.set(job)
        return progress

    def __exit__(self, *error: object) -> None:
        current_job.reset(self._job_token)
        _running.reset(self._token)


@contextlib.contextmanager
def running(job: Job) -> Iterator[WorkflowContext]:
    """Bind the context of *job* while it runs alone in this thread; write its progress, and let it be cancelled.

    Raises:
        JobCancelledError: it was cancelled by request, whatever it made of that; RQ will find that it is ``stopped``.
    """
    outer = watched_job.get()
    if outer is not None and outer.job is job:  # WorkflowJob has bound it already
        yield outer.context
        return
    watch, context = process.watch, context_of(job)
    with bind(job, context) as progress:
        watched = WatchedJob(job, context, progress)
        token = watched_job.set(watched)
        try:
            watch.begin(watched)
            try:
                yield context
            finally:
                watch.end(watched)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            if not watched.struck:
                raise
            end_as_stopped(job)
            # Its clean-up may have failed; that it was cut short is what cancelling is.
            cause = error.__cause__ if isinstance(error, DeadlineExceededError) else error
            raise JobCancelledError(job.id) from cause
        finally:
            watched_job.reset(token)
        if watched.struck:  # it made a result of its cancellation, which comes too late
            end_as_stopped(job)
            raise JobCancelledError(job.id)


def is_json(payload: bytes) -> bool:
    """Say whether a job's payload is JSON; pickle's, from protocol 2 on, begins with byte 0x80."""
    return payload[:1] == b"["


class WorkflowJob(Job):
    """RQ's job, but for how it runs: coroutines and workflows run on the managed loop of the process.

    - One loop per process, whatever the number of jobs; clients that live on the loop stay open between them.
    - A timeout of the job cancels the coroutine, whose ``finally`` has run when RQ marks the job failed.
    - A payload of JSON is read as JSON whatever the worker's ``--serializer``, and its result written as JSON; with the
      default serializer a pickled ``queue.enqueue(async_fn, data)`` runs as well.
    - A result that JSON cannot carry fails the job; RQ would call it finished and lose the value.
    """

    def restore(self, raw_data: Mapping[Any, Any]) -> Any:
        data = raw_data.get(b"data", raw_data.get("data"))
        if isinstance(data, bytes):
            with contextlib.suppress(zlib.error):
                data = zlib.decompress(data)
            if is_json(data):
                self.serializer = JSONSerializer
        return super().restore(raw_data)

    def _execute(self) -> Any:  # RQ's private API; a test of ours fails when it changes
        with running(self) as context:
            result = self._call(context)
        if self.serializer is JSONSerializer:
            check_result(self.func_name, result)
        return result

    def _call(self, context: WorkflowContext) -> Any:
        func = self.func
        if func is None:
            raise ValueError("this job has no function")
        if isinstance(func, WorkflowPrimitive):
            return run_sync(func, *self.args, **{"context": context, **self.kwargs})
        if inspect.iscoroutinefunction(func):
            return _await(func, context, functools.partial(func, *self.args, **self.kwargs))
        result = func(*self.args, **self.kwargs)
        if inspect.isawaitable(result):  # a plain function around a coroutine
            return _await(func, context, lambda: result)
        return result


def _await(func: Callable[..., Any], context: WorkflowContext, begin: Callable[[], Any]) -> Any:
    async def run() -> Any:
        return await begin()

    for attribute in ("__module__", "__name__", "__qualname__"):  # what in_flight() and the watchdog show
        with contextlib.suppress(AttributeError):
            setattr(run, attribute, getattr(func, attribute))
    return call_sync(run, timeout=None if context.deadline is None else context.deadline.remaining())


def check_result(name: str | None, result: Any) -> None:
    """Fail where RQ would lose the value.

    Raises:
        TypeError: JSON cannot carry *result*.
    """
    if isinstance(result, Retry):  # never stored
        return
    try:
        JSONSerializer.dumps(result)  # type: ignore[no-untyped-call]
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"{name} returned what JSON cannot carry ({error}): give it a dump= schema, or return plain types"
        ) from error
