"""RQ: async jobs and workflows on RQ's own data model, on stock workers."""

from tta_sync.rq.functions import JobFunction, workflow_job
from tta_sync.rq.job import WorkflowJob

__all__ = ["JobFunction", "WorkflowJob", "workflow_job"]
