"""The job: each item is processed by one job only and stored once, whatever happens to the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

import jobs.documents
from blueprints.batches.models import BatchItem, State
from blueprints.batches.store import (
    cancel_batch,
    claim_item,
    end_abandoned,
    fail_item,
    finish_item,
    forget_batch,
    open_items,
    read_batch,
    record_batch,
    take_to_enqueue,
)
from blueprints.db import Database
from blueprints.documents.models import Document
from blueprints.documents.store import insert_document
from blueprints.settings import Settings
from jobs.documents import DocumentFailedError, describe, parts, process_document
from tests.service.llm_server import LLMServer
from tta_sync import thread_step
from tta_sync.exceptions import StepTimeoutError
from tta_sync.primitives import TimeoutPrimitive

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    migrated: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Database]:
    """A database of each kind, for the jobs too."""
    env = {"TTA_DATA_DIR": str(tmp_path)}
    if request.param == "postgresql":
        env["DATABASE_URL"] = request.getfixturevalue("postgres_url")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    parts.reset()
    database = Database(migrated(**env))
    yield database
    database.close()
    parts.reset()


def record(database: Database, *texts: str) -> tuple[str, list[str]]:
    with database.units as unit:
        documents = [{"text": text, "tasks": ["summary", "keywords", "language"]} for text in texts]
        return record_batch(unit.session, documents, "corr-1", NOW)


def change(database: Database, fn: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    with database.units as unit:
        return fn(unit.session, *args, **keywords)


def item(database: Database, item_id: str) -> Any:
    with database.engine.connect() as connection:
        return connection.execute(sa.select(BatchItem).where(BatchItem.id == item_id)).one()


def documents(database: Database) -> list[str]:
    with database.engine.connect() as connection:
        return list(connection.scalars(sa.select(Document.id)))


# ---- the steps between states


def test_item_is_claimed_once_when_two_want_it(database: Database) -> None:
    """Only the first claim of a queued item succeeds, and it gets all that it needs."""
    _, (item_id,) = record(database, "text")
    claim = change(database, claim_item, item_id, "me", NOW)
    assert (claim.item_id, claim.owner, claim.text, claim.correlation_id) == (item_id, "me", "text", "corr-1")
    assert claim.tasks == ["summary", "keywords", "language"]
    assert change(database, claim_item, item_id, "other", NOW) is None
    assert change(database, claim_item, "unknown", "me", NOW) is None
    found = item(database, item_id)
    assert (found.state, found.owner, found.started_at) == ("running", "me", NOW)


def test_item_is_ended_by_its_owner_only(database: Database) -> None:
    """Who does not hold an item can neither finish nor fail it, and nobody ends it twice."""
    _, (first, second) = record(database, "a", "b")
    assert change(database, finish_item, first, "me") is False
    change(database, claim_item, first, "me", NOW)
    assert change(database, finish_item, first, "other") is False
    assert change(database, fail_item, first, "other", "x") is False
    assert change(database, finish_item, first, "me") is True
    assert change(database, finish_item, first, "me") is False
    change(database, claim_item, second, "me", NOW)
    assert change(database, fail_item, second, "me", "e" * 1000) is True
    assert (item(database, first).state, item(database, first).text) == ("done", None)
    assert (item(database, second).state, item(database, second).error) == ("failed", "e" * 500)


def test_item_of_a_cancelled_batch_is_not_claimed(database: Database) -> None:
    """After a batch was called off nothing of it starts; what runs may end; what is unknown is None."""
    batch_id, (running, waiting) = record(database, "a", "b")
    change(database, claim_item, running, "me", NOW)
    assert change(database, cancel_batch, batch_id, NOW) == [waiting]
    assert change(database, cancel_batch, batch_id, NOW) == []
    assert change(database, cancel_batch, "unknown", NOW) is None
    assert change(database, claim_item, waiting, "me", NOW) is None
    assert item(database, waiting).state == "cancelled"
    assert item(database, waiting).text is None
    assert change(database, read_batch, batch_id)["status"] == "cancelled"
    assert change(database, finish_item, running, "me") is True
    assert change(database, read_batch, batch_id)["done"] == 1


def test_item_given_back_while_its_batch_is_called_off_is_not_claimed(database: Database) -> None:
    """A sweep that read the item before the batch was called off cannot bring it back to life."""
    batch_id, (item_id,) = record(database, "a")
    change(database, claim_item, item_id, "dead", NOW)
    (seen,) = change(database, open_items, "", 10)
    change(database, cancel_batch, batch_id, NOW)
    assert change(database, take_to_enqueue, seen, datetime.now(UTC), recovery=True) is True
    assert change(database, claim_item, item_id, "me", NOW) is None
    (seen,) = change(database, open_items, "", 10)
    assert seen.cancelled


def test_lost_item_is_taken_once_when_several_sweep(database: Database) -> None:
    """Of those who saw the same lost item only one takes it on, and a recovery is counted."""
    _, (item_id,) = record(database, "a")
    change(database, claim_item, item_id, "dead", NOW)
    (seen,) = change(database, open_items, "", 10)
    assert (seen.state, seen.owner, seen.started_at, seen.recoveries) == (State.RUNNING, "dead", NOW, 0)
    later = datetime.now(UTC)
    assert change(database, take_to_enqueue, seen, later, recovery=True) is True
    assert change(database, take_to_enqueue, seen, later, recovery=True) is False
    assert change(database, end_abandoned, seen, State.FAILED, "x") is False
    found = item(database, item_id)
    assert (found.state, found.owner, found.enqueued_at, found.recoveries) == ("queued", None, later, 1)
    (seen,) = change(database, open_items, "", 10)
    assert change(database, take_to_enqueue, seen, datetime.now(UTC), recovery=False) is True
    assert item(database, item_id).recoveries == 1


def test_open_items_come_in_pages_and_without_the_ended(database: Database) -> None:
    """A sweep reads what has not ended, a page at a time."""
    _, ids = record(database, *"abcdef")
    change(database, claim_item, ids[0], "me", NOW)
    change(database, finish_item, ids[0], "me")
    change(database, claim_item, ids[1], "me", NOW)
    seen, after = [], ""
    while page := change(database, open_items, after, 2):
        assert len(page) <= 2
        seen += [found.id for found in page]
        after = page[-1].id
    assert seen == sorted(ids[1:])


def test_batch_is_forgotten_with_all_that_came_of_it(database: Database) -> None:
    """A forgotten batch leaves no item and no document; others keep theirs."""
    batch_id, (item_id,) = record(database, "a")
    _, (other,) = record(database, "b")
    process_document({"item_id": item_id})
    process_document({"item_id": other})
    change(database, forget_batch, batch_id)
    assert documents(database) == [other]
    assert change(database, read_batch, batch_id) is None


def test_document_is_not_left_over_when_its_batch_is_forgotten_while_it_is_stored(database: Database) -> None:
    """Forgetting waits for a job that is just storing a document, and takes that document too."""
    batch_id, (item_id,) = record(database, "a")
    change(database, claim_item, item_id, "me", NOW)
    with ThreadPoolExecutor(1) as threads:
        with database.units as unit:
            assert finish_item(unit.session, item_id, "me")
            results = (None, ["a"], None, 1)
            insert_document(unit.session, results, "corr-1", document_id=item_id)
            unit.session.flush()
            forgetting = threads.submit(change, database, forget_batch, batch_id)
            assert not wait([forgetting], timeout=0.3).done  # it waits for us
        forgetting.result(20)
    assert documents(database) == []


# ---- the job


def test_job_stores_the_document_and_ends_its_item(database: Database) -> None:
    """One run of the job: a document under the item's id, with the batch's correlation id, and the item done."""
    _, (item_id,) = record(database, "A text. Of two sentences.")
    assert process_document({"item_id": item_id}) == {"document_id": item_id}
    with database.engine.connect() as connection:
        document = connection.execute(sa.select(Document)).one()
    assert (document.id, document.correlation_id, document.word_count) == (item_id, "corr-1", 5)
    assert (item(database, item_id).state, item(database, item_id).text) == ("done", None)


def test_job_does_nothing_when_its_item_is_gone_or_has_ended(database: Database) -> None:
    """A job for an item that is not there, or has been dealt with, ends quietly."""
    _, (item_id,) = record(database, "a")
    process_document({"item_id": item_id})
    assert process_document({"item_id": item_id}) == {"document_id": None}
    assert process_document({"item_id": "00000000-0000-0000-0000-000000000000"}) == {"document_id": None}
    assert documents(database) == [item_id]


def test_document_is_stored_once_when_its_job_runs_several_times_at_once(database: Database) -> None:
    """Jobs that run for the same item at the same moment store one document."""
    _, ids = record(database, *(f"Text {n}." for n in range(4)))
    barrier = threading.Barrier(8)

    def run(item_id: str) -> Any:
        barrier.wait(20)
        return process_document({"item_id": item_id})["document_id"]

    with ThreadPoolExecutor(8) as threads:
        stored = [document for document in threads.map(run, ids * 2) if document]
    assert sorted(stored) == sorted(ids)
    assert sorted(documents(database)) == sorted(ids)


def test_nothing_is_stored_when_the_item_was_given_to_another_meanwhile(
    database: Database, llm: LLMServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that was taken for dead and comes back stores nothing: its item is another's."""
    monkeypatch.setenv("TTA_LLM_BASE_URL", llm.base_url)
    parts.reset()
    llm.mode = "held"
    _, (item_id,) = record(database, "a")
    with ThreadPoolExecutor(1) as threads:
        late = threads.submit(process_document, {"item_id": item_id})
        assert llm.arrived.acquire(timeout=20)
        (seen,) = change(database, open_items, "", 10)
        change(database, take_to_enqueue, seen, datetime.now(UTC), recovery=True)
        llm.release.set()
        assert late.result(20) == {"document_id": None}
    assert documents(database) == []
    assert item(database, item_id).state == "queued"


