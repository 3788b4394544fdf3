"""AsyncWorkers as processes, killed, stopped, cut off and restarted: nothing lost, nothing silently twice.

The sizes fit a test run. ``CHAOS=full`` takes those that are promised: 10,000 jobs and 20 kills, a cut of ten seconds,
100,000 jobs for memory.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Callback, Queue, Retry
from rq.command import send_shutdown_command
from rq.job import Job, JobStatus
from rq.registry import StartedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.worker import Worker

from tests.rq import worker_jobs as jobs
from tta_sync.rq import WorkflowJob
from tta_sync.rq.control import Cancel, request_cancel

JOBS = "tests.rq.worker_jobs."
CHECKOUT = Path(__file__).parents[2]
RQ = Path(sys.executable).with_name("rq")
FULL = os.environ.get("CHAOS") == "full"


def size(small: int, full: int) -> int:
    return full if FULL else small


class Process:
    """A worker, or a pool of them, and what it has printed."""

    def __init__(self, command: list[str], log: Path, environ: dict[str, str]) -> None:
        self._log = log
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=log.parent,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environ},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def status(self) -> int | None:
        return self._process.poll()

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = 30) -> int:
        return self._process.wait(seconds)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(20)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(20)


Start = Callable[..., Process]


@pytest.fixture
def start(redis_url: str, tmp_path: Path, eventually: Any) -> Iterator[Start]:
    """``start("default", url=..., TTA_WORKER_...="...")``: an AsyncWorker that listens. All are killed at the end."""
    started: list[Process] = []

    def begin(
        *queues: str, url: str = redis_url, kind: tuple[str, ...] = ("worker",), wait: bool = True, **environ: str
    ) -> Process:
        command = [str(RQ), kind[0], "-w", "tta_sync.rq.AsyncWorker", "--url", url, "--path", str(CHECKOUT), *kind[1:]]
        environ = {"TTA_WORKER_RECOVERY_SECONDS": "1", "REDIS_URL": url, "EFFECTS_URL": redis_url, **environ}
        process = Process([*command, *(queues or ("default",))], tmp_path / f"worker-{len(started)}.log", environ)
        started.append(process)
        if wait:
            eventually(lambda: "Listening on" in process.said or process.status is not None, within=60)
            assert process.status is None, process.said
        return process

    yield begin
    for process in started:
        process.end()


@pytest.fixture
def queue(client: Redis) -> Queue:
    return queue_at(client)


def queue_at(client: Redis) -> Queue:
    return Queue("default", connection=client, serializer=JSONSerializer, job_class=WorkflowJob)


def act(queue: Queue, count: int, ms: int = 0, name: str = "job", **options: Any) -> list[str]:
    """Enqueue so many jobs whose runs are counted, and return their ids."""
    many = [
        Queue.prepare_data(JOBS + "act", args=(f"{name}{n}", ms), job_id=f"{name}{n}", **options) for n in range(count)
    ]
    return [job.id for job in queue.enqueue_many(many)]


def counts(client: Redis, key: str = "runs") -> dict[str, int]:
    return {name.decode(): int(count) for name, count in client.hgetall(key).items()}


def fetch(client: Redis, job_id: str) -> Job:
    return WorkflowJob.fetch(job_id, connection=client)


def ended(queue: Queue) -> int:
    return int(queue.finished_job_registry.get_job_count(False) + queue.failed_job_registry.get_job_count(False))


def error_of(client: Redis, job_id: str) -> str:
    result = fetch(client, job_id).latest_result()
    return "" if result is None else result.exc_string or ""


def nothing_is_left(queue: Queue) -> None:
    """No job is queued or started, nowhere."""
    assert len(queue) == 0
    assert queue.connection.zrange(queue.started_job_registry.key, 0, -1) == []
    assert queue.connection.keys("rq:execution:*") == []
    assert queue.connection.keys("rq:executions:*") == []


def all_finished_once(queue: Queue, ids: list[str]) -> None:
    assert set(queue.finished_job_registry.get_job_ids()) == set(ids)
    assert queue.failed_job_registry.get_job_ids() == []
    nothing_is_left(queue)
    with queue.connection.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.xlen(Result.get_key(job_id))
        assert set(pipe.execute()) == {1}


# ---- killed


def test_all_jobs_end_once_when_workers_are_killed_again_and_again(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """kill -9 any time: finished and failed are all there were; effects with a key happen once, no run too many."""
    total, kills, concurrency = size(500, 10_000), size(4, 20), size(20, 50)
    idempotent, retried = total * 70 // 100, total * 15 // 100
    jobs.act_once.enqueue_many(
        [{"key": f"i{n}", "ms": 200} for n in range(idempotent)], job_ids=[f"i{n}" for n in range(idempotent)]
    )
    act(queue, retried, 200, "r", retry=Retry(max=2))
    act(queue, total - idempotent - retried, 200, "o")
    order = queue.get_job_ids()
    random.Random(6).shuffle(order)
    with client.pipeline() as pipe:
        pipe.delete(queue.key)
        pipe.rpush(queue.key, *order)
        pipe.execute()
    settings = {"TTA_WORKER_CONCURRENCY": str(concurrency)}
    workers = [start(**settings) for _ in range(3)]
    for kill in range(kills):
        begun = (kill + 1) * total // (kills + 2)
        eventually(lambda begun=begun: client.hlen("runs") >= begun, within=120, what=f"{begun} of {total} jobs begun")
        workers[kill % 3].kill()
        workers[kill % 3] = start(wait=False, **settings)
    eventually(lambda: ended(queue) >= total, within=120, what="the end of all jobs")
    finished, failed = (set(r.get_job_ids()) for r in (queue.finished_job_registry, queue.failed_job_registry))
    assert not finished & failed
    assert finished | failed == set(order)
    nothing_is_left(queue)
    runs = counts(client)
    effects = counts(client, "effects")
    assert set(effects.values()) == {1}
    assert {one for one in finished if one.startswith("i")} <= set(effects) <= set(runs)
    assert max(count for job_id, count in runs.items() if job_id[0] in "ir") <= 3
    assert max((count for job_id, count in runs.items() if job_id.startswith("o")), default=0) == 1
    for job_id in failed:
        assert ("poison" if job_id.startswith("i") else "its worker died") in error_of(client, job_id), job_id
        assert len(fetch(client, job_id).results()) == 1
    assert len(failed) <= kills * concurrency
    assert len({one for one in failed if one.startswith("o")}) >= 1
    print(f"{total} jobs, {kills} kills: {len(finished)} finished, {len(failed)} failed, {sum(runs.values())} runs")


@pytest.mark.parametrize("idempotent", [True, False])
def test_zombie_changes_nothing_when_it_wakes(
    client: Redis, queue: Queue, start: Start, eventually: Any, idempotent: bool
) -> None:
    """Stopped for longer than its lease with 50 jobs: they end elsewhere, once; awake, it works on as if just begun."""
    if idempotent:
        ids = [job.id for job in jobs.hang_first.enqueue_many([f"z{n}" for n in range(50)])]
    else:
        ids = [queue.enqueue(JOBS + "hang", f"z{n}").id for n in range(50)]
    zombie = start()
    eventually(lambda: len(client.keys("z*:began")) == 50)
    zombie.send(signal.SIGSTOP)
    heir = start()
    eventually(lambda: ended(queue) == 50, within=30)
    zombie.send(signal.SIGCONT)
    eventually(lambda: len(client.keys("z*:ended")) == 50, within=30)  # cancelled: they are somebody else's
    send_shutdown_command(client, next(w.name for w in Worker.all(connection=client) if w.pid == heir.pid))
    heir.wait()
    (after,) = act(queue, 1)
    eventually(lambda: fetch(client, after).is_finished)
    assert zombie.status is None, zombie.said
    assert {len(fetch(client, job_id).results()) for job_id in ids} == {1}
    if idempotent:
        assert {fetch(client, job_id).return_value() for job_id in ids} == {"second time"}
    else:
        assert set(queue.failed_job_registry.get_job_ids()) == set(ids)
        assert {client.llen(f"z{n}:began") for n in range(50)} == {1}
    nothing_is_left(queue)


def test_no_job_is_lost_or_failed_when_workers_are_told_to_stop_at_any_moment(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """SIGTERM again and again over a stream of jobs: none stays started; one runs twice only where the log says so."""
    total, stops = size(200, 3000), size(3, 10)
    chance = random.Random(10)
    ids = [
        queue.enqueue(JOBS + "act", f"s{n}", chance.choice([0, 5, 50, 400]), job_id=f"s{n}").id for n in range(total)
    ]
    put_back: list[str] = []
    for stop in range(stops):
        worker = start(TTA_WORKER_CONCURRENCY="20", TTA_WORKER_DRAIN_SECONDS="0.1", wait=False)
        begun = (stop + 1) * total // (stops + 2)
        eventually(lambda begun=begun: client.hlen("runs") >= begun, within=60)
        threading.Event().wait(chance.random() * 0.05)  # any moment
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0, worker.said
        put_back += re.findall(r"job (s\d+) did not end in time and is back in its queue", worker.said)
        assert queue.started_job_registry.get_job_ids() == []
        assert client.keys("rq:execution:*") == []
        assert client.keys("tta_sync:*") == []
    last = start()
    eventually(lambda: ended(queue) == total, within=60)
    all_finished_once(queue, ids)
    runs = counts(client)
    assert {job_id: count - 1 for job_id, count in runs.items() if count > 1} == {
        job_id: put_back.count(job_id) for job_id in set(put_back) if runs[job_id] > 1
    }
    assert put_back
    assert last.status is None


# ---- Redis and the network


@pytest.fixture
def lasting_redis(own_redis_server: Any, tmp_path: Path) -> Iterator[Any]:
    """A redis-server that keeps what it was told (AOF), whatever happens to its process."""
    own_redis_server.stop()
    directory = tmp_path / "lasting-redis"
    directory.mkdir()
    server = type(own_redis_server)(f"{directory} --appendonly yes")  # the last one on its command line counts
    server.start()
    yield server
    server.stop()


def test_all_jobs_end_once_when_redis_is_restarted(
    lasting_redis: Any, client: Redis, start: Start, eventually: Any
) -> None:
    """Stopped for longer than any lease, and killed: both workers go on, hear commands, and take nothing for dead."""
    there = Redis.from_url(lasting_redis.url)
    queue = queue_at(there)
    ids = act(queue, 200, 300)
    settings = {"TTA_WORKER_RECOVERY_SECONDS": "2", "TTA_WORKER_CONCURRENCY": "20", "TTA_WORKER_STALL_LIMIT": "2"}
    workers = [start(url=lasting_redis.url, **settings) for _ in range(2)]
    eventually(lambda: client.hlen("runs") > 40)
    lasting_redis.stop()
    down = time.monotonic()
    eventually(lambda: time.monotonic() > down + 2.5)
    lasting_redis.start()
    eventually(lambda: client.hlen("runs") > 120)
    lasting_redis.stop(signal.SIGKILL)
    lasting_redis.start()
    eventually(lambda: ended(queue) == 200, within=60)
    all_finished_once(queue, ids)
    assert counts(client) == dict.fromkeys(ids, 1)
    assert [worker.status for worker in workers] == [None, None]
    known = eventually(lambda: len(found := Worker.all(connection=there)) == 2 and found)
    for worker in known:
        eventually(lambda name=worker.name: there.publish(f"rq:pubsub:{name}", "x") == 1)  # it listens again
        send_shutdown_command(there, worker.name)
    assert [worker.wait() for worker in workers] == [0, 0]
    there.close()


def test_nothing_runs_twice_when_redis_forgets_its_last_moments(
    own_redis_server: Any, client: Redis, start: Start, eventually: Any
) -> None:
    """Killed, it comes back as it was a moment ago: claims are taken back, ends are written again, by both workers."""
    there = Redis.from_url(own_redis_server.url)
    queue = queue_at(there)
    ids = act(queue, 120, 200)
    ids += [queue.enqueue(JOBS + "act", "child", depends_on=ids[:60], job_id="child").id]
    settings = {"TTA_WORKER_RECOVERY_SECONDS": "3", "TTA_WORKER_CONCURRENCY": "10"}
    workers = [start(url=own_redis_server.url, **settings) for _ in range(2)]
    eventually(lambda: client.hlen("runs") > 30)
    there.save()
    then = ended(queue)
    eventually(lambda: ended(queue) > then + 20)
    own_redis_server.stop(signal.SIGKILL)
    own_redis_server.start()
    assert ended(queue) <= then + 20
    eventually(lambda: ended(queue) == 121, within=60)
    all_finished_once(queue, ids)
    assert counts(client) == dict.fromkeys([*ids[:120], "child"], 1)
    assert [worker.status for worker in workers] == [None, None]
    assert any("Redis has forgotten the end of job" in worker.said for worker in workers)
    there.close()


class Proxy:
    """A TCP proxy to Redis that can stop forwarding, swallow an answer, keep a request back, and reset."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self._open = threading.Event()
        self._open.set()
        self._refusing = False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.swallow: bytes | None = None  # the answer to the next request with this in it is lost, and its connection
        self.keep: bytes | None = None  # the next request with this in it is kept back, and its connection lost
        self.happened = threading.Event()
        self.kept: tuple[socket.socket, bytes] | None = None
        self.answered = threading.Event()  # to what was kept
        self.block_after = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                reset(near)
                continue
            far = socket.create_connection(("127.0.0.1", self._target))
            self._pairs.append((near, far))
            answer_is_lost = threading.Event()
            for one, other, requests in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=(one, other, requests, answer_is_lost), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, requests: bool, lost: threading.Event) -> None:
        try:
            while data := source.recv(1 << 16):
                if self.kept is not None and source is self.kept[0]:
                    self.answered.set()
                    break
                self._open.wait()
                if requests and self.keep is not None and self.keep in data:
                    self.keep, self.kept = None, (target, data)
                    reset(source)
                    self.happened.set()
                    return
                if requests and self.swallow is not None and self.swallow in data:
                    self.swallow = None
                    lost.set()
                elif not requests and lost.is_set():
                    self._refusing = self.block_after
                    reset(target)
                    self.happened.set()
                    break
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def hold(self) -> None:
        """Forward nothing, close nothing."""
        self._open.clear()

    def release(self) -> None:
        """Forward what was held."""
        self._refusing = False
        self._open.set()

    def reset_all(self, refuse: bool = False) -> None:
        self._refusing = refuse
        pairs, self._pairs = self._pairs, []
        for near, far in pairs:
            reset(near)
            reset(far)

    def deliver(self) -> None:
        """Send what was kept back, and wait until it was answered."""
        assert self.kept is not None
        far, data = self.kept
        far.sendall(data)
        assert self.answered.wait(10)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        self._listener.close()
        self.release()
        self.reset_all(refuse=True)


def reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.fixture
def proxy(redis_server: Any) -> Iterator[Proxy]:
    proxy = Proxy(redis_server.port)
    yield proxy
    proxy.close()


CLAIM = b"tta_sync:claimed:"


@pytest.mark.parametrize("how", ["silent", "reset"])
def test_all_jobs_end_once_when_the_network_is_cut(
    client: Redis, queue: Queue, start: Start, proxy: Proxy, eventually: Any, how: str
) -> None:
    """In the middle, with or without a word: what runs ends, and is written when the network is back."""
    seconds = size(2, 10)
    count = size(60, 200)
    ids = act(queue, count, 300)
    worker = start(url=proxy.url, TTA_WORKER_CONCURRENCY="10", TTA_WORKER_RECOVERY_SECONDS="30")
    eventually(lambda: client.hlen("runs") > 15)
    if how == "silent":
        proxy.hold()
    else:
        proxy.reset_all(refuse=True)
    cut = time.monotonic()
    eventually(lambda: time.monotonic() > cut + seconds, within=seconds + 5)
    running = client.hlen("runs")
    assert running < count
    proxy.release()
    eventually(lambda: ended(queue) == count, within=60)
    all_finished_once(queue, ids)
    assert counts(client) == dict.fromkeys(ids, 1)
    assert worker.status is None


