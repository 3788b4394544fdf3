"""The cache between real processes: one computation for all, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

PROGRAM = '''
"""One process of the test: waits for the word, calls, and says what it got."""
import asyncio, sys, threading, time
import redis
from tta_sync import run_sync
from tta_sync.context import WorkflowContext
from tta_sync.primitives import CachePrimitive

url, role = sys.argv[1:3]
client = redis.Redis.from_url(url)


async def compute(data):
    number = client.incr("executions")
    client.set("computing", 1)
    if role == "hang":
        await asyncio.sleep(60)
    if role in ("raise", "cancelled"):
        while not client.exists("fail"):
            await asyncio.sleep(0.01)
        if role == "raise":
            raise LookupError("the leader's own")
        calls[0].cancel()
        await asyncio.sleep(60)
    while not client.exists("finish"):
        await asyncio.sleep(0.02)
    return {"number": number, "data": data}


shared = CachePrimitive(ttl=60, storage=client, namespace="n", tags=["t"])
memory = CachePrimitive(ttl=60)
single = CachePrimitive(compute, ttl=60, storage=client, namespace="n")
flow = memory >> compute >> shared if role == "layers" else single
client.incr("ready")
while not client.exists("go"):
    time.sleep(0.005)


arriving = threading.Lock()  # one at a time: a client has not as many connections as there are threads


def ask():
    with arriving:
        client.incr("arrived")
    return run_sync(flow, "data")


def by_threads(count):
    results = []
    threads = [threading.Thread(target=lambda: results.append(ask())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


calls = []


async def leave():
    calls.append(asyncio.ensure_future(flow.execute("data", WorkflowContext())))
    await asyncio.wait(calls)
    assert calls[0].cancelled()
    return []


async def by_tasks(count):
    asking = [asyncio.ensure_future(flow.execute("data", WorkflowContext())) for _ in range(count)]
    await asyncio.sleep(0)  # each has begun
    client.incrby("arrived", count)
    return list(await asyncio.gather(*asking))


if role == "threads":
    results = by_threads(250)
elif role == "tasks":
    results = asyncio.run(by_tasks(250))
elif role == "raise":
    try:
        run_sync(flow, "data")
    except LookupError as error:
        results = []
elif role == "cancelled":
    results = asyncio.run(leave())
elif role == "layers":
    results = [run_sync(flow, "data")]
    client.incr("filled")
    while memory.get_stats()["size"]:
        time.sleep(0.005)
    results.append(run_sync(flow, "data"))
else:
    results = [ask()]
assert all(result["data"] == "data" for result in results)
print(len(results), *sorted({result["number"] for result in results}))
'''


class Workers:
    """Processes that run the program against one Redis."""

    def __init__(self, directory: Path, server: Any) -> None:
        self.program = directory / "program.py"
        self.program.write_text(PROGRAM)
        self.server = server
        self.client = redis.Redis.from_url(server.url)
        self.running: list[subprocess.Popen[str]] = []

    def start(self, *roles: str) -> list[subprocess.Popen[str]]:
        """Start a process per role, and wait until all are ready to begin."""
        before = int(self.client.get("ready") or 0)
        started = [
            subprocess.Popen(
                [sys.executable, str(self.program), self.server.url, role],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONWARNINGS": "error"},
            )
            for role in roles
        ]
        self.running += started
        self.wait_for(lambda: int(self.client.get("ready") or 0) == before + len(roles))
        return started

    def wait_for(self, condition: Callable[[], Any]) -> None:
        give_up = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < give_up, [process.poll() for process in self.running]
            for process in self.running:
                if process.poll() not in (None, 0, -signal.SIGKILL):
                    pytest.fail(process.communicate()[1])
            time.sleep(0.005)

    def wait_for_callers(self, count: int) -> None:
        """Wait until so many have asked, in all processes."""
        self.wait_for(lambda: int(self.client.get("arrived") or 0) == count)

    def results(self, processes: list[subprocess.Popen[str]]) -> list[list[int]]:
        """Wait for *processes* to end well, and return what each printed."""
        found = []
        for process in processes:
            out, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (0, "")
            found.append([int(word) for word in out.split()])
        return found


@pytest.fixture
def workers(tmp_path: Path, own_redis_server: Any) -> Iterator[Workers]:
    workers = Workers(tmp_path, own_redis_server)
    yield workers
    for process in workers.running:
        if process.poll() is None:
            process.kill()
        process.communicate()
    workers.client.close()


def test_step_runs_once_when_a_thousand_callers_in_four_processes_miss_at_once(workers: Workers) -> None:
    """Threads of synchronous code and tasks on loops, in four processes: exactly one execution, one result."""
    processes = workers.start("threads", "tasks", "threads", "tasks")
    workers.client.set("go", 1)
    workers.wait_for(lambda: workers.client.exists("computing"))
    workers.wait_for_callers(1000)  # the computation waits for them
    workers.client.set("finish", 1)
    assert workers.results(processes) == [[250, 1]] * 4
    assert workers.client.get("executions") == b"1"
    assert workers.client.keys("*:lock") == []


def test_waiter_takes_over_when_the_leader_is_killed(workers: Workers) -> None:
    """kill -9 of the process that computes: its lock runs out, and a waiter computes instead."""
    (leader,) = workers.start("hang")
    workers.client.set("go", 1)
    workers.wait_for(lambda: workers.client.exists("computing"))
    workers.client.delete("go")
    followers = workers.start("threads", "one")
    workers.client.set("finish", 1)
    workers.client.set("go", 1)
    workers.wait_for_callers(1 + 251)
    assert workers.client.get("executions") == b"1"
    leader.send_signal(signal.SIGKILL)
    leader.wait(20)
    killed = time.monotonic()
    assert workers.results(followers) == [[250, 2], [1, 2]]
    assert time.monotonic() - killed < 15  # 6 s are promised: the lock's life and one look
    assert workers.client.get("executions") == b"2"


@pytest.mark.parametrize("fate", ["raise", "cancelled"])
def test_waiter_computes_at_once_when_the_leader_fails(workers: Workers, fate: str) -> None:
    """A leader in another process that raises, or is cancelled, keeps that for itself and gives its lock back."""
    leaders = workers.start(fate)
    workers.client.set("go", 1)
    workers.wait_for(lambda: workers.client.exists("computing"))
    workers.client.delete("go")
    followers = workers.start("threads", "tasks")
    workers.client.set("finish", 1)
    workers.client.set("go", 1)
    workers.wait_for_callers(500)
    assert workers.client.get("executions") == b"1"
    workers.client.set("fail", 1)
    failed = time.monotonic()
    assert workers.results(followers) == [[250, 2], [250, 2]]
    assert time.monotonic() - failed < 15
    assert workers.results(leaders) == [[0]]
    assert workers.client.get("executions") == b"2"
    assert workers.client.keys("*:lock") == []


def test_late_result_is_not_stored_when_the_leader_was_frozen_longer_than_its_lock(workers: Workers) -> None:
    """SIGSTOP in mid-computation: the lock runs out, another process computes, and the first one's result is late."""
    (leader,) = workers.start("one")
    workers.client.set("go", 1)
    workers.wait_for(lambda: workers.client.exists("computing"))
    leader.send_signal(signal.SIGSTOP)
    try:
        (lock,) = workers.client.keys("*:lock")
        assert 0 < workers.client.pttl(lock) <= 5000
        workers.client.set("finish", 1)
        followers = workers.start("threads")
        assert workers.results(followers) == [[250, 2]]
        (name,) = (name for name in workers.client.keys("tta:1:_:n:*") if not name.endswith(b":lock"))
        stored = workers.client.get(name)
    finally:
        leader.send_signal(signal.SIGCONT)
    assert workers.results([leader]) == [[1, 1]]  # its own caller gets it
    assert workers.client.get(name) == stored
    assert workers.results(workers.start("one")) == [[1, 2]]
    assert workers.client.get("executions") == b"2"


