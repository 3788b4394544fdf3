"""Batches over HTTP: recorded before they are queued, truthful whatever happens, called off when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from blueprints.batches.models import Batch, BatchItem, State
from blueprints.batches.queue import RedisQueue
from blueprints.batches.store import status_of
from blueprints.documents.models import Document
from jobs.documents import parts, process_document
from tests.conftest import RedisServer

MakeClient = Callable[..., FlaskClient]


@pytest.fixture
def client(make_client: MakeClient, redis_url: str) -> FlaskClient:
    """A service without a provider, with a Redis."""
    return make_client(REDIS_URL=redis_url)


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as connection:
        yield connection


@pytest.fixture(autouse=True)
def _job_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Jobs that run here have the service's database."""
    monkeypatch.setenv("TTA_DATA_DIR", str(tmp_path))
    parts.reset()
    yield
    parts.reset()


def post(client: FlaskClient, texts: list[Any], **headers: str) -> Any:
    return client.post("/api/batches", json={"documents": [{"text": text} for text in texts]}, headers=headers)


def count(client: FlaskClient, model: type) -> int:
    with client.application.extensions["database"].engine.connect() as connection:
        found: int = connection.scalar(sa.select(sa.func.count()).select_from(model))
    return found


def queued(redis: Redis) -> list[str]:
    return [item_id.decode() for item_id in redis.lrange("rq:queue:default", 0, -1)]


def states(client: FlaskClient) -> list[str]:
    with client.application.extensions["database"].engine.connect() as connection:
        return list(connection.scalars(sa.select(BatchItem.state).order_by(BatchItem.position)))


# ---- taking one


def test_batch_is_recorded_and_queued_when_it_is_taken(client: FlaskClient, redis: Redis) -> None:
    """202, a Location, one recorded item and one job per document, under the same id."""
    response = post(client, ["first", "second"])
    assert response.status_code == 202
    batch_id = response.json["id"]
    assert response.headers["Location"] == f"/api/batches/{batch_id}"
    expected = {"id": batch_id, "status": "queued", "total": 2, "done": 0, "failed": 0, "results": []}
    assert response.json == expected
    assert client.get(response.headers["Location"]).json == expected
    with client.application.extensions["database"].engine.connect() as connection:
        ids = list(connection.scalars(sa.select(BatchItem.id).order_by(BatchItem.position)))
    assert queued(redis) == ids
    for item_id in ids:
        assert redis.hget(f"rq:job:{item_id}", "status") == b"queued"
        assert b"first" not in b"".join(redis.hgetall(f"rq:job:{item_id}").values())


def test_batch_is_done_in_input_order_when_its_jobs_have_run(client: FlaskClient, redis: Redis) -> None:
    """Each job stores a document under its own id and the request's correlation id; results are in input order."""
    url = post(
        client, ["Erster Satz.", "Second sentence.", "Troisième phrase."], **{"X-Request-ID": "batch-7"}
    ).headers["Location"]
    ids = queued(redis)
    assert process_document({"item_id": ids[2]}) == {"document_id": ids[2]}
    half = client.get(url).json
    assert (half["status"], half["done"]) == ("running", 1)
    assert half["results"] == [{"index": 2, "document_id": ids[2], "error": None}]
    for item_id in ids[:2]:
        process_document({"item_id": item_id})
    whole = client.get(url).json
    assert (whole["status"], whole["total"], whole["done"], whole["failed"]) == ("done", 3, 3, 0)
    assert [result["index"] for result in whole["results"]] == [0, 1, 2]
    assert [result["document_id"] for result in whole["results"]] == ids
    document = client.get(f"/api/documents/{ids[1]}").json
    assert (document["summary"], document["correlation_id"]) == ("Second sentence.", "batch-7")


def test_batch_does_the_tasks_that_each_document_asks_for(client: FlaskClient, redis: Redis) -> None:
    """A document of a batch may name its tasks, as a single one may."""
    client.post("/api/batches", json={"documents": [{"text": "One.", "tasks": ["keywords"]}, {"text": "Two."}]})
    for item_id in queued(redis):
        process_document({"item_id": item_id})
    documents = {document["summary"] for document in client.get("/api/documents").json["items"]}
    assert documents == {None, "Two."}


