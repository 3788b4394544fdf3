"""Takes up the jobs of workers that have died: each is begun again, or ends failed, once.

A worker is dead when its lease is gone: it has not been heard of for the recovery time. Who recovers a job watches and
deletes the key of its execution, so that of many workers which try at once, and of the dead one should it come back,
only one writes.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import WatchError
from rq.exceptions import AbandonedJobError, NoSuchJobError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.queue import Queue

from tta_sync.rq.claims import CONCURRENCY, DELIVERIES, WORKERS, lease_key, queues_of, running_key
from tta_sync.rq.job import META

logger = logging.getLogger("rq.worker")

MAX_DELIVERIES = 3


def ours(job: Job) -> dict[str, Any]:
    """Return our part of the job's meta."""
    kept = job.meta.get(META) if isinstance(job.meta, dict) else None
    return kept if isinstance(kept, dict) else {}


def running_key_of(job: Job) -> str | None:
    """Return the key under which the job counts against a concurrency limit."""
    pair = ours(job).get(CONCURRENCY)
    return running_key(str(pair[0])) if isinstance(pair, list) and pair else None


class Recovery:
    """Recovers for one worker, on its main thread.

    Args:
        make_queue: makes a Queue of a name.
        call_back: called with each job that has ended failed, and the error: what its author wants called.

    Raises, all methods:
        redis.exceptions.RedisError: to be called again; what was recovered stays so.
    """

    def __init__(
        self,
        connection: Redis,
        worker: str,
        make_queue: Callable[[str], Queue],
        call_back: Callable[[Job, BaseException], None],
    ) -> None:
        self._connection = connection
        self._worker = worker
        self._make_queue = make_queue
        self._call_back = call_back

    # ---- who lives

    def renew(self, queues: list[str], lease: float, pipe: Pipeline) -> None:
        """Say, in *pipe*, that this worker lives, for *lease* seconds. Its first answer: None if it was in doubt."""
        pipe.set(lease_key(self._worker), "1", px=max(1, int(lease * 1000)), get=True)
        pipe.hset(WORKERS, self._worker, json.dumps(queues))

    def deregister(self) -> None:
        """Say that this worker ends and has left no job."""
        with self._connection.pipeline(transaction=True) as pipe:
            pipe.delete(lease_key(self._worker), f"tta_sync:claimed:{self._worker}")
            pipe.hdel(WORKERS, self._worker)
            pipe.execute()

    def abandon(self) -> None:
        """Say that this worker ends and has left jobs: they are taken up at once."""
        self._connection.delete(lease_key(self._worker))

    # ---- what the dead have left

    def run(self) -> int:
        """Recover all jobs of dead workers; return how many."""
        recovered = 0
        for name, queues in self._dead():
            found = [
                self._recover(queue, job_id, execution) for queue, job_id, execution in self._left_by(name, queues)
            ]
            recovered += sum(found)
            self._bury(name)
            if found:
                logger.warning(
                    "Worker %s: worker %s has died; %d of its jobs were recovered", self._worker, name, sum(found)
                )
        return recovered

    def _dead(self) -> list[tuple[str, list[str]]]:
        found: Any = self._connection.hgetall(WORKERS)
        workers = {name.decode(): queues_of(queues) for name, queues in found.items()}
        workers.pop(self._worker, None)
        if not workers:
            return []
        leases = self._connection.mget([lease_key(name) for name in workers])
        return [worker for worker, lease in zip(workers.items(), leases, strict=True) if lease is None]

    def _left_by(self, name: str, queues: list[str]) -> Iterator[tuple[Queue, str, str]]:
        for queue_name in queues:
            queue = self._make_queue(queue_name)
            found: Any = self._connection.zrange(queue.started_job_registry.key, 0, -1)
            entries = [entry.decode() for entry in found]
            with self._connection.pipeline(transaction=False) as pipe:
                for entry in entries:
                    pipe.hget(f"rq:execution:{entry}", "worker_name")
                owners = pipe.execute()
            for entry, owner in zip(entries, owners, strict=True):
                if owner == name.encode():
                    job_id, _, execution_id = entry.rpartition(":")
                    yield queue, job_id, execution_id

    def _bury(self, name: str) -> None:
        # Not if it has come back meanwhile.
        with self._connection.pipeline(transaction=True) as pipe, contextlib.suppress(WatchError):
            pipe.watch(lease_key(name))  # type: ignore[no-untyped-call]
            if not pipe.exists(lease_key(name)):
                pipe.multi()
                pipe.hdel(WORKERS, name)
                pipe.execute()

    def _recover(self, queue: Queue, job_id: str, execution_id: str) -> bool:
        """Begin the job again or end it; return False where somebody else has."""
        execution = Execution(execution_id, job_id, self._connection)
        with self._connection.pipeline(transaction=True) as pipe:
            try:
                pipe.watch(Job.dependents_key_for(job_id), execution.key)  # type: ignore[no-untyped-call]
                if not pipe.exists(execution.key):
                    return False
                try:
                    job: Job = queue.job_class.fetch(job_id, connection=self._connection, serializer=queue.serializer)
                except NoSuchJobError:
                    pipe.multi()
                    pipe.delete(execution.key)
                    pipe.zrem(queue.started_job_registry.key, execution.composite_key)
                    pipe.execute()
                    return False
                error = self._transact(queue, job, execution, pipe)
                pipe.execute()
            except WatchError:
                return False
        if error is not None:
            self._call_back(job, error)
        return True

    def _transact(self, queue: Queue, job: Job, execution: Execution, pipe: Pipeline) -> BaseException | None:
        kept = ours(job)
        deliveries = int(pipe.hget(job.key, DELIVERIES) or 1)
        error: BaseException | None = None
        if kept.get("idempotent") is True and deliveries < MAX_DELIVERIES:
            pipe.multi()
            job.set_status(JobStatus.QUEUED, pipeline=pipe)
            pipe.hset(job.key, mapping={DELIVERIES: deliveries + 1, "started_at": "", "worker_name": ""})
            job.cleanup(ttl=job.ttl, pipeline=pipe)
            queue.push_job_id(job.id, pipeline=pipe, at_front=True)
            logger.warning("Worker %s: job %s was begun by a worker that died: it is begun again", self._worker, job.id)
        else:
            why = "its worker died before it had ended"
            if kept.get("idempotent") is True:
                why = f"poison: it was begun {deliveries} times, and each time its worker died"
            error = AbandonedJobError(why)
            error = self._end(queue, job, why, error, pipe)
        execution.delete(job=job, pipeline=pipe)
        key = running_key_of(job)
        if key is not None:
            pipe.zrem(key, execution.composite_key)
        return error

    def _end(self, queue: Queue, job: Job, why: str, error: BaseException, pipe: Pipeline) -> BaseException | None:
        if job.should_retry:
            pipe.multi()
            job.retry(queue, pipe)
            logger.warning("Worker %s: job %s: %s; it is retried", self._worker, job.id, why)
            return None
        job._status = JobStatus.FAILED
        queue.enqueue_dependents(job, pipeline=pipe, refresh_job_status=False)
        if not pipe.explicit_transaction:
            pipe.multi()
        job.set_status(JobStatus.FAILED, pipeline=pipe)
        job._handle_failure(f"{AbandonedJobError.__name__}: {why}", pipeline=pipe)
        logger.error("Worker %s: job %s failed: %s", self._worker, job.id, why)
        return error
