"""One cache under gunicorn workers, RQ jobs and a script at the same time: one computation, one invalidation."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue

SHARED = """
import asyncio, os
import redis
from tta_sync import run_sync
from tta_sync.context import WorkflowContext
from tta_sync.primitives import CachePrimitive
from tta_sync.rq import workflow_job

client = redis.Redis.from_url(os.environ["REDIS_URL"])


async def report(data):
    number = client.incr("executions")
    client.set("computing", 1)
    while not client.exists("finish"):
        await asyncio.sleep(0.02)
    return {"number": number, "for": data}


memory = CachePrimitive(ttl=600)
flow = memory >> report >> CachePrimitive(ttl=600, storage=client, tags=["reports"])


def by_script():
    return run_sync(flow, "cold")["number"]


def by_job():
    client.incr("callers")
    return run_sync(flow, "cold")["number"]


@workflow_job("default", timeout=60)
async def by_async_job(data, context):
    client.incr("callers")
    return (await flow.execute("cold", context))["number"]
"""

SERVING = """
import os
from flask import Flask
from tta_sync import current_context, run_sync
from tta_sync.flask import TTASync
import shared

app = Flask("serving")
tta = TTASync(app)


@app.get("/plain")
def plain():
    shared.client.incr("callers")
    return str(run_sync(shared.flow, "cold")["number"])


@app.get("/async")
async def asynchronous():
    shared.client.incr("callers")
    return str((await shared.flow.execute("cold", current_context()))["number"])


@app.get("/memory")
def memory():
    return f"{os.getpid()} {shared.memory.get_stats()['size']}"
"""


@pytest.fixture
def redis_url(own_redis_server: Any) -> str:
    """A Redis of its own: this process goes on listening to the cache's news after the test."""
    return str(own_redis_server.url)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of modules that the web application and the jobs share."""
    (tmp_path / "shared.py").write_text(SHARED)
    (tmp_path / "serving.py").write_text(SERVING)
    return tmp_path


@pytest.fixture
def start(project: Path, redis_url: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process of the project; it is ended with the test."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(*command: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "REDIS_URL": redis_url, "TTA_DEADLINE": "60", "PYTHONDONTWRITEBYTECODE": "1"}
        running.append(
            subprocess.Popen([sys.executable, "-m", *command], cwd=project, env={**environment, "PYTHONPATH": "."})
        )
        return running[-1]

    yield begin
    for process in running:
        process.terminate()
    for process in running:
        process.wait(30)


def get(url: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as response:
        return str(response.read().decode())


def test_one_computation_serves_all_when_workers_and_jobs_ask_at_once(
    project: Path, start: Any, redis_url: str, free_port: Callable[[], int], eventually: Any, monkeypatch: Any
) -> None:
    """Sync and async views, sync and async jobs, and this process: one execution; and one word makes all forget."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.delitem(sys.modules, "shared", raising=False)
    import shared  # type: ignore[import-not-found]  # the project's

    site = f"http://127.0.0.1:{free_port()}"
    start(
        *("gunicorn", "-k", "gthread", "-w", "2", "--threads", "8", "-b", site.removeprefix("http://")),
        *("--no-control-socket", "--log-level", "critical", "serving:app"),
    )
    queue = Queue("default", connection=redis.Redis.from_url(redis_url))
    jobs = [queue.enqueue("shared.by_job"), shared.by_async_job.enqueue(None, connection=queue.connection)]
    for options in ((), ("--worker-class", "rq.SimpleWorker")):
        start("rq.cli", "worker", "--job-class", "tta_sync.rq.WorkflowJob", "--url", redis_url, *options, "default")

    def up() -> bool:
        try:
            return get(f"{site}/memory").endswith(" 0")
        except OSError:
            return False

    client = queue.connection
    eventually(up, within=60, what="gunicorn")
    with ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(get, f"{site}/{'async' if n % 2 else 'plain'}") for n in range(8)]
        here = pool.submit(shared.by_script)
        try:  # a worker has eight threads: all of the callers can be there at once, wherever they end up
            eventually(lambda: client.get("callers") == b"10", within=60, what="eight requests and two jobs")
            assert client.get("executions") == b"1"
        finally:
            client.set("finish", 1)
        assert {answer.result(60) for answer in answers} == {"1"}
        assert here.result(60) == 1
    eventually(lambda: all(job.get_status() in ("finished", "failed") for job in jobs), within=60, what="the jobs")
    assert [job.return_value() for job in jobs] == [1, 1]
    assert client.get("executions") == b"1"

    def sizes() -> dict[str, str]:
        return dict(get(f"{site}/memory").split() for _ in range(20))

    assert "1" in sizes().values()
    shared.memory.invalidate(tags=["reports"])
    eventually(lambda: set(sizes().values()) == {"0"}, what="the memory of every worker")
    again = queue.enqueue("shared.by_job")
    eventually(lambda: again.get_status() == "finished", within=60, what="the job after the invalidation")
    assert again.return_value() == 2
    assert {get(f"{site}/plain"), get(f"{site}/async"), str(shared.by_script())} == {"2"}
    assert client.get("executions") == b"2"
    client.close()