def test_text_is_dropped_when_its_item_has_ended(client: FlaskClient, redis: Redis) -> None:
    """The text is kept while it is needed, and no longer."""
    post(client, ["one", "two"])
    process_document({"item_id": queued(redis)[0]})
    with client.application.extensions["database"].engine.connect() as connection:
        assert list(connection.scalars(sa.select(BatchItem.text).order_by(BatchItem.position))) == [None, "two"]


def test_batch_of_a_thousand_is_taken_quickly(client: FlaskClient, redis: Redis) -> None:
    """The most documents that a batch may have are recorded and queued in one go."""
    began = time.monotonic()
    response = post(client, [f"Document number {n}." for n in range(1000)])
    assert response.status_code == 202
    assert time.monotonic() - began < 15  # measured: 0.5 s
    assert len(set(queued(redis))) == 1000
    assert client.get(response.headers["Location"]).json["total"] == 1000


# ---- refusing one


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"documents": []}, "documents"),
        ({"documents": [{"text": "a"}] * 1001}, "documents"),
        ({"documents": {"text": "a"}}, "documents"),
        ({"documents": None}, "documents"),
        ({}, "documents"),
        ({"documents": [{"text": "a"}], "name": 1}, "name"),
        ({"documents": [{"text": "a"}, {"text": ""}]}, "documents.1.text"),
        ({"documents": [{"text": "a"}, {"text": "a\x00"}]}, "documents.1.text"),
        ({"documents": [{"text": "a"}, {"text": "\ud800"}]}, "documents.1.text"),
        ({"documents": [{"text": "a" * 200_001}]}, "documents.0.text"),
        ({"documents": [{"text": "a", "tasks": ["x"]}]}, "documents.0.tasks"),
        ({"documents": [{"text": "a", "colour": 1}]}, "documents.0.colour"),
        ({"documents": ["a"]}, "documents"),
        ([], "_schema"),
    ],
)
def test_batch_is_refused_as_a_whole_when_one_part_is_bad(
    client: FlaskClient, redis: Redis, body: Any, field: str
) -> None:
    """One bad document refuses them all, by field; nothing is recorded and nothing is queued."""
    response = client.post("/api/batches", json=body)
    assert response.status_code == 422
    assert response.content_type == "application/problem+json"
    assert list(response.json["errors"]) == [field]
    assert count(client, Batch) == count(client, BatchItem) == 0
    assert queued(redis) == []


def test_batch_is_refused_and_forgotten_when_redis_is_down(
    make_client: MakeClient, own_redis_server: RedisServer
) -> None:
    """Without Redis a batch is 503 and leaves nothing; single documents are still processed."""
    client = make_client(REDIS_URL=own_redis_server.url)
    own_redis_server.stop()
    response = post(client, ["a"])
    assert response.status_code == 503
    assert response.content_type == "application/problem+json"
    assert response.json["code"] == "redis_unavailable"
    assert response.headers["Retry-After"]
    assert count(client, Batch) == count(client, BatchItem) == 0
    assert client.post("/api/process", json={"text": "a"}).status_code == 200
    own_redis_server.start()
    assert post(client, ["a"]).status_code == 202


def test_batch_is_refused_when_no_redis_is_set(make_client: MakeClient) -> None:
    """Without REDIS_URL a batch is 503, not an error of ours."""
    client = make_client()
    assert post(client, ["a"]).status_code == 503
    assert count(client, Batch) == 0


