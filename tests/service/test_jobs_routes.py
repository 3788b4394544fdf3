"""``/api/jobs``: how jobs stand, go on and are cancelled; what is shown of them, and what is not."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from redis import Redis
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer
from werkzeug.test import TestResponse

from blueprints.jobs import store, stream, views
from blueprints.jobs.store import MAX_ERROR, MAX_RESULT, describe, read_job
from blueprints.jobs.stream import JobEvents, Places, has_left
from tests.conftest import eventually
from tests.rq import long_jobs as jobs
from tests.seams.rq_jobs import evil_payload
from tta_sync.rq import WorkflowJob
from tta_sync.rq.control import cancel_key
from tta_sync.rq.progress import Progress, events_channel

MakeClient = Callable[..., FlaskClient]


@pytest.fixture
def redis(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    monkeypatch.setenv("REDIS_URL", redis_url)
    client = Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.fixture
def client(redis: Redis, redis_url: str, make_client: MakeClient) -> FlaskClient:
    """The service, on the session's Redis."""
    return make_client(REDIS_URL=redis_url)


class DeafWorker(SimpleWorker):
    def subscribe(self) -> None:
        pass

    def _install_signal_handlers(self) -> None:
        pass


def work(redis: Redis) -> None:
    queue = Queue("default", connection=redis, job_class=WorkflowJob)
    DeafWorker([queue], connection=redis, job_class=WorkflowJob).work(burst=True, logging_level="CRITICAL")


def finish(redis: Redis, job: Job, kind: int = 1, **entry: Any) -> None:
    """End *job* as RQ stores it, with a result of the test's."""
    redis.hset(job.key, "status", "finished" if kind == 1 else "failed")
    redis.xadd(f"rq:results:{job.id}", {"type": kind, **entry})


def traceback(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode())).decode()


# ---- GET /api/jobs/<id> ----------------------------------------------------------------------------------------------


def test_job_is_shown_while_it_waits_and_when_it_has_ended(client: FlaskClient, redis: Redis) -> None:
    """Status, times with their zone, progress, result."""
    job = jobs.counts.enqueue({"key": "k", "items": 3}, job_id="one")
    before = client.get("/api/jobs/one")
    assert before.status_code == 200
    enqueued = before.json["enqueued_at"]
    assert before.json == {
        "id": "one",
        "status": "queued",
        "queue": "default",
        "progress": None,
        "enqueued_at": enqueued,
        "started_at": None,
        "ended_at": None,
        "cancel_requested": False,
        "result": None,
        "error": None,
    }
    assert datetime.fromisoformat(enqueued) == job.enqueued_at
    work(redis)
    after = client.get("/api/jobs/one").json
    assert (after["status"], after["result"], after["error"]) == ("finished", "counted", None)
    assert (after["progress"]["done"], after["progress"]["total"], after["progress"]["message"]) == (3, 3, "item 3")
    for name in ("enqueued_at", "started_at", "ended_at"):
        assert datetime.fromisoformat(after[name]).utcoffset() is not None
    assert datetime.fromisoformat(after["progress"]["at"]).utcoffset() is not None


def test_request_to_cancel_is_shown_while_the_job_runs(client: FlaskClient, redis: Redis) -> None:
    """Only a request for this run, and only until it has ended."""
    job = jobs.quick.enqueue(1, job_id="one")
    redis.hset(job.key, "status", "started")
    assert client.get("/api/jobs/one").json["cancel_requested"] is False
    assert client.post("/api/jobs/one/cancel").status_code == 202
    assert client.get("/api/jobs/one").json["cancel_requested"] is True
    redis.set(cancel_key("one"), "2020-01-01T00:00:00.000000Z")
    assert client.get("/api/jobs/one").json["cancel_requested"] is False


