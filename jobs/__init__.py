"""RQ's side of the service: the job functions, and the worker that recovers what was lost."""