def test_late_result_is_not_stored_when_another_process_invalidates_meanwhile(workers: Workers) -> None:
    """Whoever computes with what was true before the invalidation answers its caller and nobody later."""
    from tta_sync.primitives.performance import CachePrimitive

    async def never(data: Any) -> Any: ...

    operator: CachePrimitive[Any, Any] = CachePrimitive(never, storage=workers.client, namespace="n")
    forget: list[Callable[[], None]] = [lambda: operator.invalidate("data"), operator.clear_cache]
    for number, each in enumerate(forget):
        workers.client.delete("finish", "computing", "go")
        (early,) = workers.start("one")
        workers.client.set("go", 1)
        workers.wait_for(lambda: workers.client.exists("computing"))
        each()
        workers.client.set("finish", 1)
        assert workers.results([early]) == [[1, 2 * number + 1]]
        assert workers.results(workers.start("one")) == [[1, 2 * number + 2]]
        operator.invalidate("data")


def test_memory_of_every_process_forgets_when_one_of_them_invalidates(workers: Workers) -> None:
    """An invalidation here reaches the memory above Redis in other processes, who then compute once more."""
    from tta_sync.primitives.performance import CachePrimitive

    workers.client.set("finish", 1)
    processes = workers.start("layers", "layers", "layers")
    workers.client.set("go", 1)
    workers.wait_for(lambda: workers.client.get("filled") == b"3")
    assert workers.client.get("executions") == b"1"

    async def never(data: Any) -> Any: ...

    CachePrimitive(never, storage=workers.client, namespace="n").invalidate(tags=["t"])
    assert workers.results(processes) == [[2, 1, 2]] * 3
    assert workers.client.get("executions") == b"2"


def test_process_ends_quickly_and_silently_when_redis_is_in_use(workers: Workers) -> None:
    """Connections, subscriptions and probes of the managed loop hold up no exit, and say nothing."""
    program = workers.program.with_name("exit.py")
    program.write_text(
        "import sys, redis\n"
        "from tta_sync.primitives import CachePrimitive\n"
        "async def step(data): return data\n"
        "flow = CachePrimitive(ttl=60) >> step >> CachePrimitive(ttl=60, storage=redis.Redis.from_url(sys.argv[1]),"
        " namespace='n')\n"
        "assert flow.run_sync(5) == 5\n"
        "down = CachePrimitive(step, storage=redis.Redis(port=1), namespace='n')\n"
        "assert down.run_sync(6) == 6\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program), workers.server.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - began < 20