@pytest.mark.parametrize("value", [0, "", [], {"a": [1, None, "ä"]}, "x" * (MAX_RESULT - 2), 1.5, False])
def test_result_is_shown_when_it_is_json_and_of_a_length(client: FlaskClient, redis: Redis, value: Any) -> None:
    """Whatever JSON can say, up to MAX_RESULT bytes."""
    job = jobs.quick.enqueue(1, job_id="one")
    finish(redis, job, return_value=base64.b64encode(json.dumps(value).encode()).decode())
    assert client.get("/api/jobs/one").json["result"] == value


@pytest.mark.parametrize(
    "raw",
    [
        b'"' + b"x" * (MAX_RESULT + 100) + b'"',
        b"NaN",
        b"[Infinity]",
        b"[" * 20_000,
        b"\xff",
        b"\x80\x05.",
        b"{",
    ],
)
def test_result_is_left_out_when_it_is_no_json_or_too_long(client: FlaskClient, redis: Redis, raw: bytes) -> None:
    """The job is shown all the same."""
    job = jobs.quick.enqueue(1, job_id="one")
    finish(redis, job, return_value=base64.b64encode(raw).decode())
    answer = client.get("/api/jobs/one")
    assert answer.status_code == 200
    assert (answer.json["status"], answer.json["result"]) == ("finished", None)


def test_nothing_is_unpickled_when_a_job_is_shown(client: FlaskClient, redis: Redis, tmp_path: Path) -> None:
    """Whoever writes to Redis does not run code in the web process."""
    target = tmp_path / "unpickled"
    evil = evil_payload(str(target))
    job = Queue("default", connection=redis).enqueue(jobs.bare, job_id="one")
    redis.hset(job.key, mapping={"meta": evil, "result": evil, "data": zlib.compress(evil), "tta_sync_progress": evil})
    finish(redis, job, return_value=base64.b64encode(evil).decode(), exc_string=base64.b64encode(evil).decode())
    answer = client.get("/api/jobs/one")
    assert (answer.status_code, answer.json["result"], answer.json["progress"]) == (200, None, None)
    redis.hset(job.key, "status", "failed")
    assert client.get("/api/jobs/one").json["error"] is None
    assert not target.exists()


def test_progress_of_a_pickled_job_is_shown(client: FlaskClient, redis: Redis) -> None:
    """From where it is kept beside the pickle."""
    Queue("default", connection=redis).enqueue(jobs.counts_without_ado, 3, job_id="one")
    work(redis)
    assert client.get("/api/jobs/one").json["progress"]["done"] == 3


@pytest.mark.parametrize(
    ("held", "shown"),
    [
        ("no", None),
        ([1], None),
        ({"done": "1", "total": True, "message": 5, "at": None}, [None, None, None, None]),
        ({"done": 10**400, "total": 1e300, "message": "m" * 9999}, [None, None, "m" * 500, None]),
        ({"done": 1.5, "total": 2}, [1.5, 2, None, None]),
    ],
)
def test_progress_of_any_kind_does_no_harm(client: FlaskClient, redis: Redis, held: Any, shown: Any) -> None:
    """User code may have put anything there."""
    job = jobs.quick.enqueue(1, job_id="one")
    redis.hset(job.key, "meta", json.dumps({"progress": held}))
    progress = client.get("/api/jobs/one").json["progress"]
    assert (None if progress is None else list(progress.values())) == shown


def test_odd_fields_do_no_harm(client: FlaskClient, redis: Redis) -> None:
    """Times that are none, results without values, meta without end."""
    job = jobs.quick.enqueue(1, job_id="one")
    meta = json.dumps({"progress": {"done": 1}, "more": "x" * 2**21})
    redis.hset(job.key, mapping={"started_at": "soon", "meta": meta, "origin": b"\xff"})
    finish(redis, job, return_value="no base64!")
    shown = client.get("/api/jobs/one").json
    assert (shown["started_at"], shown["progress"], shown["result"]) == (None, None, None)
    redis.delete(f"rq:results:{job.id}")
    assert client.get("/api/jobs/one").json["result"] is None
    for exc_string in ("no base64!", base64.b64encode(b"no zlib").decode()):
        finish(redis, job, kind=2, exc_string=exc_string)
        assert client.get("/api/jobs/one").json["error"] is None


