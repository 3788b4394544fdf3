"""The thread that delivers after commits: how long commits wait, what it keeps in mind, and what a fork makes of it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tta_sync.sqlalchemy import courier
from tta_sync.sqlalchemy.courier import Courier

Eventually = Callable[..., Any]


class Relay:
    """A relay whose deliveries wait, fail or raise as the test says."""

    def __init__(self) -> None:
        self.delivered: list[list[str]] = []
        self.asked = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.down = False
        self.error: Exception | None = None
        self.pause = 0.0

    def deliver(self, units: Sequence[str], arrived: Callable[[], object]) -> bool:
        self.asked.set()
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        if self.down:
            self.pause = 0.01
            return False
        self.pause = 0.0
        self.delivered.append(list(units))
        return True

    @property
    def units(self) -> list[str]:
        return [unit for units in self.delivered for unit in units]


@pytest.fixture
def relay() -> Iterator[Relay]:
    relay = Relay()
    yield relay
    relay.gate.set()


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Courier]:
    """A courier of this test's own, whose thread ends soon after it has nothing to do."""
    monkeypatch.setattr(courier, "IDLE", 0.2)
    made = Courier()
    yield made
    with made._changed:
        made._desks.clear()


def test_commit_waits_until_its_messages_have_arrived(
    own: Courier, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is quick is there when the commit returns."""
    monkeypatch.setattr(courier, "PATIENCE", 60.0)
    for number in range(20):
        own.hand_over("key", lambda: relay, f"u{number}")
        assert relay.units[-1] == f"u{number}"


def test_commit_goes_on_when_its_messages_have_arrived_though_the_relay_has_more_to_do(
    own: Courier, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the tidying up; nor is anybody told who still waits for the rest."""
    monkeypatch.setattr(courier, "PATIENCE", 60.0)
    told = []

    class Tidies(Relay):
        def deliver(self, units: Sequence[str], arrived: Callable[[], object]) -> bool:
            arrived()
            told.append(len(units))
            return super().deliver(units, arrived)

    tidies = Tidies()
    tidies.gate.clear()
    own.hand_over("key", lambda: tidies, "u0")
    assert tidies.delivered == []
    with own._changed:
        desk = own._desks["key"]
        desk.units.extend(str(number) for number in range(150))
        arrived = desk.arrived
    monkeypatch.setattr(courier, "_nobody", lambda: told.append(arrived.is_set()))
    tidies.gate.set()
    assert arrived.wait(20)
    assert told == [1, False, 100, 50]


def test_commit_does_not_wait_for_what_is_slow(own: Courier, relay: Relay) -> None:
    """A quarter of a second, once: who comes while the courier is stuck for longer than that does not wait at all."""
    relay.gate.clear()
    began = time.monotonic()
    own.hand_over("key", lambda: relay, "u0")
    assert time.monotonic() - began >= courier.PATIENCE
    began = time.monotonic()
    for number in range(1, 100):
        own.hand_over("key", lambda: relay, f"u{number}")
    assert time.monotonic() - began < 10
    assert relay.delivered == []


def test_commits_of_many_threads_are_delivered_together(own: Courier, relay: Relay, eventually: Eventually) -> None:
    """What has come meanwhile goes in one delivery, in the order in which it came."""
    relay.gate.clear()
    own.hand_over("key", lambda: relay, "first")
    for number in range(250):
        own.hand_over("key", lambda: relay, f"u{number}")
    relay.gate.set()
    eventually(lambda: len(relay.units) == 251)
    assert [len(units) for units in relay.delivered] == [1, 100, 100, 50]
    assert relay.units == ["first", *(f"u{number}" for number in range(250))]


def test_courier_tries_again_when_nobody_has_answered(own: Courier, relay: Relay, eventually: Eventually) -> None:
    """In the order of the commits, without a relay process and without a further commit."""
    relay.down = True
    for number in range(5):
        own.hand_over("key", lambda: relay, f"u{number}")
    relay.asked.clear()
    assert relay.asked.wait(20), "it does not try again"
    relay.down = False
    eventually(lambda: len(relay.units) == 5)
    assert relay.units == [f"u{number}" for number in range(5)]


def test_commits_do_not_wait_while_nobody_answers(
    own: Courier, relay: Relay, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage is waited for by the courier, not by requests."""
    relay.down = True
    own.hand_over("key", lambda: relay, "u0")
    eventually(lambda: own._desks["key"].resumes_at > 0)
    with own._changed:
        own._desks["key"].resumes_at = time.monotonic() + 1000
    monkeypatch.setattr(courier, "PATIENCE", 1000.0)
    for number in range(100):
        own.hand_over("key", lambda: relay, f"v{number}")


def test_commit_on_a_loop_does_not_wait(own: Courier, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """An async session commits on its loop, which must not stand still."""
    monkeypatch.setattr(courier, "PATIENCE", 60.0)
    relay.gate.clear()

    async def commit() -> None:
        own.hand_over("key", lambda: relay, "u0")

    asyncio.run(asyncio.wait_for(commit(), 30))
    assert relay.delivered == []


def test_what_is_kept_in_mind_is_bounded(
    own: Courier,
    relay: Relay,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    eventually: Eventually,
) -> None:
    """The oldest are left to a relay, and the log says so once; their rows are all in the database."""
    monkeypatch.setattr(courier, "MOST_UNITS", 10)
    relay.gate.clear()
    own.hand_over("key", lambda: relay, "first")
    for number in range(50):
        own.hand_over("key", lambda: relay, f"u{number}")
    relay.gate.set()
    eventually(lambda: len(relay.units) == 11)
    assert relay.units == ["first", *(f"u{number}" for number in range(40, 50))]
    assert caplog.text.count("left to a relay") == 1


def test_what_comes_back_after_an_outage_does_not_exceed_the_bound(
    own: Courier, relay: Relay, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """Those that came meanwhile are not pushed out by those that could not be delivered."""
    monkeypatch.setattr(courier, "MOST_UNITS", 4)
    relay.gate.clear()
    own.hand_over("key", lambda: relay, "u0")
    relay.asked.wait(20)
    for number in range(1, 5):
        own.hand_over("key", lambda: relay, f"u{number}")
    relay.down = True
    relay.gate.set()
    eventually(lambda: own._desks["key"].resumes_at > 0)
    relay.down = False
    eventually(lambda: len(relay.units) == 4)
    assert relay.units == ["u1", "u2", "u3", "u4"]


def test_error_of_a_relay_is_logged_and_ends_nothing(
    own: Courier, relay: Relay, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    """A bug in a delivery costs no later message; the rows of this one are left to a relay."""
    relay.error = ZeroDivisionError("a bug")
    own.hand_over("key", lambda: relay, "u0")
    eventually(lambda: "ZeroDivisionError: a bug" in caplog.text)
    relay.error = None
    own.hand_over("key", lambda: relay, "u1")
    eventually(lambda: relay.units == ["u1"])


def test_one_that_does_not_answer_holds_up_no_other_for_long(own: Courier, eventually: Eventually) -> None:
    """While one database or Redis is down and waited for, others are delivered to."""
    down, up = Relay(), Relay()
    down.down = True
    own.hand_over("down", lambda: down, "u0")
    eventually(lambda: own._desks["down"].resumes_at > 0)
    own.hand_over("up", lambda: up, "v0")
    eventually(lambda: up.units == ["v0"])


def test_one_that_is_busy_does_not_starve_another(own: Courier, eventually: Eventually) -> None:
    """They take turns, a hundred transactions each."""
    busy, other = Relay(), Relay()
    order: list[str] = []
    for name, each in (("busy", busy), ("other", other)):
        each.deliver = lambda units, arrived, name=name, each=each: (  # type: ignore[method-assign, misc]
            order.append(name),
            Relay.deliver(each, units, arrived),
        )[1]
    busy.gate.clear()
    own.hand_over("busy", lambda: busy, "u0")
    for number in range(300):
        own.hand_over("busy", lambda: busy, f"u{number}")
    own.hand_over("other", lambda: other, "v0")
    busy.gate.set()
    eventually(lambda: len(busy.units) == 301 and other.units == ["v0"])
    assert order == ["busy", "other", "busy", "busy", "busy"]


def test_thread_ends_when_there_is_nothing_to_do_and_begins_again(
    own: Courier, relay: Relay, eventually: Eventually
) -> None:
    """A process that has stopped writing to outboxes has no thread for them."""
    for unit in ("u0", "u1"):
        own.hand_over("key", lambda: relay, unit)
        thread = own._thread
        assert thread is not None
        assert thread.daemon
        assert thread.name.startswith("tta_sync")
        eventually(lambda thread=thread: not thread.is_alive(), within=30)
        assert own._thread is None
    assert relay.units == ["u0", "u1"]


def test_thread_that_has_died_is_replaced(own: Courier, relay: Relay, eventually: Eventually) -> None:
    """Whatever ended it."""
    dead = threading.Thread(target=lambda: None)
    dead.start()
    dead.join()
    own._thread = dead
    own.hand_over("key", lambda: relay, "u0")
    eventually(lambda: relay.units == ["u0"])


def test_commit_succeeds_when_no_thread_can_be_had(
    own: Courier,
    relay: Relay,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    eventually: Eventually,
) -> None:
    """It has been committed: what is not delivered now is delivered with the next, or by a relay."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        own.hand_over("key", lambda: relay, "u0")
    assert "can't start new thread" in caplog.text
    own.hand_over("key", lambda: relay, "u1")
    eventually(lambda: relay.units == ["u0", "u1"])


def test_commits_wait_once_for_a_thread_that_does_not_run(
    own: Courier, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some servers start no threads unless they are told to: that must not cost every request its patience."""
    monkeypatch.setattr(Courier, "_run", lambda self: relay.gate.wait(60))
    relay.gate.clear()
    began = time.monotonic()
    for number in range(100):
        own.hand_over("key", lambda: relay, f"u{number}")
    assert time.monotonic() - began < 10


def test_relay_is_let_go_when_all_is_delivered(own: Courier, eventually: Eventually) -> None:
    """It holds an engine, which an application may want to be rid of."""
    relay = Relay()
    gone = weakref.ref(relay)
    own.hand_over("key", lambda kept=relay: kept, "u0")
    eventually(lambda: not own._desks)
    del relay
    eventually(lambda: gc.collect() >= 0 and gone() is None)


def test_child_of_a_fork_has_a_courier_of_its_own(
    relay: Relay, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """What the parent has in hand stays the parent's; the child's lock is free and its thread runs."""
    monkeypatch.setattr(courier, "_courier", Courier())
    relay.gate.clear()
    courier.hand_over("key", lambda: relay, "parent's")
    with courier._courier._changed:  # held by another than who forks, as far as the child is concerned
        pid = os.fork()
        if not pid:
            status = 1
            try:
                relay.gate.set()
                courier.PATIENCE = 60.0
                fresh = Relay()
                courier.hand_over("key", lambda: fresh, "child's")
                status = 0 if fresh.units == ["child's"] and relay.units == [] else 2
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    relay.gate.set()
    eventually(lambda: relay.units == ["parent's"])
    logging.getLogger("tta_sync").debug("the parent goes on")


GEVENT = """
from gevent import monkey; monkey.patch_all()
import sys
import gevent, redis
from tests.rq.outbox_jobs import Base, anything
from tta_sync.rq import outbox_relay
from tta_sync.sqlalchemy import create_engine, unit_of_work

engine = create_engine(sys.argv[1])
Base.metadata.create_all(engine)
units = unit_of_work(engine)

def commit(number):
    with units:
        anything.enqueue_on_commit(number)

gevent.joinall([gevent.spawn(commit, number) for number in range(30)], raise_error=True)
relay = outbox_relay(engine)
with gevent.Timeout(30):
    while relay.waiting():
        gevent.sleep(0.01)
print(redis.Redis.from_url(sys.argv[2]).llen("rq:queue:default"))
"""


def test_courier_delivers_under_gevent(redis_url: str, tmp_path: Path) -> None:
    """Its thread is a greenlet there, and commits wait for it as greenlets do."""
    done = subprocess.run(
        [sys.executable, "-c", GEVENT, f"sqlite:///{tmp_path}/outbox.db", redis_url],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "REDIS_URL": redis_url, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (done.stdout, done.stderr) == ("30\n", "")
