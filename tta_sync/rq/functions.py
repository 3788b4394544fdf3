"""Functions that can be enqueued: validated before they enter the queue, and again in the worker."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry as RedisRetry
from rq import Queue, Retry, get_current_job
from rq.serializers import JSONSerializer
from rq.utils import parse_timeout

from tta_sync.context import Deadline, WorkflowContext, current_context
from tta_sync.exceptions import ConfigurationError
from tta_sync.facade import run_sync
from tta_sync.primitives.core.base import CallerPrimitive, LambdaPrimitive, WorkflowPrimitive, as_primitive, caller_step
from tta_sync.rq.job import META, WorkflowJob, check_result, running

T = TypeVar("T")


class UnitOfWork(Protocol):
    """What is asked of a unit of work: ``tta_sync.sqlalchemy.unit_of_work(Session)`` is one."""

    def run(self, fn: Callable[..., T], /, *args: Any, **keywords: Any) -> T: ...


class JobFunction(Protocol):
    """What :func:`workflow_job` makes: a function, because RQ refers to functions by name.

    Called in a worker it runs the job; called elsewhere it is :meth:`run`.
    """

    __name__: str
    __qualname__: str
    __module__: str

    workflow: WorkflowPrimitive[Any, Any]
    """What it runs."""

    def __call__(self, data: Any = None) -> Any: ...

    def enqueue(
        self,
        data: Any = None,
        *,
        context: WorkflowContext | None = None,
        deadline: Deadline | float | None = None,
        job_id: str | None = None,
        connection: Redis | None = None,
        **options: Any,
    ) -> WorkflowJob:
        """Validate *data* and put it on the queue.

        Args:
            data: plain JSON types, as the load schema takes them.
            context: what travels with the job, its deadline included; by default the id, trace and tenant of the
                current request or job travel, and its deadline does not: the one who asked does not wait.
            deadline: when the job must have ended, in the queue or out of it; seconds from now, or a Deadline.
            job_id: letters, digits, underscores and dashes.
            connection: another Redis than the function's.
            options: further ones of RQ's ``enqueue_call``: at_front, depends_on, description, meta, on_success ...

        Raises:
            marshmallow.ValidationError: *data* does not fit; nothing is enqueued.
            rq.exceptions.DuplicateJobError: the function is ``unique`` and this job is there already.
        """
        ...

    def delay(self, data: Any = None) -> WorkflowJob:
        """Enqueue with nothing but data."""
        ...

    def enqueue_on_commit(
        self,
        data: Any = None,
        *,
        session: Any = None,
        context: WorkflowContext | None = None,
        deadline: Deadline | float | None = None,
        job_id: str | None = None,
        **options: Any,
    ) -> str:
        """Validate *data*, and put it on the queue if, and only if, the SQL transaction commits; then exactly once.

        A row of the outbox (``docs/outbox.md``) is written in the transaction, and goes with it or with its savepoint.
        Jobs of one transaction are enqueued in order, usually before the commit returns. A Redis that is down delays
        neither the commit nor fails it; the job is enqueued when it is back.

        Args:
            data: plain JSON types, as the load schema takes them.
            session: whose transaction; by default that of the current session step, unit of work, or request.
            context, deadline, job_id, options: as for :meth:`enqueue`; a connection cannot be given.

        Returns:
            The job's id: to be asked for later, or for another's ``depends_on``. Where the function is ``unique`` and
            such a job is there already when this one would be enqueued, it is not.

        Raises:
            marshmallow.ValidationError: *data* does not fit; nothing is written.
            ConfigurationError: there is no transaction, or no table for the outbox.
            NoCallerError: called on the loop, outside session steps.
        """
        ...

    def enqueue_many(
        self,
        items: Iterable[Any],
        *,
        job_ids: Sequence[str] | None = None,
        context: WorkflowContext | None = None,
        deadline: Deadline | float | None = None,
        connection: Redis | None = None,
        **options: Any,
    ) -> list[WorkflowJob]:
        """Enqueue one job per item, in one transaction; all are validated first, and one bad item refuses all.

        Raises:
            marshmallow.ValidationError: messages by the item's index.
        """
        ...

    def run(self, data: Any = None, context: WorkflowContext | None = None) -> Any:
        """Run the job here and now, schemas and unit of work included, and return what RQ would have stored."""
        ...


class _Job:
    """What stands behind one job function."""

    def __init__(
        self,
        work: Any,
        queue: str | Queue,
        *,
        load: Any,
        dump: Any,
        unique: bool,
        idempotent: bool,
        concurrency: int | None,
        concurrency_key: Callable[[Any], str] | None,
        connection: Redis | None,
        unit_of_work: UnitOfWork | None,
        options: dict[str, Any],
    ) -> None:
        plain = inspect.isroutine(work) and not inspect.iscoroutinefunction(work)
        self.workflow: WorkflowPrimitive[Any, Any] = caller_step(work) if plain else as_primitive(work)
        self.queue = queue
        self.loads, self.dumps = _instance(load), _instance(dump)
        self.unique = unique
        self.idempotent = idempotent
        self.concurrency = concurrency
        self.concurrency_key = concurrency_key
        self.connection = connection
        self.unit_of_work = unit_of_work
        self.options = options
        self.function: Any = None
        self.modules: tuple[str, ...] = ()  # where the function may be a top-level name

    # ---- running

    def __call__(self, data: Any = None) -> Any:
        job = get_current_job()
        if job is None:
            return self.run(data)
        with running(job) as context:
            result = self.run(data, context)
        check_result(job.func_name, result)
        return result

    @property
    def needs_thread(self) -> bool:
        """Whether it runs on one thread from beginning to end, wherever it runs."""
        return self.unit_of_work is not None or type(self.workflow) is CallerPrimitive

    async def execute(self, data: Any = None, context: WorkflowContext | None = None) -> Any:
        """Do as :meth:`run` does, on the loop. Not for what needs a thread."""
        if self.loads is not None:
            data = self.loads.load(data)
        return self._dumped(await self.workflow.execute(data, context or WorkflowContext()))

    def run(
        self, data: Any = None, context: WorkflowContext | None = None, *, enter: Callable[..., Any] = run_sync
    ) -> Any:
        if self.loads is not None:
            data = self.loads.load(data)
        state = None if context is None else context.state.copy()

        def once() -> Any:
            if context is not None and state is not None:
                context.state = state.copy()  # a unit of work that begins again must not see what was left behind
            return enter(self.workflow, data, context)

        return self._dumped(once() if self.unit_of_work is None else self.unit_of_work.run(once))

    def _dumped(self, result: Any) -> Any:
        if self.dumps is None or isinstance(result, Retry):  # RQ's own way of asking for another run
            return result
        return self.dumps.dump(result)

    # ---- enqueueing

    @property
    def name(self) -> str:
        """The dotted name by which a worker imports the function."""
        function = self.function
        if function.__module__ != "__main__":
            for module in self.modules:
                names = vars(sys.modules.get(module, function))
                if names.get(function.__qualname__) is function:
                    return f"{module}.{function.__qualname__}"
                # Made of a workflow, or under another name: the variable for it did not exist yet when it was made.
                for name, value in names.items():
                    if value is function:
                        return f"{module}.{name}"
        raise ConfigurationError(
            f"a worker cannot import {function.__qualname__} from {function.__module__}: "
            "a job function must be a top-level name of a module"
        )

    @property
    def queue_name(self) -> str:
        return self.queue.name if isinstance(self.queue, Queue) else self.queue

    @property
    def own_connection(self) -> Redis | None:
        return self.queue.connection if isinstance(self.queue, Queue) else self.connection

    def queue_for(self, connection: Redis | None) -> Queue:
        if isinstance(self.queue, Queue):
            if connection is None:
                return self.queue
            return Queue(self.queue.name, connection=connection, serializer=JSONSerializer, job_class=WorkflowJob)
        client = connection or self.connection or default_connection()
        return Queue(self.queue, connection=client, serializer=JSONSerializer, job_class=WorkflowJob)

    def payload(self, data: Any) -> None:
        """Refuse what the worker would refuse, and what JSON cannot carry."""
        if self.loads is not None:
            self.loads.load(data)
        self.check(data, "", "enqueue plain types, as the load schema takes them")

    def check(self, thing: Any, what: str, remedy: str) -> None:
        try:
            json.dumps(thing)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"{self.name} was given {what}what JSON cannot carry ({error}): {remedy}") from error

    def limited_by(self, data: Any) -> str:
        """Return what a job with *data* shares its concurrency limit with."""
        key = self.name if self.concurrency_key is None else self.concurrency_key(data)
        if not isinstance(key, str) or not 0 < len(key) <= 200:
            raise ConfigurationError(
                f"concurrency_key of {self.name} must return a str of 1 to 200 characters, not {key!r}"
            )
        return key

    def meta(
        self,
        context: WorkflowContext | None,
        deadline: Deadline | float | None,
        meta: dict[str, Any] | None,
        data: Any = None,
    ) -> dict[str, Any]:
        if context is None:
            current = current_context()
            context = WorkflowContext() if current is None else current.next_call()
            context.deadline = None
        carried = context.to_dict()
        if deadline is not None:
            limit = deadline if isinstance(deadline, Deadline) else Deadline.after(deadline)
            carried["expires_at"] = limit.expires_at
        kept: dict[str, Any] = {"context": carried}
        if self.idempotent:
            kept["idempotent"] = True
        if self.concurrency is not None:
            kept["concurrency"] = [self.limited_by(data), self.concurrency]
        self.check(kept, "a context with ", "keep other things out of its state and metadata")
        return {**(meta or {}), META: kept}

    def settings(self, options: dict[str, Any]) -> dict[str, Any]:
        # RQ describes a job by its call, arguments included, and every worker logs that: names say enough.
        return {"description": self.name, **self.options, **options}

    def job_id(self, data: Any) -> str:
        """Name a unique job after what it does to what."""
        text = json.dumps([self.name, data], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def enqueue(
        self,
        data: Any = None,
        *,
        context: WorkflowContext | None = None,
        deadline: Deadline | float | None = None,
        job_id: str | None = None,
        connection: Redis | None = None,
        meta: dict[str, Any] | None = None,
        **options: Any,
    ) -> WorkflowJob:
        self.payload(data)
        job = self.queue_for(connection).enqueue_call(
            self.name,
            args=(data,),
            job_id=self.job_id(data) if self.unique and job_id is None else job_id,
            meta=self.meta(context, deadline, meta, data),
            unique=self.unique,
            **self.settings(options),
        )
        return cast(WorkflowJob, job)

    def delay(self, data: Any = None) -> WorkflowJob:
        return self.enqueue(data)

    def enqueue_on_commit(
        self,
        data: Any = None,
        *,
        session: Any = None,
        context: WorkflowContext | None = None,
        deadline: Deadline | float | None = None,
        job_id: str | None = None,
        meta: dict[str, Any] | None = None,
        **options: Any,
    ) -> str:
        from tta_sync.rq.outbox import write  # that imports this module

        return write(
            self,
            data,
            session=session,
            context=context,
            deadline=deadline,
            job_id=job_id,
            meta=meta,
            options=options,
        )

    def enqueue_many(
        self,
        items: Iterable[Any],
        *,
        job_ids: Sequence[str] | None = None,
        context: WorkflowContext | None = None,
        deadline: Deadline | float | None = None,
        connection: Redis | None = None,
        meta: dict[str, Any] | None = None,
        **options: Any,
    ) -> list[WorkflowJob]:
        if self.unique:
            raise ConfigurationError("a unique job is enqueued one by one: use enqueue")
        batch = list(items)
        if job_ids is not None and len(job_ids) != len(batch):
            raise ValueError(f"{len(batch)} items and {len(job_ids)} job ids")
        self.check_all(batch)
        if not batch:
            return []
        kept = None if self.concurrency_key is not None else self.meta(context, deadline, meta)
        settings = self.settings(options)
        prepared = [
            Queue.prepare_data(
                self.name,
                args=(data,),
                job_id=None if job_ids is None else job_ids[i],
                meta=kept or self.meta(context, deadline, meta, data),
                **settings,
            )
            for i, data in enumerate(batch)
        ]
        return cast("list[WorkflowJob]", self.queue_for(connection).enqueue_many(prepared))

    def check_all(self, batch: list[Any]) -> None:
        if self.loads is None:
            for data in batch:
                self.payload(data)
            return
        from marshmallow import ValidationError

        errors: dict[Any, Any] = {}
        for index, data in enumerate(batch):
            try:
                self.payload(data)
            except ValidationError as error:
                errors[index] = error.normalized_messages()  # type: ignore[no-untyped-call]
        if errors:
            raise ValidationError(errors)


def workflow_job(
    queue: str | Queue,
    *,
    load: Any = None,
    dump: Any = None,
    timeout: int | str | None = None,
    retry: Retry | int | None = None,
    result_ttl: int | None = None,
    failure_ttl: int | None = None,
    ttl: int | None = None,
    unique: bool = False,
    idempotent: bool = False,
    concurrency: int | None = None,
    concurrency_key: Callable[[Any], str] | None = None,
    connection: Redis | None = None,
    unit_of_work: UnitOfWork | None = None,
) -> Callable[[Any], JobFunction]:
    """Make an ``async def`` or a workflow a job that can be enqueued::

        @workflow_job("default", load=Document, dump=Summary, timeout=60)
        async def summarise(data, context):
            return await flow.execute(data, context)

        summarise = workflow_job("default", load=Document)(flow)    # the same, of a workflow

        job = summarise.enqueue({"text": "..."})

    Args:
        queue: a name, or a Queue.
        load: the schema that data must fit, checked before it enters the queue and again in the worker.
        dump: the schema through which the result goes before RQ stores it: only its fields are kept.
        timeout: whole seconds that the job may run, or RQ's "1h"; it becomes the deadline of the job's context.
        retry: RQ's Retry, or how many retries.
        result_ttl, failure_ttl, ttl: seconds, as in RQ.
        unique: refuse a second job with the same id, or with the same data where no id is given.
        idempotent: the job may be run twice; so says its author. AsyncWorker begins it again when its worker has died.
        concurrency: how many of these jobs AsyncWorkers run at once, all together; None is no limit of their own.
        concurrency_key: of the data, what shares that limit: ``lambda data: data["tenant"]``. By default all do.
        connection: the Redis to use; else the Flask application's ``TTA_REDIS_URL``, else the environment's
            ``REDIS_URL``.
        unit_of_work: what each run happens in, ``tta_sync.sqlalchemy.unit_of_work(Session)`` say.

    Any worker runs it whose serializer is JSON (``rq worker --serializer json``); with ``--job-class
    tta_sync.rq.WorkflowJob`` the serializer does not matter.

    Raises:
        ConfigurationError: what is decorated is no function or workflow, or the timeout no number of seconds.
    """
    whole = isinstance(concurrency, int) and not isinstance(concurrency, bool)
    if concurrency is not None and not (whole and concurrency > 0):
        raise ConfigurationError(f"concurrency is a whole number above 0, not {concurrency!r}")
    if concurrency_key is not None and concurrency is None:
        raise ConfigurationError("concurrency_key says what shares a limit: give the limit too, as concurrency=")
    here = sys._getframe(1).f_globals.get("__name__", "__main__")
    options = {
        "timeout": _seconds(timeout),
        "retry": _retry(retry),
        "result_ttl": result_ttl,
        "failure_ttl": failure_ttl,
        "ttl": ttl,
    }

    def decorate(work: Any) -> JobFunction:
        job = _Job(
            work,
            queue,
            load=load,
            dump=dump,
            unique=unique,
            idempotent=idempotent,
            concurrency=concurrency,
            concurrency_key=concurrency_key,
            connection=connection,
            unit_of_work=unit_of_work,
            options=options,
        )

        def function(data: Any = None) -> Any:
            return job(data)

        face = work.func if isinstance(work, LambdaPrimitive) else work
        if inspect.isroutine(face):
            functools.update_wrapper(function, face)
        else:
            function.__module__, function.__name__, function.__qualname__ = here, "workflow", "<workflow>"
        made: Any = function
        job.function = made
        job.modules = (function.__module__, here)
        made.workflow, made.run = job.workflow, job.run
        made.enqueue, made.delay, made.enqueue_many = job.enqueue, job.delay, job.enqueue_many
        made.enqueue_on_commit, made._tta_job = job.enqueue_on_commit, job
        return cast(JobFunction, made)

    return decorate


def _instance(schema: Any) -> Any:
    return schema() if isinstance(schema, type) else schema


def _seconds(timeout: int | str | None) -> int | None:
    if timeout is None:
        return None
    try:
        seconds = parse_timeout(timeout)
    except Exception as error:
        raise ConfigurationError(f'timeout is whole seconds or "1h", not {timeout!r}') from error
    # RQ's alarm takes whole seconds, and 0 would switch it off; RQ itself cuts 1.5 down to 1.
    if isinstance(timeout, (bool, float)) or seconds is None or (seconds < 1 and seconds != -1):
        raise ConfigurationError(f"timeout is whole seconds above 0, or -1 for none, not {timeout!r}")
    return seconds


def _retry(retry: Retry | int | None) -> Retry | None:
    if isinstance(retry, int):
        return Retry(max=retry) if retry > 0 else None
    return retry


def default_connection() -> Redis:
    """Return the client for the Flask application's ``TTA_REDIS_URL``, else for the environment's ``REDIS_URL``.

    Raises:
        ConfigurationError: neither is set.
    """
    flask = sys.modules.get("flask")
    url = flask.current_app.config.get("TTA_REDIS_URL") if flask is not None and flask.has_app_context() else None
    url = url or os.environ.get("REDIS_URL")
    if not url:
        raise ConfigurationError(
            "no Redis to enqueue to: give connection=, set app.config['TTA_REDIS_URL'], or set REDIS_URL"
        )
    return _client(url)


@functools.lru_cache(maxsize=16)
def _client(url: str) -> Redis:
    # One try: who enqueues inside a request must hear at once that Redis is down. redis-py's default is ten.
    return Redis.from_url(url, socket_connect_timeout=2.0, socket_timeout=5.0, retry=RedisRetry(NoBackoff(), 1))