def test_jobs_are_run_elsewhere_when_a_worker_is_cut_off_for_long(
    client: Redis, queue: Queue, start: Start, proxy: Proxy, eventually: Any
) -> None:
    """Longer than its lease: another worker takes over, what the first one did in the dark is not recorded."""
    enqueued = jobs.hang_first.enqueue_many([f"c{n}" for n in range(20)])
    cut_off = start(url=proxy.url)
    eventually(lambda: len(client.keys("c*:began")) == 20)
    proxy.reset_all(refuse=True)
    start()
    eventually(lambda: ended(queue) == 20, within=30)
    proxy.release()
    eventually(lambda: len(client.keys("c*:ended")) == 20, within=30)
    assert {fetch(client, job.id).return_value() for job in enqueued} == {"second time"}
    assert {len(fetch(client, job.id).results()) for job in enqueued} == {1}
    assert cut_off.status is None
    nothing_is_left(queue)


def test_same_jobs_are_run_once_when_the_answer_to_a_claim_is_lost(
    client: Redis, queue: Queue, start: Start, proxy: Proxy, eventually: Any
) -> None:
    """The claim is repeated and brings what it had brought."""
    start(url=proxy.url, TTA_WORKER_RECOVERY_SECONDS="30")
    ids = act(queue, 1, name="first")
    eventually(lambda: ended(queue) == 1)
    proxy.swallow = CLAIM
    ids += act(queue, 30)
    assert proxy.happened.wait(20)
    eventually(lambda: ended(queue) == 31)
    all_finished_once(queue, ids)
    assert counts(client) == dict.fromkeys(ids, 1)


