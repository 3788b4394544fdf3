"""The Redis side of batches: enqueueing all of a batch's jobs at once, and taking them back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from blueprints.settings import Settings
from tta_sync import WorkflowContext
from tta_sync.rq import JobFunction

QUEUE = "default"
JOB_KEY = "rq:job:{}"
QUEUE_KEY = f"rq:queue:{QUEUE}"

_FAILURE_TTL = 24 * 3600  # seconds that RQ keeps a failed job; SQL keeps its error for good
_REMOVABLE = 5_000  # jobs in the queue up to which taking one out of its middle is quick


class JobQueue(Protocol):
    """What the views need of the queue."""

    def ping(self) -> None: ...

    def enqueue(self, item_ids: Sequence[str], correlation_id: str) -> None: ...

    def remove(self, item_ids: Sequence[str]) -> None: ...


class RedisQueue:
    """The jobs of *function*, by the id of their item. Nothing here is retried: who asks is a request that waits."""

    def __init__(self, settings: Settings, function: JobFunction, connection: Redis | None = None) -> None:
        self._settings = settings
        self._function = function
        self._connection = connection
        # Whole seconds. The job ends itself well before this; RQ's alarm is for one that hangs.
        self.timeout = math.ceil(settings.deadline) + 45

    def _client(self) -> Redis:
        if self._connection is None:
            self._connection = connect(self._settings.require_redis_url())
        return self._connection

    def ping(self) -> None:
        """Ask Redis whether it is there, for 2 s at most.

        Raises:
            SettingsError: REDIS_URL is not set.
            redis.exceptions.RedisError: it does not answer.
        """
        with connect(self._settings.require_redis_url(), connect_timeout=1.0, timeout=1.0) as client:
            client.ping()

    def enqueue(self, item_ids: Sequence[str], correlation_id: str) -> None:
        """Enqueue the jobs of these items: all, or on an error none."""
        self._function.enqueue_many(
            [{"item_id": item_id} for item_id in item_ids],
            job_ids=item_ids,
            context=WorkflowContext(correlation_id=correlation_id),
            connection=self._client(),
            timeout=self.timeout,
            failure_ttl=_FAILURE_TTL,
        )

    def remove(self, item_ids: Iterable[str]) -> None:
        """Take back jobs that have not begun.

        A worker passes over an id whose job is gone, so it is enough to delete the jobs; out of a short queue the ids
        are taken as well, so that it counts right.
        """
        client = self._client()
        short = client.llen(QUEUE_KEY) <= _REMOVABLE
        with client.pipeline(transaction=False) as pipe:
            for item_id in item_ids:
                pipe.unlink(JOB_KEY.format(item_id))
                if short:
                    pipe.lrem(QUEUE_KEY, 1, item_id)
            pipe.execute()


def connect(url: str, connect_timeout: float = 2.0, timeout: float = 5.0) -> Redis:
    """Make a client that fails at the first error, within its timeouts (seconds)."""
    return Redis.from_url(
        url, socket_connect_timeout=connect_timeout, socket_timeout=timeout, retry=Retry(NoBackoff(), 0)
    )
