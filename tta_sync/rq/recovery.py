"""Takes up the jobs of workers that have died: each is begun again, or ends failed, once.

A worker is dead when its lease is gone: it has not been heard of for the recovery time. Who recovers a job watches that
lease, so that nothing is taken from a worker that has come back, and watches and deletes the key of the execution, so
that of many workers which try at once, and of the dead one should it come back later, only one writes.

When Redis itself was away, all leases may have run out with it: then nobody is taken for dead before all had the time
to renew them.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError, ResponseError, WatchError
from rq.exceptions import AbandonedJobError, NoSuchJobError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.serializers import DefaultSerializer, JSONSerializer
from rq.worker_registration import REDIS_WORKER_KEYS, WORKERS_BY_QUEUE_KEY

from tta_sync.exceptions import JobCancelledError
from tta_sync.rq.claims import (
    CONCURRENCY,
    DELIVERIES,
    WORKERS,
    claimed_key,
    lease_key,
    queues_of,
    running_key,
)
from tta_sync.rq.control import applies, cancel_key
from tta_sync.rq.endings import fail_barely, inside
from tta_sync.rq.job import META, is_json

logger = logging.getLogger("rq.worker")

MAX_DELIVERIES = 3

_ATTEMPTS = 20  # at a transaction that others keep touching


def ours(job: Job) -> dict[str, Any]:
    """Return our part of the job's meta."""
    kept = job.meta.get(META) if isinstance(job.meta, dict) else None
    return kept if isinstance(kept, dict) else {}


def running_key_of(job: Job) -> str | None:
    """Return the key under which the job counts against a concurrency limit."""
    pair = ours(job).get(CONCURRENCY)
    return running_key(str(pair[0])) if isinstance(pair, list) and pair else None


class _BackAgain(Exception):
    """The worker that was taken for dead is not."""


class _Unsettled(Exception):
    """A job changes too fast for now; the worker is not to be forgotten before that job is recovered."""