def test_no_job_is_lost_when_a_claim_is_delivered_late(
    client: Redis, queue: Queue, start: Start, proxy: Proxy, eventually: Any
) -> None:
    """What the network had kept reaches Redis behind later claims: it takes nothing."""
    start(url=proxy.url, TTA_WORKER_RECOVERY_SECONDS="30")
    ids = act(queue, 1, name="first")
    eventually(lambda: ended(queue) == 1)
    proxy.keep = CLAIM
    ids += act(queue, 10)
    assert proxy.happened.wait(20)
    eventually(lambda: ended(queue) == 11)
    proxy.hold()  # while the worker cannot speak
    more = act(queue, 10, name="more")
    proxy.deliver()
    assert queue.get_job_ids()[-9:] == more[-9:]  # at most one is in the hands of a doorman that moves it to its place
    proxy.release()
    eventually(lambda: ended(queue) == 21)
    all_finished_once(queue, ids + more)


def test_jobs_are_in_their_queue_when_the_worker_stops_before_it_hears_of_them(
    client: Redis, queue: Queue, start: Start, proxy: Proxy, eventually: Any
) -> None:
    """Claimed, the answer lost, and SIGTERM: they were never begun, and are put back."""
    worker = start(url=proxy.url, TTA_WORKER_RECOVERY_SECONDS="30")
    act(queue, 1, name="first")
    eventually(lambda: ended(queue) == 1)
    proxy.block_after = True
    proxy.swallow = CLAIM
    ids = act(queue, 20)
    assert proxy.happened.wait(20)
    worker.send(signal.SIGTERM)
    proxy.release()
    assert worker.wait() == 0, worker.said
    runs = counts(client)
    assert queue.get_job_ids() == [one for one in ids if one not in runs]
    assert set(runs) <= {"first0", *ids}
    assert queue.started_job_registry.get_job_ids() == []


