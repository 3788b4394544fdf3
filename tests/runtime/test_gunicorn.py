"""gunicorn, really started: --preload with a call at import time, under both worker classes."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tta_sync

APP = """
import asyncio, json, os, threading
from contextlib import asynccontextmanager
from tta_sync import run_on_caller
from tta_sync.facade import SyncFacade

facade = SyncFacade(**{options!r})

@asynccontextmanager
async def client():
    yield os.getpid()

shared = facade.resource(client)

async def work():
    await asyncio.sleep(0.005)
    return {{
        "pid": os.getpid(),
        "resource": await shared,
        "thread": await run_on_caller(threading.get_ident),
    }}

AT_IMPORT = facade.call_sync(work)

def app(environ, start_response):
    answer = facade.call_sync(work, timeout=10)
    answer["own"] = answer["thread"] == threading.get_ident()
    answer["imported_by"] = AT_IMPORT["pid"]
    body = json.dumps(answer).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
"""


@pytest.mark.parametrize("worker", ["gthread", "sync"])
def test_workers_answer_when_gunicorn_preloads_an_app_that_calls_at_import(
    tmp_path, options, free_port, eventually, worker
):
    """With a loop started in the master before the fork, every worker starts its own, answers, and ends quietly."""
    (tmp_path / "app.py").write_text(APP.format(options=options))
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "app:app", "--preload", "--workers", "2", "--worker-class", worker]
    command += ["--bind", f"127.0.0.1:{port}", "--no-control-socket", "--log-level", "warning", "--timeout", "20"]
    command += ["--graceful-timeout", "5"] + (["--threads", "8"] if worker == "gthread" else [])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(tta_sync.__file__).parents[1])]),
    }
    with open(tmp_path / "stderr", "w+") as stderr:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=stderr, stderr=stderr)
        try:

            def ask(_=None):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=15) as response:
                    return json.loads(response.read())

            def is_up():
                assert server.poll() is None, Path(stderr.name).read_text()
                try:
                    return ask()
                except OSError:
                    return None

            eventually(is_up, what="gunicorn's first answer")
            workers = set()
            give_up = time.monotonic() + 15
            while len(workers) < 2 and time.monotonic() < give_up:
                with ThreadPoolExecutor(16) as pool:
                    for answer in pool.map(ask, range(64)):
                        assert answer["imported_by"] == server.pid != answer["pid"]
                        assert answer["resource"] == answer["pid"]  # the worker's own, not the one opened at import
                        assert answer["own"]
                        workers.add(answer["pid"])
            assert len(workers) == 2
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                status = server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
                raise
        stderr.seek(0)
        said = stderr.read()
    assert status == 0
    assert said == ""
