"""The bridge beside its peers: ``make bench ARGS=bridge``.

"rct" is ``asyncio.run_coroutine_threadsafe(...).result()`` on a background loop, always asyncio's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import contextvars
import gc
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import Goal, Table, machine, median_us, pinned, write_page
from tta_sync import SyncFacade, events
from tta_sync.events import LoopStalled
from tta_sync.primitives import WorkflowPrimitive

PACKAGES = ("tta-sync", "asgiref", "anyio", "fsspec", "synchronicity", "uvloop", "flask", "gunicorn")


async def trivial() -> int:
    return 1


class Trivial(WorkflowPrimitive[int, int]):
    async def execute(self, data: int, context: Any) -> int:
        return data


# ---- contestants ---------------------------------------------------------------------------------------------------

Call = Callable[[], object]


def rct() -> Call:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return lambda: asyncio.run_coroutine_threadsafe(trivial(), loop).result()


def anyio_portal() -> Call:
    from anyio.from_thread import start_blocking_portal

    manager = start_blocking_portal(backend="asyncio")
    portal = manager.__enter__()
    return lambda manager=manager: portal.call(trivial)  # type: ignore[misc]  # the manager must live as long


def asgiref() -> Call:
    from asgiref.sync import async_to_sync

    return async_to_sync(trivial)


def fsspec() -> Call:
    from fsspec.asyn import get_loop, sync

    loop = get_loop()
    return lambda: sync(loop, trivial)


def synchronicity() -> Call:
    from synchronicity import Synchronizer

    return Synchronizer().create_blocking(trivial)


def asyncio_run() -> Call:
    return lambda: asyncio.run(trivial())


def flask_async_view() -> Call:
    from flask import Flask

    return Flask("bench").ensure_sync(trivial)


def ours(**options: Any) -> Call:
    facade = SyncFacade(**options)
    return lambda: facade.call_sync(trivial)


def ours_workflow(**options: Any) -> Call:
    facade = SyncFacade(**options)
    workflow = Trivial()
    return lambda: facade.run_sync(workflow, 1)


def ours_async_to_sync(**options: Any) -> Call:
    return SyncFacade(**options).async_to_sync(trivial)


# ---- one caller ----------------------------------------------------------------------------------------------------


def one_caller(repeat: int) -> Table:
    table = Table("bridge-call", "A trivial coroutine, one caller, one core", "µs")
    contestants: dict[str, tuple[Callable[[], Call], list[Goal], int]] = {
        "rct": (rct, [], 1),
        "tta_sync call_sync": (ours, [Goal("rct", 0.75), Goal("anyio", 0.4), Goal("asgiref", 0.12)], 1),
        "tta_sync call_sync, uvloop": (lambda: ours(use_uvloop=True), [Goal("rct", 0.55)], 1),
        "tta_sync run_sync(primitive)": (ours_workflow, [Goal("rct", 0.85)], 1),
        "tta_sync run_sync(primitive), uvloop": (lambda: ours_workflow(use_uvloop=True), [Goal("rct", 0.65)], 1),
        "tta_sync async_to_sync": (ours_async_to_sync, [], 1),
        'tta_sync call_sync, drive="caller"': (lambda: ours(drive="caller"), [], 1),
        "fsspec": (fsspec, [], 1),
        "synchronicity": (synchronicity, [], 1),
        "asyncio.run": (asyncio_run, [], 5),
        "anyio": (anyio_portal, [], 1),
        "asgiref": (asgiref, [], 10),
        "Flask async view": (flask_async_view, [], 10),
    }
    calls = {who: make() for who, (make, _, _) in contestants.items()}
    rounds: dict[str, list[float]] = {who: [] for who in contestants}
    for _ in range(3):  # in turn, so that a busy moment of the machine hits all alike
        for who, (_, _, share) in contestants.items():
            rounds[who].append(median_us(calls[who], repeat // share))
    for who, (_, goals, _) in contestants.items():
        table.add(who, sorted(rounds[who])[1], *goals)
    return table


def durations_us(call: Call, repeat: int) -> list[float]:
    clock, samples = time.perf_counter, []
    for _ in range(repeat):
        began = clock()
        call()
        samples.append((clock() - began) * 1e6)
    return samples


def beside_a_hog(repeat: int) -> Table:
    table = Table(
        "bridge-hog",
        "A trivial coroutine beside a CPU-bound thread on another core",
        "µs",
        note="A hop waits for the interpreter's lock, 5 ms at a time, whenever the other thread has got hold of it. "
        'The goal for drive="caller" is a median below 50 µs.',
    )
    stop = threading.Event()

    def hog() -> None:
        while not stop.is_set():
            sum(range(100))

    calls = {"rct": rct(), "tta_sync call_sync": ours(), 'tta_sync call_sync, drive="caller"': ours(drive="caller")}
    thread = threading.Thread(target=hog, daemon=True)
    thread.start()
    for who, call in calls.items():
        samples = sorted(durations_us(call, repeat if "caller" in who else repeat // 10))
        table.add(f"{who}, median", samples[len(samples) // 2])
        table.add(f"{who}, 99 of 100", samples[len(samples) * 99 // 100])
    stop.set()
    thread.join()
    return table


# ---- many callers --------------------------------------------------------------------------------------------------


def throughput(call: Call, threads: int, seconds: float) -> tuple[float, float]:
    """Return calls per second and microseconds of processor time per call."""
    counts = [0] * threads
    ready = threading.Barrier(threads + 1)

    def work(index: int) -> None:
        ready.wait()
        done = 0
        while clock() < end:
            call()
            done += 1
        counts[index] = done

    clock = time.perf_counter
    end = clock() + 3600
    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    end = clock() + seconds
    began, cpu = clock(), time.process_time()
    ready.wait()
    for worker in workers:
        worker.join()
    total = sum(counts)
    return total / (clock() - began), (time.process_time() - cpu) / total * 1e6


def many_callers(threads: int, seconds: float) -> tuple[Table, Table]:
    rate = Table(f"bridge-{threads}-threads", f"Calls per second, {threads} threads, one core", "calls/s", "more")
    cost = Table(f"bridge-cpu-{threads}", f"Processor time per call, {threads} threads", "µs")
    calls = {
        "rct": rct(),
        "tta_sync call_sync": ours(),
        "tta_sync call_sync, uvloop": ours(use_uvloop=True),
        'tta_sync call_sync, drive="caller"': ours(drive="caller"),
        "fsspec": fsspec(),
        "synchronicity": synchronicity(),
        "anyio": anyio_portal(),
        "asgiref": asgiref(),
    }
    samples: dict[str, list[tuple[float, float]]] = {who: [] for who in calls}
    for _ in range(3):
        for who, call in calls.items():
            samples[who].append(throughput(call, threads, seconds))
    rates = {who: sorted(rate for rate, _ in found)[1] for who, found in samples.items()}
    best = max(("tta_sync call_sync", "tta_sync call_sync, uvloop"), key=rates.__getitem__)
    for who, found in samples.items():
        goals = [Goal("rct", 2, True), Goal("anyio", 4, True), Goal("asgiref", 20, True)] if who == best else []
        rate.add(who, rates[who], *goals)
        cost.add(who, sorted(cpu for _, cpu in found)[1], *([Goal("rct", 0.6)] if who.startswith("tta_sync") else []))
    return rate, cost


NAP = 0.005  # seconds


def sleepers(threads: int, seconds: float) -> Table:
    """Measure how many calls a second are answered when each waits: whether waits overlap, and what is lost."""
    table = Table("bridge-sleepers", f"{threads} threads, each call sleeps for 5 ms, one core", "calls/s", "more")
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    asyncio_facade, uvloop_facade = SyncFacade(), SyncFacade(use_uvloop=True)
    calls: dict[str, Call] = {
        "rct": lambda: asyncio.run_coroutine_threadsafe(asyncio.sleep(NAP), loop).result(),
        "tta_sync call_sync": lambda: asyncio_facade.call_sync(asyncio.sleep, NAP),
        "tta_sync call_sync, uvloop": lambda: uvloop_facade.call_sync(asyncio.sleep, NAP),
    }
    table.add("ideal", threads / NAP)
    rates = {who: sorted(throughput(call, threads, seconds)[0] for _ in range(3))[1] for who, call in calls.items()}
    best = max(("tta_sync call_sync", "tta_sync call_sync, uvloop"), key=rates.__getitem__)
    for who, rate in rates.items():
        table.add(who, rate, *([Goal("rct", 1.1, True), Goal("ideal", 0.8, True)] if who == best else []))
    return table


# ---- streams -------------------------------------------------------------------------------------------------------


async def numbers(count: int) -> Any:
    for number in range(count):
        yield number


def streams(items: int) -> Table:
    table = Table("bridge-stream", "iterate_sync, one core", "items/s", "more")
    facade = SyncFacade()
    for buffer in (1, 16, 64, 1024):
        began = time.perf_counter()
        count = sum(1 for _ in facade.iterate_sync(numbers, items if buffer > 1 else items // 20, buffer=buffer))
        goals = [Goal("tta_sync, buffer 1", 5, True)] if buffer == 64 else []
        table.add(f"tta_sync, buffer {buffer}", count / (time.perf_counter() - began), *goals)
    return table


# ---- watching -----------------------------------------------------------------------------------------------------


def watching(rounds: int) -> Table:
    """Measure what the watchdog and the introspection cost, and how soon a stall is reported."""
    table = Table(
        "bridge-watching",
        "Watchdog and introspection",
        "see each",
        note="Goals: a stall is reported within 250 ms, the watchdog takes below 1 % of one core, what is noted of "
        "each call for in_flight() and stats() takes below 1 µs.",
    )
    facade = SyncFacade()
    reports: list[float] = []

    def hear(event: Any) -> None:
        if isinstance(event, LoopStalled):
            reports.append(time.perf_counter())

    async def block() -> float:
        began = time.perf_counter()
        time.sleep(0.4)
        return began

    waits = []
    unsubscribe = events.bus.subscribe(hear)
    for _ in range(rounds):
        reports.clear()
        began = facade.call_sync(block)
        waits.append((reports[0] - began) * 1e3)
    unsubscribe()
    waits.sort()
    table.add("tta_sync stall to report, median, ms", waits[len(waits) // 2])
    table.add("tta_sync stall to report, worst, ms", waits[-1])
    began, cpu = time.perf_counter(), time.process_time()
    facade.call_sync(asyncio.sleep, rounds / 5)
    busy = (time.process_time() - cpu) / (time.perf_counter() - began)
    table.add("tta_sync processor time while a call waits, % of one core", busy * 100)
    table.add("tta_sync stats(), µs", median_us(facade.stats, 10_000))
    loop = facade._loop
    assert loop is not None
    call = loop.new_call(trivial, (), None, "trivial", None, None, contextvars.copy_context())

    def note() -> None:  # as in new_call(), conduct() and _drain()
        call.name = getattr(trivial, "__qualname__", None)
        call.ident = threading.get_ident()
        call.started = time.monotonic()
        calls[call] = None
        loop.begun += 1
        calls.pop(call, None)

    calls: dict[Any, None] = {}
    table.add("tta_sync noting one call, µs", median_us(note, 10_000))
    return table


# ---- growth --------------------------------------------------------------------------------------------------------


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth(calls: int) -> Table:
    table = Table(
        "bridge-growth", f"Growth over {calls:,} calls and {calls // 10:,} raises", "MB, threads, descriptors"
    )
    facade = SyncFacade()

    async def fail() -> None:
        raise LookupError("as always")

    def some(count: int) -> None:
        for _ in range(count):
            facade.call_sync(trivial)
        for _ in range(count // 10):
            with contextlib.suppress(LookupError):
                facade.call_sync(fail)
        for _ in facade.iterate_sync(numbers, count, buffer=64):
            pass

    some(10_000)
    gc.collect()
    before = resident_mb(), threading.active_count(), len(os.listdir("/proc/self/fd"))
    some(calls)
    gc.collect()
    after = resident_mb(), threading.active_count(), len(os.listdir("/proc/self/fd"))
    for name, was, now in zip(
        ("tta_sync memory", "tta_sync threads", "tta_sync descriptors"), before, after, strict=True
    ):
        table.add(name, round(max(now - was, 0), 2))
    table.note = f"Also {calls:,} items streamed. Growth below 1 MB is the allocator's."
    return table


# ---- HTTP ----------------------------------------------------------------------------------------------------------

APP = """
import os, select, threading
from collections import deque
from flask import Flask
from tta_sync import SyncFacade, call_sync
from tta_sync.flask import TTASync
from tta_sync.runtime.semaphore import Semaphore