def test_end_is_written_once_when_the_answer_to_it_is_lost(
    client: Redis, queue: Queue, start: Start, proxy: Proxy, eventually: Any
) -> None:
    """One entry in the result stream, one count; for a retry with a pause one entry in the schedule."""
    worker = start(url=proxy.url, TTA_WORKER_RECOVERY_SECONDS="30")
    proxy.swallow = b"rq:results:"
    ids = act(queue, 5, 20)
    assert proxy.happened.wait(20)
    eventually(lambda: ended(queue) == 5)
    proxy.happened.clear()
    proxy.swallow = b"rq:scheduled:"
    retried = queue.enqueue(JOBS + "fail", retry=Retry(max=3, interval=60))
    assert proxy.happened.wait(20)
    eventually(lambda: fetch(client, retried.id).is_scheduled)
    eventually(lambda: "though Redis's answer was lost" in worker.said)
    all_finished_once(queue, ids)
    assert fetch(client, retried.id).retries_left == 2
    assert "was taken from this worker" not in worker.said
    (known,) = Worker.all(connection=client)
    assert (known.successful_job_count, known.failed_job_count) == (5, 1)


# ---- long runs


def memory(client: Redis, queue: Queue, counts: list[int]) -> list[dict[str, int]]:
    """Have so many jobs run, look at the process, have so many more run, look again."""
    found = []
    for count in counts:
        for begin in range(0, count, 5000):
            many = [Queue.prepare_data(JOBS + "nothing", args=(n,), result_ttl=60) for n in range(begin, count)][:5000]
            queue.enqueue_many(many)
        look = queue.enqueue(JOBS + "measured", "now")
        give_up = time.monotonic() + 300
        while not fetch(client, look.id).is_finished:
            assert time.monotonic() < give_up
            time.sleep(0.05)
        found.append(fetch(client, look.id).return_value())
    return found


