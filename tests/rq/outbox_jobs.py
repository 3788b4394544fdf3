"""Job functions for the tests of the outbox, the table that goes with them, and a program that dies where it is told.

``python -m tests.rq.outbox_jobs DATABASE MODE POINT``: MODE is write or relay; see :func:`main`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from marshmallow import Schema, fields, validate
from redis import Redis
from redis.client import Pipeline
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from tta_sync import WorkflowContext, run_sync
from tta_sync.rq import outbox, outbox_relay, workflow_job
from tta_sync.sqlalchemy import OutboxRelay, courier, create_engine, outbox_table, session_step, unit_of_work

ROUNDS = 40  # transactions of one life of the writer in the storm


class Base(DeclarativeBase): ...


outbox_table(Base.metadata)


class Entry(Base):
    """What a transaction has recorded beside the jobs that it has enqueued."""

    __tablename__ = "entries"
    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(unique=True)
    batch: Mapped[str]


class Item(Schema):
    id = fields.Integer(required=True, validate=validate.Range(min=0))


@workflow_job("default", load=Item, timeout=60)
async def index(data: dict[str, Any], context: WorkflowContext) -> dict[str, Any]:
    return {"id": data["id"], "correlation_id": context.correlation_id}


@workflow_job("default")
async def anything(data: Any) -> Any:
    return data


@workflow_job("default", idempotent=True, concurrency=2, concurrency_key=lambda data: f"of {data['tenant']}")
async def a_few(data: Any) -> Any:
    return data


@workflow_job("default", unique=True)
async def only_once(data: Any) -> Any:
    return data


@workflow_job("default", result_ttl=0)
def count(key: str) -> None:
    with Redis.from_url(os.environ["REDIS_URL"]) as client:
        client.incr(key)


engine = create_engine(os.environ.get("OUTBOX_TEST_DATABASE", "sqlite:////nowhere/at/all.db"))


@session_step
def save_and_count(session: Session, key: str) -> str:
    session.add(Entry(job_id=count.enqueue_on_commit(key), batch=key))
    return key


enqueue_another = workflow_job("default", unit_of_work=unit_of_work(engine))(save_and_count)


# ---- the program that dies -------------------------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_before(function: Callable[..., Any]) -> Callable[..., Any]:
    return die


def dies_after(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **keywords: Any) -> Any:
        function(*args, **keywords)
        die()

    return run


POINTS: dict[str, tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = {
    "after the commit": (courier, "hand_over", dies_before),
    "before it is read": (OutboxRelay, "_claim", dies_before),
    "when it is read": (OutboxRelay, "_claim", dies_after),
    "before EXEC": (Pipeline, "execute", dies_before),
    "after EXEC": (Pipeline, "execute", dies_after),
    "before it is deleted": (OutboxRelay, "_settle", dies_before),
    "before the deletion is committed": (OutboxRelay, "_settle", dies_after),
    "when it is deleted": (outbox.JobDelivery, "forget", dies_before),
    "when it is forgotten": (outbox.JobDelivery, "forget", dies_after),
}
"""Where a process may die between its commit and the end of the delivery."""


def set_trap(point: str) -> None:
    owner, name, trap = POINTS[point]
    setattr(owner, name, trap(getattr(owner, name)))


def main(database: str, mode: str, point: str) -> None:
    """Write a job, or relay what is there, and die at the point given; "before the commit" is one for the writer."""
    engine = create_engine(database)
    if point in POINTS:
        set_trap(point)
    if mode == "relay":
        outbox_relay(engine).run_once()
        return

    @session_step
    def save(session: Session, data: dict[str, Any]) -> None:
        job_id = index.enqueue_on_commit(data, job_id="the-job")
        session.add(Entry(job_id=job_id, batch="one"))
        session.flush()
        if point == "before the commit":
            die()

    unit_of_work(sessionmaker(engine)).run(run_sync, save, {"id": 1})
    give_up = time.monotonic() + 30
    while point in POINTS and courier._courier._desks and time.monotonic() < give_up:
        time.sleep(0.01)  # it is to die in the courier's thread


# ---- the storm -------------------------------------------------------------------------------------------------------


def storm(database: str, seed: str, lives: str) -> None:
    """Fork writers and relays, two at a time, each of which dies at a random moment of its own choice."""
    # Nothing is opened before the forks.
    chance = random.Random(int(seed))
    killed = 0
    for life in range(int(lives)):
        children = []
        for mode in (write_for_life, relay_for_life):
            own = chance.randrange(2**32)
            pid = os.fork()
            if not pid:
                try:
                    fall(random.Random(own))
                    mode(database, random.Random(own + 1), f"{seed}-{life}")
                finally:
                    os._exit(0)
            children.append(pid)
        killed += [os.waitpid(pid, 0)[1] for pid in children].count(signal.SIGKILL)
    assert killed > int(lives), f"only {killed} of {2 * int(lives)} processes have died"


def fall(chance: random.Random) -> None:
    """Have this process die at the n-th passage of one of the points."""
    owner, name, trap = POINTS[chance.choice(sorted(POINTS))]
    original = getattr(owner, name)
    left = chance.randrange(1, ROUNDS)

    def run(*args: Any, **keywords: Any) -> Any:
        nonlocal left
        left -= 1
        return (trap(original) if left == 0 else original)(*args, **keywords)

    setattr(owner, name, run)


class Regret(Exception):
    """The transaction is rolled back."""


def write_for_life(database: str, chance: random.Random, life: str) -> None:
    engine = create_engine(database)
    units = unit_of_work(sessionmaker(engine))
    for number in range(ROUNDS):
        batch = f"{life}-{number}"
        try:
            with units as unit:
                for position in range(chance.randrange(1, 5)):
                    job_id = f"{batch}-{position}"
                    savepoint = unit.session.begin_nested()
                    unit.session.add(Entry(job_id=job_id, batch=batch))
                    index.enqueue_on_commit({"id": position}, job_id=job_id)
                    unit.session.flush()
                    if chance.random() < 0.2:
                        savepoint.rollback()
                    else:
                        savepoint.commit()
                if chance.random() < 0.2:
                    raise Regret
        except Regret:
            pass


def relay_for_life(database: str, chance: random.Random, life: str) -> None:
    relay = outbox_relay(create_engine(database))
    for _ in range(ROUNDS):
        relay.run_once(chance.randrange(1, 20))


if __name__ == "__main__":
    from tests.rq import outbox_jobs  # by the name that the jobs carry

    {"storm": outbox_jobs.storm}.get(sys.argv[1], outbox_jobs.main)(*sys.argv[-3:])