def test_error_is_its_line_only(client: FlaskClient, redis: Redis) -> None:
    """Of a real failure: no frames, no notes, no file names."""
    jobs.fails_after_a_report.enqueue("the reason", job_id="one")
    work(redis)
    answer = client.get("/api/jobs/one")
    assert answer.json["error"] == "ValueError: the reason"
    assert b"Traceback" not in answer.data
    assert b".py" not in answer.data


def test_error_is_found_at_the_end_of_a_long_traceback_and_not_in_a_bomb(client: FlaskClient, redis: Redis) -> None:
    """A traceback may be long; what unpacks to no end is left out."""
    job = jobs.quick.enqueue(1, job_id="one")
    frames = '  File "x.py", line 1, in f\n    f()\n' * 20_000
    finish(redis, job, 2, exc_string=traceback(f"Traceback (most recent call last):\n{frames}ValueError: deep\n"))
    assert client.get("/api/jobs/one").json["error"] == "ValueError: deep"
    finish(redis, job, 2, exc_string=traceback("x" * 2**25))
    assert client.get("/api/jobs/one").json["error"] is None


HEAD = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    f()\n    ^^^\n'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (HEAD + "ValueError: a\nin step 1 of 2: fetch", "ValueError: a"),
        (HEAD + "ValueError: a\nb\nc", "ValueError: a"),
        (HEAD + "KeyError: 'a'\n\nDuring handling ...:\n\n" + HEAD + "pkg.mod.OwnError", "pkg.mod.OwnError"),
        (
            "  + Exception Group Traceback (most recent call last):\n  |   File ...\n  | ExceptionGroup: two (2 sub)\n"
            "  +-+---------------- 1 ----------------\n    | Traceback (most recent call last):\n    | ValueError: a\n",
            "ExceptionGroup: two (2 sub)",
        ),
        (
            "Work-horse terminated unexpectedly; waitpid returned 9\n\n",
            "Work-horse terminated unexpectedly; waitpid returned 9",
        ),
        (HEAD, None),
        ("", None),
        ("a\x1b[31mb\x00", "a\ufffd[31mb\ufffd"),
        ("E: " + "x" * 5000, "E: " + "x" * (MAX_ERROR - 3)),
    ],
)
def test_line_of_an_error_is_found(text: str, line: str | None) -> None:
    """Whatever a traceback looks like."""
    assert describe(text) == line


@pytest.mark.parametrize(
    "text",
    [
        "E: postgresql://ada:hunter2@db/x failed",
        "E: password=hunter2 refused",
        'E: {"api_key": "hunter2", "a": 1}',
        "E: Authorization: Bearer hunter2hunter2",
        "E: bad header 'Bearer hunter2hunter2'",
        "E: DB_PASSWORD='hunter2 and more' is wrong",
        "E: got sk-hunter2hunter2",
        "E: access_token=hunter2&x=1",
        "E: eyJhbGciOiJIUzI1NiJ9.hunter2.hunter2",
    ],
)
def test_error_does_not_show_what_looks_like_a_secret(text: str) -> None:
    """Errors quote what they were given."""
    shown = describe(text)
    assert shown is not None
    assert "hunter2" not in shown
    assert shown.startswith("E: ")


@pytest.mark.parametrize("path", ["{}", "{}/events", "{}/cancel"])
@pytest.mark.parametrize("job_id", ["nobody", "a" * 256, "a%20b", "%00", "%0A", "*", "a:b", "ä", "a%2Fb", "..", "'"])
def test_unknown_or_odd_id_is_not_found(client: FlaskClient, redis: Redis, path: str, job_id: str) -> None:
    """404 as problem details, and nothing is written to Redis."""
    url = "/api/jobs/" + path.format(job_id)
    answer = client.post(url) if path.endswith("cancel") else client.get(url)
    assert (answer.status_code, answer.mimetype) == (404, "application/problem+json")
    assert redis.keys() == []


