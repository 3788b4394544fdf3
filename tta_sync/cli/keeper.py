"""Keep one redis-server for a directory, for as long as any run on that directory lives.

A program of its own (standard library only, started by path). It belongs to no run: whichever run ends first, by Ctrl-C
or by SIGKILL, the others keep their Redis. Who lives is decided by locks, which the kernel drops for the dead:

``lock``        held for moments, around every decision to start or to end the server
``runs/*``      one file per run, locked by it and by each of its children while they live
``server.lock`` locked while the keeper or its redis-server lives
``address``     host, port and password as JSON, readable by the owner only; kept for the next start
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

POLL = 0.2  # seconds between two looks at the runs and the server
START_BUDGET = 60.0  # seconds for redis-server to load its append-only file
STOP_BUDGET = 10.0  # seconds for redis-server to flush it
RESTARTS = 5, 60.0  # at most so many in so many seconds, then give up


def try_lock(handle: int) -> bool:
    """Take the exclusive lock on an open file if nobody else has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Say whether somebody holds the lock on *path*."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: Path, budget: float) -> Iterator[None]:
    """Hold the exclusive lock on *path*.

    Raises:
        TimeoutError: others held it for *budget* seconds.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        give_up = time.monotonic() + budget
        while not try_lock(handle):
            if time.monotonic() > give_up:
                raise TimeoutError(f"{path} has been locked for {budget:g} s")
            time.sleep(0.02)
        yield
    finally:
        os.close(handle)


def living_runs(directory: Path) -> list[Path]:
    """Return the runs that live, and forget those that do not; call it with ``lock`` held."""
    living = []
    for run in (directory / "runs").glob("*"):
        if is_locked(run):
            living.append(run)
        else:
            run.unlink(missing_ok=True)
    return living


def read_address(directory: Path) -> tuple[int, str] | None:
    """Return port and password as last written, or None if there is nothing usable."""
    try:
        found = json.loads((directory / "address").read_text(encoding="ascii"))
        return int(found["port"]), str(found["password"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def answers(port: int, password: str) -> bool:
    """Say whether a redis-server with this password, done with loading, listens on *port*."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode("ascii"))
            reply = b""
            while reply.count(b"\r\n") < 2 and (chunk := connection.recv(256)):
                reply += chunk
            return reply == b"+OK\r\n+PONG\r\n"
    except OSError:
        return False


class Keeper:
    """One redis-server in *directory*, started, watched, restarted and ended."""

    def __init__(self, directory: Path, binary: str, server_lock: int) -> None:
        self.directory = directory
        self.binary = binary
        self.server_lock = server_lock
        self.server: subprocess.Popen[bytes] | None = None
        self.stopping = False

    def start(self, *, again: bool = False) -> None:
        """Start the server on the port it had before, else on a free one, and write its address.

        Started *again*, it may have no other port: the runs know the one it had.

        Raises:
            RuntimeError: it does not start; the message is one line.
        """
        port, password = read_address(self.directory) or (0, secrets.token_urlsafe(32))
        for attempt in range(5):
            port = port if again else _free_port(port if attempt == 0 else 0)
            self._spawn(port, password)
            if self._ready(port, password):
                _write_private(self.directory / "address", json.dumps({"port": port, "password": password}))
                return
            self.stop()
        raise RuntimeError(f"redis-server does not start; {self.directory / 'redis.log'} says why")

    def _spawn(self, port: int, password: str) -> None:
        config = (
            f"bind 127.0.0.1\nport {port}\nrequirepass {password}\ndir ./\n"
            'appendonly yes\nappendfsync everysec\nsave ""\nlogfile redis.log\nloglevel notice\n'
        )
        self.server = subprocess.Popen(
            [self.binary, "-"],  # its configuration from stdin: a password on the command line is everybody's
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.directory,
            pass_fds=[self.server_lock],
            preexec_fn=end_with_parent,
        )
        assert self.server.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.server.stdin as stdin:
            stdin.write(config.encode())

    def _ready(self, port: int, password: str) -> bool:
        assert self.server is not None
        give_up = time.monotonic() + START_BUDGET
        while self.server.poll() is None and time.monotonic() < give_up and not self.stopping:
            if answers(port, password):
                return True
            time.sleep(0.005)
        return False

    def stop(self) -> None:
        """End the server; on SIGTERM it flushes its append-only file first."""
        if self.server is not None:
            server, self.server = self.server, None
            server.terminate()
            try:
                server.wait(STOP_BUDGET)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()

    def keep(self) -> None:
        """Return when no run lives any more, holding ``lock`` until the server has ended.

        Raises:
            RuntimeError: the server dies again and again.
        """
        most, span = RESTARTS
        restarts: list[float] = []
        while not self.stopping:
            time.sleep(POLL)
            if self.server is not None and self.server.poll() is not None:
                restarts = [moment for moment in restarts if moment > time.monotonic() - span] + [time.monotonic()]
                if len(restarts) > most:
                    raise RuntimeError(f"redis-server died {len(restarts)} times in {span:g} s")
                self.start(again=True)
            try:
                with locked(self.directory / "lock", 0.0):
                    if not living_runs(self.directory):
                        self.stop()
                        return
            except TimeoutError:
                continue  # a run is just joining or leaving: look again
            except FileNotFoundError:
                return  # the directory was removed under us, and all that we keep with it


def end_with_parent() -> None:
    """Ask the kernel for a SIGTERM when the parent dies, however it dies (Linux; elsewhere there is no such thing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise RuntimeError("no free port on 127.0.0.1")


def _write_private(path: Path, text: str) -> None:
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(text)
    draft.replace(path)


def main(directory: str, binary: str, server_lock: str) -> int:
    """Keep the server; say ``ready`` or what is wrong on stdout, once, then close it."""
    keeper = Keeper(Path(directory), binary, int(server_lock))

    def stop(*_: object) -> None:
        keeper.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        try:
            keeper.start()
        except (RuntimeError, OSError) as error:
            print(error, flush=True)
            return 1
        print("ready", flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever started us waits for the end of this pipe
        keeper.keep()
    except RuntimeError:
        return 1  # the runs see that nobody holds server.lock, and say so
    finally:
        keeper.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
