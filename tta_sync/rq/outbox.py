"""Jobs that are enqueued if, and only if, the SQL transaction commits, and then exactly once.

The job is made at once, as RQ will store it, and written as a message to the transactional outbox of the transaction
(:mod:`tta_sync.sqlalchemy.outbox`). Whoever delivers the message puts the job on its queue and sets a marker in the
same MULTI: a message that is delivered again, by a relay that died before it could delete it or by two at once, finds
the marker, also when the job has long been run and its key is gone. The marker and the queue are in the same Redis, so
that neither outlives the other.

Nothing here needs SQLAlchemy before the first job is written.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError, WatchError
from rq import Queue
from rq.exceptions import ShutDownImminentException, StopRequested
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.timeouts import BaseTimeoutException

from tta_sync.context import Deadline, Message, Outbox, WorkflowContext, ports
from tta_sync.exceptions import ConfigurationError
from tta_sync.rq.functions import JobFunction, default_connection
from tta_sync.rq.job import WorkflowJob

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from tta_sync.rq.functions import _Job

logger = logging.getLogger(__name__)

MARKER = "tta:outbox:{}"
"""The key that says that a message has been delivered."""

MARKER_TTL = 30 * 24 * 3600
"""Seconds that a marker is kept while its message may still be in the outbox."""

FORGOTTEN_TTL = 3600
"""Seconds that it is kept after that: far longer than a message may be in a relay's hands."""

_CHUNK = 50  # jobs in one MULTI
_TRIES = 20  # of a MULTI that others interfere with
_INTERRUPTS = (BaseTimeoutException, ShutDownImminentException, StopRequested)  # of RQ; two of them plain Exceptions


# ---- writing ---------------------------------------------------------------------------------------------------------


@overload
def enqueue_on_commit(function: JobFunction, data: Any = None, /, *, session: Any = None, **options: Any) -> str: ...
@overload
def enqueue_on_commit(session: Session, function: JobFunction, data: Any = None, /, **options: Any) -> str: ...
def enqueue_on_commit(first: Any, second: Any = None, third: Any = None, /, **options: Any) -> str:
    """Do ``function.enqueue_on_commit(data)``: with the current session, or with the one that is given first::

        enqueue_on_commit(send_mail, {"to": "ada@example.org"})
        enqueue_on_commit(session, send_mail, {"to": "ada@example.org"})

    Raises:
        ConfigurationError: there is no job function among the arguments; and see :meth:`JobFunction.enqueue_on_commit`.
    """
    if _made_by_workflow_job(first) is not None:
        if third is not None:
            raise ConfigurationError(
                "write enqueue_on_commit(function, data) or enqueue_on_commit(session, function, data)"
            )
        function, data = first, second
    else:
        function, data = second, third
        options = {"session": first, **options}
    if _made_by_workflow_job(function) is None:
        raise ConfigurationError(f"enqueue_on_commit takes a function made by workflow_job, not {function!r}")
    job_id: str = function.enqueue_on_commit(data, **options)
    return job_id


def write(
    job: _Job,
    data: Any,
    *,
    session: Any,
    context: WorkflowContext | None,
    deadline: Deadline | float | None,
    job_id: str | None,
    meta: dict[str, Any] | None,
    options: dict[str, Any],
) -> str:
    """Write a job of the function *job* to the outbox of the transaction; see :meth:`JobFunction.enqueue_on_commit`."""
    if "connection" in options or "pipeline" in options:
        raise ConfigurationError(
            "a job that is enqueued later cannot take a connection along: give it to workflow_job, "
            "or set app.config['TTA_REDIS_URL'] or REDIS_URL"
        )
    job.payload(data)
    settings = job.settings(options)
    at_front = bool(settings.pop("at_front", False))
    made = _drawing_board(job).create_job(
        job.name,
        args=(data,),
        job_id=job.job_id(data) if job.unique and job_id is None else job_id,
        meta=job.meta(context, deadline, meta, data),
        **settings,
    )
    if job.unique and made._dependency_ids:
        raise ValueError("a unique job cannot depend on others")
    body = json.dumps({"v": 1, "id": made.id, "queue": job.queue_name, "at_front": at_front, "job": _texts(made)})
    _outbox().write(session, job.name, made.id, body, _delivery(_default_now()))
    return made.id


def _outbox() -> Outbox:
    if not hasattr(ports, "outbox"):
        try:
            importlib.import_module("tta_sync.sqlalchemy")  # fills the port; by name, for it is a sibling
        except ImportError as error:
            raise ConfigurationError("this needs SQLAlchemy: pip install 'tta-sync[sqlalchemy]'") from error
    return ports.outbox


@functools.lru_cache(maxsize=1)
def _nowhere() -> Redis:
    return Redis()  # never connected: RQ asks for one to make a job


