"""Jobs over real HTTP, from real gunicorn and the service's own worker: followed, left, cancelled."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis import Redis
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from blueprints.jobs.stream import MAX_STREAMS
from tests.conftest import RedisServer
from tests.e2e.conftest import starter
from tests.rq import long_jobs as jobs
from tests.running import Run
from tta_sync.rq.progress import events_channel

Eventually = Callable[..., Any]


@pytest.fixture(scope="module")
def redis_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for the module's service and its jobs."""
    server = RedisServer(tmp_path_factory.mktemp("redis-of-jobs"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def service(redis_here: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The service with one gunicorn worker, for all tests of the module that leave it running."""
    for start in starter(tmp_path_factory.mktemp("service"), GUNICORN_CMD_ARGS="--workers 1"):
        yield start(REDIS_URL=redis_here.url)


@pytest.fixture
def redis(redis_here: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    monkeypatch.setenv("REDIS_URL", redis_here.url)
    client = Redis.from_url(redis_here.url)
    yield client
    client.close()


class Listener:
    """One client of the stream; it reads an event when it is told to."""

    def __init__(self, url: str, job_id: str) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        self.connection.request("GET", f"/api/jobs/{job_id}/events")
        self.response = self.connection.getresponse()

    def next(self) -> Any:
        """The next event; None at the end."""
        kind, data, empty = (self.response.readline() for _ in range(3))
        if not kind:
            return None
        assert empty == b"\n"
        return kind.removeprefix(b"event: ").decode().strip(), json.loads(data.removeprefix(b"data: "))

    def leave(self, *, rudely: bool = False) -> None:
        if rudely:  # as a process that is killed would
            self.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.response.close()
        self.connection.close()


def park(redis: Redis, name: str) -> None:
    """Store a job that no worker takes."""
    job = Job.create(jobs.bare, connection=redis, id=name, origin="default", serializer=JSONSerializer)
    job.set_status(JobStatus.DEFERRED)
    job.save()


def test_job_is_followed_while_it_runs(service: Run, redis: Redis) -> None:
    """Each report and each status arrives when it happens, the result at the end."""
    jobs.counts.enqueue({"key": "k", "items": 20, "wait_at": [10]}, job_id="followed")
    listener = Listener(service.url, "followed")
    assert listener.response.headers["Content-Type"].startswith("text/event-stream")
    heard: list[Any] = []
    while not heard or heard[-1][0] != "progress" or heard[-1][1]["done"] != 10:
        heard.append(listener.next())
    assert service.get("/api/jobs/followed").body["status"] == "started"
    redis.set("k:go", 1)
    while (event := listener.next()) is not None:
        heard.append(event)
    listener.leave()
    statuses = [data["status"] for kind, data in heard if kind == "status"]
    assert statuses[-2:] == ["started", "finished"]
    assert heard[-2][1]["done"] == 20
    assert heard[-1][1]["result"] == "counted"


def test_running_job_is_cancelled_over_http(service: Run, redis: Redis, eventually: Eventually) -> None:
    """202, and about a second later the coroutine has cleaned up and the job is stopped."""
    jobs.hangs.enqueue("hung", job_id="hung")
    eventually(lambda: redis.get("hung:began"), within=60)
    listener = Listener(service.url, "hung")
    assert listener.next()[1]["status"] == "started"
    answer = service.post("/api/jobs/hung/cancel", {})
    assert (answer.status, answer.body["cancel"]) == (202, "requested")
    kind, shown = listener.next()
    assert (kind, shown["status"]) == ("status", "stopped")
    assert shown["error"].endswith("JobCancelledError: job hung was cancelled by request")
    assert listener.next() is None
    listener.leave()
    assert redis.get("hung:cleaned") == b"started"
    assert service.post("/api/jobs/hung/cancel", {}).status == 409


@pytest.mark.parametrize("rudely", [False, True], ids=["closed", "reset"])
def test_thread_and_connection_are_free_when_a_listener_leaves(
    service: Run, redis: Redis, eventually: Eventually, rudely: bool
) -> None:
    """As many as may be, several times over; nobody complains, and the last ones hear the end."""
    name = f"left-{rudely}"
    park(redis, name)
    said = service.output
    for _ in range(3):
        listeners = [Listener(service.url, name) for _ in range(MAX_STREAMS)]
        assert {listener.response.status for listener in listeners} == {200}
        for listener in listeners:
            assert listener.next()[0] == "status"
        refused = service.get(f"/api/jobs/{name}/events")
        assert (refused.status, refused.body["code"]) == (503, "too_many_streams")
        for listener in listeners:
            listener.leave(rudely=rudely)
        eventually(lambda: redis.pubsub_numsub(events_channel(name))[0][1] == 0)
        eventually(lambda: service.get("/api/jobs/nobody/events").status == 404)
    last = Listener(service.url, name)
    assert last.next()[1]["status"] == "deferred"
    assert service.post(f"/api/jobs/{name}/cancel", {}).body["cancel"] == "cancelled"
    assert last.next()[1]["status"] == "canceled"
    last.leave()
    assert service.output == said


def test_command_follows_and_cancels(service: Run, redis: Redis, eventually: Eventually) -> None:
    """`tta-sync jobs watch` and `cancel` against the real service."""

    def command(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tta_sync.cli", "jobs", *arguments, "--url", service.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    jobs.counts.enqueue({"key": "w", "items": 5}, job_id="watched")
    with command("watch", "watched") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines()[-1] == "watched: finished"
    assert "watched: 5/5 item 5" in out

    jobs.hangs.enqueue("ended", job_id="ended")
    eventually(lambda: redis.get("ended:began"), within=60)
    with command("watch", "ended") as watching:
        with command("cancel", "ended") as cancelling:
            assert cancelling.communicate(timeout=60)[0] == "ended: asked to stop\n"
        out, err = watching.communicate(timeout=60)
    assert (watching.returncode, cancelling.returncode) == (1, 0)
    assert "cancelled by request" in err


def test_service_stops_at_once_when_somebody_listens(
    redis: Redis, redis_here: RedisServer, start_small: Callable[..., Run]
) -> None:
    """A stream has no end of its own; a worker that is told to stop ends it, without waiting out its patience."""
    park(redis, "forever")
    service = start_small(REDIS_URL=redis_here.url)
    listener = Listener(service.url, "forever")
    assert listener.next()[0] == "status"
    began = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - began < 15
    assert listener.next() is None
    listener.leave()
