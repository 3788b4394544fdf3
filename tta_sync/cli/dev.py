"""``tta-sync dev``: the reference service on one machine, from nothing: Redis, database, gunicorn and an RQ worker."""

from __future__ import annotations

import argparse
import contextlib
import errno
import http.client
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from tta_sync.cli import keeper, processes
from tta_sync.cli.embedded_redis import EmbeddedRedis, RedisUnavailableError
from tta_sync.exceptions import ConfigurationError

START_BUDGET = 60.0  # seconds until gunicorn must have answered
RESTARTS, RESTART_SPAN = 3, 60.0  # a child that dies more often in so many seconds takes the service down
HURRY = 1.0  # a second signal this many seconds after the first hurries; make and a shell may both send the first


class Refused(Exception):
    """The service cannot run like this; the message is one line and names the setting."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the supervisor itself must know; the rest is checked by ``python -m migrations`` and the service."""

    checkout: Path
    data_dir: Path
    host: str
    port: int
    redis_url: str | None = field(repr=False)  # may carry a password
    deadline: float

    @classmethod
    def load(cls, env: Mapping[str, str], directory: Path) -> Settings:
        """Read them, for a service started in *directory*; an empty variable counts as not set.

        Raises:
            Refused: one is wrong.
        """
        checkout = find_checkout(directory)

        def read(name: str, default: str) -> str:
            return env.get(name, "").strip() or default

        try:
            port = int(read("TTA_PORT", "8000"))
            if not 0 <= port <= 65_535:
                raise ValueError
        except ValueError:
            raise Refused(f"TTA_PORT: must be a port from 0 to 65535, not {read('TTA_PORT', '')[:40]!r}") from None
        try:
            deadline = float(read("TTA_DEADLINE", "15"))
        except ValueError:
            deadline = 15.0  # the service says what is wrong with it
        chosen = read("TTA_DATA_DIR", "")
        return cls(
            checkout=checkout,
            data_dir=(directory / Path(chosen).expanduser()).absolute() if chosen else checkout / "data",
            host=read("TTA_HOST", "127.0.0.1"),
            port=port,
            redis_url=read("REDIS_URL", "") or None,
            deadline=min(max(deadline, 0.0), 600.0) if math.isfinite(deadline) else 15.0,
        )


def find_checkout(directory: Path) -> Path:
    """Return the checkout that *directory* lies in.

    Raises:
        Refused: in none.
    """
    for candidate in (directory, *directory.parents):
        if all((candidate / name).exists() for name in ("wsgi.py", "gunicorn.conf.py", "jobs", "migrations")):
            return candidate
    raise Refused(f"needs a checkout of tta_sync (wsgi.py, jobs/, migrations/): {directory} is not in one")


@dataclass(slots=True)
class Child:
    """One of the service's processes, and when it was started."""

    name: str
    command: list[str]
    budget: float  # seconds to end in order
    needs_redis: bool = False  # it ends by itself where Redis does not answer
    waits: bool = False  # it has ended, and is to be started once Redis answers
    process: subprocess.Popen[bytes] | None = None
    starts: deque[float] = field(default_factory=lambda: deque(maxlen=RESTARTS + 1))

    def may_restart(self, now: float) -> bool:
        """Say whether it died seldom enough to be started again."""
        return len(self.starts) <= RESTARTS or now - self.starts[0] > RESTART_SPAN