def test_batch_is_forgotten_when_redis_fails_after_the_commit(
    client: FlaskClient, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that could not be queued leaves nothing, documents of jobs that did slip through included."""
    enqueue = RedisQueue.enqueue

    def fail(self: RedisQueue, ids: list[str], correlation_id: str) -> None:
        enqueue(self, ids, correlation_id)
        process_document({"item_id": ids[0]})
        raise RedisConnectionError("gone")

    monkeypatch.setattr(RedisQueue, "enqueue", fail)
    assert post(client, ["one", "two"]).status_code == 503
    assert count(client, Batch) == count(client, BatchItem) == count(client, Document) == 0
    assert process_document({"item_id": queued(redis)[1]}) == {"document_id": None}
    assert count(client, Document) == 0


def test_batch_is_forgotten_when_something_else_fails_after_the_commit(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever keeps a batch from being queued, it is not left behind recorded."""

    def fail(*_: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(RedisQueue, "enqueue", fail)
    assert post(client, ["one"]).status_code == 500
    assert count(client, Batch) == 0


@pytest.mark.parametrize("method", ["get", "delete"])
@pytest.mark.parametrize("batch_id", ["00000000-0000-0000-0000-000000000000", "x", "%00", "a" * 3000])
def test_batch_is_404_when_there_is_none(client: FlaskClient, method: str, batch_id: str) -> None:
    """An unknown batch is a 404 problem, for reading and for calling off."""
    response = getattr(client, method)(f"/api/batches/{batch_id}")
    assert response.status_code == 404
    assert response.content_type == "application/problem+json"


# ---- calling one off


def test_cancel_lets_nothing_further_start_and_keeps_what_is_done(client: FlaskClient, redis: Redis) -> None:
    """DELETE takes the jobs back; done documents stay; a job that a worker has already popped does nothing."""
    url = post(client, ["one", "two", "three"]).headers["Location"]
    ids = queued(redis)
    process_document({"item_id": ids[0]})
    assert client.delete(url).status_code == 204
    assert queued(redis) == ids[:1]  # the test ran that one by hand, past the queue
    assert [redis.exists(f"rq:job:{item_id}") for item_id in ids[1:]] == [0, 0]
    batch = client.get(url).json
    assert (batch["status"], batch["total"], batch["done"], batch["failed"]) == ("cancelled", 3, 1, 0)
    assert batch["results"] == [{"index": 0, "document_id": ids[0], "error": None}]
    assert process_document({"item_id": ids[1]}) == {"document_id": None}
    assert client.get(url).json == batch
    assert client.get(f"/api/documents/{ids[0]}").status_code == 200


def test_cancel_changes_nothing_when_all_is_done_or_cancelled(client: FlaskClient, redis: Redis) -> None:
    """A batch that is done stays done, and calling off twice is as good as once."""
    done = post(client, ["one"]).headers["Location"]
    process_document({"item_id": queued(redis)[0]})
    before = client.get(done).json
    for _ in range(2):
        assert client.delete(done).status_code == 204
    assert client.get(done).json == before


def test_cancel_works_when_redis_is_down(make_client: MakeClient, own_redis_server: RedisServer) -> None:
    """SQL decides: what is called off there does not run, though Redis could not be told."""
    client = make_client(REDIS_URL=own_redis_server.url)
    url = post(client, ["one"]).headers["Location"]
    own_redis_server.stop()
    assert client.delete(url).status_code == 204
    assert client.get(url).json["status"] == "cancelled"
    assert states(client) == ["cancelled"]


def test_cancel_leaves_the_list_alone_when_it_is_long(
    client: FlaskClient, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a long queue only the jobs are deleted: a worker passes over an id without a job."""
    monkeypatch.setattr("blueprints.batches.queue._REMOVABLE", 1)
    url = post(client, ["one", "two"]).headers["Location"]
    ids = queued(redis)
    assert client.delete(url).status_code == 204
    assert queued(redis) == ids
    assert not any(redis.exists(f"rq:job:{item_id}") for item_id in ids)


# ---- what it says


@pytest.mark.parametrize(
    ("items", "cancelled", "status"),
    [
        ("qq", False, "queued"),
        ("qr", False, "running"),
        ("qd", False, "running"),
        ("qf", False, "running"),
        ("dd", False, "done"),
        ("df", False, "done"),
        ("ff", True, "done"),
        ("dc", True, "cancelled"),
        ("rc", True, "cancelled"),
        ("cc", True, "cancelled"),
    ],
)
def test_status_follows_from_the_states(items: str, cancelled: bool, status: str) -> None:
    """done means done + failed = total; cancelled, that some were called off; queued, that none has begun."""
    by_letter = {state.value[0]: state for state in State}
    assert status_of([by_letter[letter] for letter in items], cancelled) == status
