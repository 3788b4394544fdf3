"""In a process that gevent has patched: greenlets wait on their hub, the loop runs on a real thread."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

import tta_sync

ROOT = str(Path(tta_sync.__file__).parent.parent)

PRELUDE = """
from gevent import monkey; monkey.patch_all()
import asyncio, gevent, gevent.event, sys, threading, time
from tta_sync import run_on_caller
from tta_sync.facade import SyncFacade
from tta_sync.exceptions import *
facade = SyncFacade(use_uvloop=OPTION)
"""


def run(body: str, tmp_path: Path, uvloop: bool) -> str:
    path = tmp_path / "program.py"
    path.write_text(PRELUDE.replace("OPTION", repr(uvloop)) + textwrap.dedent(body))
    ended = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": ROOT}
    )
    assert ended.stderr == ""
    assert ended.returncode == 0
    return ended.stdout.strip()


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def uvloop(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_a_hundred_greenlets_overlap_and_the_hub_stays_free(tmp_path: Path, uvloop: bool) -> None:
    """100 calls of 0.5 s take about 0.5 s together, and other greenlets run meanwhile."""
    out = run(
        """
        async def work(): await asyncio.sleep(0.5); return threading.get_ident()
        ticks = []
        def tick():
            while True: gevent.sleep(0.01); ticks.append(1)
        gevent.spawn(tick)
        began = time.monotonic()
        greenlets = [gevent.spawn(facade.call_sync, work) for _ in range(100)]
        gevent.joinall(greenlets)
        took = time.monotonic() - began
        assert len({g.get() for g in greenlets}) == 1
        assert took < 5, took
        assert len(ticks) > 5, ticks
        print("overlapped")
        """,
        tmp_path,
        uvloop,
    )
    assert out == "overlapped"


def test_caller_steps_interrupts_deadlines_and_streams_work(tmp_path: Path, uvloop: bool) -> None:
    """A caller step runs in the calling greenlet; a killed greenlet cancels its coroutine; deadlines hold."""
    out = run(
        """
        async def here(): return await run_on_caller(gevent.getcurrent)
        greenlet = gevent.spawn(facade.call_sync, here)
        assert greenlet.get() is greenlet
        begun, ended = [], []
        async def long():
            begun.append(1)
            try: await asyncio.sleep(60)
            finally: ended.append(1)
        greenlet = gevent.spawn(facade.call_sync, long)
        while not begun: gevent.sleep(0.001)
        greenlet.kill()
        assert ended == [1] and facade.in_flight() == [], (ended, facade.in_flight())
        while len(begun) < 2:  # a machine that stalls may let the time pass before it begins
            try: facade.call_sync(long, timeout=0.05)
            except DeadlineExceededError: assert ended == begun
            else: raise AssertionError("no deadline")
        while len(begun) < 3:
            with gevent.Timeout(0.05, False): facade.call_sync(long)
            assert ended == begun
        async def numbers():
            for number in range(100): yield number
        assert list(facade.iterate_sync(numbers)) == list(range(100))
        async def threaded(): return await asyncio.to_thread(time.sleep, 0.01)
        facade.call_sync(threaded)
        assert facade.stats().orphans == 0
        print("done")
        """,
        tmp_path,
        uvloop,
    )
    assert out == "done"


def test_another_greenlets_loop_does_not_refuse_a_call(tmp_path: Path, uvloop: bool) -> None:
    """A running loop in one greenlet is not 'inside a running loop' for another of the same thread; inside it is."""
    out = run(
        """
        async def answer(): return 42
        said = []
        runs, answered = gevent.event.Event(), gevent.event.Event()
        async def other():
            runs.set()
            while not answered.is_set(): await asyncio.sleep(0.01)
            try: facade.call_sync(answer)
            except LoopUnavailableError: said.append("refused")
        def loop(): asyncio.new_event_loop().run_until_complete(other())
        greenlet = gevent.spawn(loop)
        assert runs.wait(20)
        said.append(facade.call_sync(answer))
        answered.set()
        greenlet.join()
        print(said)
        """,
        tmp_path,
        uvloop,
    )
    assert out == "[42, 'refused']"


def test_gunicorn_gevent_worker_serves_overlapping_requests(tmp_path: Path) -> None:
    """gunicorn -k gevent, really started: 20 slow requests on one worker overlap."""
    (tmp_path / "app.py").write_text(
        textwrap.dedent(
            """
            import asyncio
            from tta_sync import call_sync
            async def slow(): await asyncio.sleep(0.5); return b"ok"
            def app(environ, start_response):
                body = call_sync(slow)
                start_response("200 OK", [("Content-Length", "2")])
                return [body]
            """
        )
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = "-m gunicorn -k gevent -w 1 --no-control-socket --log-level error app:app"
    server = subprocess.Popen(
        [sys.executable, *command.split(), "--bind", f"127.0.0.1:{port}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ROOT},
        stderr=subprocess.PIPE,
    )
    try:
        give_up = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert time.monotonic() < give_up
            time.sleep(0.02)
        from concurrent.futures import ThreadPoolExecutor

        def get() -> bytes:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                return bytes(answer.read())

        with ThreadPoolExecutor(20) as pool:
            began = time.monotonic()
            answers = [future.result() for future in [pool.submit(get) for _ in range(20)]]
            took = time.monotonic() - began
        assert answers == [b"ok"] * 20
        assert took < 8  # one after another they would take 10 s
    finally:
        server.send_signal(signal.SIGTERM)
        _, stderr = server.communicate(timeout=30)
    assert b"Traceback" not in stderr