class Supervisor:
    """Start the parts in order, watch them, end them in the opposite order.

    gunicorn stops first and drains, then the worker finishes its job, Redis goes last. A part that dies is started
    again; one that dies again and again takes the service down, but a Redis that does not answer does not: the worker
    then waits for it, while documents are still processed. Whatever is left at the end, in whatever session, is
    killed. Killed itself, its children end in order too (Linux), since the kernel tells them.
    """

    def __init__(self, settings: Settings, env: Mapping[str, str]) -> None:
        self._settings = settings
        self._env = {**env, "TTA_DATA_DIR": str(settings.data_dir)}
        self._redis: EmbeddedRedis | None = None
        self._listener: socket.socket | None = None
        self._children: list[Child] = []
        self._signals: list[float] = []  # when we were asked to stop
        self._wake: tuple[socket.socket, socket.socket] | None = None

    def run(self) -> int:
        """Serve until a signal or a failure; return the exit status."""
        with self._listening_to_signals():
            try:
                status = self._start()
                return self._watch() if status is None else status
            except (Refused, ConfigurationError, RedisUnavailableError) as error:
                say(str(error))
                return 2
            finally:
                self._stop()

    # ------------------------------------------------------------------------------------------------- start

    def _start(self) -> int | None:
        settings = self._settings
        self._listener = listen(settings.host, settings.port)
        host, port = self._listener.getsockname()[:2]
        self._env |= {"TTA_HOST": settings.host, "TTA_PORT": str(port)}
        self._start_redis()
        if (status := self._migrate()) is not None:
            return status
        gunicorn, rq = [sys.executable, "-m", "gunicorn"], [sys.executable, "-m", "rq.cli"]
        self._children = [
            Child(
                "gunicorn",
                [*gunicorn, "--config", "gunicorn.conf.py", "--bind", f"fd://{self._listener.fileno()}", "wsgi:app"],
                budget=settings.deadline + 15.0,
            ),
            Child(
                "the RQ worker",
                [*rq, "worker", "-w", "jobs.worker.RecoveringWorker", "--job-class", "tta_sync.rq.WorkflowJob",
                 "--path", ".", "--quiet", "default"],
                budget=settings.deadline + 15.0,
                needs_redis=True,
            ),
        ]  # fmt: skip
        for child in self._children:
            self._spawn(child)
        return self._await_first_answer(host, port)

    def _start_redis(self) -> None:
        if self._settings.redis_url is not None:
            check_redis(self._settings.redis_url)
            url = self._settings.redis_url
        else:
            try:
                self._redis = EmbeddedRedis(self._settings.data_dir / "redis")
                self._redis.join()
            except OSError as error:
                where = self._settings.data_dir
                raise Refused(f"TTA_DATA_DIR: cannot keep data in {where}: {error.strerror or error}") from None
            url = self._redis.url
        self._env |= {"REDIS_URL": url, "RQ_REDIS_URL": url}

    def _migrate(self) -> int | None:
        """Check the settings and bring the database up to date; what is wrong, the program itself says."""
        migrations = Child("the migration", [sys.executable, "-m", "migrations"], budget=5.0)
        self._children = [migrations]
        process = self._spawn(migrations)
        while process.poll() is None:
            self._wait(1.0)
            if self._signals:
                return 0
        return process.returncode or None

    def _await_first_answer(self, host: str, port: int) -> int | None:
        if host in ("0.0.0.0", "::"):  # noqa: S104  # compared, not bound
            host = "127.0.0.1" if host == "0.0.0.0" else "::1"  # noqa: S104
        give_up = time.monotonic() + START_BUDGET
        while not _answers(host, port):
            if self._signals:
                return 0
            for child in self._children:
                if child.process is not None and child.process.poll() is not None:
                    say(f"{child.name} did not start ({_how(child.process.returncode)})")
                    return 1
            if time.monotonic() > give_up:
                say(f"gunicorn did not answer within {START_BUDGET:g} s")
                return 1
            self._wait(0.05)
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        _print(f"tta_sync serves {address} (Ctrl-C ends it); try:")
        _print(
            f"curl -s {address}/api/process -H 'Content-Type: application/json' "
            """-d '{"text": "The bridge carries async work. Callers stay synchronous."}'"""
        )
        return None

    def _spawn(self, child: Child) -> subprocess.Popen[bytes]:
        keep_open = [self._redis.run_lock] if self._redis is not None else []
        if self._listener is not None and child.name == "gunicorn":
            keep_open.append(self._listener.fileno())
        child.process = subprocess.Popen(
            child.command,
            cwd=self._settings.checkout,
            env=self._env,
            stdin=subprocess.DEVNULL,
            pass_fds=keep_open,
            start_new_session=True,  # Ctrl-C is for us: they are told in order
            preexec_fn=keeper.end_with_parent,  # one thread here, nothing to deadlock with
        )
        child.starts.append(time.monotonic())
        return child.process

    # ------------------------------------------------------------------------------------------------- watch

    def _watch(self) -> int:
        while not self._signals:
            self._wait(1.0)
            processes.reap_orphans(self._known_pids())
            if self._signals:
                break
            if self._redis is not None:
                try:
                    self._redis.ensure()
                except (RedisUnavailableError, OSError) as error:
                    say(f"Redis is gone: {error}")
                    return 1
            for child in self._children:
                assert child.process is not None
                if child.process.poll() is None:
                    continue
                how = _how(child.process.returncode)
                if child.needs_redis and not self._redis_answers():
                    if not child.waits:
                        say(f"{child.name} ended ({how}): Redis does not answer; it is started again when Redis does")
                        child.waits = True
                    continue
                child.waits = False
                if not child.may_restart(time.monotonic()):
                    say(f"{child.name} ended again ({how}), {RESTARTS + 1} times in {RESTART_SPAN:g} s: giving up")
                    return 1
                say(f"{child.name} ended unexpectedly ({how}); starting it again")
                self._spawn(child)
        return 0

    def _redis_answers(self) -> bool:
        try:
            check_redis(self._env["REDIS_URL"], timeout=1.0)
        except Refused:
            return False
        return True

    def _known_pids(self) -> set[int]:
        known = {child.process.pid for child in self._children if child.process is not None}
        if self._redis is not None and self._redis.keeper_pid is not None:
            known.add(self._redis.keeper_pid)
        return known

    # -------------------------------------------------------------------------------------------------- stop

    def _stop(self) -> None:
        if self._listener is not None:
            self._listener.close()  # or the kernel would go on taking connections that nobody will answer
        for child in self._children:
            if child.process is not None and child.process.poll() is None:
                self._end(child, child.process)
        spared = {self._redis.keeper_pid} if self._redis is not None and self._redis.keeper_pid is not None else set()
        processes.kill_family(os.getpid(), spared)
        if self._redis is not None:
            self._redis.leave()

    def _end(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        give_up = time.monotonic() + child.budget
        while process.poll() is None:
            hurried = bool(self._signals) and self._signals[-1] > self._signals[0] + HURRY
            if hurried or time.monotonic() > give_up:
                say(f"{child.name} {'is killed' if hurried else f'had not ended after {child.budget:g} s: killed'}")
                process.kill()
                process.wait()
                return  # its own children are orphans now, ours to kill
            self._wait(0.1)

    # ----------------------------------------------------------------------------------------------- signals

    @contextlib.contextmanager
    def _listening_to_signals(self) -> Iterator[None]:
        def stop(_signum: int, _frame: FrameType | None) -> None:
            self._signals.append(time.monotonic())

        def child_ended(_signum: int, _frame: FrameType | None) -> None:
            pass  # the wake-up is all that it is for

        self._wake = socket.socketpair()
        for end in self._wake:
            end.setblocking(False)
        handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: stop, signal.SIGCHLD: child_ended}
        before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
        signal.set_wakeup_fd(self._wake[1].fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            for signum, handler in before.items():
                signal.signal(signum, handler)
            for end in self._wake:
                end.close()

    def _wait(self, timeout: float) -> None:
        """Return at the next signal, SIGCHLD included, at the latest after *timeout* seconds."""
        assert self._wake is not None
        self._wake[0].settimeout(timeout)
        with contextlib.suppress(TimeoutError):
            self._wake[0].recv(4096)


def listen(host: str, port: int) -> socket.socket:
    """Open the service's listening socket here, so that a taken port is found at once and a restart keeps it.

    Raises:
        Refused: naming TTA_HOST or TTA_PORT.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise Refused(f"TTA_HOST: {host[:80]!r} is no address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise Refused(f"TTA_PORT: port {port} on {host} is taken; set TTA_PORT to a free one") from None
        if error.errno == errno.EACCES:
            raise Refused(f"TTA_PORT: not allowed to listen on port {port}; set TTA_PORT to one above 1023") from None
        raise Refused(f"TTA_HOST: cannot listen on {host[:80]!r}: {error.strerror}") from None
    return listener


def check_redis(url: str, timeout: float = 3.0) -> None:
    """Say at once whether the Redis at *url* answers, within *timeout* seconds for each step of it.

    Raises:
        Refused: naming REDIS_URL; its password is not in the message.
    """
    import redis

    try:
        with redis.Redis.from_url(url, socket_connect_timeout=timeout, socket_timeout=timeout, retry=None) as client:
            client.ping()
    except (redis.RedisError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        if "@" in url:  # it may quote what it was given
            reason = reason.replace(url.rpartition("@")[0].rpartition("://")[2], "***")
        raise Refused(f"REDIS_URL: no Redis answers there: {reason}") from None


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _how(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-status).name
    return f"exit status {status}"


def say(message: str) -> None:
    """Tell the user on stderr, in one line; a terminal that has gone is no reason to fail."""
    _print(f"tta-sync: {message}", file_descriptor=2)


def _print(line: str, file_descriptor: int = 1) -> None:
    with contextlib.suppress(OSError):
        os.write(file_descriptor, f"{line}\n".encode(errors="replace"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run the reference service from a checkout: an embedded redis-server (unless REDIS_URL is set), the database's "
        "migrations (SQLite unless DATABASE_URL is set), gunicorn and one RQ worker. Ctrl-C or SIGTERM ends all of "
        "them in order. TTA_HOST and TTA_PORT say where it listens, TTA_DATA_DIR where it keeps its data."
    )


def run(_arguments: argparse.Namespace) -> int:
    """Run the service until it is told to stop; return the exit status."""
    missing = [name for name in ("gunicorn", "redis", "rq", "sqlalchemy") if find_spec(name) is None]
    try:
        settings = Settings.load(os.environ, Path.cwd())
        if missing:
            raise Refused(f"{missing[0]} is not installed: pip install -e '.[service]'")
    except Refused as error:
        say(f"dev {error}" if str(error).startswith("needs") else str(error))
        return 2
    if "MAKELEVEL" in os.environ:
        keeper.end_with_parent()  # a killed make takes the service with it
    processes.adopt_orphans()
    return Supervisor(settings, os.environ).run()
