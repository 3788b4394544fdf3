"""One facade per kind of loop, threads that are joined, programs of their own, and children that cannot hang."""

from __future__ import annotations

import functools
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tta_sync
from tta_sync.exceptions import DeadlineExceededError
from tta_sync.facade import SyncFacade
from tta_sync.runtime.frames import running_frame

FACADES: dict[str, dict[str, Any]] = {
    "thread-asyncio": {},
    "thread-uvloop": {"use_uvloop": True},
    "caller": {"drive": "caller"},
}
"""The ways in which a facade may drive its loop, as its options: every hazard is tested under each of them."""

PACKAGE = Path(tta_sync.__file__).parent
PATIENCE = 20.0  # seconds after which something hangs, whatever the machine does beside


# ------------------------------------------------------------------------------------------------------- facades


@pytest.fixture(scope="module", params=FACADES)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The options that make this kind of facade."""
    return FACADES[request.param]


@pytest.fixture(autouse=True)
def still_measured() -> Iterator[None]:
    """Put back the tracer that measures coverage: Python drops it when a signal's exception strikes in it."""
    tracer = sys.gettrace()
    yield
    if sys.gettrace() is None and tracer is not None:
        sys.settrace(tracer)


@pytest.fixture
def callers_drive(options: dict[str, Any]) -> bool:
    """Whether the waiting caller turns the loop itself: what blocks the loop then blocks its own caller."""
    return options.get("drive") == "caller"


@pytest.fixture(scope="module")
def repeats(options: dict[str, Any]) -> Callable[[int, int], int]:
    """``repeats(100, 30)``: how often to repeat something, with the first kind of facade and with the others."""
    return lambda full, less: less if options else full


@pytest.fixture
def threads_end() -> Callable[[], None]:
    """``threads_end()``: wait for the end of all threads that the runtime has started since the test began."""
    before = set(threading.enumerate())

    def left() -> list[threading.Thread]:
        return [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("tta_sync-")]

    def wait() -> None:
        give_up = time.monotonic() + PATIENCE
        while left():
            if time.monotonic() > give_up:
                stacks = [
                    f"{thread.name}:\n{''.join(traceback.format_stack(running_frame(thread.ident or 0)))}"
                    for thread in left()
                ]
                pytest.fail("threads of the runtime that do not end:\n" + "\n".join(stacks))
            time.sleep(0.002)

    return wait


@pytest.fixture
def make_facade(options: dict[str, Any], threads_end: Callable[[], None]) -> Iterator[Callable[..., SyncFacade]]:
    """``make_facade(max_in_flight=..., ...)``: a facade of this kind, shut down after the test with all its threads."""
    made: list[SyncFacade] = []

    def make(**more: Any) -> SyncFacade:
        made.append(SyncFacade(**{**options, **more}))
        return made[-1]

    yield make
    for facade in made:
        facade.shutdown(0.0)
    threads_end()


@pytest.fixture
def facade(make_facade: Callable[..., SyncFacade]) -> SyncFacade:
    """A facade of this kind, with the default settings."""
    return make_facade()


