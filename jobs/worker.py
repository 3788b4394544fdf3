"""The worker of the service: ``rq worker -w jobs.worker.RecoveringWorker --job-class tta_sync.rq.WorkflowJob default``.

RQ's own forking worker, with two things added: what every job needs is imported before the fork, so that a fork costs
milliseconds; and at start-up, and every SWEEP_EVERY seconds, it takes up jobs that were lost.
"""

from __future__ import annotations

import gc
import importlib
import math
import sys
import time
from typing import Any

from rq import Queue, Worker
from rq.job import Job
from sqlalchemy import NullPool
from sqlalchemy.orm import configure_mappers

from blueprints.batches.queue import RedisQueue
from blueprints.db import Database
from blueprints.documents.local import load_language_model
from blueprints.settings import SettingsError, load_settings
from jobs.documents import parts, process_document
from jobs.owner import new_owner
from jobs.sweep import OWNER_FIELD, ROUND, Sweep

SWEEP_EVERY = 10  # seconds
_MAINTENANCE_EVERY = 60  # seconds, for RQ's own cleaning of registries; its default is ten minutes


class RecoveringWorker(Worker):
    """RQ's worker; its parent process opens no database connection that a child could inherit, and starts no loop."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.job_monitoring_interval = min(self.job_monitoring_interval, SWEEP_EVERY)
        self.maintenance_interval = min(self.maintenance_interval, _MAINTENANCE_EVERY)
        self._owner = ""
        self._sweep: Sweep | None = None
        self._next_sweep = 0.0  # on time.monotonic()

    @property
    def dequeue_timeout(self) -> int:
        # RQ waits 405 s for a job, and as long for a Redis that has gone silent.
        return min(super().dequeue_timeout, SWEEP_EVERY)

    def serialize(self) -> dict[str, Any]:
        return {**super().serialize(), OWNER_FIELD: self._owner}

    def bootstrap(self, *args: Any, **options: Any) -> None:
        self._owner = new_owner()
        try:
            self._warm_up()
        except SettingsError as error:
            sys.stderr.write(f"tta_sync: {error}\n")
            sys.exit(2)
        super().bootstrap(*args, **options)

    def _warm_up(self) -> None:
        """Do here, once, what each forked job would do for itself."""
        settings = load_settings()
        load_language_model()
        importlib.import_module("anyio._backends._asyncio")  # what httpx loads at its first connection
        configure_mappers()
        parts.prepare()
        # NullPool: a sweep closes what it opened, so there is nothing for a child to inherit.
        database = Database(settings, statement_timeout=ROUND, poolclass=NullPool)
        self._sweep = Sweep(
            settings, database, RedisQueue(settings, process_document, self.connection), self.connection
        )
        # A child's garbage collection would write to every object inherited, and so copy every page of them.
        gc.collect()
        gc.freeze()

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """Wait for a job, with a sweep whenever one is due."""
        began = time.monotonic()
        while True:
            self.sweep_if_due()
            if timeout is None:  # burst: whether there is a job now
                return super().dequeue_job_and_maintain_ttl(None, max_idle_time)
            wait = max(1, math.ceil(self._next_sweep - time.monotonic()))
            if max_idle_time is not None:
                left = math.ceil(began + max_idle_time - time.monotonic())
                if left <= 0:
                    return None
                wait = min(wait, left)
            found = super().dequeue_job_and_maintain_ttl(min(timeout, wait), wait)
            if found is not None:
                return found

    def maintain_heartbeats(self, job: Job) -> None:
        super().maintain_heartbeats(job)
        self.sweep_if_due()  # a long job must not keep lost ones waiting

    def sweep_if_due(self) -> None:
        """Sweep, unless the last one was less than SWEEP_EVERY seconds ago."""
        if self._sweep is not None and time.monotonic() >= self._next_sweep:
            self._sweep.run()
            self._next_sweep = time.monotonic() + SWEEP_EVERY
