"""Writes down how deliveries ended: with RQ's own methods, many at a time, and only if they are still ours.

Each transaction watches the key of the execution: whoever recovers the job of a worker that was taken for dead deletes
it, so that a worker which comes back too late writes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import WatchError
from rq.job import JobStatus
from rq.repeat import Repeat
from rq.results import Result
from rq.worker import BaseWorker

from tta_sync.rq.claims import DELIVERIES
from tta_sync.rq.control import cancel_key
from tta_sync.rq.delivery import DRAINED, LOST, STOPPED, Delivery, is_retry
from tta_sync.rq.progress import flush

logger = logging.getLogger("rq.worker")

_ATTEMPTS = 20  # at a transaction that others keep touching


class Endings:
    """Writes for one worker, on its main thread.

    Raises, all methods:
        redis.exceptions.RedisError: nothing, or not all, was written; to be called again with the same deliveries.
    """

    def __init__(self, worker: BaseWorker) -> None:
        self._worker = worker
        self._connection: Redis = worker.connection

    def write(self, deliveries: Sequence[Delivery]) -> None:
        """Write what has ended; whoever is LOST is passed over."""
        plain: list[Delivery] = []
        rest: list[Delivery] = []
        for delivery in deliveries:
            if delivery.why == LOST:
                continue
            (plain if self._is_plain(delivery) else rest).append(delivery)
        if plain:
            rest.extend(self._write_together(plain))
        # Put back in front of its queue: the first to have been claimed is the last to be put there.
        for delivery in sorted(rest, key=lambda delivery: -delivery.number if delivery.why == DRAINED else 1):
            self._write_one(delivery)

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

    def _write_together(self, deliveries: list[Delivery]) -> list[Delivery]:
        """Write all in one transaction; return those that must be looked at one by one."""
        with self._connection.pipeline(transaction=True) as pipe:
            dependents = [delivery.job.dependents_key for delivery in deliveries]
            executions = [delivery.execution.key for delivery in deliveries]
            pipe.watch(*dependents, *executions)  # type: ignore[no-untyped-call]
            if pipe.exists(*executions) != len(executions) or pipe.exists(*dependents):
                return deliveries
            pipe.multi()
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
            try:
                pipe.execute()
            except WatchError:  # dependents came, or somebody has recovered one of them
                return deliveries
        return []

    # ---- one at a time

    def _write_one(self, delivery: Delivery) -> None:
        job, queue = delivery.job, delivery.queue
        for _ in range(_ATTEMPTS):
            with self._connection.pipeline(transaction=True) as pipe:
                try:
                    pipe.watch(job.dependents_key, delivery.execution.key)  # type: ignore[no-untyped-call]
                    if not pipe.exists(delivery.execution.key):
                        self._lost(delivery)
                        return
                    self._transact(delivery, pipe)
                    pipe.execute()
                except WatchError:
                    continue
            return
        raise RuntimeError(f"job {job.id} of queue {queue.name} changes faster than its end can be written")

    def _transact(self, delivery: Delivery, pipe: Pipeline) -> None:
        worker, job, queue = self._worker, delivery.job, delivery.queue
        if delivery.why == DRAINED and delivery.error is not None:
            pipe.multi()
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
                job.retry(queue, pipe)
            else:
                self._fail(delivery, pipe)
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
            Repeat.schedule(job, delivery.queue, pipeline=pipe)
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
            job._handle_retry_result(queue=delivery.queue, pipeline=pipe, retry=retry, **self._of(delivery))
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
