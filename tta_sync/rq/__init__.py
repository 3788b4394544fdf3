"""RQ: async jobs and workflows on RQ's own data model, on stock workers and on one that runs many at once."""

from tta_sync.rq.functions import JobFunction, workflow_job
from tta_sync.rq.job import WorkflowJob
from tta_sync.rq.outbox import JobDelivery, enqueue_on_commit, outbox_relay
from tta_sync.rq.worker import AsyncWorker

__all__ = [
    "AsyncWorker",
    "JobDelivery",
    "JobFunction",
    "WorkflowJob",
    "enqueue_on_commit",
    "outbox_relay",
    "workflow_job",
]
