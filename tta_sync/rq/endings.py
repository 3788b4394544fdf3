"""Writes down how deliveries ended: with RQ's own methods, many at a time, and only if they are still ours.

Each transaction watches the key of the execution: whoever recovers the job of a worker that was taken for dead deletes
it, so that a worker which comes back too late writes nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
    RedisError,
    TimeoutError as RedisTimeoutError,
    WatchError,
)
from rq.defaults import DEFAULT_FAILURE_TTL
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.repeat import Repeat
from rq.results import Result
from rq.utils import now, utcformat
from rq.worker import BaseWorker

from tta_sync.rq.claims import DELIVERIES
from tta_sync.rq.control import cancel_key
from tta_sync.rq.delivery import DRAINED, LOST, STOPPED, Delivery, is_retry
from tta_sync.rq.progress import flush

logger = logging.getLogger("rq.worker")

_UNHEARD = RedisConnectionError, RedisTimeoutError
_ATTEMPTS = 20  # at a transaction that others keep touching, before the next job has its turn


@contextlib.contextmanager
def inside(pipe: Pipeline, job: Job, queue: Queue) -> Iterator[Queue]:
    """Have all that RQ writes to schedule *job* be part of the transaction.

    RQ adds it to its registry at once, whatever pipeline it is given: of a transaction that comes to nothing a job
    would be left that runs a second time.
    """
    bound = type(queue)(
        queue.name,
        connection=pipe,
        default_timeout=queue._default_timeout,
        job_class=queue.job_class,
        serializer=queue.serializer,
    )
    bound.redis_server_version = queue.get_redis_server_version()
    connection, job.connection = job.connection, pipe
    try:
        yield bound
    finally:
        job.connection = connection


def fail_barely(job: Job, exc_string: str, pipe: Pipeline, **told: Any) -> None:
    """Fail a job which RQ's own methods cannot save: write what shows that it failed, and nothing that it holds."""
    ttl = DEFAULT_FAILURE_TTL if job.failure_ttl is None else job.failure_ttl
    moment = now()
    pipe.hset(job.key, mapping={"status": JobStatus.FAILED.value, "ended_at": utcformat(job.ended_at or moment)})
    pipe.zadd(job.failed_job_registry.key, {job.id: ttl if ttl < 0 else int(moment.timestamp()) + ttl})
    Result.create_failure(job, ttl, exc_string, pipeline=pipe, **told)
    if ttl > 0:
        pipe.expire(job.key, ttl)


def _is_no_answer(error: RedisError) -> bool:
    """Say whether a transaction may have happened all the same: a lost connection comes as a WatchError, too."""
    return not isinstance(error, WatchError) or isinstance(error.__context__, _UNHEARD)


