"""The Redis of a data directory, where REDIS_URL names none: one redis-server, shared by all runs on that directory."""

from __future__ import annotations

import fcntl
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

from tta_sync.cli import keeper
from tta_sync.redis import find_redis_server

__all__ = ["EmbeddedRedis", "RedisUnavailableError"]

LOCK_BUDGET = keeper.START_BUDGET + keeper.STOP_BUDGET + 5.0  # the longest that a keeper or a run holds the lock


ADDRESS_BUDGET = 2.0  # seconds; a server's address is written before anybody else may look for it


class RedisUnavailableError(Exception):
    """The embedded redis-server cannot be had; the message is one line and says why."""


class EmbeddedRedis:
    """One run's share in the redis-server of *directory*: 127.0.0.1 only, a password, an append-only file.

    The first run starts it, later ones join it, the last to leave ends it. A killed run counts as gone, once its
    children are gone too. ``url`` carries the password: hand it on by environment, never print it.

    Raises:
        ConfigurationError: there is no redis-server program on this machine.
        OSError: *directory* cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._binary = find_redis_server()
        self._directory = directory.absolute()
        self._runs = self._directory / "runs"
        self._runs.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        self._run: Path | None = None
        self._handle = -1
        self._keeper: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def run_lock(self) -> int:
        """The descriptor that says this run lives; children that inherit it keep the server until they have ended."""
        return self._handle

    @property
    def keeper_pid(self) -> int | None:
        """The keeper's pid, if this run started it: a child to leave alone."""
        return self._keeper.pid if self._keeper is not None else None

    def join(self) -> None:
        """Become one of the runs on the directory, and start the server if none runs.

        Raises:
            RedisUnavailableError: it cannot be started; all is as before.
        """
        try:
            with keeper.locked(self._directory / "lock", LOCK_BUDGET):
                self._run = self._runs / f"{os.getpid()}-{secrets.token_hex(4)}"
                self._handle = os.open(self._run, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                fcntl.flock(self._handle, fcntl.LOCK_EX)
                try:
                    self._connect()
                except BaseException:
                    self._forget()
                    raise
        except TimeoutError as error:
            raise RedisUnavailableError(str(error)) from None

    def ensure(self) -> None:
        """Start the server again, at the same address, if it and its keeper were killed; else do nothing.

        Raises:
            RedisUnavailableError: it cannot be started, or not at the address that this run's children know.
        """
        if keeper.is_locked(self._directory / "server.lock"):
            return
        known = self.url
        try:
            with keeper.locked(self._directory / "lock", LOCK_BUDGET):
                self._connect()
        except TimeoutError as error:
            raise RedisUnavailableError(str(error)) from None
        if self.url != known:
            raise RedisUnavailableError("redis-server ended and its port was taken meanwhile")

    def leave(self) -> None:
        """Stop being one of the runs; the last one out waits until the server has flushed its file and ended."""
        if self._run is None:
            return
        try:
            with keeper.locked(self._directory / "lock", LOCK_BUDGET):
                self._forget()
        except (TimeoutError, FileNotFoundError):  # stuck, or removed under us: the kernel drops our lock all the same
            self._forget()
        give_up = time.monotonic() + keeper.STOP_BUDGET + 5.0
        while keeper.is_locked(self._directory / "server.lock") and time.monotonic() < give_up:
            try:
                with keeper.locked(self._directory / "lock", 0.0):
                    if keeper.living_runs(self._directory):
                        break  # theirs now
            except (TimeoutError, FileNotFoundError):
                pass  # the keeper is just ending the server
            time.sleep(0.02)
        self._release_keeper(ended=not keeper.is_locked(self._directory / "server.lock"))

    def _connect(self) -> None:
        began = time.monotonic()
        server_lock = os.open(self._directory / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while True:
                if keeper.try_lock(server_lock):
                    self._start_keeper(server_lock)
                address = keeper.read_address(self._directory)
                if address is not None and keeper.answers(*address):
                    self.url = f"redis://:{address[1]}@127.0.0.1:{address[0]}/0"
                    return
                if time.monotonic() > began + (ADDRESS_BUDGET if address is None else keeper.START_BUDGET):
                    break
                time.sleep(0.05)  # its keeper starts it again just now, or somebody only looked at the lock
        finally:
            os.close(server_lock)
        raise RedisUnavailableError(
            f"TTA_DATA_DIR: a redis-server holds {self._directory} and does not answer; end it, then try again"
        )

    def _start_keeper(self, server_lock: int) -> None:
        self._release_keeper(ended=True)
        with open(self._directory / "keeper.log", "ab") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", keeper.__file__, str(self._directory), str(self._binary), str(server_lock)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=[server_lock],
                start_new_session=True,  # it belongs to all runs: this one's Ctrl-C is not for it
            )
        assert self._keeper.stdout is not None
        with self._keeper.stdout as said:
            word = said.readline().decode().strip()
        if word != "ready":
            self._release_keeper(ended=True)
            raise RedisUnavailableError(word or f"the Redis keeper died; {self._directory / 'keeper.log'} says why")

    def _release_keeper(self, *, ended: bool) -> None:
        """Collect the exit status of the keeper that this run started, unless it goes on for others."""
        if self._keeper is not None:
            try:
                self._keeper.wait(keeper.STOP_BUDGET if ended else 0.0)
            except subprocess.TimeoutExpired:
                self._keeper.returncode = 0  # theirs: Popen is not to warn that it still runs
            self._keeper = None

    def _forget(self) -> None:
        assert self._run is not None
        self._run.unlink(missing_ok=True)
        os.close(self._handle)
        self._run, self._handle = None, -1