class Recovery:
    """Recovers for one worker, on its main thread.

    Args:
        worker: its name; *worker_keys* is the prefix of the keys under which RQ keeps workers.
        life: what its lease says; no two workers have the same, whatever their name.
        lease: seconds.
        make_queue: makes a Queue of a name.
        call_back: called with each job that has ended failed, and the error: what its author wants called.
        allow_pickle: whether what a pickled job holds may be loaded.

    Raises, all methods:
        redis.exceptions.RedisError: to be called again; what was recovered stays so.
    """

    def __init__(
        self,
        connection: Redis,
        worker: str,
        worker_keys: str,
        life: str,
        lease: float,
        make_queue: Callable[[str], Queue],
        call_back: Callable[[Job, BaseException], None],
        *,
        allow_pickle: bool = False,
    ) -> None:
        self._connection = connection
        self._worker = worker
        self._worker_keys = worker_keys
        self._life = life
        self._lease = lease
        self._make_queue = make_queue
        self._call_back = call_back
        self._allow_pickle = allow_pickle

    # ---- who lives

    def renew(self, queues: list[str], pipe: Pipeline) -> None:
        """Say, in *pipe*, that this worker lives. The first answer is what :meth:`was_alive` asks for."""
        pipe.set(lease_key(self._worker), self._life, px=max(1, int(self._lease * 1000)), get=True)
        pipe.hset(WORKERS, self._worker, json.dumps(queues))

    def was_alive(self, answer: bytes | None) -> bool:
        """Say whether the lease had not run out before it was renewed."""
        return answer is not None and answer.decode() == self._life

    def deregister(self) -> None:
        """Say that this worker ends and has left no job."""
        with self._connection.pipeline(transaction=True) as pipe:
            pipe.delete(lease_key(self._worker), claimed_key(self._worker))
            pipe.hdel(WORKERS, self._worker)
            pipe.execute()

    def abandon(self) -> None:
        """Say that this worker ends and has left jobs: they are taken up at once."""
        self._connection.delete(lease_key(self._worker))

    # ---- what the dead have left

    def run(self) -> int:
        """Recover all jobs of dead workers; return how many."""
        dead = self._dead()
        if not dead or self._redis_was_away():
            return 0
        return sum(self._take_up(name, queues, lease_key(name)) for name, queues in dead)

    def run_for_namesake(self) -> int:
        """Recover the jobs of an earlier worker of this name, before this one says that it lives."""
        queues = self._connection.hget(WORKERS, self._worker)
        if queues is None:
            return 0
        # No lease of its own to watch: RQ allows one living worker of a name.
        return self._take_up(self._worker, queues_of(queues), None)

    def _take_up(self, name: str, queues: list[str], lease: str | None) -> int:
        found = recovered = 0
        try:
            for queue, job_id, execution in self._left_by(name, queues):
                found += 1
                recovered += self._recover(queue, job_id, execution, lease)
        except _BackAgain:
            logger.warning("Worker %s: worker %s, which was taken for dead, has come back", self._worker, name)
        except _Unsettled:
            logger.warning("Worker %s: the jobs of worker %s change while they are recovered", self._worker, name)
        else:
            if lease is not None:
                self._bury(name, queues)
        if found:
            logger.warning(
                "Worker %s: worker %s has died; %d of its jobs were recovered", self._worker, name, recovered
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

    def _redis_was_away(self) -> bool:
        try:
            uptime = self._connection.info("server").get("uptime_in_seconds", self._lease + 2)
        except ResponseError:  # some who offer Redis do not allow that
            return False
        return float(uptime) <= self._lease + 1

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

    def _bury(self, name: str, queues: list[str]) -> None:
        # Not if it has come back meanwhile.
        with self._connection.pipeline(transaction=True) as pipe, contextlib.suppress(WatchError):
            pipe.watch(lease_key(name))  # type: ignore[no-untyped-call]
            if not pipe.exists(lease_key(name)):
                pipe.multi()
                pipe.hdel(WORKERS, name)
                pipe.delete(claimed_key(name))
                # RQ would show it for seven minutes more, and let none of its name start.
                key = self._worker_keys + name
                pipe.delete(key)
                pipe.srem(REDIS_WORKER_KEYS, key)
                for queue in queues:
                    pipe.srem(WORKERS_BY_QUEUE_KEY % queue, key)
                pipe.execute()

    def _recover(self, queue: Queue, job_id: str, execution_id: str, lease: str | None) -> bool:
        """Begin the job again or end it; return False where somebody else has.

        Raises:
            _BackAgain: the lease is there again.
            _Unsettled: to be tried again.
        """
        execution = Execution(execution_id, job_id, self._connection)
        for _ in range(_ATTEMPTS):
            with self._connection.pipeline(transaction=True) as pipe, contextlib.suppress(WatchError):
                return self._recover_in(pipe, queue, execution, lease)
        raise _Unsettled

    def _recover_in(self, pipe: Pipeline, queue: Queue, execution: Execution, lease: str | None) -> bool:
        job_id = execution.job_id
        watched = [Job.dependents_key_for(job_id), execution.key, *([] if lease is None else [lease])]
        pipe.watch(*watched)  # type: ignore[no-untyped-call]
        if lease is not None and pipe.exists(lease):
            raise _BackAgain
        if not pipe.exists(execution.key):
            return False
        error: BaseException | None = None
        job = None
        try:
            job = self._fetch(queue, job_id)
            error = self._transact(queue, job, execution, pipe)
        except NoSuchJobError:
            pipe.multi()
        except RedisError:
            raise
        except Exception as broken:  # whatever is wrong with it is the end of this job, not of all workers
            logger.exception("Worker %s: job %s of a worker that died is damaged", self._worker, job_id)
            pipe.reset()
            pipe.watch(*watched)  # type: ignore[no-untyped-call]
            job = self._fail_damaged(queue, job_id, broken, pipe)
        self._forget(queue, execution, job, pipe)
        pipe.execute()
        if error is not None and job is not None:
            self._call_back(job, error)
        return job is not None

    def _fetch(self, queue: Queue, job_id: str) -> Job:
        job: Job = queue.job_class.fetch(job_id, connection=self._connection, serializer=JSONSerializer)
        if not is_json(job.data):
            if self._allow_pickle:
                return queue.job_class.fetch(job_id, connection=self._connection, serializer=DefaultSerializer)
            job.meta = {}  # unread; what is empty is not saved, so that it stays as it is
        return job

    def _fail_damaged(self, queue: Queue, job_id: str, broken: Exception, pipe: Pipeline) -> Job:
        job: Job = queue.job_class(job_id, connection=self._connection, serializer=JSONSerializer)
        job.origin = queue.name
        pipe.multi()
        why = f"its worker died before it had ended, and it is damaged ({type(broken).__name__}: {broken})"
        fail_barely(job, f"{AbandonedJobError.__name__}: {why}", pipe)
        return job

    def _forget(self, queue: Queue, execution: Execution, job: Job | None, pipe: Pipeline) -> None:
        pipe.delete(execution.key)
        pipe.zrem(queue.started_job_registry.key, execution.composite_key)
        pipe.zrem(f"rq:executions:{execution.job_id}", execution.id)
        key = None if job is None else running_key_of(job)
        if key is not None:
            pipe.zrem(key, execution.composite_key)

    def _transact(self, queue: Queue, job: Job, execution: Execution, pipe: Pipeline) -> BaseException | None:
        kept = ours(job)
        deliveries = int(pipe.hget(job.key, DELIVERIES) or 1)
        cancel: Any = pipe.get(cancel_key(job.id))
        if applies(cancel, job):
            return self._end(queue, job, "it was cancelled by request", JobCancelledError(job.id), pipe)
        if kept.get("idempotent") is True and deliveries < MAX_DELIVERIES:
            pipe.multi()
            job.set_status(JobStatus.QUEUED, pipeline=pipe)
            pipe.hset(job.key, mapping={DELIVERIES: deliveries + 1, "started_at": "", "worker_name": ""})
            job.cleanup(ttl=job.ttl, pipeline=pipe)
            pipe.sadd(queue.redis_queues_keys, queue.key)
            queue.push_job_id(job.id, pipeline=pipe, at_front=True)
            logger.warning("Worker %s: job %s was begun by a worker that died: it is begun again", self._worker, job.id)
            return None
        why = "its worker died before it had ended"
        if kept.get("idempotent") is True:
            why = f"poison: it was begun {deliveries} times, and each time its worker died"
        return self._end(queue, job, why, AbandonedJobError(why), pipe)

    def _end(self, queue: Queue, job: Job, why: str, error: BaseException, pipe: Pipeline) -> BaseException | None:
        stopped = isinstance(error, JobCancelledError)
        if job.should_retry and not stopped:
            pipe.multi()
            with inside(pipe, job, queue) as bound:
                job.retry(bound, pipe)
            logger.warning("Worker %s: job %s: %s; it is retried", self._worker, job.id, why)
            return None
        job._status = JobStatus.STOPPED if stopped else JobStatus.FAILED
        queue.enqueue_dependents(job, pipeline=pipe, refresh_job_status=False)
        if not pipe.explicit_transaction:
            pipe.multi()
        job.set_status(job._status, pipeline=pipe)
        job._handle_failure(f"{type(error).__name__}: {why}", pipeline=pipe)
        pipe.delete(cancel_key(job.id))
        pipe.hdel(job.key, DELIVERIES)  # requeued by hand, it begins anew
        logger.error("Worker %s: job %s failed: %s", self._worker, job.id, why)
        return None if stopped else error
