"""Real workers of every class, as processes or in this one, on the session's Redis."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis
from rq import Queue, SimpleWorker

from tta_sync.rq import WorkflowJob

CHECKOUT = Path(__file__).parents[2]
RQ = Path(sys.executable).with_name("rq")

OURS = ("--job-class", "tta_sync.rq.WorkflowJob")
WORKERS: dict[str, tuple[str, ...]] = {
    "fork": ("worker", *OURS),
    "simple": ("worker", *OURS, "--worker-class", "rq.SimpleWorker"),
    # It forgets the job class in the process that it spawns, so the serializer must be JSON.
    "spawn": ("worker", *OURS, "--worker-class", "rq.worker.SpawnWorker", "--serializer", "json"),
    "pool": ("worker-pool", *OURS, "--num-workers", "1"),
    "async": ("worker", "--worker-class", "tta_sync.rq.AsyncWorker"),
}


@pytest.fixture
def client(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    """The test's Redis, to which job functions enqueue because REDIS_URL says so."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    client = Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.fixture
def start_worker(client: Redis, redis_url: str, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """``start_worker("fork", *options)``: a worker as a process, ended with the test; returns where its output goes."""
    started: list[subprocess.Popen[bytes]] = []

    def start(kind: str, *options: str) -> Path:
        log = tmp_path / f"worker-{len(started)}.log"
        command = [str(RQ), *WORKERS[kind], "--url", redis_url, "--path", str(CHECKOUT), *options, "default"]
        with open(log, "wb") as output:
            started.append(
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env={**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return log

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
    for process in started:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            pass
        try:  # and the job that it may still wait for
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(20)


class DeafWorker(SimpleWorker):
    """Without the thread that hears RQ's commands: at its end redis-py may leave it waiting for a minute."""

    def subscribe(self) -> None:
        pass


@pytest.fixture
def work_here(client: Redis) -> Iterator[Callable[..., None]]:
    """``work_here(meanwhile)``: RQ's SimpleWorker in this thread until the queue is empty, *meanwhile* in another."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}

    def work(meanwhile: Callable[[], object] = lambda: None, **options: object) -> None:
        failures: list[BaseException] = []

        def run() -> None:
            try:
                meanwhile()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        queue = Queue("default", connection=client, job_class=WorkflowJob)
        worker = DeafWorker([queue], connection=client, job_class=WorkflowJob, **options)  # type: ignore[arg-type]
        worker.work(burst=True, logging_level="CRITICAL")
        thread.join()
        if failures:
            raise failures[0]

    yield work
    for number, handler in before.items():
        signal.signal(number, handler)