def _drawing_board(job: _Job) -> Queue:
    """Return a queue to make a job for, without asking where Redis is: that counts when the job is delivered."""
    own = job.queue if isinstance(job.queue, Queue) else None
    return Queue(
        job.queue_name,
        default_timeout=None if own is None else own._default_timeout,
        connection=_nowhere(),
        serializer=JSONSerializer,
        job_class=WorkflowJob,
    )


def _texts(job: Job) -> dict[str, str]:
    """Return *job* as the hash that RQ stores, as text; RQ reads its payload uncompressed as well.

    Raises:
        UnicodeError: an option is no text that Redis could store.
    """
    raw = {**job.to_dict(), "data": job.data}
    texts = {name: value.decode() if isinstance(value, bytes) else str(value) for name, value in raw.items()}
    texts["status"] = str(job.get_status(refresh=False).value)
    for text in texts.values():
        text.encode()
    return texts


def _default_now() -> Redis | None:
    """Return the Redis for functions that have none of their own; None where only a relay knows."""
    try:
        return default_connection()
    except ConfigurationError:
        return None


# ---- delivering ------------------------------------------------------------------------------------------------------


class _Parcel:
    """One message, opened."""

    __slots__ = ("_made", "at_front", "client", "depends", "id", "key", "queue", "raw", "unique")

    def __init__(self, message: Message, connection: Redis | None) -> None:
        fields = json.loads(message.body)
        if fields["v"] != 1:
            raise ValueError("this message was written by a newer release of tta_sync")
        self.key = message.key
        self.id: str = fields["id"]
        self.queue: str = fields["queue"]
        self.at_front: bool = fields["at_front"]
        self.raw = {name.encode(): value.encode() for name, value in fields["job"].items()}
        name, *_ = json.loads(fields["job"]["data"])
        job = _made_by_workflow_job(_import(name))
        if job is None:
            raise LookupError(f"{name} is no job function any more")
        self.unique = job.unique
        self.client = job.own_connection or connection
        self.depends = b"dependency_ids" in self.raw
        # Now: where it cannot be read, that is this message's own affair, and none of the others'.
        self._made: WorkflowJob | None = self._make()

    def _make(self) -> WorkflowJob:
        job = WorkflowJob(self.id, connection=_nowhere(), serializer=JSONSerializer)
        job.restore(self.raw)
        return job

    def job(self, client: Redis) -> WorkflowJob:
        """Return the job, each time a new one: RQ notes in it what becomes of it."""
        job, self._made = self._made or self._make(), None
        job.connection = client
        return job