@pytest.fixture
def replace_standby(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``replace_standby(loop, fn)``: from now on the standby driver calls *fn* where it would wait to be needed."""

    def replace(managed: Any, fn: Callable[[], object]) -> None:
        monkeypatch.setattr(managed, "_stand_by", fn)
        managed._wake_standby()  # it may doze
        managed.loop.call_soon_threadsafe(managed._halt)  # or turn the loop

    return replace


@pytest.fixture
def works() -> Callable[[SyncFacade], None]:
    """``works(facade)``: fail unless the next call is answered, and nothing is in flight after it."""

    async def echo(value: object) -> object:
        return value

    def check(facade: SyncFacade) -> None:
        token = object()
        assert facade.call_sync(echo, token, timeout=PATIENCE) is token
        assert [record for record in facade.in_flight() if "echo" in record.name] == []

    return check


@pytest.fixture
def expires(eventually: Callable[..., Any]) -> Callable[..., pytest.ExceptionInfo[DeadlineExceededError]]:
    """``expires(facade.call_sync, body, timeout=0.05)``: the error of a call whose time is up after *body* has begun.

    A machine that stalls may let the time pass before: then the call is made again, with more of it. If the stall was
    longer than the grace as well, the first one counts among the orphans, and holds its place until the loop sees it.
    """

    def call(way: Callable[..., Any], body: Callable[..., Any], *arguments: Any, timeout: float, **options: Any) -> Any:
        begun: list[int] = []

        @functools.wraps(body)
        async def noted(*arguments: Any) -> Any:
            begun.append(1)
            return await body(*arguments)

        for more in range(8):
            with pytest.raises(DeadlineExceededError) as caught:
                way(noted, *arguments, timeout=timeout * 2**more, **options)
            eventually(lambda: begun or not is_an_orphan(way, body), what="the end of a call that has not begun")
            if begun:
                return caught
        pytest.fail(f"{body.__qualname__} has not begun within {timeout * 2**more} s")

    def is_an_orphan(way: Any, body: Callable[..., Any]) -> bool:
        records = way.__self__.in_flight()
        return any(record.name == body.__qualname__ and record.state == "orphaned" for record in records)

    return call


# ------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def in_thread() -> Iterator[Callable[..., Future[Any]]]:
    """``in_thread(fn, *args)``: a Future of what *fn* returns or raises on a thread of its own."""
    started: list[threading.Thread] = []

    def start(fn: Callable[..., Any], *args: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def body() -> None:
            try:
                result = fn(*args, **keywords)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        started.append(threading.Thread(target=body, name=f"caller-{len(started)}", daemon=True))
        started[-1].start()
        return future

    yield start
    for thread in started:
        thread.join(PATIENCE)
        assert not thread.is_alive(), f"{thread.name} still waits"


@pytest.fixture
def many_switches() -> Iterator[None]:
    """Switch threads as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


# ------------------------------------------------------------------------------------------------------ children


class ChildFailed(Exception):
    """A forked child raised, hung or died; the text is what it said."""


def _say(pipe: int, text: str) -> None:
    os.write(pipe, text.encode()[:60_000])


@pytest.fixture
def in_child() -> Callable[..., str]:
    """``in_child(fn)``: fork, run *fn* in the child, return the str of its result. A child that hangs is killed."""

    def run(fn: Callable[[], object]) -> str:
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(int(PATIENCE))  # pytest's own timer does not survive the fork
                _say(into, str(fn()))
                status = 0
            except BaseException:
                _say(into, traceback.format_exc())
            finally:
                os._exit(status)
        os.close(into)
        said = b""
        while chunk := os.read(out, 65_536):
            said += chunk
        os.close(out)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status:
            how = "it hung" if status == -signal.SIGALRM else f"exit status {status}"
            raise ChildFailed(f"{how}: {said.decode()}")
        return said.decode()

    return run


# ------------------------------------------------------------------------------------------------------ programs

PRELUDE = """\
import asyncio, atexit, gc, os, signal, sys, threading, time, warnings
from contextlib import asynccontextmanager
from tta_sync import caller_step, run_on_caller, step, thread_step
from tta_sync.exceptions import *
from tta_sync.facade import SyncFacade

warnings.filterwarnings("ignore", "This process .* is multi-threaded")  # of 3.12: what is tested here is just that
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in a shell's background
OPTIONS = {options!r}
facade = SyncFacade(**OPTIONS)

async def answer(value=42):
    await asyncio.sleep(0)
    return value

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def last():
    "The main thread's last statement."
    say("LAST", time.monotonic())

def until(condition):
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up, "it did not come true"
        time.sleep(0.002)
"""


@dataclass(frozen=True)
class Ended:
    """What a program said, and how it ended."""

    stdout: str
    stderr: str
    status: int
    seconds_after_last: float | None

    @property
    def said(self) -> list[str]:
        return [line for line in self.stdout.splitlines() if not line.startswith("LAST ")]


class Program:
    """A Python program of its own, run to its end by somebody who reads along."""

    def __init__(self, path: Path, options: dict[str, Any], body: str) -> None:
        path.write_text(PRELUDE.format(options=options) + textwrap.dedent(body))
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
        self._process = subprocess.Popen(
            [sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=path.parent
        )
        self._said = {"stdout": b"", "stderr": b""}
        self._ended_at = 0.0
        self._reader = threading.Thread(target=self._read, name="reads-a-program", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        streams = {self._process.stdout: "stdout", self._process.stderr: "stderr"}
        while streams:
            for stream in select.select(list(streams), [], [])[0]:
                chunk = os.read(stream.fileno(), 65_536)
                self._said[streams[stream]] += chunk
                if not chunk:
                    del streams[stream]
                    stream.close()
        self._process.wait()
        self._ended_at = time.monotonic()  # the same clock in every process

    def end(self, within: float = PATIENCE) -> Ended:
        """Wait for the end, and make one when it does not come: status -9 then."""
        self._reader.join(within)
        if self._reader.is_alive():
            self._process.kill()
            self._reader.join()
        stdout, stderr = self._said["stdout"].decode(), self._said["stderr"].decode()
        mark = re.search(r"^LAST (\S+)$", stdout, re.MULTILINE)
        after = None if mark is None else self._ended_at - float(mark[1])
        return Ended(stdout, stderr, self._process.returncode, after)


@pytest.fixture(scope="module")
def run_together(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]
) -> Callable[[dict[str, str]], dict[str, Ended]]:
    """``run_together(programs)``: run programs, by name, side by side to their ends; most of them only wait."""

    def run(bodies: dict[str, str]) -> dict[str, Ended]:
        directory = tmp_path_factory.mktemp("programs")

        def one(numbered: tuple[int, str]) -> Ended:
            number, body = numbered
            return Program(directory / f"program_{number}.py", options, body).end()

        with ThreadPoolExecutor(8) as pool:
            return dict(zip(bodies, pool.map(one, enumerate(bodies.values())), strict=True))

    return run


@pytest.fixture
def program(tmp_path: Path, options: dict[str, Any]) -> Iterator[Callable[[str], Program]]:
    """``program(body)``: start a script that has ``facade``, ``answer``, ``say`` and ``last`` already."""
    started: list[Program] = []

    def start(body: str) -> Program:
        started.append(Program(tmp_path / f"program_{len(started)}.py", options, body))
        return started[-1]

    yield start
    for one in started:
        one.end(0.0)


@pytest.fixture
def run_program(program: Callable[[str], Program]) -> Callable[..., Ended]:
    """``run_program(body)``: the same, to its end, which must be a clean one: status 0, nothing on stderr.

    With ``quiet=False`` stderr is not looked at: where signals raise, Python itself reports those that met a finalizer.
    """

    def run(body: str, quiet: bool = True) -> Ended:
        ended = program(body).end()
        assert ended.stderr == "" or not quiet
        assert ended.status == 0, ended
        return ended

    return run


# ------------------------------------------------------------------------------------------------------- signals


class Interrupt(BaseException):
    """What a signal handler of the tests raises."""


@pytest.fixture
def interrupt() -> Iterator[Callable[..., None]]:
    """``interrupt(error)``: from any thread, have *error* raised on the main thread by a real signal's handler."""
    raising: list[BaseException] = []

    def handler(_signum: int, _frame: object) -> None:
        if raising:
            raise raising.pop(0)

    def send(error: BaseException) -> None:
        raising.append(error)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    yield send
    raising.clear()
    signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def alarms() -> Iterator[None]:
    """Give SIGALRM and its timer to the test, and afterwards back to pytest-timeout."""
    started = time.monotonic()
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    handler = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)
    if remaining:
        signal.setitimer(signal.ITIMER_REAL, max(0.1, remaining - (time.monotonic() - started)), interval)
