"""Stops, kills and restarts in the middle of the work: nothing lost, nothing twice, nothing left running."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest

from tests.running import Run, request
from tta_sync.cli.processes import family

COUNT = 100

pytestmark = pytest.mark.timeout(400)  # a machine that others keep busy takes its time


@pytest.fixture
def post_batch(texts):
    """``post_batch(run, count)``: post a batch and return its address below the service's."""

    def post(run: Run, count: int = COUNT) -> str:
        answer = run.post("/api/batches", {"documents": [{"text": text} for text in texts(count)]})
        assert answer.status == 202
        return answer.headers["Location"]

    return post


@pytest.fixture
def some_done(eventually):
    """``some_done(run, location, least)``: wait until the batch is under way, but far from its end."""

    def wait(run: Run, location: str, least: int = 5) -> None:
        state = eventually(lambda: s if (s := run.get(location).body)["done"] >= least else None, within=60)
        assert state["done"] < state["total"], "too quick for this test"

    return wait


def exactly_once(state, stored, count=COUNT):
    """Check that each document of the batch was processed once, and that its text is the one that was posted."""
    assert (state["status"], state["done"], state["failed"]) == ("done", count, 0)
    assert [result["index"] for result in state["results"]] == list(range(count))
    ids = [result["document_id"] for result in state["results"]]
    assert len(set(ids)) == count
    assert sorted(ids) == sorted(document["id"] for document in stored)
    summaries = {document["id"]: document["summary"] for document in stored}
    assert all(f"Document {index}." in summaries[document_id] for index, document_id in enumerate(ids))


def test_batch_is_completed_once_when_sigterm_comes_in_its_middle(
    start_service, post_batch, some_done, finished, documents, processes, tmp_path
):
    """SIGTERM in the middle ends every process in order; the next start completes it, each document exactly once."""
    first = start_service()
    location = post_batch(first)
    some_done(first, location)
    assert first.stop() == 0
    assert processes.of(tmp_path / "data") == {}
    second = start_service()
    before = second.get(location).body
    assert 0 < before["done"] < COUNT
    exactly_once(finished(second, location), documents(second))


def test_batch_is_completed_once_when_everything_is_killed_in_its_middle(
    start_small, post_batch, some_done, finished, documents, processes, tmp_path, eventually
):
    """SIGKILL to every process at once, Redis too, loses nothing that was recorded and repeats nothing."""
    first = start_small()
    location = post_batch(first, 80)
    some_done(first, location)
    keeper = min(processes.of(tmp_path / "data", "keeper.py"))
    for pid in [*processes.of(tmp_path / "data"), *family(keeper)]:
        with contextlib.suppress(ProcessLookupError):  # told so by the kernel when its parent was killed
            os.kill(pid, signal.SIGKILL)
    first.process.wait()
    eventually(lambda: not processes.of(tmp_path / "data"))
    second = start_small()
    exactly_once(finished(second, location), documents(second), 80)


def test_batch_is_completed_once_when_parts_are_killed_in_its_middle(
    start_small, post_batch, some_done, finished, documents, processes, tmp_path, eventually
):
    """The worker, its work horse, gunicorn and Redis killed one after the other: the service mends itself."""
    run = start_small()
    location = post_batch(run, 80)
    some_done(run, location)
    workers = processes.of(tmp_path / "data", "rq.cli")
    for pid in sorted(workers, reverse=True):  # the work horse first, if there is one just now
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: set(processes.of(tmp_path / "data", "rq.cli")) - set(workers))
    (redis_server,) = family(min(processes.of(tmp_path / "data", "keeper.py")))
    os.kill(redis_server, signal.SIGKILL)
    gunicorn = processes.of(tmp_path / "data", "gunicorn")
    os.kill(min(gunicorn), signal.SIGKILL)
    eventually(lambda: processes.of(tmp_path / "data", "gunicorn").keys() - gunicorn.keys())
    eventually(lambda: _status(run, "/readyz") == 200, within=30)
    exactly_once(finished(run, location), documents(run), 80)
    assert run.stop() == 0
    assert processes.of(tmp_path / "data") == {}


def _status(run, path):
    try:
        return run.get(path).status
    except OSError:  # in between there may be nobody
        return None