def test_other_keys_of_rqs_are_no_jobs(client: FlaskClient, redis: Redis) -> None:
    """What RQ keeps beside a job, under a name that begins like one's, is not found either."""
    jobs.quick.enqueue(1, job_id="one")
    jobs.quick.enqueue(2, job_id="two", depends_on="one")
    assert redis.type("rq:job:one:dependents") == b"set"
    for url in ("/api/jobs/one:dependents", "/api/jobs/one:dependents/events"):
        assert client.get(url).status_code == 404
    assert client.post("/api/jobs/one:dependents/cancel").status_code == 404
    assert redis.hget("rq:job:one", "status") == b"queued"


@pytest.mark.parametrize("settings", [{}, {"REDIS_URL": "redis://127.0.0.1:1/0"}])
@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("GET", "/events"), ("POST", "/cancel")])
def test_redis_that_is_not_there_is_said(
    make_client: MakeClient, settings: dict[str, str], method: str, path: str
) -> None:
    """503 with Retry-After."""
    answer = make_client(**settings).open(f"/api/jobs/one{path}", method=method)
    assert (answer.status_code, answer.json["code"]) == (503, "redis_unavailable")
    assert answer.headers["Retry-After"]


def test_jobs_are_for_those_who_may(client: FlaskClient, redis: Redis) -> None:
    """The one place that decides who may call decides here too."""
    jobs.quick.enqueue(1, job_id="one")
    for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel")):
        answer = client.open(f"/api/jobs/one{path}", method=method, environ_base={"REMOTE_ADDR": "10.0.0.7"})
        assert answer.status_code == 403
    assert redis.hget("rq:job:one", "status") == b"queued"


# ---- POST /api/jobs/<id>/cancel --------------------------------------------------------------------------------------


def test_waiting_job_is_cancelled(client: FlaskClient, redis: Redis) -> None:
    """200: it will not begin. Once more: 409, it has ended."""
    jobs.quick.enqueue(1, job_id="one")
    answer = client.post("/api/jobs/one/cancel")
    assert (answer.status_code, answer.json) == (200, {"id": "one", "cancel": "cancelled"})
    assert client.get("/api/jobs/one").json["status"] == "canceled"
    again = client.post("/api/jobs/one/cancel")
    assert (again.status_code, again.json["code"]) == (409, "already_ended")


def test_running_job_is_asked_to_stop(client: FlaskClient, redis: Redis) -> None:
    """202: its worker has been told."""
    job = jobs.quick.enqueue(1, job_id="one")
    redis.hset(job.key, "status", "started")
    answer = client.post("/api/jobs/one/cancel")
    assert (answer.status_code, answer.json) == (202, {"id": "one", "cancel": "requested"})
    assert redis.exists(cancel_key("one"))


# ---- GET /api/jobs/<id>/events ---------------------------------------------------------------------------------------


def decoded(raw: bytes) -> tuple[str, Any]:
    first, second, end = raw.decode("ascii").split("\n", 2)
    assert end == "\n"
    return first.removeprefix("event: "), json.loads(second.removeprefix("data: "))


def listen(client: FlaskClient, job_id: str) -> tuple[TestResponse, Iterator[bytes]]:
    answer = client.get(f"/api/jobs/{job_id}/events", buffered=False)
    return answer, iter(answer.response)


@pytest.fixture
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "POLL", 0.02)


