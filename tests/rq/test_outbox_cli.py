"""``tta-sync outbox``: the relay as a process, and what one does about parked messages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from redis import Redis
from sqlalchemy.orm import Session

from tests.rq.outbox_jobs import Base, anything
from tta_sync.cli import main
from tta_sync.sqlalchemy import courier, create_engine, outbox_table, unit_of_work

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sa.Engine]:
    """A database that DATABASE_URL names; nobody delivers what is written to it but relays."""
    url = f"sqlite:///{tmp_path}/outbox.db"
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setattr(courier, "hand_over", lambda *arguments: None)
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def client(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    monkeypatch.setenv("REDIS_URL", redis_url)
    client = Redis.from_url(redis_url)
    yield client
    client.close()


def write(engine: sa.Engine, *job_ids: str) -> None:
    with unit_of_work(engine):
        for job_id in job_ids:
            anything.enqueue_on_commit(job_id, job_id=job_id)


def spoil(engine: sa.Engine, job_id: str, *, parked: bool) -> None:
    table = outbox_table(Base.metadata)
    changes = {"body": "no JSON", "attempts": 5} if parked else {"body": "no JSON"}
    with engine.begin() as connection:
        connection.execute(sa.update(table).where(table.c.job_id == job_id).values(changes))


def test_relay_runs_until_it_is_stopped(
    engine: sa.Engine, client: Redis, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    """What waits is enqueued, also what comes later; SIGTERM ends it with 0 and nothing in the middle of anything."""
    write(engine, "first")
    command = [sys.executable, "-m", "tta_sync.cli", "outbox", "relay", "--path", CHECKOUT, "--interval", "0.05"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: client.llen("rq:queue:default") == 1, within=60)
        write(engine, "second", "third")
        eventually(lambda: client.llen("rq:queue:default") == 3, within=60)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=30)[1]
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, error) == (0, "")
    assert client.lrange("rq:queue:default", 0, -1) == [b"first", b"second", b"third"]


def test_relay_stops_by_itself_when_asked_to_run_once(
    engine: sa.Engine, client: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For cron: all that is due, then 0; the options say what the environment does not."""
    write(engine, *(f"job-{number}" for number in range(501)))
    monkeypatch.delenv("REDIS_URL")
    url = os.environ["DATABASE_URL"]
    monkeypatch.delenv("DATABASE_URL")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["outbox", "--database", url, "relay", "--redis", redis_url, "--once", "--path", str(CHECKOUT)]) == 0
    assert client.llen("rq:queue:default") == 501
    assert sys.path[0] == str(CHECKOUT)


def test_relay_says_that_redis_is_down(
    engine: sa.Engine, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once asked for it is status 1, and stderr has the reason, without a traceback or a password."""
    write(engine, "first")
    env = {**os.environ, "REDIS_URL": f"redis://user:hidden@127.0.0.1:{free_port()}"}
    command = [sys.executable, "-m", "tta_sync.cli", "outbox", "relay", "--once", "--path", CHECKOUT]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Redis: ConnectionError" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "hidden" not in done.stderr


def test_parked_messages_are_listed_retried_and_dropped(
    engine: sa.Engine, client: Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each, tabs between: id, state, attempts, job, function, error."""
    write(engine, "good", "bad")
    write(engine, "worse")
    spoil(engine, "bad", parked=True)
    spoil(engine, "worse", parked=False)
    assert main(["outbox", "relay", "--once"]) == 0
    capsys.readouterr()
    assert main(["outbox", "list"]) == 0
    bad, worse = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert bad[1:5] == ["parked", "6", "bad", "tests.rq.outbox_jobs.anything"]
    assert bad[5].startswith("JSONDecodeError: ")
    assert worse[1:4] == ["waiting", "1", "worse"]
    assert main(["outbox", "retry", bad[0]]) == 0
    assert main(["outbox", "retry"]) == 0  # nothing is parked any more, which is fine
    assert main(["outbox", "retry", bad[0]]) == 1
    assert main(["outbox", "drop", bad[0]]) == 1
    assert capsys.readouterr().out == "1 to be tried anew\n0 to be tried anew\n0 to be tried anew\n0 dropped\n"
    spoil(engine, "bad", parked=True)
    assert main(["outbox", "relay", "--once"]) == 0
    assert main(["outbox", "drop", bad[0]]) == 0
    assert capsys.readouterr().out.endswith("1 dropped\n")
    with Session(engine) as session:
        assert list(session.scalars(sa.select(outbox_table(Base.metadata).c.job_id))) == ["worse"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["relay"], "no Redis"),
        (["--database", "", "list"], "DATABASE_URL"),
        (["--database", "nonsense", "list"], "URL"),
        (["--database", "nobody://here", "list"], "nobody"),
        (["--database", "sqlite:////nowhere/at/all.db", "list"], "unable to open"),
        (["--database", "sqlite://", "list"], "create_outbox"),
        (["relay", "--redis", "nonsense"], "redis://"),
    ],
)
def test_what_is_not_possible_is_one_line(
    arguments: list[str], said: str, engine: sa.Engine, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Exit status 2 and the remedy."""
    if arguments[:2] == ["--database", ""]:
        monkeypatch.delenv("DATABASE_URL")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["outbox", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("tta-sync outbox: ")
    assert error.count("\n") == 1


def test_missing_libraries_are_named(
    engine: sa.Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who installed neither SQLAlchemy nor RQ learns what to install."""
    monkeypatch.setitem(sys.modules, "tta_sync.rq", None)
    assert main(["outbox", "list"]) == 2
    assert "pip install" in capsys.readouterr().err


def test_database_that_goes_away_is_one_line(
    engine: sa.Engine, client: Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a traceback."""
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE tta_sync_outbox DROP COLUMN error")
    assert main(["outbox", "list"]) == 2
    assert "no such column" in capsys.readouterr().err
