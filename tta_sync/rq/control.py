"""Cancelling jobs: a waiting one in RQ's own way, a running one by a key that its worker looks at.

The key carries the moment at which the job was enqueued, as the one who asked has seen it. Every attempt and every job
that is enqueued again under the same id has another one, so a request that nobody has answered can stop neither.
"""

from __future__ import annotations

import time
from enum import Enum

from redis import Redis
from redis.client import Pipeline
from rq.command import send_stop_job_command
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.utils import str_to_date, utcformat

from tta_sync.exceptions import JobCancelledError

__all__ = ["CANCEL_KEY", "Cancel", "JobCancelledError", "applies", "cancel_key", "end_as_stopped", "request_cancel"]

CANCEL_KEY = "tta_sync:job:cancel:{}"
"""Set while somebody wants the running job to end; see :func:`applies`."""

WATCHED_KEY = "tta_sync:job:watched:{}"
"""Kept alive by whoever looks at the key above on a stock worker; short-lived."""

ASYNC_WORKERS = "tta_sync:workers"
"""The names of the AsyncWorkers, which look at the keys of all their jobs."""

KEEP = 3600
"""Seconds that a request is kept for."""

NOTICED_BY = 1.5
"""Seconds after its beginning by which a job is watched, if it ever is."""

_WHENEVER = b"1"
ENDED = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED)
_ATTEMPTS = 5


class Cancel(Enum):
    """What :func:`request_cancel` has done."""

    CANCELLED = "cancelled"
    """It was waiting, and will not begin."""

    REQUESTED = "requested"
    """It runs; a coroutine of it will be cancelled within a second. Plain code is killed with its process by workers
    that fork; in others it ends by itself."""

    ENDED = "ended"
    """It had ended already."""


def cancel_key(job_id: str) -> str:
    """Name the key by which a running job is asked to end."""
    return CANCEL_KEY.format(job_id)


def watched_key(job_id: str) -> str:
    """Name the key that says that somebody looks at :func:`cancel_key`."""
    return WATCHED_KEY.format(job_id)


def applies(value: bytes | None, job: Job) -> bool:
    """Say whether *value*, read from the job's :func:`cancel_key`, asks for the end of this run of *job*."""
    if value is None:
        return False
    return value == _WHENEVER or value == _enqueued(job)


def _enqueued(job: Job) -> bytes:
    return _WHENEVER if job.enqueued_at is None else utcformat(job.enqueued_at).encode()


def request_cancel(job_id: str, connection: Redis) -> Cancel:
    """End a job, wherever it stands.

    One that waits (queued, scheduled, deferred) is cancelled as ``job.cancel()`` does it: it is in RQ's registry of
    cancelled jobs, and what depends on it stays deferred. One that runs is asked to end; it ends as ``stopped``.

    Nothing that the job has stored is unpickled.

    Raises:
        rq.exceptions.NoSuchJobError: there is no such job.
        redis.exceptions.RedisError: Redis did not answer; ask again.
    """
    for _ in range(_ATTEMPTS):
        # JSON as the serializer: what is not JSON is then left alone, where RQ's default would unpickle it.
        job = Job.fetch(job_id, connection=connection, serializer=JSONSerializer)
        status = job.get_status(refresh=False)
        if status in ENDED:
            return Cancel.ENDED
        if status != JobStatus.STARTED:
            outcome = _cancel_waiting(job, status)
            if outcome is not None:
                return outcome
        outcome = _ask_to_end(job)
        if outcome is not None:
            return outcome
    return Cancel.REQUESTED  # it is enqueued again and again; the latest request stands


def _cancel_waiting(job: Job, status: JobStatus | None) -> Cancel | None:
    """Cancel *job* unless a worker has just taken it."""
    if status == JobStatus.QUEUED and not Queue(job.origin, connection=job.connection).remove(job.id):
        return None  # who takes it out of the list, has it: this is atomic
    try:
        job.cancel()
    except InvalidJobOperation:  # somebody else's request was quicker
        return Cancel.ENDED
    return Cancel.CANCELLED


def _ask_to_end(job: Job) -> Cancel | None:
    """Leave the request; None where the job was enqueued again meanwhile."""
    client, key = job.connection, cancel_key(job.id)
    with client.pipeline(transaction=True) as pipe:
        pipe.set(key, _enqueued(job), ex=KEEP)
        pipe.hmget(job.key, "status", "enqueued_at")
        _, (status, enqueued_at) = pipe.execute()
    if status is None or status.decode() in ENDED:  # between our two looks
        client.delete(key)
        if status is None:
            raise NoSuchJobError(f"No such job: {job.key}")
        return Cancel.ENDED
    if (enqueued_at or _WHENEVER) != _enqueued(job):
        return None
    if status.decode() == JobStatus.STARTED and not job.meta.get("tta_sync"):
        _stop_unwatched(job)
    return Cancel.REQUESTED


def _stop_unwatched(job: Job) -> None:
    """Have RQ stop a job that runs without us: a plain function, in RQ's own job class."""
    client = job.connection
    while True:
        with client.pipeline(transaction=False) as pipe:
            pipe.hmget(job.key, "status", "worker_name", "started_at")
            pipe.exists(watched_key(job.id))
            (status, worker, started_at), watched = pipe.execute()
        if watched or status != JobStatus.STARTED.encode() or not worker or not started_at:
            return
        if client.hexists(ASYNC_WORKERS, worker):
            return
        if time.time() - str_to_date(started_at).timestamp() > NOTICED_BY:
            break
        time.sleep(0.1)
    try:
        send_stop_job_command(client, job.id, serializer=JSONSerializer)
    except (InvalidJobOperation, NoSuchJobError):
        pass  # it has ended meanwhile


def end_as_stopped(job: Job) -> None:
    """Make of the failure that RQ is about to handle what RQ makes of its own stop command.

    The job's status becomes ``stopped``; it is not retried, its stopped callback runs instead of its failure callback,
    and no webhook for failures is sent. To be called on the job object that the worker holds, before the worker sees
    the error.
    """
    set_status, run_callback = job.set_status, job.execute_stopped_callback

    def stopped(status: JobStatus, pipeline: Pipeline | None = None) -> None:
        set_status(JobStatus.STOPPED if status == JobStatus.FAILED else status, pipeline)

    def callback(death_penalty_class: type, *exc_info: object) -> None:
        run_callback(death_penalty_class)

    job.set_status = stopped  # type: ignore[method-assign]
    job.execute_failure_callback = callback  # type: ignore[method-assign]
    # Both are left out of what RQ saves where they are empty: the stored ones stay.
    job.retries_left = None
    job.webhooks = []