@pytest.mark.usefixtures("quick_polls")
def test_events_follow_a_job_to_its_end(client: FlaskClient, redis: Redis) -> None:
    """The status first, each change and each report after it, the end last; then the stream is over."""
    job = jobs.quick.enqueue(1, job_id="one")
    answer, events = listen(client, "one")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Accel-Buffering"] == "no"
    kind, shown = decoded(next(events))
    assert (kind, shown["status"]) == ("status", "queued")
    redis.hset(job.key, "status", "started")
    assert decoded(next(events))[1]["status"] == "started"
    progress = Progress("one", redis)
    progress.report(1, 2, "half\nway ä")
    progress.write()
    assert decoded(next(events)) == ("progress", {**(progress.latest() or {}), "done": 1.0, "total": 2.0})
    progress.report(2, 2)
    progress.write()
    finish(redis, job, return_value=base64.b64encode(b'"done"').decode())
    rest = [decoded(event) for event in events]
    assert [kind for kind, _ in rest][-2:] == ["progress", "status"]
    assert (rest[-1][1]["status"], rest[-1][1]["result"]) == ("finished", "done")
    answer.close()
    assert eventually_no_subscribers(redis, "one")


def eventually_no_subscribers(redis: Redis, job_id: str) -> bool:
    return bool(eventually(lambda: redis.pubsub_numsub(events_channel(job_id))[0][1] == 0))


@pytest.mark.parametrize("end", ["finished", "failed", "stopped", "canceled"])
def test_events_of_a_job_that_has_ended_are_its_end(client: FlaskClient, redis: Redis, end: str) -> None:
    """One status, and the stream is over. Last-Event-ID, which a browser sends when it comes back, does no harm."""
    job = jobs.quick.enqueue(1, job_id="one")
    redis.hset(job.key, "status", end)
    answer = client.get("/api/jobs/one/events", headers={"Last-Event-ID": "x" * 1000})
    (event,) = answer.data.split(b"\n\n")[:-1]
    assert decoded(event + b"\n\n")[1]["status"] == end


@pytest.mark.usefixtures("quick_polls")
def test_events_end_when_the_job_is_not_kept(client: FlaskClient, redis: Redis) -> None:
    """result_ttl=0: RQ deletes it at its end."""
    job = jobs.quick.enqueue(1, job_id="one")
    answer, events = listen(client, "one")
    next(events)
    redis.delete(job.key)
    assert [decoded(event) for event in events] == [("status", {"id": "one", "status": "gone"})]
    answer.close()