def test_batch_may_be_deleted_while_its_job_runs(
    database: Database, llm: LLMServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose batch has gone meanwhile ends quietly and leaves nothing."""
    monkeypatch.setenv("TTA_LLM_BASE_URL", llm.base_url)
    parts.reset()
    llm.mode = "held"
    batch_id, (item_id,) = record(database, "a")
    with ThreadPoolExecutor(1) as threads:
        late = threads.submit(process_document, {"item_id": item_id})
        assert llm.arrived.acquire(timeout=20)
        change(database, forget_batch, batch_id)
        llm.release.set()
        assert late.result(20) == {"document_id": None}
    assert documents(database) == []


def test_provider_and_degraded_are_kept_when_a_job_asked_it(
    database: Database, llm: LLMServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document of a batch says who summarised it, as a single one does."""
    monkeypatch.setenv("TTA_LLM_BASE_URL", llm.base_url)
    monkeypatch.setenv("TTA_LLM_MODEL", "m")
    parts.reset()
    _, ids = record(database, "good", "bad")
    process_document({"item_id": ids[0]})
    llm.mode = "garbage"
    process_document({"item_id": ids[1]})
    with database.engine.connect() as connection:
        rows = connection.execute(sa.select(Document.provider, Document.degraded).order_by(Document.created_at))
        assert [tuple(row) for row in rows] == [("m", False), ("local", True)]


def test_failure_is_recorded_when_the_work_fails(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that cannot be processed is failed with a short text that quotes neither text nor secret."""

    def fail(session: Session, *_: Any, **__: Any) -> None:
        raise ValueError("password=hidden")

    monkeypatch.setattr(jobs.documents, "insert_document", fail)
    batch_id, (item_id,) = record(database, "a")
    with pytest.raises(DocumentFailedError):
        process_document({"item_id": item_id})
    batch = change(database, read_batch, batch_id)
    assert (batch["status"], batch["done"], batch["failed"]) == ("done", 0, 1)
    assert batch["results"] == [{"index": 0, "document_id": None, "error": "failed with ValueError"}]
    assert documents(database) == []
    assert process_document({"item_id": item_id}) == {"document_id": None}


def test_failure_is_recorded_when_the_stored_text_is_no_longer_allowed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item that the workflow's own validation refuses is failed, too."""
    batch_id, (item_id,) = record(database, "too long by now")
    monkeypatch.setenv("TTA_MAX_TEXT", "3")
    parts.reset()
    with pytest.raises(DocumentFailedError):
        process_document({"item_id": item_id})
    assert change(database, read_batch, batch_id)["results"][0]["error"] == "failed with ValidationError"


def test_item_stays_open_when_the_database_is_to_blame(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database's own trouble fails the job but not the document: the sweep gives it back to the queue."""

    def fail(session: Session, *_: Any, **__: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("disk full"))

    monkeypatch.setattr(jobs.documents, "insert_document", fail)
    _, (item_id,) = record(database, "a")
    with pytest.raises(DocumentFailedError):
        process_document({"item_id": item_id})
    assert item(database, item_id).state == "running"
    assert item(database, item_id).text == "a"


def test_job_still_fails_when_its_failure_cannot_be_recorded(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where even the failure cannot be written, that is logged, and the item stays for the sweep."""

    def fail(session: Session, *_: Any, **__: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(jobs.documents, "insert_document", fail)
    monkeypatch.setattr(jobs.documents, "fail_item", fail)
    _, (item_id,) = record(database, "a")
    with pytest.raises(DocumentFailedError):
        process_document({"item_id": item_id})
    assert item_id in caplog.text
    assert item(database, item_id).state == "running"


def test_failure_is_recorded_when_the_document_takes_too_long(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document that takes longer than its deadline is failed, and the error says so."""

    @thread_step
    def hang(_: Any) -> None:
        time.sleep(0.5)

    monkeypatch.setattr(jobs.documents, "build_flow", lambda settings, save: hang)
    monkeypatch.setenv("TTA_DEADLINE", "3.01")
    monkeypatch.setattr(jobs.documents, "TimeoutPrimitive", _hundredth)
    batch_id, (item_id,) = record(database, "a")
    with pytest.raises(DocumentFailedError):
        process_document({"item_id": item_id})
    error = change(database, read_batch, batch_id)["results"][0]["error"]
    assert "took longer than its 0.0301 s" in error


def _hundredth(flow: Any, timeout_seconds: float, name: str) -> TimeoutPrimitive[Any, Any]:
    return TimeoutPrimitive(flow, timeout_seconds=timeout_seconds / 100, name=name)


def test_description_of_a_failure_is_ours_or_only_a_class() -> None:
    """Our own errors speak for themselves, others are named only."""
    assert describe(StepTimeoutError("document", 15.0)) == "document took longer than its 15 s"
    assert describe(RuntimeError("secret")) == "failed with RuntimeError"


def test_job_refuses_to_be_enqueued_when_its_argument_is_no_id(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's argument is checked before it enters the queue."""
    from marshmallow import ValidationError

    monkeypatch.setenv("REDIS_URL", redis_url)
    with pytest.raises(ValidationError):
        process_document.enqueue({"item_id": "x"})


def test_parts_are_made_once_when_threads_ask_at_once(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has one database and one workflow for its jobs."""
    made: list[int] = []
    original = jobs.documents.Parts._make
    monkeypatch.setattr(
        jobs.documents.Parts, "_make", lambda self, settings: made.append(1) or original(self, settings)
    )
    with ThreadPoolExecutor(6) as threads:
        assert len({id(found) for found in threads.map(lambda _: parts.flow, range(6))}) == 1
    assert made == [1]
