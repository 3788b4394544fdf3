"""Give back to the queue what was lost: SQL says what is to be done, Redis only what is about to be.

An item can be lost in many ways: the process died between recording and enqueueing it, Redis forgot it, the worker was
killed with it in hand. A sweep compares the two and mends the difference. Any number of workers may sweep at once: each
item is taken by one UPDATE, which only one of them wins.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum, auto

from redis import Redis
from redis.exceptions import RedisError
from rq.exceptions import NoSuchJobError
from rq.intermediate_queue import IntermediateQueue
from sqlalchemy.exc import SQLAlchemyError

from blueprints.batches.models import State
from blueprints.batches.queue import JOB_KEY, QUEUE_KEY, RedisQueue
from blueprints.batches.store import OpenItem, end_abandoned, open_items, take_to_enqueue
from blueprints.db import Database
from blueprints.settings import Settings
from jobs.owner import lives
from tta_sync.rq import WorkflowJob

logger = logging.getLogger(__name__)

PAGE = 500  # items looked at in one go
ROUND = 5.0  # seconds after which a round stops; the next one goes on from there
MAX_RECOVERIES = 3
_YOUNG = timedelta(seconds=5)  # whoever has taken an item on is given this long to enqueue it
_LONGEST_LOOK = 20_000  # ids in the queue up to which it is read, to find what is in no list at all

_OVER = ("finished", "failed", "stopped", "canceled")


class Action(Enum):
    """What to do about an item."""

    LEAVE = auto()
    SUSPECT = auto()  # leave it once more, and enqueue it if it still looks so at the next sweep
    ENQUEUE = auto()  # Redis does not know it
    RECOVER = auto()  # whoever had it has ended without ending it


@dataclass(frozen=True, slots=True)
class Seen:
    """What Redis says about an item's job."""

    status: str | None  # None: no such job
    worker_lives: bool = True  # the worker that began it, as far as can be told
    listed: bool = True  # its id is in the queue


def decide(item: OpenItem, job: Seen, owner_lives: bool | None, now: datetime, longest: timedelta) -> Action:
    """Say what to do about an item; *longest* is the most that a job may take. A function of its arguments only.

    *owner_lives* is None where the process that runs the item is of another machine.
    """
    if item.state is State.RUNNING:
        overdue = item.started_at is not None and now - item.started_at > longest
        if owner_lives:
            # A job that RQ gave up on may still be at work, for RQ can lose sight of it; only time tells.
            gone = overdue and (job.status is None or job.status in _OVER)
        elif owner_lives is False:
            # Dead on this machine. Where its worker lives, that one is about to tell RQ: it has a sweep's time to.
            if job.status == "started" and job.worker_lives:
                return Action.SUSPECT
            gone = True
        else:
            gone = job.status in _OVER or (overdue if job.status is None else not job.worker_lives)
        return Action.RECOVER if gone else Action.LEAVE
    if now - item.enqueued_at < _YOUNG:
        return Action.LEAVE
    if job.status is None:
        return Action.ENQUEUE
    if job.status in _OVER:
        return Action.RECOVER
    if job.status == "queued":
        # On its way from the list to a worker, or lost on that way.
        return Action.LEAVE if job.listed else Action.SUSPECT
    if job.status == "started":
        return Action.LEAVE if job.worker_lives else Action.RECOVER
    return Action.LEAVE  # deferred or scheduled, by somebody's hand


