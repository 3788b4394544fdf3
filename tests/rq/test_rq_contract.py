"""What tta_sync.rq uses and imitates of RQ that RQ does not promise: a new RQ that changes it is found out here.

When one of these fails after an upgrade:

- a name or a signature: read RQ's changelog and the new source, adapt the caller (the file named beside it), and
  correct the table;
- a source text: AsyncWorker writes the same by its own means, or depends on its order. Read the difference between the
  two versions, do the same in the file named beside it, run ``test_keyspace_is_what_rq_leaves_when_all_is_done``, and
  put the new digest here. A difference that changes nothing for Redis needs the digest only.

Until then pin RQ to the version before.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from typing import Any

import pytest
import rq.job
from redis import Redis
from rq import Queue
from rq.defaults import DEFAULT_FAILURE_TTL
from rq.job import Job
from rq.registry import FailedJobRegistry, StartedJobRegistry
from rq.scheduler import RQScheduler
from rq.suspension import WORKERS_SUSPENDED
from rq.worker_registration import REDIS_WORKER_KEYS, WORKERS_BY_QUEUE_KEY

from tta_sync.rq import AsyncWorker

# Called, or overridden: delivery.py, endings.py, job.py, recovery.py, worker.py.
PARAMETERS = {
    "rq.job:Job.__init__": "self, id, connection, serializer",
    "rq.job:Job._execute": "self",
    "rq.job:Job._handle_success": (
        "self, result_ttl, pipeline, worker_name, execution_id, execution_started_at, execution_ended_at"
    ),
    "rq.job:Job._handle_failure": (
        "self, exc_string, pipeline, worker_name, execution_id, execution_started_at, execution_ended_at"
    ),
    "rq.job:Job._handle_retry_result": (
        "self, queue, pipeline, retry, execution_id, execution_started_at, execution_ended_at, worker_name"
    ),
    "rq.job:Job.restore": "self, raw_data",
    "rq.job:Job.retry": "self, queue, pipeline",
    "rq.job:Job.should_retry": "self",
    "rq.job:Job.cleanup": "self, ttl, pipeline, remove_from_queue",
    "rq.job:Job.set_status": "self, status, pipeline",
    "rq.job:Job.get_status": "self, refresh",
    "rq.job:Job.get_result_ttl": "self, default_ttl",
    "rq.job:Job.send_webhooks": "self, status, exc_string",
    "rq.job:Job.execute_failure_callback": "self, death_penalty_class, exc_info",
    "rq.job:Job.execute_stopped_callback": "self, death_penalty_class",
    "rq.job:Job.success_callback": "self",
    "rq.job:Job.failure_callback": "self",
    "rq.job:Job.stopped_callback": "self",
    "rq.job:Job.dependents_key_for": "cls, job_id",
    "rq.queue:Queue.__init__": (
        "self, name, connection, default_timeout, is_async, job_class, serializer, death_penalty_class, kwargs"
    ),
    "rq.queue:Queue.enqueue_dependents": "self, job, pipeline, exclude_job_id, refresh_job_status",
    "rq.queue:Queue.push_job_id": "self, job_id, pipeline, at_front",
    "rq.queue:Queue.get_redis_server_version": "self",
    "rq.executions:Execution.__init__": "self, id, job_id, connection, worker_name",
    "rq.executions:Execution.delete": "self, job, pipeline",
    "rq.repeat:Repeat.schedule": "cls, job, queue, pipeline",
    "rq.results:Result.create_failure": (
        "cls, job, ttl, exc_string, worker_name, pipeline, execution_id, execution_started_at, execution_ended_at"
    ),
    "rq.results:Result.create_max_retries_exceeded": (
        "cls, job, ttl, return_value, worker_name, execution_id, execution_started_at, execution_ended_at, pipeline"
    ),
    "rq.results:Result.get_key": "cls, job_id",
    "rq.worker.base:BaseWorker.__init__": (
        "self, queues, name, default_result_ttl, connection, exception_handlers, maintenance_interval, "
        "default_worker_ttl, worker_ttl, job_class, queue_class, log_job_description, "
        "job_monitoring_interval, disable_default_exception_handler, prepare_for_work, serializer, "
        "work_horse_killed_handler"
    ),
    "rq.worker.base:BaseWorker._set_connection": "self, connection",
    "rq.worker.base:BaseWorker._start_scheduler": "self, burst, logging_level, date_format, log_format",
    "rq.worker.base:BaseWorker._install_signal_handlers": "self",
    "rq.worker.base:BaseWorker._pubsub_exception_handler": "self, exc, pubsub, pubsub_thread",
    "rq.worker.base:BaseWorker.request_stop": "self, signum, frame",
    "rq.worker.base:BaseWorker.handle_payload": "self, message",
    "rq.worker.base:BaseWorker.bootstrap": "self, logging_level, date_format, log_format",
    "rq.worker.base:BaseWorker.register_birth": "self",
    "rq.worker.base:BaseWorker.register_death": "self",
    "rq.worker.base:BaseWorker.teardown": "self",
    "rq.worker.base:BaseWorker.unsubscribe": "self",
    "rq.worker.base:BaseWorker.heartbeat": "self, timeout, pipeline",
    "rq.worker.base:BaseWorker.serialize": "self",
    "rq.worker.base:BaseWorker.set_state": "self, state, pipeline",
    "rq.worker.base:BaseWorker.set_current_job_id": "self, job_id, pipeline",
    "rq.worker.base:BaseWorker.reorder_queues": "self, reference_queue",
    "rq.worker.base:BaseWorker.run_maintenance_tasks": "self",
    "rq.worker.base:BaseWorker.should_run_maintenance_tasks": "self",
    "rq.worker.base:BaseWorker.increment_failed_job_count": "self, pipeline",
    "rq.worker.base:BaseWorker.increment_successful_job_count": "self, pipeline",
    "rq.worker.base:BaseWorker.increment_total_working_time": "self, job_execution_time, pipeline",
    "rq.worker.base:BaseWorker.work": (
        "self, burst, logging_level, date_format, log_format, max_jobs, max_idle_time, with_scheduler, dequeue_strategy"
    ),
    "rq.worker_registration:register": "worker, pipeline",
    "rq.command:parse_payload": "payload",
}

# Written by our own scripts (claims.py), or in our own order (endings.py, recovery.py, worker.py, delivery.py).
SOURCES = {
    "rq.executions:Execution.create": "11d84f7f0f52",
    "rq.executions:Execution.save": "27a9a8461d65",
    "rq.executions:Execution.serialize": "41f84dc13055",
    "rq.executions:Execution.heartbeat": "ca753f4e7b38",
    "rq.executions:Execution.delete": "f70986c2803d",
    "rq.executions:ExecutionRegistry.add": "39c126ebd685",
    "rq.executions:prepare_execution": "67351870bec3",
    "rq.registry:StartedJobRegistry.add_execution": "058aeccefc8e",
    "rq.registry:FailedJobRegistry.add": "f8d6dd39b765",
    "rq.job:Job.heartbeat": "d2b6e131210d",
    "rq.job:Job.prepare_for_execution": "4e8e0eca634d",
    "rq.job:Job.perform": "d86f4829a8d2",
    "rq.worker.base:BaseWorker.prepare_job_execution": "783c9dc74a37",
    "rq.worker.base:BaseWorker.handle_job_success": "d3a8e0ee111a",
    "rq.worker.base:BaseWorker.handle_job_failure": "ecfeb052c99a",
    "rq.worker.base:BaseWorker.handle_job_retry": "9e190fbe3cbe",
    "rq.worker.base:BaseWorker.perform_job": "8f75687c8510",
    "rq.worker.base:BaseWorker.increment_failed_job_count": "492c04f44f86",
    "rq.worker.base:BaseWorker.increment_successful_job_count": "077c6bb479dc",
    "rq.worker.base:BaseWorker.increment_total_working_time": "91a9441e7a19",
    "rq.worker.base:BaseWorker.register_death": "92e03f8d3c57",
    "rq.worker_registration:unregister": "14ac14053479",
    "rq.queue:Queue.enqueue_dependents": "d44fb82f9e19",
    "rq.job:Job.dependencies_are_met": "d42e2e932459",
}


def found(path: str) -> Any:
    module, _, names = path.partition(":")
    owner: Any = importlib.import_module(module)
    for name in names.split("."):
        owner = inspect.getattr_static(owner, name) if inspect.isclass(owner) else getattr(owner, name)
    function = owner.fget if isinstance(owner, property) else owner
    return getattr(function, "__func__", function)


@pytest.mark.parametrize("path", PARAMETERS)
def test_parameters_are_those_we_know_when_rq_is_called(path: str) -> None:
    """Names and order of what is called or overridden; see the top of this file for what to do."""
    assert ", ".join(inspect.signature(found(path)).parameters) == PARAMETERS[path]


@pytest.mark.parametrize("path", SOURCES)
def test_source_is_the_one_we_imitate(path: str) -> None:
    """The text, to the letter, of what is done by our own means; see the top of this file for what to do."""
    assert hashlib.sha256(inspect.getsource(found(path)).encode()).hexdigest()[:12] == SOURCES[path]


def test_attributes_and_keys_are_those_we_know(client: Redis) -> None:
    """Private attributes that we read or set, and the names of keys that our scripts spell out."""
    job = Job("an-id", connection=client)
    job.origin = "low"
    for name in (
        *("_status", "_result", "_dependency_ids", "_exc_info", "_cached_result"),
        *("_success_callback_name", "_failure_callback_name", "_stopped_callback_name"),
        *("retries_left", "repeats_left", "number_of_retries", "webhooks", "group_id"),
        *("success_callback_timeout", "failure_callback_timeout", "stopped_callback_timeout"),
    ):
        assert hasattr(job, name), f"Job.{name}: delivery.py, endings.py and worker.py use it"
    assert hasattr(rq.job._job_stack, "top"), "job.py: get_current_job() reads the top of this stack"
    queue = Queue("low", connection=client)
    assert queue._default_timeout == Queue.DEFAULT_TIMEOUT
    assert hasattr(queue, "redis_server_version")
    # claims.py and recovery.py
    assert (queue.key, job.key, job.dependents_key) == ("rq:queue:low", "rq:job:an-id", "rq:job:an-id:dependents")
    assert StartedJobRegistry("low", connection=client).key == "rq:wip:low"
    assert FailedJobRegistry("low", connection=client).key == "rq:failed:low"
    assert job.execution_registry.key == "rq:executions:an-id"
    assert (WORKERS_SUSPENDED, REDIS_WORKER_KEYS) == ("rq:suspended", "rq:workers")
    assert WORKERS_BY_QUEUE_KEY % "low" == "rq:workers:low"
    assert DEFAULT_FAILURE_TTL == 31536000
    assert "_process" in inspect.getsource(RQScheduler.__init__), "worker.py ends it by this"
    worker = AsyncWorker(["low"], connection=client)
    for name in (
        *("_stop_requested", "_shutdown_requested_date", "_dequeue_strategy", "_ordered_queues", "_exc_handlers"),
        *("_state", "scheduler", "pubsub_thread", "last_cleaned_at", "default_result_ttl", "log_job_description"),
        *("disable_default_exception_handler", "redis_worker_namespace_prefix", "death_penalty_class"),
    ):
        assert hasattr(worker, name), f"BaseWorker.{name}: worker.py and endings.py use it"
    assert worker.key == f"rq:worker:{worker.name}"
