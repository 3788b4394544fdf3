"""gunicorn.conf.py under a real gunicorn: slow and refused senders, and the end of a worker."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import pytest

READS = """
def app(environ, start_response):
    try:
        environ["wsgi.input"].read(100)
        status = "200 OK"
    except OSError:
        status = "400 Bad Request"
    start_response(status, [("Content-Length", "0")])
    return []
"""

REFUSES = """
def app(environ, start_response):
    start_response("413 Content Too Large", [("Content-Length", "0"), ("Connection", "close")])
    return []
"""

OPENS = """
import contextlib
from tta_sync import call_sync, resource

@contextlib.asynccontextmanager
async def opened():
    yield
    open({path!r}, "w").close()

held = resource(opened)

async def use():
    await held

def app(environ, start_response):
    call_sync(use)
    start_response("200 OK", [("Content-Length", "0")])
    return []
"""


@pytest.fixture
def start(start_run, checkout):
    """``start(application, **constants)``: the supervisor with that application, constants of the file replaced."""

    def start(application, **constants):
        (checkout / "wsgi.py").write_text(application)
        with open(checkout / "gunicorn.conf.py", "a") as conf:
            conf.writelines(f"{name} = {value}\n" for name, value in constants.items())
        return start_run()

    return start


def exchange(run, *pieces):
    """Send the pieces of a request, then read until the connection ends."""
    address = urlsplit(run.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        for piece in pieces:
            connection.sendall(piece)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


@pytest.mark.parametrize("framing", [b"Content-Length: 100", b"Transfer-Encoding: chunked"])
def test_sender_is_given_up_when_it_stalls_in_its_body(start, framing):
    """A body that stops coming holds a thread for STALL_SECONDS, not for ever; the application sees an OSError."""
    run = start(READS, STALL_SECONDS=0.2)
    received = exchange(run, b"POST / HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n4\r\nx")
    assert received.startswith(b"HTTP/1.1 400 ")


def test_answer_is_read_when_the_refused_body_is_large(start):
    """A sender that finishes its 8 MB before it reads gets the refusal, not a reset connection."""
    run = start(REFUSES)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n"
    assert exchange(run, head, b"x" * 8_000_000).startswith(b"HTTP/1.1 413 ")


def test_sender_is_cut_off_when_its_refused_body_does_not_come(start):
    """A refused body is read for DRAIN_SECONDS at most: the connection ends although the sender does not."""
    run = start(REFUSES, DRAIN_SECONDS=0.2)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n"
    assert exchange(run, head, b"x").startswith(b"HTTP/1.1 413 ")


def test_sender_is_cut_off_when_its_refused_body_does_not_end(start):
    """A refused body is read for DRAIN_BYTES at most, however fast it comes."""
    run = start(REFUSES, DRAIN_BYTES=100_000)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 800000000\r\n\r\n"
    with pytest.raises(ConnectionError):
        exchange(run, head, *[b"x" * 1_000_000] * 800)


def test_resources_are_closed_when_a_worker_ends(start, checkout, tmp_path):
    """A gunicorn worker's event loop is ended in order by worker_exit, not only when the interpreter goes."""
    with open(checkout / "gunicorn.conf.py", "a") as conf:
        conf.write(
            "from pathlib import Path\n"
            "_ours = worker_exit\n"
            "def worker_exit(server, worker):\n"
            "    _ours(server, worker)\n"
            f"    if Path({str(tmp_path)!r}, 'closed').exists():\n"
            f"        Path({str(tmp_path)!r}, 'in-order').touch()\n"
        )
    run = start(OPENS.format(path=str(tmp_path / "closed")))
    exchange(run, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert run.stop() == 0
    assert (tmp_path / "in-order").exists()
