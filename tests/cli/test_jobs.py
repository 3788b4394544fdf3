"""``tta-sync jobs``, against a service whose answers a test writes; against the real one in tests/e2e."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tta_sync.cli import jobs, main


def status(name: str, **more: Any) -> bytes:
    return event("status", {"id": "one", "status": name, **more})


def progress(done: float, total: float | None = None, message: str | None = None) -> bytes:
    return event("progress", {"done": done, "total": total, "message": message, "at": "now"})


def event(kind: str, data: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


class Service:
    """Answer as told, request by request; ``asked`` holds the requests."""

    def __init__(self):
        self.asked = []
        self.answers = []  # (status, body), or the pieces of a stream, of which an Event is waited for
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = False
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def _handler(self):
        service = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self):
                service.asked.append(f"{self.command} {self.path}")
                given = service.answers.pop(0) if len(service.answers) > 1 else service.answers[0]
                if isinstance(given, tuple):
                    body = given[1] if isinstance(given[1], bytes) else json.dumps(given[1]).encode()
                    self.send_response(given[0])
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream; charset=utf-8")
                self.end_headers()
                for piece in given:
                    if isinstance(piece, threading.Event):
                        assert piece.wait(20)
                    else:
                        self.wfile.write(piece)
                        self.wfile.flush()

            do_GET = do_POST = answer

        return Handler


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(jobs, "PAUSE", 0.001)
    service = Service()
    yield service
    service.close()


def watch(service: Service, job_id: str = "one") -> int:
    return main(["jobs", "watch", job_id, "--url", service.url])


def test_job_is_followed_to_its_end_when_it_finishes(service, capsys):
    """Without a terminal: a line for each thing that happens, the end last; exit status 0."""
    service.answers = [
        [
            b"retry: 1000\r\n: hello\n\n",
            status("queued"),
            status("started"),
            progress(0, 3),
            progress(1.5, 3, "half\x1b[31m\nway"),
            progress(2),
            status("finished"),
        ]
    ]
    assert watch(service) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "one: queued",
        "one: started",
        "one: 0/3",
        "one: 1.5/3 half\ufffd[31m\ufffdway",
        "one: 2",
        "one: finished",
    ]
    assert err == ""
    assert service.asked == ["GET /api/jobs/one/events"]


@pytest.mark.parametrize("end", ["failed", "stopped", "canceled"])
def test_exit_status_is_one_when_the_job_did_not_finish(service, capsys, end):
    """What went wrong is said, as far as the service says it."""
    service.answers = [[status(end, error="ValueError: boom")], [status(end)]]
    assert watch(service) == 1
    assert capsys.readouterr().err == f"tta-sync: one {end}: ValueError: boom\n"
    assert watch(service) == 1
    assert capsys.readouterr().out == f"one: {end}\n"


def test_exit_status_is_two_when_the_job_is_not_kept(service, capsys):
    """A job that is gone at its end may have gone well or not."""
    service.answers = [[status("started"), status("gone")]]
    assert watch(service) == 2
    assert "how it ended is not known" in capsys.readouterr().err


def test_unknown_job_is_one_line_and_exit_status_two(service, capsys):
    """The service does not know it; its id is sent as it is."""
    service.answers = [(404, {"title": "Not Found", "status": 404, "detail": "There is no job with this id."})]
    assert watch(service, "a/b c") == 2
    assert capsys.readouterr().err == (
        f"tta-sync: {service.url}/api/jobs/a%2Fb%20c/events refused: Not Found (404): There is no job with this id.\n"
    )
    assert service.asked == ["GET /api/jobs/a%2Fb%20c/events"]


@pytest.mark.parametrize("answer", [(200, {}), (200, b"<html>"), (404, b"<html>"), (405, b"[]")])
def test_answer_is_doubted_when_it_is_not_the_services(service, capsys, answer):
    """Another server on that port is told from the service."""
    service.answers = [answer]
    assert watch(service) == 2
    assert "is that the service?" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["watch", "cancel"])
def test_missing_service_is_one_line_when_nobody_listens(free_port, capsys, monkeypatch, action):
    """One clear line, and exit status 2; the address is that of TTA_HOST and TTA_PORT."""
    monkeypatch.setenv("TTA_PORT", str(free_port()))
    assert main(["jobs", action, "one"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tta-sync: no service answers: http://127.0.0.1:{os.environ['TTA_PORT']}/api/jobs/one/")
    assert err.endswith("Connection refused; start it with `make run`, or say where it is with --url\n")
    assert main(["jobs", action, "one", "--url", "nowhere"]) == 2


def test_job_is_followed_over_as_many_connections_as_it_takes(service, capsys):
    """A stream that ends without the job's end, as in a restart of the service, is begun again."""
    service.answers = [
        [status("started"), progress(1, 2)],
        [],
        (503, {"title": "Service Unavailable", "code": "too_many_streams"}),
        [b": keep-alive\n\n", b"event: error\ndata: {}\n\n", b"event: status\ndata: {oops\n\n", b"data: 1\n\n"],
        [status("started"), b'event: status\ndata: {"sta'],
        [progress(2, 2), status("finished")],
    ]
    assert watch(service) == 0
    assert len(service.asked) == 6
    assert capsys.readouterr().out.splitlines()[-2:] == ["one: 2/2", "one: finished"]