class Endings:
    """Writes for one worker, on its main thread.

    Raises, all methods:
        redis.exceptions.RedisError: nothing, or not all, was written; to be called again with what was not.
    """

    def __init__(self, worker: BaseWorker) -> None:
        self._worker = worker
        self._connection: Redis = worker.connection

    def write(self, deliveries: Sequence[Delivery], written: Callable[[Delivery], None]) -> None:
        """Write what has ended, and tell *written* of each; whoever is LOST is passed over.

        Of what is not told another has changed something again and again: it is to be given once more.
        """
        plain: list[Delivery] = []
        rest: list[Delivery] = []
        for delivery in deliveries:
            job = delivery.job
            job.retries_left, job.repeats_left, job.number_of_retries = delivery.counts  # an earlier try changed them
            if delivery.why == LOST:
                written(delivery)
            else:
                (plain if self._is_plain(delivery) else rest).append(delivery)
        if plain:
            if self._write_together(plain):
                for delivery in plain:
                    written(delivery)
            else:
                rest.extend(plain)
        # Put back in front of its queue: the first to have been claimed is the last to be put there.
        for delivery in sorted(rest, key=lambda delivery: -delivery.number if delivery.why == DRAINED else 1):
            if self._write_one(delivery):
                written(delivery)

    def _is_plain(self, delivery: Delivery) -> bool:
        """Say whether nothing can hang on how it ended but dependents, which are asked for in Redis."""
        job = delivery.job
        if delivery.why == DRAINED and delivery.error is not None:
            return False
        if job.webhooks or is_retry(delivery.result):
            return False
        if delivery.error is not None:
            return not job.should_retry or delivery.why == STOPPED
        return not job.repeats_left and job.get_result_ttl(self._worker.default_result_ttl) != 0

    # ---- many at once

    def _write_together(self, deliveries: list[Delivery]) -> bool:
        """Write all in one transaction; say whether that was possible. Else they must be looked at one by one."""
        with self._connection.pipeline(transaction=True) as pipe:
            dependents = [delivery.job.dependents_key for delivery in deliveries]
            executions = [delivery.execution.key for delivery in deliveries]
            pipe.watch(*dependents, *executions)  # type: ignore[no-untyped-call]
            if pipe.exists(*executions) != len(executions) or pipe.exists(*dependents):
                return False
            pipe.multi()
            try:
                self._transact_together(deliveries, pipe)
            except RedisError:
                raise
            except Exception:
                return False  # one of them is at fault, and will be found
            try:
                pipe.execute()
            except RedisError as error:
                for delivery in deliveries:
                    delivery.unanswered = delivery.unanswered or _is_no_answer(error)
                if isinstance(error, WatchError):  # dependents came, or somebody has recovered one of them
                    return False
                raise
        return True

    def _transact_together(self, deliveries: list[Delivery], pipe: Pipeline) -> None:
        flush([delivery.progress for delivery in deliveries if delivery.progress is not None], pipe, final=True)
        done = working = 0.0
        for delivery in deliveries:
            if delivery.error is None:
                self._succeed(delivery, pipe)
                done += 1
            else:
                self._fail(delivery, pipe)
            self._forget(delivery, pipe)
            working += delivery.seconds()
        key = self._worker.key
        if done:
            pipe.hincrby(key, "successful_job_count", int(done))
        if failed := len(deliveries) - int(done):
            pipe.hincrby(key, "failed_job_count", failed)
        pipe.hincrbyfloat(key, "total_working_time", working)

    # ---- one at a time

    def _write_one(self, delivery: Delivery) -> bool:
        """Write its end, or find that it is not ours any more; say False if others changed too much meanwhile."""
        job = delivery.job
        spoilt = False
        for _ in range(_ATTEMPTS):
            with self._connection.pipeline(transaction=True) as pipe:
                try:
                    pipe.watch(job.dependents_key, delivery.execution.key)  # type: ignore[no-untyped-call]
                    if not pipe.exists(delivery.execution.key):
                        self._lost(delivery)
                        return True
                    try:
                        if spoilt:
                            self._transact_barely(delivery, pipe)
                        else:
                            self._transact(delivery, pipe)
                    except RedisError:
                        raise
                    except Exception as error:
                        if spoilt:
                            raise
                        logger.exception("Worker %s: the end of job %s cannot be written", self._worker.name, job.id)
                        delivery.exc_string += f"\nIts end could not be written: {type(error).__name__}: {error}\n"
                        delivery.error = delivery.error or error
                        spoilt = True
                        continue
                    pipe.execute()
                except RedisError as error:
                    delivery.unanswered = delivery.unanswered or _is_no_answer(error)
                    if isinstance(error, WatchError):
                        continue
                    raise
            return True
        return False

    def _transact_barely(self, delivery: Delivery, pipe: Pipeline) -> None:
        pipe.multi()
        self._worker.increment_failed_job_count(pipeline=pipe)
        delivery.webhook = "failed", delivery.exc_string
        fail_barely(delivery.job, delivery.exc_string, pipe, **self._of(delivery))
        self._forget(delivery, pipe)

    def _transact(self, delivery: Delivery, pipe: Pipeline) -> None:
        worker, job, queue = self._worker, delivery.job, delivery.queue
        if delivery.why == DRAINED and delivery.error is not None:
            pipe.watch(job.key)  # type: ignore[no-untyped-call]
            deleted = not pipe.exists(job.key)
            pipe.multi()
            if not deleted:
                self.put_back(delivery, pipe)
            self._forget(delivery, pipe)
            return
        job.retries_left, job.repeats_left, job.number_of_retries = delivery.counts  # an earlier attempt changed them
        retry = self._wants_retry(delivery)
        if not retry:
            # Told beforehand: the dependents' conditions are read from it, and Redis does not know yet.
            if delivery.error is not None and delivery.why == STOPPED:
                job._status = JobStatus.STOPPED
            elif delivery.error is not None or is_retry(delivery.result):
                job._status = JobStatus.FAILED
            else:
                job._status = JobStatus.FINISHED
            queue.enqueue_dependents(job, pipeline=pipe, refresh_job_status=False)
        if not pipe.explicit_transaction:
            pipe.multi()
        if delivery.progress is not None:
            flush([delivery.progress], pipe, final=True)
        if delivery.error is None and is_retry(delivery.result):
            self._returned_retry(delivery, pipe)
        elif delivery.error is None:
            worker.increment_successful_job_count(pipeline=pipe)
            self._succeed(delivery, pipe)
        else:
            worker.increment_failed_job_count(pipeline=pipe)
            if retry:
                pipe.hdel(job.key, DELIVERIES)
                with inside(pipe, job, queue) as bound:
                    job.retry(bound, pipe)
            else:
                self._fail(delivery, pipe)
        delivery.webhook = None
        if not retry and delivery.why != STOPPED:
            ended_well = delivery.error is None and not is_retry(delivery.result)
            delivery.webhook = ("finished" if ended_well else "failed"), delivery.exc_string
        if job.started_at is not None and job.ended_at is not None:
            worker.increment_total_working_time(job.ended_at - job.started_at, pipe)
        self._forget(delivery, pipe)

    def _wants_retry(self, delivery: Delivery) -> bool:
        job = delivery.job
        if delivery.error is not None:
            return job.should_retry and delivery.why != STOPPED
        result = delivery.result
        return is_retry(result) and not (job.number_of_retries and job.number_of_retries >= result.max)

    def _lost(self, delivery: Delivery) -> None:
        if delivery.unanswered:
            logger.info(
                "Worker %s: job %s was written, though Redis's answer was lost", self._worker.name, delivery.job.id
            )
            return
        logger.warning(
            "Worker %s: job %s was taken from this worker, which had not been heard of for too long; "
            "what it did is not recorded",
            self._worker.name,
            delivery.job.id,
        )

    # ---- the parts, all inside a transaction

    def _of(self, delivery: Delivery) -> dict[str, Any]:
        return {
            "worker_name": self._worker.name,
            "execution_id": delivery.execution.id,
            "execution_started_at": delivery.execution.created_at,
            "execution_ended_at": delivery.job.ended_at,
        }

    def _succeed(self, delivery: Delivery, pipe: Pipeline) -> None:
        job = delivery.job
        job._result = delivery.result
        job._status = JobStatus.FINISHED
        ttl = job.get_result_ttl(self._worker.default_result_ttl)
        if ttl != 0:
            job._handle_success(ttl, pipeline=pipe, **self._of(delivery))
        if job.repeats_left is not None and job.repeats_left > 0:
            pipe.hdel(job.key, DELIVERIES)
            with inside(pipe, job, delivery.queue) as bound:
                Repeat.schedule(job, bound, pipeline=pipe)
        else:
            job.cleanup(ttl, pipeline=pipe, remove_from_queue=False)

    def _fail(self, delivery: Delivery, pipe: Pipeline) -> None:
        job = delivery.job
        job.set_status(JobStatus.STOPPED if delivery.why == STOPPED else JobStatus.FAILED, pipeline=pipe)
        if not self._worker.disable_default_exception_handler:
            job._handle_failure(delivery.exc_string, pipeline=pipe, **self._of(delivery))

    def _returned_retry(self, delivery: Delivery, pipe: Pipeline) -> None:
        job, retry = delivery.job, delivery.result
        job._result = retry
        self._worker.increment_failed_job_count(pipeline=pipe)
        if self._wants_retry(delivery):
            with inside(pipe, job, delivery.queue) as bound:
                job._handle_retry_result(queue=bound, pipeline=pipe, retry=retry, **self._of(delivery))
            return
        job.set_status(JobStatus.FAILED, pipeline=pipe)
        job.failed_job_registry.add(job, ttl=job.failure_ttl, exc_string="", pipeline=pipe)
        Result.create_max_retries_exceeded(
            job, job.failure_ttl, return_value=retry, pipeline=pipe, **self._of(delivery)
        )

    def _forget(self, delivery: Delivery, pipe: Pipeline) -> None:
        delivery.execution.delete(job=delivery.job, pipeline=pipe)
        if delivery.why == STOPPED:
            pipe.delete(cancel_key(delivery.job.id))
        if delivery.running_key is not None:
            pipe.zrem(delivery.running_key, delivery.execution.composite_key)

    def put_back(self, delivery: Delivery, pipe: Pipeline) -> None:
        """Put the job in front of its queue as if it had never been begun."""
        job, queue = delivery.job, delivery.queue
        job.set_status(JobStatus.QUEUED, pipeline=pipe)
        pipe.hset(job.key, mapping={"started_at": "", "ended_at": "", "worker_name": ""})
        job.cleanup(ttl=job.ttl, pipeline=pipe)
        pipe.sadd(queue.redis_queues_keys, queue.key)
        queue.push_job_id(job.id, pipeline=pipe, at_front=True)
