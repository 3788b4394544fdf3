"""Jobs a second on RQ's data model, beside RQ's own workers and arq, in one run: ``make bench ARGS=rq``.

Async jobs that sleep for 20 ms, and jobs that do nothing, on a redis-server of the run's own. Each worker is a process
that works a full queue off; what is measured is from its first look at the queue to its end. arq needs an older
redis-py than we do, so it gets a virtual environment of its own beside the run; where that cannot be made it is left
out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import redis
from rq import Queue
from rq.serializers import JSONSerializer

from benchmarks.cache import redis_server
from benchmarks.report import Goal, Table, machine, write_page

PACKAGES = ("tta-sync", "rq", "redis", "uvloop")
CONCURRENCY = 100

JOBS = """
import asyncio

async def nap():
    await asyncio.sleep(0.02)

async def nothing():
    return None
"""

RQ_WORKER = """
import sys, time
from redis import Redis
from rq import Queue, SimpleWorker, Worker
from rq.serializers import JSONSerializer
from tta_sync.rq import AsyncWorker, WorkflowJob

kind, port = sys.argv[1], int(sys.argv[2])
worker = {"AsyncWorker": AsyncWorker, "SimpleWorker": SimpleWorker, "Worker": Worker}[kind](
    ["default"], connection=Redis(port=port), serializer=JSONSerializer
)
began = time.perf_counter()
worker.work(burst=True, logging_level="WARNING")
print(time.perf_counter() - began)
"""

ARQ_WORKER = """
import asyncio, sys, time
from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import Worker

name, port, jobs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

async def nap(ctx):
    await asyncio.sleep(0.02)

async def nothing(ctx):
    return None

async def main():
    settings = RedisSettings(port=port)
    pool = await create_pool(settings)
    for _ in range(jobs):
        await pool.enqueue_job(name)
    worker = Worker(
        functions=[nap, nothing], redis_settings=settings, burst=True, max_jobs=100, handle_signals=False,
        poll_delay=0.01,
    )
    began = time.perf_counter()
    await worker.main()
    print(time.perf_counter() - began)
    await worker.close()

asyncio.run(main())
"""

ENQUEUE = """
import sys, time
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from tta_sync.rq import workflow_job

port, jobs = int(sys.argv[1]), int(sys.argv[2])
client = Redis(port=port)

@workflow_job("default", connection=client)
async def job(data, context):
    return None

job.__module__ = "bench_jobs"
import bench_jobs
bench_jobs.job = job
queue = Queue("default", connection=client, serializer=JSONSerializer)

def theirs():
    queue.enqueue_many([Queue.prepare_data("bench_jobs.nothing", args=(n,)) for n in range(jobs)])

def ours():
    job.enqueue_many(range(jobs))

rates = {"theirs": [], "ours": []}
for _ in range(5):
    for name, fill in (("theirs", theirs), ("ours", ours)):
        client.flushall()
        began = time.perf_counter()
        fill()
        rates[name].append(jobs / (time.perf_counter() - began))
print(sorted(rates["theirs"])[2], sorted(rates["ours"])[2])
"""

GROWTH = """
import gc, os, sys, threading
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from tta_sync.rq import AsyncWorker

port, jobs = int(sys.argv[1]), int(sys.argv[2])
client = Redis(port=port)
queue = Queue("default", connection=client, serializer=JSONSerializer)

def held():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6, threading.active_count(), len(os.listdir("/proc/self/fd"))

def run(count):
    while count > 0:
        queue.enqueue_many([Queue.prepare_data("bench_jobs.nothing", result_ttl=0) for _ in range(min(count, 2000))])
        AsyncWorker(["default"], connection=client).work(burst=True, logging_level="WARNING")
        count -= 2000