def test_memory_descriptors_and_threads_stay_when_many_jobs_run(client: Redis, queue: Queue, start: Start) -> None:
    """No-op jobs, one process: what it holds after many is what it held after some."""
    start(TTA_WORKER_RECOVERY_SECONDS="30", kind=("worker", "--quiet"), wait=False)
    found = memory(client, queue, [size(2550, 5000), size(450, 95_000)])
    print(found)
    assert found[1]["kilobytes"] - found[0]["kilobytes"] < size(6_000, 10_000)
    assert abs(found[1]["descriptors"] - found[0]["descriptors"]) <= 3
    assert abs(found[1]["threads"] - found[0]["threads"]) <= 3


def test_stock_worker_holds_no_more_when_many_workflow_jobs_have_run(
    client: Redis, queue: Queue, tmp_path: Path
) -> None:
    """2,000 async jobs in RQ's own SimpleWorker with WorkflowJob, one loop: RQ alone leaves descriptors with each."""
    command = [str(RQ), "worker", "-w", "rq.SimpleWorker", "--job-class", "tta_sync.rq.WorkflowJob", "--quiet"]
    options = ["--serializer", "json", "--url", os.environ["REDIS_URL"], "--path", str(CHECKOUT), "default"]
    process = Process([*command, *options], tmp_path / "simple.log", {})
    try:
        found = memory(client, queue, [50, size(200, 2000)])
    finally:
        process.send(signal.SIGTERM)
        process.wait()
    print(found)
    assert found[1]["kilobytes"] - found[0]["kilobytes"] < 8_000
    assert abs(found[1]["descriptors"] - found[0]["descriptors"]) <= 3
    assert abs(found[1]["threads"] - found[0]["threads"]) <= 3


# ---- company