@pytest.mark.usefixtures("quick_polls")
def test_silence_is_filled_and_has_an_end(client: FlaskClient, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments keep the connection alive; after its lifetime the stream ends without a word."""
    monkeypatch.setattr(stream, "KEEP_ALIVE", 0.05)
    monkeypatch.setattr(stream, "LIFETIME", 0.5)
    jobs.quick.enqueue(1, job_id="one")
    answer, events = listen(client, "one")
    next(events)
    rest = list(events)
    assert rest
    assert set(rest) == {b": keep-alive\n\n"}
    answer.close()


@pytest.mark.usefixtures("quick_polls")
def test_events_end_when_the_service_is_told_to_stop(client: FlaskClient, redis: Redis) -> None:
    """A worker that stops waits for its streams, so they end."""
    jobs.quick.enqueue(1, job_id="one")
    client.application.extensions["stopping"] = stopping = threading.Event().is_set
    answer, events = listen(client, "one")
    next(events)
    answer.close()
    client.application.extensions["stopping"] = lambda: True
    answer, events = listen(client, "one")
    next(events)
    assert list(events) == []
    answer.close()
    assert not stopping()


@pytest.mark.usefixtures("quick_polls")
def test_events_say_so_when_redis_goes_away(
    redis: Redis, make_client: MakeClient, own_redis_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a stream an error is an event, and the last one."""
    monkeypatch.setenv("REDIS_URL", own_redis_server.url)
    jobs.quick.enqueue(1, job_id="one")
    answer, events = listen(make_client(REDIS_URL=own_redis_server.url), "one")
    next(events)
    own_redis_server.stop()
    (kind, problem), *rest = [decoded(event) for event in events]
    assert (kind, problem["code"], rest) == ("error", "redis_unavailable", [])
    answer.close()


def test_streams_are_so_many_and_no_more(
    client: FlaskClient, redis: Redis, make_client: MakeClient, redis_url: str
) -> None:
    """One more is told when to come again; a stream that ends, even one that was never read, makes room."""
    jobs.quick.enqueue(1, job_id="one")
    open_ones = [listen(client, "one") for _ in range(stream.MAX_STREAMS)]
    for number, (_, events) in enumerate(open_ones):
        if number % 2:
            next(events)
    refused = client.get("/api/jobs/one/events")
    assert (refused.status_code, refused.json["code"]) == (503, "too_many_streams")
    assert int(refused.headers["Retry-After"]) > 0
    assert client.head("/api/jobs/one/events").status_code == 200
    assert client.get("/api/jobs/one").status_code == 200
    for answer, _ in open_ones:
        answer.close()
        answer.close()
    again = [listen(client, "one") for _ in range(stream.MAX_STREAMS)]
    assert {answer.status_code for answer, _ in again} == {200}
    for answer, _ in again:
        answer.close()
    assert eventually_no_subscribers(redis, "one")


@pytest.mark.parametrize("closed", [True, False])
def test_place_is_given_back_when_a_stream_is_dropped(closed: bool) -> None:
    """Closed before it was ever read, or not even closed by its server; a place is given back once."""
    places = Places(1)
    give_back = places.take()
    assert give_back is not None
    events = JobEvents(
        Redis(),
        "one",
        read=lambda: None,
        encode=lambda state: {},
        gone=lambda: False,
        stopping=lambda: False,
        unavailable={},
        give_back=give_back,
    )
    assert places.take() is None
    if closed:
        events.close()
    else:
        del events
    again = places.take()
    assert again is not None
    give_back()
    assert places.take() is None
    again()


def test_client_that_has_left_is_noticed() -> None:
    """By a look at its connection; data that it sends meanwhile is no leaving."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(30)
        assert not has_left(None)
        assert not has_left(ours)
        theirs.sendall(b"GET / HTTP/1.1")
        assert not has_left(ours)
        ours.recv(100)
        theirs.close()
        assert has_left(ours)
    assert has_left(ours)

    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
        with ours:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()  # as a process that is killed would
            eventually(lambda: has_left(ours))

    class TLS:
        def fileno(self) -> int:
            return reading.fileno()

        def recv(self, *_: object) -> bytes:
            raise ValueError("non-zero flags not allowed in calls to recv() on <class 'ssl.SSLSocket'>")

    assert issubclass(ssl.SSLSocket, socket.socket)
    reading, writing = socket.socketpair()
    with reading, writing:
        writing.send(b"x")
        assert not has_left(TLS())


@pytest.mark.usefixtures("quick_polls")
def test_stream_ends_when_its_client_has_left(client: FlaskClient, redis: Redis) -> None:
    """Noticed at the next look, without anything to send."""
    jobs.quick.enqueue(1, job_id="one")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        answer = client.get("/api/jobs/one/events", buffered=False, environ_overrides={"gunicorn.socket": ours})
        events = iter(answer.response)
        next(events)
        theirs.close()
        assert list(events) == []
        answer.close()


def test_private_names_of_rq_are_what_is_read(redis: Redis) -> None:
    """The fields that are read are those that RQ writes: a new RQ that writes others fails here."""
    job = jobs.quick.enqueue(1, job_id="one")
    fields = redis.hgetall(job.key)
    assert {b"status", b"origin", b"enqueued_at", b"started_at", b"ended_at", b"meta"} <= fields.keys()
    work(redis)
    ((_, entry),) = redis.xrevrange("rq:results:one", count=1)
    assert entry[b"type"] == b"1"
    assert JSONSerializer.loads(base64.b64decode(entry[b"return_value"])) == 1
    jobs.fails_after_a_report.enqueue("boom", job_id="two")
    work(redis)
    ((_, entry),) = redis.xrevrange("rq:results:two", count=1)
    assert zlib.decompress(base64.b64decode(entry[b"exc_string"])).endswith(b"boom\n")
    assert read_job(redis, "two") is not None
    assert {"finished", "failed", "stopped", "canceled"} == store.TERMINAL
    assert views.MAX_STREAMS == stream.MAX_STREAMS