def _import(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise LookupError(f"{name} cannot be imported here ({error})") from error


def _made_by_workflow_job(function: Any) -> _Job | None:
    return getattr(function, "_tta_job", None)


class JobDelivery:
    """Put jobs on their queues, each once: a :class:`tta_sync.context.Delivery`.

    Args:
        connection: the Redis for functions that have none of their own; else the Flask application's
            ``TTA_REDIS_URL``, else the environment's ``REDIS_URL``.
    """

    def __init__(self, connection: Redis | None = None) -> None:
        self._connection = connection
        self._queues: dict[tuple[Redis, str], Queue] = {}
        self._places: dict[str, Redis] = {}  # where the marker of a delivered message is, until it is forgotten

    def deliver(self, messages: Sequence[Message], fresh: Callable[[], bool]) -> Mapping[str, Exception | None]:
        """Put the job of each message on its queue, unless that has been done.

        Raises:
            ConnectionError: a Redis does not answer, or none is named.
        """
        outcome: dict[str, Exception | None] = {}
        failed: set[str] = set()  # units
        parcels: list[tuple[str, _Parcel]] = []
        for message in messages:
            if message.unit in failed:
                continue
            try:
                parcels.append((message.unit, _Parcel(message, self._connection)))
            except _INTERRUPTS:
                raise
            except Exception as error:  # whatever the import of a module can raise
                outcome[message.key] = error
                failed.add(message.unit)
        failed.clear()
        for client, chunk in self._chunks(parcels):
            going = [(unit, parcel) for unit, parcel in chunk if unit not in failed]
            try:
                errors = self._enqueue(client, [parcel for _, parcel in going], fresh) if going else []
            except RedisError as error:
                raise _unreachable(error) from error
            for (unit, parcel), refused in zip(going, errors, strict=True):
                outcome[parcel.key] = refused
                if refused is None:
                    self._places[parcel.key] = client
                else:
                    failed.add(unit)
        return outcome

    def forget(self, keys: Sequence[str]) -> None:
        """Keep the markers of these no longer than a relay may still have them in hand."""
        by_client: dict[Redis, list[str]] = {}
        for key in keys:
            client = self._places.pop(key, None)
            if client is not None:
                by_client.setdefault(client, []).append(key)
        for client, known in by_client.items():
            try:
                with client.pipeline(transaction=False) as pipe:
                    for key in known:
                        pipe.expire(MARKER.format(key), FORGOTTEN_TTL)
                    pipe.execute()
            except RedisError as error:
                raise _unreachable(error) from error

    def _chunks(self, parcels: list[tuple[str, _Parcel]]) -> Iterator[tuple[Redis, list[tuple[str, _Parcel]]]]:
        """Cut into what can go in one MULTI: to one Redis, and nothing beside a job that depends on others."""
        chunk: list[tuple[str, _Parcel]] = []
        place: Redis | None = None
        for unit, parcel in parcels:
            client = parcel.client or self._default()
            if chunk and (client is not place or parcel.depends or chunk[-1][1].depends or len(chunk) == _CHUNK):
                assert place is not None
                yield place, chunk
                chunk = []
            place = client
            chunk.append((unit, parcel))
        if chunk:
            assert place is not None
            yield place, chunk

    def _default(self) -> Redis:
        try:
            return default_connection()
        except ConfigurationError as error:
            raise ConnectionError(str(error)) from error

    def _enqueue(self, client: Redis, parcels: list[_Parcel], fresh: Callable[[], bool]) -> list[Exception | None]:
        """Enqueue those that have not been, in one MULTI; return what became of each."""
        markers = [MARKER.format(parcel.key) for parcel in parcels]
        unique = [Job.key_for(parcel.id) for parcel in parcels if parcel.unique]
        with client.pipeline() as pipe:
            for _ in range(_TRIES):
                try:
                    pipe.watch(*markers, *unique)  # type: ignore[no-untyped-call]
                    delivered: list[Any] = pipe.mget(markers)  # watching, it answers at once
                    there = {key for key in unique if pipe.exists(key)}
                    if not fresh():
                        raise ConnectionError("the messages were held up on their way, and are read again")
                    if all(delivered):
                        break
                    if not parcels[0].depends:  # else RQ itself looks at the dependencies first
                        pipe.multi()
                    ends: list[int] = []  # of each parcel's commands
                    for parcel, marker, known in zip(parcels, markers, delivered, strict=True):
                        if not known:
                            self._add(client, pipe, parcel, there)
                            pipe.set(marker, parcel.id, ex=MARKER_TTL)
                        ends.append(len(pipe.command_stack))
                    return self._judge(client, markers, ends, pipe.execute(raise_on_error=False))
                except WatchError:  # another relay was faster, or the connection was lost: look again
                    pipe.reset()
            else:
                raise ConnectionError("others interfere with the same jobs all the time")
        return [None] * len(parcels)

    def _judge(self, client: Redis, markers: list[str], ends: list[int], answers: list[Any]) -> list[Exception | None]:
        """Find the parcels that Redis refused: MULTI goes on after an error, to the marker, which is taken back."""
        errors: list[Exception | None] = []
        for marker, start, end in zip(markers, [0, *ends], ends, strict=False):
            refused = next((answer for answer in answers[start:end] if isinstance(answer, Exception)), None)
            if refused is not None:
                client.delete(marker)
            errors.append(refused)
        return errors

    def _add(self, client: Redis, pipe: Pipeline, parcel: _Parcel, there: set[str]) -> None:
        job = parcel.job(client)
        if parcel.unique:
            if job.key in there:
                logger.info("job %s is unique and there already: it is not enqueued again", parcel.id)
                return
            there.add(job.key)
        self._queue(client, parcel.queue).enqueue_job(job, pipeline=pipe, at_front=parcel.at_front)

    def _queue(self, client: Redis, name: str) -> Queue:
        queue = self._queues.get((client, name))
        if queue is None:
            if len(self._queues) > 100:  # names come from the database
                self._queues.clear()
            queue = Queue(name, connection=client, serializer=JSONSerializer, job_class=WorkflowJob)
            self._queues[client, name] = queue
        return queue


def _unreachable(error: RedisError) -> ConnectionError:
    return ConnectionError(f"Redis: {type(error).__name__}")  # its text may name hosts and users


@functools.lru_cache(maxsize=16)
def _delivery(connection: Redis | None) -> JobDelivery:
    return JobDelivery(connection)


def outbox_relay(engine: Any, *, connection: Redis | None = None, attempts: int = 6) -> Any:
    """Return the relay that enqueues what is left in the outbox of *engine*'s database::

        relay = outbox_relay(engine)
        relay.run_once(limit=500)  # now and then; returns how many have been enqueued

    It must run where the functions can be imported: in a worker, or by ``tta-sync outbox relay``. Any number may run.

    Args:
        engine: a sync Engine, from :func:`tta_sync.sqlalchemy.create_engine` if it is SQLite's.
        connection: the Redis for functions that have none of their own; else the Flask application's
            ``TTA_REDIS_URL``, else the environment's ``REDIS_URL``.
        attempts: how often a message that cannot be enqueued is tried before it is parked.

    Returns:
        :class:`tta_sync.sqlalchemy.OutboxRelay`.

    Raises:
        ConfigurationError: the engine cannot be used for it.
    """
    return _outbox().relay(engine, JobDelivery(connection), attempts)
