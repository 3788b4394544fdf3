"""What the cache costs, beside its peers, in one run: ``make bench ARGS=cache``.

A hit in memory on the loop and from synchronous code, a hit in Redis, a miss, a stampede of a thousand callers, and a
Redis that accepts connections and never answers. A redis-server of its own is started for it. Contestants that are not
installed (extra ``bench``) are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import redis
import redis.asyncio
from flask import Flask

from benchmarks.primitives import Limit, measure, optional, ours, quartile, quick
from benchmarks.report import Goal, Table, machine, pinned, write_page
from tta_sync import WorkflowContext
from tta_sync.flask import TTASync
from tta_sync.primitives import CachePrimitive, FallbackPrimitive, TimeoutPrimitive
from tta_sync.redis import find_redis_server

PACKAGES = (
    *("tta-sync", "cashews", "aiocache", "dogpile.cache", "cachetools", "flask-caching", "redis", "flask"),
    "flask-limiter",
)
SMALL = {"answer": 42, "ok": True}
LARGE = {f"key {number}": "x" * 10 for number in range(45)}
CALLERS = 1000

Sync = Callable[[str], object]
Async = Callable[[str], Awaitable[object]]


@contextlib.contextmanager
def redis_server() -> Iterator[int]:
    """Run a redis-server that keeps nothing; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    options = f"--port {port} --bind 127.0.0.1 --appendonly no --loglevel warning"
    server = subprocess.Popen([find_redis_server(), *options.split(), "--save", ""], stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port) as client:
            give_up = time.monotonic() + 20
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    if time.monotonic() > give_up:
                        raise
        yield port
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """Accept connections and never answer; the port."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as server:
        yield int(server.getsockname()[1])


def cached(load: Async, **options: Any) -> CachePrimitive[Any, Any]:
    return CachePrimitive(load, ttl=3600, namespace=str(id(load)), **options)


# ---- contestants: decorators over a loader ---------------------------------------------------------------------------


def async_peers(load: Async, port: int | None = None) -> dict[str, Async]:
    """The asynchronous libraries, in memory or on the Redis at *port*."""
    peers: dict[str, Async] = {}
    with optional():
        from cashews import Cache as Cashews

        cashews = Cashews()
        cashews.setup("mem://?check_interval=0" if port is None else f"redis://127.0.0.1:{port}", client_side=False)

        @cashews(ttl="1h", key="cashews:{data}")
        async def by_cashews(data: str) -> Any:
            return await load(data)

        peers["cashews"] = by_cashews
    with optional():
        from aiocache import Cache, cached
        from aiocache.serializers import JsonSerializer

        store: dict[str, Any] = {"cache": Cache.MEMORY}
        if port is not None:
            store = {"cache": Cache.REDIS, "endpoint": "127.0.0.1", "port": port, "serializer": JsonSerializer()}

        @cached(ttl=3600, key_builder=lambda function, data: f"aiocache:{data}", **store)
        async def by_aiocache(data: str) -> Any:
            return await load(data)

        peers["aiocache"] = by_aiocache
    return peers


def sync_peers(load: Sync, port: int | None = None) -> dict[str, Sync]:
    """The synchronous libraries, in memory or on the Redis at *port*."""
    peers: dict[str, Sync] = {}
    if port is None:
        with optional():
            from cachetools import TTLCache, cached as by_cachetools

            peers["cachetools, with a lock"] = by_cachetools(TTLCache(10_000, 3600), lock=threading.Lock())(load)
    with optional():
        from dogpile.cache import make_region

        region = make_region(key_mangler=lambda key: f"dogpile:{key}")
        if port is None:
            region.configure("dogpile.cache.memory", expiration_time=3600)
        else:
            arguments = {"host": "127.0.0.1", "port": port, "distributed_lock": True, "thread_local_lock": False}
            region.configure("dogpile.cache.redis", expiration_time=3600, arguments=arguments)

        def by_dogpile(data: str) -> object:
            return region.get_or_create(data, lambda: load(data))

        peers["dogpile.cache"] = by_dogpile
    with optional():
        from flask_caching import Cache as FlaskCache

        app = Flask(__name__)
        settings: dict[str, Any] = {"CACHE_TYPE": "SimpleCache"}
        if port is not None:
            settings = {"CACHE_TYPE": "RedisCache", "CACHE_REDIS_HOST": "127.0.0.1", "CACHE_REDIS_PORT": port}
        flask_cache = FlaskCache(app, config=settings)

        def by_flask_caching(data: str) -> object:
            with app.app_context():
                found = flask_cache.get(data)
                if found is None:
                    found = load(data)
                    flask_cache.set(data, found, 3600)
                return found

        peers["flask-caching"] = by_flask_caching
    return peers


async def load_small(data: Any) -> Any:
    return SMALL


async def load_large(data: Any) -> Any:
    return LARGE


# ---- tables ----------------------------------------------------------------------------------------------------------


def hit_on_loop(repeat: int) -> Table:
    calls: dict[str, Any] = {}
    for size, load in (("≤ 100 bytes", load_small), ("1 KB", load_large)):
        primitive = cached(load)
        asyncio.run(primitive.execute("key", WorkflowContext()))
        calls[f"tta_sync, {size}"] = ours(primitive, data="key")
    for who, peer in async_peers(load_small).items():
        asyncio.run(_once(peer))
        calls[who] = lambda peer=peer: peer("key")
    made = Table(
        "cache-hit-loop",
        "A hit in memory, on the loop",
        "µs",
        note="aiocache hands out the stored object, the others a copy.",
    )
    for who, figure in measure(calls, lambda: quick(1), repeat).items():
        made.add(who, figure, *([Limit(who, 2.0)] if who == "tta_sync, ≤ 100 bytes" else []))
    return made


async def _once(peer: Async) -> None:
    await peer("key")


def hit_from_sync(repeat: int) -> Table:
    made = Table(
        "cache-hit-sync",
        "A hit in memory, from synchronous code",
        "µs",
        note="run_sync makes a context and asks the cache on the caller's thread; no loop is involved. cachetools and "
        "dogpile.cache hand out the stored object, the others a copy.",
    )
    calls: dict[str, Callable[[], object]] = {}
    context = WorkflowContext()
    for size, load in (("≤ 100 bytes", load_small), ("1 KB", load_large)):
        primitive = cached(load)
        primitive.run_sync("key")
        calls[f"tta_sync peek, {size}"] = lambda primitive=primitive: primitive.peek("key", context)
    wrapped = TimeoutPrimitive(FallbackPrimitive(cached(load_small), load_small), 5.0)
    headed = CachePrimitive(ttl=3600) >> load_small >> load_small
    for who, flow in (("in a fallback in a timeout", wrapped), ("at the head of a chain", headed)):
        flow.run_sync("key")
        flow.run_sync("key")  # by now the chain is bound
        calls[f"tta_sync peek, {who}"] = lambda flow=flow: flow.peek("key", context)
    primitive = cached(load_small)
    primitive.run_sync("key")
    calls["tta_sync run_sync"] = lambda: primitive.run_sync("key")
    for who, peer in sync_peers(lambda data: SMALL).items():
        peer("key")
        calls[who] = lambda peer=peer: peer("key")
    for who, figure in in_turn(calls, repeat).items():
        goal = 10.0 if who.endswith("1 KB") else 2.0 if " peek" in who else None
        made.add(who, figure, *([] if goal is None else [Limit(who, goal)]))
    return made


def in_turn(calls: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Return the lower quartile of many short rounds in turn, in microseconds per call."""
    samples: dict[str, list[float]] = {who: [] for who in calls}
    each = max(10, repeat // 40)
    for _ in range(40):
        for who, call in calls.items():
            began = time.perf_counter()
            for _ in range(each):
                call()
            samples[who].append((time.perf_counter() - began) / each * 1e6)
    return {who: quartile(found) for who, found in samples.items()}


def hit_in_redis(port: int, repeat: int) -> list[Table]:
    bare = "redis.asyncio GET, nothing decoded"
    on_loop = Table("cache-hit-redis", "A hit in Redis, on the loop", "µs")
    primitive = cached(load_small, storage=redis.Redis(port=port))

    async def run() -> dict[str, float]:
        client = redis.asyncio.Redis(port=port)
        await client.set("bare", b"x" * 100)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            bare: lambda: client.get("bare"),
            "tta_sync": ours(primitive, data="key"),
        }
        for who, peer in async_peers(load_small, port).items():
            calls[who] = lambda peer=peer: peer("key")
        for call in calls.values():
            await call()
        samples: dict[str, list[float]] = {who: [] for who in calls}
        each = max(10, repeat // 40)
        for _ in range(40):
            for who, call in calls.items():
                began = time.perf_counter()
                for _ in range(each):
                    await call()
                samples[who].append((time.perf_counter() - began) / each * 1e6)
        await client.aclose()
        return {who: quartile(found) for who, found in samples.items()}

    for who, figure in asyncio.run(run()).items():
        on_loop.add(who, figure, *([Goal(bare, 1.25)] if who == "tta_sync" else []))

    from_sync = Table("cache-hit-redis-sync", "A hit in Redis, from synchronous code", "µs")
    with redis.Redis(port=port) as client:
        calls: dict[str, Callable[[], object]] = {
            "redis GET, nothing decoded": lambda: client.get("bare"),
            "tta_sync run_sync": lambda: primitive.run_sync("key"),
        }
        for who, peer in sync_peers(lambda data: SMALL, port).items():
            calls[who] = lambda peer=peer: peer("key")
        for call in calls.values():
            call()
        for who, figure in in_turn(calls, repeat).items():
            from_sync.add(who, figure)
    return [on_loop, from_sync]


def miss(repeat: int) -> Table:
    """A new key each time: the key, the flight, the copy and the place in memory."""
    made = Table(
        "cache-miss",
        "A miss in memory, on the loop",
        "µs",
        note="With the flight that others may join, and a copy for each caller.",
    )
    numbers = iter(range(10**9))
    primitive = cached(load_small)
    contestants: dict[str, Async] = {"tta_sync": lambda data: primitive.execute(data, WorkflowContext())}
    contestants |= async_peers(load_small)
    calls = {who: (lambda peer=peer: peer(f"key {next(numbers)}")) for who, peer in contestants.items()}
    for who, figure in measure(calls, lambda: quick(1), repeat).items():
        made.add(who, figure)
    return made


def stampede(port: int) -> list[Table]:
    """A thousand callers of one cold key at once; the computation takes 50 ms."""
    runs = Table("cache-stampede", f"Executions for {CALLERS} concurrent callers of a cold key", "executions")
    took = Table("cache-stampede-time", f"Time until all {CALLERS} of them have their answer", "ms")
    count = 0

    async def slow(data: Any) -> Any:
        nonlocal count
        count += 1
        await asyncio.sleep(0.05)
        return SMALL

    memory, shared = cached(slow), cached(slow, storage=redis.Redis(port=port))
    contestants: dict[str, Async] = {
        "tta_sync, memory": lambda data: memory.execute(data, WorkflowContext()),
        "tta_sync, Redis": lambda data: shared.execute(data, WorkflowContext()),
    }
    contestants |= {f"{who}, memory": peer for who, peer in async_peers(slow).items()}
    for who, peer in contestants.items():

        async def run(peer: Async = peer) -> float:
            await peer("warm")
            nonlocal count
            count = 0
            began = time.perf_counter()
            await asyncio.gather(*(peer("cold") for _ in range(CALLERS)))
            return time.perf_counter() - began

        seconds = asyncio.run(run())
        runs.add(who, count, *([Exactly(who, 1)] if who.startswith("tta_sync") else []))
        took.add(who, seconds * 1000)

    def slow_sync(data: str) -> object:
        nonlocal count
        count += 1
        time.sleep(0.05)
        return SMALL

    for who, peer in sync_peers(slow_sync).items():
        peer("warm")
        count = 0
        threads = [threading.Thread(target=peer, args=("cold",)) for _ in range(CALLERS)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        runs.add(f"{who}, memory", count)
        took.add(f"{who}, memory", (time.perf_counter() - began) * 1000)
    return [runs, took]


class Exactly(Goal):
    """A goal that is one number."""

    def __init__(self, who: str, number: int) -> None:
        super().__init__(who, number)

    def text(self, own: float, peer: float) -> str:
        return f"goal: exactly {self.ratio:g}{'' if own == self.ratio else ' MISSED'}"


class Milliseconds(Goal):
    """A goal in milliseconds."""

    def __init__(self, who: str, most: float) -> None:
        super().__init__(who, most)

    def text(self, own: float, peer: float) -> str:
        return f"goal ≤ {self.ratio:g} ms{'' if own <= self.ratio else ' MISSED'}"


_PATIENCE = 10.0  # seconds after which no request would wait any longer


def black_holed(calls: int) -> list[Table]:
    """What a call costs more when Redis accepts connections and never answers."""
    first = Table("cache-black-hole-first", "Black-holed Redis: the first call", "ms")
    note = f"Each peer with the defaults of redis-py; a call is given up after {_PATIENCE:g} s."
    later = Table("cache-black-hole-later", "Black-holed Redis: the calls after it, median", "ms", note=note)
    with black_hole() as port, asyncio.Runner() as runner:
        primitive = cached(load_small, storage=redis.Redis(port=port))
        contestants: dict[str, Callable[[str], object]] = {"tta_sync": primitive.run_sync}
        for who, peer in async_peers(load_small, port).items():
            contestants[who] = lambda data, peer=peer: runner.run(_patient(peer, data))
        for who, peer in sync_peers(lambda data: SMALL, port).items():
            contestants[who] = lambda data, peer=peer: _in_thread(peer, data)
        for who, call in contestants.items():
            ours_too = who == "tta_sync"
            times = []
            for number in range(calls if ours_too else 2):
                began = time.perf_counter()
                with contextlib.suppress(Exception):  # some answer with an error instead of the value
                    call(str(number))
                times.append((time.perf_counter() - began) * 1000)
            first.add(who, times[0], *([Milliseconds(who, 150.0)] if ours_too else []))
            later.add(who, statistics.median(times[1:]), *([Milliseconds(who, 5.0)] if ours_too else []))
    return [first, later]


async def _patient(peer: Async, data: str) -> object:
    async with asyncio.timeout(_PATIENCE):
        return await peer(data)


def _in_thread(peer: Sync, data: str) -> None:
    def ask() -> None:
        with contextlib.suppress(Exception):  # when the black hole closes, long after
            peer(data)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)


def views(port: int, repeat: int) -> Table:
    """What the view decorators add to a request of Flask's test client."""
    calls: dict[str, Callable[[], object]] = {}
    made = Table(
        "cache-views",
        "What a decorator adds to a request of Flask's test client",
        "µs",
        note="Differences to the bare view in the same rounds; a limit that is never reached, a new key each time.",
    )
    bare = "the bare view"
    numbers = iter(range(10**9))

    def site(who: str, decorate: Callable[[Flask], Callable[[Any], Any]], headers: bool = False) -> None:
        app = Flask(__name__)
        app.testing = True
        app.add_url_rule("/", "view", decorate(app)(lambda: "done"), methods=["POST"])
        client = app.test_client()
        if headers:
            calls[who] = lambda: client.post("/", headers={"Idempotency-Key": f"k{next(numbers)}"})
        else:
            calls[who] = lambda: client.post("/")

    url = f"redis://127.0.0.1:{port}"
    site(bare, lambda app: TTASync(app) and (lambda view: view))
    for where, storage in (("memory", ""), ("Redis", url)):

        def ours_here(app: Flask, storage: str = storage) -> TTASync:
            app.config["TTA_REDIS_URL"] = storage
            return TTASync(app)

        site(f"tta_sync rate_limit, {where}", lambda app, h=ours_here: h(app).rate_limit(1e6, burst=10**6))
        site(f"tta_sync idempotent, {where}", lambda app, h=ours_here: h(app).idempotent(), headers=True)
        with optional():
            from flask_limiter import Limiter
            from flask_limiter.util import get_remote_address

            def theirs(app: Flask, storage: str = storage) -> Callable[[Any], Any]:
                TTASync(app)
                limiter = Limiter(get_remote_address, app=app, storage_uri=storage or "memory://", headers_enabled=True)
                return limiter.limit("1000000 per second")

            site(f"Flask-Limiter, {where}", theirs)
    for call in calls.values():
        answer: Any = call()
        assert answer.status_code == 200, answer.data
    figures = in_turn(calls, repeat)
    for who, figure in figures.items():
        if who != bare:
            made.add(who, max(0.01, figure - figures[bare]))
    made.note += f" The bare view takes {figures[bare]:.0f} µs."
    return made


def main(arguments: list[str]) -> list[Table]:
    parser = argparse.ArgumentParser(prog="make bench ARGS=cache", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the repetitions")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks-cache.md and its pictures")
    options = parser.parse_args(arguments)
    logging.disable(logging.ERROR)  # of the peers, about their Redis
    load = os.getloadavg()[0]
    repeat = 4_000 if options.quick else 40_000
    tables: list[Table] = []

    def done(*made: Table) -> None:
        for each in made:
            each.show()
            tables.append(each)

    with redis_server() as port:
        with pinned():
            done(hit_on_loop(repeat * 5), hit_from_sync(repeat), miss(repeat * 5))
        done(*hit_in_redis(port, repeat // 4), *stampede(port), views(port, repeat // 10))
    done(*black_holed(50))
    if options.write:
        write_page(
            "benchmarks-cache",
            "Benchmarks of the cache",
            "All figures of one table come from one run; compare within a table only. Costs per call are the lower "
            "quartile of 40 rounds in which the contestants take turns, so that a busy moment of the machine hits all "
            "alike and drops out; hits and misses in memory are measured with the process kept on one core. Redis is a "
            "redis-server of the run's own on the same machine, which shares its cores. A stampede is one event, "
            f"measured once: {CALLERS:,} tasks, or threads for the synchronous libraries. The black hole is a socket "
            "that accepts connections and never answers. Peers are asked as their documents show, with their defaults. "
            f"The machine's load average was {load:.1f} when the run began. "
            f"{'This run made a tenth of the repetitions (`--quick`). ' if options.quick else ''}"
            "`make bench ARGS='cache --write'` makes this page.",
            tables,
            machine(*PACKAGES),
        )
    return tables