def test_pool_of_workers_with_a_scheduler_runs_all_while_dashboards_look(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """rq worker-pool, which schedules: what others read, count and clean meanwhile fails no live job."""
    ids = act(queue, 200, 100)
    later = queue.enqueue(JOBS + "fail_at_first", "scheduled", retry=Retry(max=1, interval=1))
    pool = start(kind=("worker-pool", "-n", "2"), wait=False, TTA_WORKER_CONCURRENCY="10")
    seen = 0
    give_up = time.monotonic() + 60
    while ended(queue) < 201 and time.monotonic() < give_up:
        assert {worker.get_state() for worker in Worker.all(connection=client)} <= {"busy", "idle", "started", "?"}
        registry = StartedJobRegistry("default", connection=client, serializer=JSONSerializer, job_class=WorkflowJob)
        seen = max(seen, registry.count)
        registry.cleanup()
        for job_id in registry.get_job_ids()[:3]:
            with contextlib.suppress(ValueError):  # RQ's own: the execution has ended between its two looks
                for execution in fetch(client, job_id).get_executions():
                    assert execution.worker_name
    assert seen > 5
    eventually(lambda: fetch(client, later.id).is_finished)
    all_finished_once(queue, [*ids, later.id])
    assert counts(client) == dict.fromkeys(ids, 1)
    pool.send(signal.SIGTERM)
    assert pool.wait() == 0, pool.said
    eventually(lambda: Worker.all_keys(connection=client) == [])


def test_progress_of_a_running_job_is_seen_and_its_last_one_kept(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """context.progress shows in job.meta while the job runs; the last report is there at its end."""
    start()
    job = queue.enqueue(JOBS + "report_progress", "go")
    seen = eventually(lambda: fetch(client, job.id).meta.get("progress"), within=10)
    assert (seen["done"], seen["total"], seen["message"]) == (1, 3, "begun")
    client.set("go", 1)
    eventually(lambda: fetch(client, job.id).is_finished)
    last = fetch(client, job.id).meta["progress"]
    assert (last["done"], last["message"]) == (3, "last")


def test_jobs_are_cancelled_wherever_they_stand(client: Redis, queue: Queue, start: Start, eventually: Any) -> None:
    """While it runs, while it waits for a thread; in its callbacks it has ended already, and that stands."""
    start(TTA_WORKER_SYNC_THREADS="1")
    in_callback = queue.enqueue(JOBS + "double", 4, on_success=Callback(JOBS + "hang_in_callback"))
    eventually(lambda: client.llen(f"{in_callback.id}:called"))
    waiting = queue.enqueue(JOBS + "block", "waiting", "go")  # the callback has the only thread
    running = queue.enqueue(JOBS + "hang", "running")
    eventually(lambda: client.llen("running:began") and fetch(client, waiting.id).is_started)
    asked = time.monotonic()
    for job in (running, waiting, in_callback):
        assert request_cancel(job.id, client) == Cancel.REQUESTED
    eventually(lambda: all(fetch(client, job.id).get_status() == JobStatus.STOPPED for job in (running, waiting)))
    assert time.monotonic() - asked < 5
    assert client.llen("waiting:began") == 0
    client.set(f"{in_callback.id}:go", 1)
    eventually(lambda: fetch(client, in_callback.id).is_finished)
    assert fetch(client, in_callback.id).return_value() == 8
    (after,) = act(queue, 1)
    eventually(lambda: fetch(client, after).is_finished)


def test_no_job_stays_started_when_the_worker_stops_in_the_middle_of_callbacks(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """The result is recorded; the callback is left behind, and the log says so. Jobs without a thread go back."""
    worker = start(TTA_WORKER_SYNC_THREADS="1", TTA_WORKER_DRAIN_SECONDS="0.2")
    in_callback = queue.enqueue(JOBS + "double", 4, on_success=Callback(JOBS + "hang_in_callback"))
    eventually(lambda: client.llen(f"{in_callback.id}:called"))
    waiting = queue.enqueue(JOBS + "block", "waiting", "go")
    eventually(lambda: fetch(client, waiting.id).is_started)
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0, worker.said
    assert fetch(client, in_callback.id).return_value() == 8
    assert "its callbacks did not end" in worker.said
    assert queue.get_job_ids() == [waiting.id]
    assert queue.started_job_registry.get_job_ids() == []
