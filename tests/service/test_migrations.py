"""Migrations: up, down and up again, the same as the models, safe when two start at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

import blueprints.documents.models  # noqa: F401  # fills the metadata
from blueprints.batches.models import Batch
from blueprints.db import Base
from migrations.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty database of each kind, named by DATABASE_URL."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'some' / 'where' / 'service.db'}"
    else:
        url = request.getfixturevalue("postgres_url")
    monkeypatch.setenv("DATABASE_URL", url)
    return url


def tables(url: str) -> set[str]:
    engine = sa.create_engine(url)
    try:
        return set(sa.inspect(engine).get_table_names())
    finally:
        engine.dispose()


def drift(url: str) -> list[object]:
    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            return list(compare_metadata(context, Base.metadata))
    finally:
        engine.dispose()


def test_migrations_go_up_down_and_up_again(database_url: str) -> None:
    """Every migration can be taken back and run again, and what is taken back leaves nothing behind."""
    assert main([]) == 0
    built = tables(database_url)
    assert {"documents", "batches", "batch_items"} <= built
    assert main(["downgrade"]) == 0
    assert tables(database_url) == {"alembic_version"}
    assert main(["upgrade"]) == 0
    assert tables(database_url) == built
    assert main([]) == 0


def test_migrations_build_what_the_models_say(database_url: str) -> None:
    """A migrated database and the models do not differ in any table, column, type, index or constraint."""
    assert main([]) == 0
    assert drift(database_url) == []


def test_drift_is_found_when_there_is_any(database_url: str) -> None:
    """The comparison that the other test rests on does see a missing index and a column too many."""
    assert main([]) == 0
    engine = sa.create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP INDEX ix_documents_created_at_id"))
        connection.execute(sa.text("ALTER TABLE documents ADD COLUMN extra INTEGER"))
    engine.dispose()
    assert len(drift(database_url)) == 2


def test_migrations_hold_the_states_when_rows_are_written(database_url: str) -> None:
    """The database itself refuses a state that does not exist, and deletes items with their batch."""
    assert main([]) == 0
    engine = sa.create_engine(database_url)
    batch = "INSERT INTO batches (id, correlation_id, created_at) VALUES ('b', 'c', '2026-01-01 00:00:00')"
    item = (
        "INSERT INTO batch_items (id, batch_id, position, tasks, state, enqueued_at, recoveries) "
        "VALUES ('i', 'b', 0, '[]', '{}', '2026-01-01 00:00:00', 0)"
    )
    with engine.begin() as connection:
        connection.execute(sa.text(batch))
        connection.execute(sa.text(item.format("queued")))
    with pytest.raises(sa.exc.IntegrityError), engine.begin() as connection:
        connection.execute(sa.text(item.replace("'i'", "'j'").replace(", 0, '[]'", ", 1, '[]'").format("lost")))
    engine.dispose()


def test_migrations_wait_for_each_other_when_several_start_at_once(database_url: str) -> None:
    """Several that find the same empty database all succeed, and build it once."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-m", "migrations"], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outcomes = [(process.communicate(timeout=60)[1], process.returncode) for process in processes]
    assert outcomes == [("", 0)] * 3
    assert drift(database_url) == []


@pytest.mark.parametrize(
    ("env", "setting"),
    [
        ({"DATABASE_URL": "nonsense"}, "DATABASE_URL"),
        ({"DATABASE_URL": "postgresql://user:hidden@127.0.0.1:1/nothing"}, "DATABASE_URL"),
        ({"DATABASE_URL": "sqlite:////proc/nowhere/tta.db"}, "DATABASE_URL"),
        ({"DATABASE_URL": f"sqlite:///{__file__}"}, "DATABASE_URL"),
        ({"TTA_DATA_DIR": "/proc/nowhere"}, "TTA_DATA_DIR"),
        ({"TTA_PORT": "many"}, "TTA_PORT"),
        ({"TTA_DEADLINE": "1"}, "TTA_DEADLINE"),
    ],
)
def test_migrations_name_the_setting_in_one_line_when_it_is_bad(
    env: dict[str, str],
    setting: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """A bad setting, or a database that cannot be used, is one line on stderr and exit status 2; no secret is in it."""
    for name, value in {"TTA_DATA_DIR": str(tmp_path), **env}.items():
        monkeypatch.setenv(name, value)
    assert main([]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert setting in err
    assert "hidden" not in err


def test_migrations_refuse_a_database_that_is_newer_than_the_checkout(
    database_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A revision that this checkout does not know is one line, and nothing is touched."""
    assert main([]) == 0
    engine = sa.create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    capfd.readouterr()
    assert main([]) == 2
    assert "9999" in capfd.readouterr().err


def test_migrations_leave_nothing_when_one_fails_half_way(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A migration that fails takes back all that it did, on both databases."""
    from alembic import op

    original: Callable[..., object] = op.create_index

    def fail(name: str, *args: object, **options: object) -> object:
        original(name, *args, **options)
        raise sa.exc.OperationalError("CREATE INDEX", {}, Exception("disk full"))

    monkeypatch.setattr(op, "create_index", fail)
    assert main([]) == 2
    assert "disk full" in capfd.readouterr().err
    assert tables(database_url) <= {"alembic_version"}
    monkeypatch.undo()


def test_migrations_draft_the_next_one_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`revision` compares the models with the database and writes a draft that can be read and run."""
    import migrations.__main__ as module

    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'service.db'}")
    assert main([]) == 0
    copy = tmp_path / "migrations"
    shutil.copytree(ROOT / "migrations", copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "__file__", str(copy / "__main__.py"))
    assert main(["revision", "add nothing"]) == 0
    drafts = [path for path in (copy / "versions").glob("*.py") if path.name != "0001_documents_and_batches.py"]
    assert len(drafts) == 1
    text = drafts[0].read_text()
    compile(text, drafts[0].name, "exec")
    assert "down_revision = '0001'" in text


def test_moment_without_a_zone_is_refused(database_url: str) -> None:
    """A naive datetime never reaches the database, and every moment comes back in UTC, to the microsecond."""
    assert main([]) == 0
    engine = sa.create_engine(database_url)
    east = datetime(2026, 1, 1, 12, 0, 0, 123456, timezone(timedelta(hours=2)))
    with engine.begin() as connection:
        connection.execute(sa.insert(Batch).values(id="b", correlation_id="c", created_at=east))
        found = connection.scalar(sa.select(Batch.created_at))
    assert found == east
    assert found.tzinfo is UTC
    with pytest.raises(sa.exc.StatementError, match="no zone"), engine.begin() as connection:
        connection.execute(sa.insert(Batch).values(id="d", correlation_id="c", created_at=datetime(2026, 1, 1)))
    engine.dispose()
