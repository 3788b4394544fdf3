"""RQ: async jobs and workflows on RQ's own data model, on stock workers."""

from tta_sync.rq.functions import JobFunction, workflow_job
from tta_sync.rq.job import WorkflowJob
from tta_sync.rq.outbox import JobDelivery, enqueue_on_commit, outbox_relay

__all__ = ["JobDelivery", "JobFunction", "WorkflowJob", "enqueue_on_commit", "outbox_relay", "workflow_job"]