async def trivial():
    return "ok"

plain, managed = Flask("plain"), Flask("managed")
TTASync(managed)

@plain.get("/noop")
def noop():
    return "ok"

@plain.get("/facade")
def facade():
    return call_sync(trivial)

driven = SyncFacade(drive="caller")

@plain.get("/driven")
def driven_view():
    return driven.call_sync(trivial)

# A bare hop: what any bridge to another thread must pay.
bell, waiting, own = os.eventfd(0, os.EFD_NONBLOCK), deque(), threading.local()

def answer():
    poll = select.epoll()
    poll.register(bell, select.EPOLLIN | select.EPOLLET)
    while True:
        poll.poll()
        while waiting:
            waiting.popleft().release()

threading.Thread(target=answer, daemon=True).start()

@plain.get("/bare")
def bare():
    if not hasattr(own, "semaphore"):
        own.semaphore = Semaphore()
    waiting.append(own.semaphore)
    os.eventfd_write(bell, 1)
    own.semaphore.acquire()
    return "ok"

@plain.get("/async")
async def view():
    return "ok"

@managed.get("/async")
async def managed_view():
    return "ok"
"""


@contextlib.contextmanager
def served(app: str, folder: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = "-m gunicorn -k gthread -w 1 --threads 16 --no-control-socket --log-level error"
    process = subprocess.Popen(
        [sys.executable, *command.split(), "--bind", f"127.0.0.1:{port}", f"bench_app:{app}"], cwd=folder
    )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def wrk(url: str, core: int) -> float:
    output = subprocess.run(
        ["taskset", "-c", str(core), "wrk", "-t1", "-c16", "-d1s", url], capture_output=True, text=True, check=True
    ).stdout
    return float(next(line for line in output.splitlines() if line.startswith("Requests/sec")).split()[1])


def http(rounds: int) -> Table | None:
    """Measure what a call costs a real server, the server on one core and the clients on another."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2 or subprocess.run(["which", "wrk"], capture_output=True).returncode:
        print("no wrk on PATH, or one core only: the HTTP comparison is left out", file=sys.stderr)
        return None
    noop, asynchronous = "no-op sync view", "Flask async view, without TTASync"
    table = Table(
        "bridge-http",
        "Flask on gunicorn gthread, 16 threads, 16 connections, on one core",
        "requests/s",
        "more",
        note="The bare hop wakes a thread by an eventfd, and is woken by a semaphore: no asyncio, no task, nothing but "
        "the two switches. No bridge to another thread can be faster.",
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bench_app.py").write_text(textwrap.dedent(APP))
        with pinned(), served("plain", folder) as plain, served("managed", folder) as managed:
            contestants = {
                noop: f"{plain}/noop",
                "a bare hop in a sync view": f"{plain}/bare",
                "tta_sync call_sync in a sync view": f"{plain}/facade",
                'tta_sync call_sync in a sync view, drive="caller"': f"{plain}/driven",
                "tta_sync async view, with TTASync": f"{managed}/async",
                asynchronous: f"{plain}/async",
            }
            samples: dict[str, list[float]] = {who: [] for who in contestants}
            for round_ in range(rounds + 1):
                for who, url in contestants.items():
                    rate = wrk(url, cores[0])
                    if round_:  # the first one warms up
                        samples[who].append(rate)
    for who, found in samples.items():
        goals = [Goal(noop, 0.9, True), Goal(asynchronous, 2.5, True)] if "call_sync" in who else []
        table.add(who, statistics.median(found), *([Goal(noop, 0.9, True)] if "bare" in who else goals))
    return table


def main(arguments: list[str]) -> list[Table]:
    parser = argparse.ArgumentParser(prog="make bench ARGS=bridge", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the repetitions")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and its pictures")
    options = parser.parse_args(arguments)
    scale = 10 if options.quick else 1
    tables: list[Table] = []

    def done(*made: Table | None) -> None:
        for table in made:
            if table is not None:
                table.show()
                tables.append(table)

    with pinned():
        done(one_caller(20_000 // scale))
        for threads in (16, 64):
            done(*many_callers(threads, 2.0 / scale))
        done(sleepers(64, 2.0 / scale))
        done(streams(1_000_000 // scale), growth(1_000_000 // scale))
        done(watching(max(20 // scale, 5)))
    done(beside_a_hog(4_000 // scale), http(max(15 // scale, 2)))
    if options.write:
        write_page(
            "benchmarks",
            "Benchmarks of the bridge",
            "All figures of one table come from one run; compare within a table only. The run is pinned to one core "
            "but for what stands beside a CPU-bound thread. "
            "rct is `asyncio.run_coroutine_threadsafe(...).result()` on asyncio's loop. "
            "`make bench ARGS='bridge --write'` makes this page.",
            tables,
            machine(*PACKAGES),
        )
    return tables


if __name__ == "__main__":
    main(sys.argv[1:])