@pytest.mark.parametrize("answers", [[(503, {"title": "Busy"})], [[status("started")], (502, b"<html>")]])
def test_watching_ends_when_the_service_does_not_come_back(service, capsys, monkeypatch, answers):
    """After a while without an event there is no use in waiting."""
    monkeypatch.setattr(jobs, "PATIENCE", 0.05)
    service.answers = answers
    assert watch(service) == 2
    assert capsys.readouterr().err.startswith(f"tta-sync: {service.url}/api/jobs/one/events ")


def test_watching_ends_when_nobody_listens_any_more(service, capsys, monkeypatch):
    """The same where the connection is refused, after the job was seen."""
    monkeypatch.setattr(jobs, "PATIENCE", 0.05)
    seen = threading.Event()
    service.answers = [[status("started"), seen]]

    def close():
        service.server.socket.close()  # nobody is let in any more; who is in, stays
        seen.set()

    threading.Timer(0.2, close).start()
    assert watch(service) == 2
    assert "no service answers" in capsys.readouterr().err


def test_job_goes_on_when_ctrl_c_ends_the_watching(service, eventually):
    """Ctrl-C says so, and how the job would be ended; exit status 130, and the service is not told."""
    held = threading.Event()
    service.answers = [[status("started"), held]]
    command = [sys.executable, "-m", "tta_sync.cli", "jobs", "watch", "one", "--url", service.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "one: started\n"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    held.set()
    assert process.returncode == 130
    assert said == "tta-sync: not watching any more; the job goes on (`tta-sync jobs cancel one` ends it)\n"
    assert service.asked == ["GET /api/jobs/one/events"]


def on_a_terminal(service: Service) -> tuple[int, str]:
    terminal, end = os.openpty()
    command = [sys.executable, "-m", "tta_sync.cli", "jobs", "watch", "one", "--url", service.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end, text=True) as process:
        os.close(end)
        shown = b""
        while True:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
    os.close(terminal)
    return process.returncode, shown.decode()


def test_bar_is_shown_when_stderr_is_a_terminal(service):
    """On a terminal a bar shows how far the job is, and in its own words what it does; they are words only."""
    service.answers = [
        [status("started"), progress(1, 4, "first"), progress(3, 4, "[red]last[/red]"), status("finished", result=1)]
    ]
    code, shown = on_a_terminal(service)
    assert code == 0
    assert "one finished" in shown
    assert "100%" in shown
    assert "[red]last[/red]" in shown


def test_bar_is_shown_when_the_total_is_not_known(service):
    """A job that does not know how much there is, or reports nothing, has a bar too."""
    service.answers = [[status("started"), progress(3), status("failed", error="E: x")]]
    code, shown = on_a_terminal(service)
    assert code == 1
    assert "one failed" in shown
    assert "tta-sync: one failed: E: x" in shown


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ((200, {"cancel": "cancelled"}), 0, "one: cancelled before it began\n"),
        ((202, {"cancel": "requested"}), 0, "one: asked to stop\n"),
        ((409, {"title": "Conflict"}), 1, "one: has ended already\n"),
    ],
)
def test_job_is_cancelled_and_what_came_of_it_is_said(service, capsys, answer, code, said):
    """Exit status 0 where there was something to cancel, 1 where it had ended."""
    service.answers = [answer]
    assert main(["jobs", "cancel", "one", "--url", service.url]) == code
    assert capsys.readouterr().out == said
    assert service.asked == ["POST /api/jobs/one/cancel"]


def test_unknown_job_cannot_be_cancelled(service, capsys):
    """Exit status 2, with what the service says."""
    service.answers = [(404, {"title": "Not Found", "detail": "There is no job with this id."})]
    assert main(["jobs", "cancel", "one", "--url", service.url]) == 2
    assert capsys.readouterr().err == "tta-sync: one: refused: Not Found (404): There is no job with this id.\n"


def test_server_that_speaks_no_http_is_no_service(capsys):
    """Whatever listens there."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk():
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=talk)
        thread.start()
        assert main(["jobs", "watch", "one", "--url", f"http://127.0.0.1:{server.getsockname()[1]}"]) == 2
        thread.join()
    assert capsys.readouterr().err.startswith("tta-sync: no service answers: ")