class Sweep:
    """One process's sweeps, one after another."""

    def __init__(self, settings: Settings, database: Database, queue: RedisQueue, connection: Redis) -> None:
        self._database = database
        self._queue = queue
        self._connection = connection
        self._longest = timedelta(seconds=queue.timeout + 60)
        self._after = ""  # where the next page begins
        self._suspects: dict[str, OpenItem] = {}  # what looked lost at the last sweep

    def run(self) -> int:
        """Look at what has not ended, for ROUND seconds at most; return how many items were given back or ended.

        A database or a Redis that does not answer is logged, and tried again at the next sweep.
        """
        mended = 0
        suspects: dict[str, OpenItem] = {}
        give_up = time.monotonic() + ROUND
        try:
            while True:
                with self._database.reads as unit:
                    page = open_items(unit.session, self._after, PAGE)
                mended += self._mend(page, suspects)
                self._after = page[-1].id if len(page) == PAGE else ""
                if not self._after or time.monotonic() > give_up:
                    break
        except (SQLAlchemyError, RedisError) as error:
            logger.warning("a sweep for lost jobs failed (%s); it is tried again", type(error).__name__)
        else:
            self._suspects = suspects
        if mended:
            logger.warning("%d jobs of batches were lost and have been taken up again, or ended", mended)
        return mended

    def _mend(self, page: Sequence[OpenItem], suspects: dict[str, OpenItem]) -> int:
        now = datetime.now(UTC)
        mended = 0
        wanted: dict[str, list[str]] = {}  # ids by correlation id
        for item, job in zip(page, self._look(page), strict=True):
            action = decide(item, job, None if item.owner is None else lives(item.owner), now, self._longest)
            if action is Action.SUSPECT:
                suspects[item.id] = item
                action = Action.RECOVER if self._suspects.get(item.id) == item else Action.LEAVE
            if action is Action.LEAVE:
                continue
            enqueue = self._take(item, action, now)
            if enqueue is None:
                continue
            mended += 1
            if enqueue:
                wanted.setdefault(item.correlation_id, []).append(item.id)
                if job.status is not None:
                    self._discard(item.id)
        for correlation_id, ids in wanted.items():
            self._queue.enqueue(ids, correlation_id)
        return mended

    def _take(self, item: OpenItem, action: Action, now: datetime) -> bool | None:
        """Bring the item to its next state: True, to be enqueued; False, ended; None, another was quicker."""
        with self._database.units as unit:
            if item.cancelled:
                return False if end_abandoned(unit.session, item, State.CANCELLED) else None
            recovery = action is Action.RECOVER
            if recovery and item.recoveries >= MAX_RECOVERIES:
                error = f"was begun {item.recoveries + 1} times, and its worker ended each time before it did"
                return False if end_abandoned(unit.session, item, State.FAILED, error) else None
            return True if take_to_enqueue(unit.session, item, now, recovery=recovery) else None

    def _look(self, page: Sequence[OpenItem]) -> list[Seen]:
        """Ask Redis about the page's jobs, in three round trips."""
        with self._connection.pipeline(transaction=False) as pipe:
            for item in page:
                pipe.hmget(JOB_KEY.format(item.id), "status", "worker_name")
            pipe.llen(QUEUE_KEY)
            *found, length = pipe.execute()
        jobs = [(status and status.decode(), (worker or b"").decode()) for status, worker in found]
        living = self._living({worker for status, worker in jobs if status == "started"})
        waiting = {item.id for item, (status, _) in zip(page, jobs, strict=True) if status == "queued"}
        # Read after the states: an id that was put into the list meanwhile is seen there.
        listed = self._listed() if waiting and length <= _LONGEST_LOOK else waiting
        return [
            Seen(status, worker in living if status == "started" else True, item.id in listed)
            for item, (status, worker) in zip(page, jobs, strict=True)
        ]

    def _listed(self) -> set[str]:
        ids: list[bytes] = self._connection.lrange(QUEUE_KEY, 0, -1)  # type: ignore[assignment]  # it decodes nothing
        return {item_id.decode() for item_id in ids}

    def _living(self, workers: set[str]) -> set[str]:
        names = sorted(workers)
        with self._connection.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hmget(f"rq:worker:{name}", "birth", "death", OWNER_FIELD)
            found = pipe.execute()
        return {name for name, (birth, death, owner) in zip(names, found, strict=True) if _alive(birth, death, owner)}

    def _discard(self, item_id: str) -> None:
        """Delete what RQ still holds of an earlier attempt: its job, executions, and places in registries."""
        try:
            job = WorkflowJob.fetch(item_id, connection=self._connection)
            job.delete()
        except NoSuchJobError:
            pass
        IntermediateQueue(QUEUE_KEY, self._connection).remove(item_id)


OWNER_FIELD = "tta_owner"
"""Of a worker's hash in Redis: its process, by a name that tells whether it lives."""


def _alive(birth: bytes | None, death: bytes | None, owner: bytes | None) -> bool:
    if birth is None or death is not None:
        return False  # its heartbeat has run out, or it has said goodbye
    return owner is None or lives(owner.decode()) is not False