run(10_000)
before = held()
run(jobs)
after = held()
print(*(b - a for a, b in zip(before, after)))
"""


class Run:
    """A folder with the jobs, and a Redis."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.client = redis.Redis(port=port)
        (folder / "bench_jobs.py").write_text(JOBS)

    def python(self, program: str, *arguments: object, python: str = sys.executable) -> list[float]:
        path = self.folder / "program.py"
        path.write_text(textwrap.dedent(program))
        root = str(Path(__file__).resolve().parent.parent)
        done = subprocess.run(
            [python, str(path), *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(self.folder), root))},
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return [float(figure) for figure in done.stdout.split()[-3:]]

    def rq(self, kind: str, job: str, jobs: int) -> float:
        self.client.flushall()
        queue = Queue("default", connection=self.client, serializer=JSONSerializer)
        queue.enqueue_many([Queue.prepare_data(f"bench_jobs.{job}") for _ in range(jobs)])
        rate = jobs / self.python(RQ_WORKER, kind, self.port)[0]
        finished = queue.finished_job_registry.count
        if finished != jobs:
            raise RuntimeError(f"{kind} finished {finished} of {jobs} jobs")
        return rate

    def arq(self, python: str, job: str, jobs: int) -> float:
        self.client.flushall()
        return jobs / self.python(ARQ_WORKER, job, self.port, jobs, python=python)[0]


def arq_python(folder: Path) -> str | None:
    """Make an environment with arq; None where there is no network."""
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
        python = folder / "bin" / "python"
        subprocess.run([str(python), "-m", "pip", "install", "-q", "arq"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return str(python)


def middle(measure: Any, times: int) -> float:
    return float(sorted(measure() for _ in range(times))[times // 2])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks rq")
    parser.add_argument("--quick", action="store_true", help="a tenth of the jobs")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks-rq.md")
    options = parser.parse_args(arguments)
    scale = 10 if options.quick else 1
    began = time.strftime("%Y-%m-%d")
    with tempfile.TemporaryDirectory() as temporary, redis_server() as port:
        folder = Path(temporary)
        arq = arq_python(folder / "arq")
        run = Run(folder, port)

        naps = Table("rq-naps", "Async jobs of 20 ms, concurrency 100", "jobs/s", "more")
        idle = Table("rq-nothing", "Jobs that do nothing", "jobs/s", "more")
        for table, job, goals in (
            (naps, "nap", [("arq", 1.0), ("RQ SimpleWorker", 25.0), ("RQ Worker", 40.0)]),
            (idle, "nothing", [("RQ SimpleWorker", 3.0)]),
        ):
            table.add(
                "tta_sync AsyncWorker",
                middle(lambda job=job: run.rq("AsyncWorker", job, 10_000 // scale), 3),
                *(Goal(peer, ratio, at_least=True) for peer, ratio in goals),
            )
            if arq is not None:
                table.add("arq", middle(lambda job=job: run.arq(arq, job, 10_000 // scale), 3))
            table.add("RQ SimpleWorker", run.rq("SimpleWorker", job, 1_000 // scale))
            table.add("RQ Worker", run.rq("Worker", job, 300 // scale))
            table.show()
        naps.note = "RQ's own workers run one job at a time. The goal besides: at least 1,000 jobs/s."

        fill = Table("rq-enqueue", "enqueue_many", "jobs/s", "more")
        theirs, ours = run.python(ENQUEUE, port, 20_000 // scale)
        fill.add("RQ Queue.enqueue_many", theirs)
        fill.add("tta_sync enqueue_many", ours, Goal("RQ Queue.enqueue_many", 0.9, at_least=True))
        fill.show()

        growth = Table("rq-growth", "Growth over 100,000 jobs on AsyncWorker", "MB, threads, descriptors")
        run.client.flushall()
        for name, figure in zip(
            ("memory", "threads", "descriptors"), run.python(GROWTH, port, 100_000 // scale), strict=True
        ):
            growth.add(f"tta_sync {name}", figure)
        growth.note = "After a warm-up of 10,000 jobs. Growth of a few MB is the allocator's."
        growth.show()
    if options.write:
        write_page(
            "benchmarks-rq",
            "Jobs on RQ",
            f"``make bench ARGS=rq``, {began}. Redis on loopback, worker and Redis on the same machine.",
            [naps, idle, fill, growth],
            machine(*PACKAGES),
        )


if __name__ == "__main__":
    main(sys.argv[1:])