def test_service_goes_on_when_one_of_two_runs_on_a_directory_ends(
    start_small, post_batch, some_done, finished, documents, processes, tmp_path, eventually
):
    """Two runs on one data directory share its Redis and its database; each may end first, by SIGKILL even."""
    first, second = start_small(), start_small()
    made = first.post("/api/process", {"text": "Written through the first."}).body
    assert second.get(f"/api/documents/{made['id']}").body == made
    location = post_batch(first, 30)
    some_done(second, location, 1)
    first.process.kill()
    first.process.wait()
    state = finished(second, location)
    stored = [document for document in documents(second) if document["id"] != made["id"]]
    exactly_once(state, stored, 30)
    assert second.get("/readyz").status == 200
    eventually(lambda: len(processes.of(tmp_path / "data", "rq.cli")) == 1, within=60, what="the first's end")
    assert second.stop() == 0
    assert processes.of(tmp_path / "data") == {}


def test_documents_are_still_answered_when_redis_is_down(start_small, post_batch, own_redis_server, eventually):
    """Without Redis batches are refused with nothing stored, single documents go on; it recovers by itself."""
    run = start_small(REDIS_URL=own_redis_server.url)
    own_redis_server.stop(signal.SIGKILL)
    assert run.post("/api/process", {"text": "No Redis is needed for this."}).status == 200
    ready = run.get("/readyz")
    assert ready.status == 503
    assert (ready.body["checks"]["loop"], ready.body["checks"]["database"]) == ("ok", "ok")
    refused = run.post("/api/batches", {"documents": [{"text": "A batch."}]})
    assert (refused.status, refused.headers["Content-Type"]) == (503, "application/problem+json")
    assert run.get("/livez").status == 200
    own_redis_server.start()
    eventually(lambda: run.get("/readyz").status == 200)
    assert run.get("/api/documents").body["items"][0]["summary"] == "No Redis is needed for this."
    assert len(run.get("/api/documents").body["items"]) == 1


def test_batch_is_completed_when_it_was_posted_while_no_worker_could_run(
    start_small, post_batch, finished, own_redis_server, documents
):
    """A Redis that forgets everything takes nothing with it: SQL says what is still to be done."""
    first = start_small(REDIS_URL=own_redis_server.url)
    location = post_batch(first, 30)
    assert first.stop() == 0
    own_redis_server.stop(signal.SIGKILL)
    own_redis_server.start()
    second = start_small(REDIS_URL=own_redis_server.url)
    exactly_once(finished(second, location), documents(second), 30)


def test_nothing_further_runs_when_a_batch_is_cancelled(start_small, post_batch, some_done, documents, eventually):
    """DELETE stops what has not begun, also after a restart; what is done stays."""
    run = start_small()
    location = post_batch(run)
    some_done(run, location)
    assert request("DELETE", run.url + location).status in (202, 204)
    state = eventually(lambda: s if (s := run.get(location).body)["status"] == "cancelled" else None)
    assert run.stop() == 0
    again = start_small()
    after = again.get(location).body
    assert after["status"] == "cancelled"
    assert state["done"] <= after["done"] < COUNT
    assert len(documents(again)) == after["done"] == len(after["results"])


def test_request_in_flight_is_answered_when_sigterm_comes(start_small, llm, eventually):
    """A request that waits for its provider is drained: it gets its answer, and it is stored, before the end."""
    llm.mode = "held"
    run = start_small(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_TIMEOUT="8")
    answers = []
    client = threading.Thread(target=lambda: answers.append(run.post("/api/process", {"text": "Wait for me."})))
    client.start()
    assert llm.arrived.acquire(timeout=30)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)  # the signal is under way; released too early, the request would not be in flight at the stop
    llm.release.set()
    client.join()
    assert run.process.wait(60) == 0
    assert (answers[0].status, answers[0].body["summary"]) == (200, "A summary from the provider.")
    again = start_small()
    assert again.get(f"/api/documents/{answers[0].body['id']}").body == answers[0].body


def test_data_is_in_postgresql_when_database_url_says_so(start_small, post_batch, finished, documents, postgres_url):
    """With DATABASE_URL the same service runs on PostgreSQL; the data directory holds no database."""
    run = start_small(DATABASE_URL=postgres_url.replace("postgresql+psycopg://", "postgresql://"))
    location = post_batch(run, 20)
    exactly_once(finished(run, location), documents(run), 20)
