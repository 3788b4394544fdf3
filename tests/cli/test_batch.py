"""``tta-sync batch``, against a service whose answers a test writes; against the real one in tests/e2e."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from tta_sync.cli import batch, main


class Service:
    """Accept batches and answer polls as told; ``posted`` holds the bodies."""

    def __init__(self):
        self.posted = []
        self.polls = 0
        self.refusals = {}  # number of the POST -> (status, body)
        self.states = []  # answers to the polls, in turn; the last one again and again; a callable makes its own
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

            def answer(self, status, body, **headers):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.posted.append(body["documents"])
                number = len(service.posted)
                if number in service.refusals:
                    self.answer(*service.refusals[number])
                else:
                    total = len(body["documents"])
                    self.answer(202, state("queued", total), Location=f"/api/batches/{number}")

            def do_GET(self):
                number = int(self.path.rpartition("/")[2])
                total = len(service.posted[number - 1])
                answer = service.states[min(service.polls, len(service.states) - 1)] if service.states else finished
                service.polls += 1
                if callable(answer):
                    answer = answer(total)
                self.answer(*answer) if isinstance(answer, tuple) else self.answer(200, answer)

        return Handler


def state(status, total, done=0, failed=0, results=()):
    return {"status": status, "total": total, "done": done, "failed": failed, "results": list(results)}


def finished(total):
    results = [{"index": index, "document_id": f"id-{index}", "error": None} for index in range(total)]
    return state("done", total, total, 0, results)


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(batch, "FIRST_POLL", 0.001)
    monkeypatch.setattr(batch, "LAST_POLL", 0.001)
    service = Service()
    yield service
    service.close()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three text files, named from where the command runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(f"The text of {name}.")
    return ["a.txt", "b.txt", "c.txt"]


def test_documents_are_listed_when_all_are_done(service, files, capsys):
    """Every file becomes a document in order, is listed with its id, and the exit status is 0."""
    service.states = [state("queued", 3), state("running", 3, 1), finished]
    assert main(["batch", *files, "--url", service.url + "/"]) == 0
    out, err = capsys.readouterr()
    assert service.posted == [[{"text": f"The text of {name}."} for name in files]]
    assert out == "id-0\ta.txt\nid-1\tb.txt\nid-2\tc.txt\n"
    assert err == "tta-sync: 3 done, 0 failed\n"
    assert service.polls == 3


def test_exit_status_is_one_when_a_document_failed(service, files, capsys):
    """A failed document is named with its error, and the exit status says so."""
    results = [
        {"index": 0, "document_id": "id-0", "error": None},
        {"index": 1, "document_id": None, "error": {"title": "Too long", "code": "x"}},
        {"index": 2, "document_id": None, "error": "broken\nin two"},
    ]
    service.states = [state("done", 3, 1, 2, results)]
    assert main(["batch", *files, "--url", service.url]) == 1
    out, err = capsys.readouterr()
    assert out == "id-0\ta.txt\n"
    assert err == "tta-sync: b.txt: Too long\ntta-sync: c.txt: broken in two\ntta-sync: 1 done, 2 failed\n"


def test_exit_status_is_one_when_the_batch_was_cancelled(service, files, capsys):
    """What was cancelled by somebody else has not been done, and the exit status says so."""
    service.states = [state("cancelled", 3, 1, 0, [{"index": 0, "document_id": "id-0", "error": None}])]
    assert main(["batch", *files, "--url", service.url]) == 1
    assert capsys.readouterr().err == "tta-sync: 1 done, 0 failed, 2 cancelled\n"


def test_files_are_posted_in_parts_when_there_are_over_a_thousand(service, tmp_path, capsys, monkeypatch):
    """2,001 files are three batches of at most 1,000 documents, all watched, all listed in order."""
    monkeypatch.chdir(tmp_path)
    names = [f"{number}.txt" for number in range(2001)]
    for name in names:
        (tmp_path / name).write_text(name)
    assert main(["batch", *names, "--url", service.url]) == 0
    assert [len(part) for part in service.posted] == [1000, 1000, 1]
    out, err = capsys.readouterr()
    assert [line.split("\t")[1] for line in out.splitlines()] == names
    assert err == "tta-sync: 2001 done, 0 failed\n"


def test_files_are_posted_in_parts_when_a_body_would_be_too_large(monkeypatch):
    """A batch's body stays under the limit, counted as it is sent; a text over it goes alone."""
    monkeypatch.setattr(batch, "MOST_BYTES", 100)
    texts = ["x" * 30, "é" * 8, "y", "z" * 500, "w"]
    assert [list(part) for part in batch.split(texts)] == [[0], [1, 2], [3], [4]]


def test_file_is_named_when_it_cannot_be_posted(service, files, tmp_path, capsys):
    """Every file that is missing, empty, no file or no UTF-8 is named, and nothing is posted."""
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    wrong = ["missing.txt", "empty.txt", "latin.txt", str(tmp_path), "nul\0.txt"]
    assert main(["batch", files[0], *wrong, "--url", service.url]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "tta-sync: missing.txt: cannot be read (No such file or directory)",
        "tta-sync: empty.txt: is empty",
        "tta-sync: latin.txt: is not UTF-8 text (byte 3)",
        f"tta-sync: {tmp_path}: cannot be read (Is a directory)",
        "tta-sync: nul\0.txt: cannot be read (embedded null byte)",
        "tta-sync: nothing was posted",
    ]
    assert service.posted == []


def test_text_is_taken_from_stdin_when_the_file_is_a_dash(service, monkeypatch):
    """'-' reads stdin; a byte order mark is not part of the text."""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"\xef\xbb\xbfpiped")))
    assert main(["batch", "-", "--url", service.url]) == 0
    assert service.posted == [[{"text": "piped"}]]


def test_name_is_printed_readably_when_it_is_not_unicode(service, tmp_path, monkeypatch, capsys):
    """A file whose name is no text is processed like any other."""
    monkeypatch.chdir(tmp_path)
    with open(b"\xff.txt", "w") as file:
        file.write("text")
    assert main(["batch", os.fsdecode(b"\xff.txt"), "--url", service.url]) == 0
    assert capsys.readouterr().out == "id-0\t\\udcff.txt\n"


def test_missing_service_is_one_line_when_nobody_listens(files, free_port, capsys, monkeypatch):
    """Without a service there is one clear line, and exit status 2; the address is that of TTA_HOST and TTA_PORT."""
    port = free_port()
    monkeypatch.setenv("TTA_PORT", str(port))
    monkeypatch.setenv("TTA_HOST", "0.0.0.0")
    assert main(["batch", *files]) == 2
    assert capsys.readouterr().err == (
        f"tta-sync: no service answers: http://127.0.0.1:{port}/api/batches: Connection refused; "
        "start it with `make run`, or say where it is with --url\n"
    )


def test_missing_service_is_one_line_when_something_else_listens(files, capsys):
    """A server that speaks no HTTP is no service either."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk():
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=talk)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert main(["batch", *files, "--url", url]) == 2
        thread.join()
    err = capsys.readouterr().err
    assert err.startswith(f"tta-sync: no service answers: {url}/api/batches: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "http://host:99999"])
def test_address_is_refused_when_it_is_none(files, url, capsys):
    """An address without a scheme or host is said to be none, and how one is written."""
    assert main(["batch", *files, "--url", url]) == 2
    assert capsys.readouterr().err == f"tta-sync: {url!r} is no address of a service; write --url http://host:port\n"


@pytest.mark.parametrize(
    ("env", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"TTA_HOST": "::", "TTA_PORT": "81"}, "http://[::1]:81"),
        ({"TTA_HOST": "example.org", "TTA_PORT": " "}, "http://example.org:8000"),
    ],
)
def test_address_follows_the_settings_when_none_is_given(env, url):
    """TTA_HOST and TTA_PORT say where the service is; an address for listening everywhere is reached on loopback."""
    assert batch.service_url(None, env) == url


def test_refusal_names_the_files_when_a_document_is_invalid(service, files, capsys):
    """Field errors are told by file; nothing was posted, exit status 2."""
    errors = {"documents": {"1": {"text": ["Too long."], "tasks": {"0": ["Unknown."]}}, "9": ["?"]}, "extra": ["No."]}
    service.refusals = {1: (422, {"title": "Invalid", "status": 422, "detail": "see errors", "errors": errors})}
    assert main(["batch", *files, "--url", service.url]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"tta-sync: {service.url} refused: Invalid (422): see errors",
        "tta-sync: b.txt: text: Too long.",
        "tta-sync: b.txt: tasks: 0: Unknown.",
        "tta-sync: 9: ?",
        "tta-sync: extra: No.",
    ]


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}"])
def test_answer_is_doubted_when_it_is_not_the_service_s(service, files, capsys, body):
    """Another web server on that port is told from the service."""
    service.refusals = {1: (404, body)}
    assert main(["batch", *files, "--url", service.url]) == 2
    assert capsys.readouterr().err == f"tta-sync: {service.url} answered 404: is that the service?\n"


def test_first_part_is_watched_when_a_later_one_is_refused(service, files, capsys, monkeypatch):
    """What was accepted is watched to its end; what was not is counted; the exit status is 1."""
    monkeypatch.setattr(batch, "MOST_DOCUMENTS", 1)
    service.refusals = {2: (503, {"title": "Unavailable", "status": 503})}
    assert main(["batch", *files, "--url", service.url]) == 1
    out, err = capsys.readouterr()
    assert out == "id-0\ta.txt\n"
    assert err.splitlines() == [
        f"tta-sync: {service.url} refused: Unavailable (503)",
        "tta-sync: 2 documents were not posted",
        "tta-sync: 1 done, 0 failed",
    ]


def test_watching_goes_on_when_the_service_restarts(service, files):
    """An error of the service in the middle, as in a restart, is waited out."""
    service.states = [state("running", 3, 1), (503, {"title": "Unavailable"}), (502, b"<html>"), finished]
    assert main(["batch", *files, "--url", service.url]) == 0
    assert service.polls == 4


def test_watching_ends_when_the_service_does_not_come_back(service, files, capsys, monkeypatch):
    """After a while without an answer the batch's address is all that is left to say; exit status 1."""
    monkeypatch.setattr(batch, "PATIENCE", 0.05)
    service.states = [(500, {"title": "Broken"})]
    assert main(["batch", *files, "--url", service.url]) == 1
    url = f"{service.url}/api/batches/1"
    assert capsys.readouterr().err == (
        f"tta-sync: the service stopped answering: {url} answered 500; "
        f"what it has taken goes on when it is back, see {url}\n"
    )


def test_watching_ends_when_the_batch_is_unknown(service, files, capsys):
    """A batch that the service does not know any more, after its data was removed say, is not waited for."""
    service.states = [(404, {"title": "Not found", "status": 404})]
    assert main(["batch", *files, "--url", service.url]) == 2
    assert capsys.readouterr().err == f"tta-sync: {service.url}/api/batches/1 refused: Not found (404)\n"


def test_batch_goes_on_when_ctrl_c_ends_the_watching(service, files, eventually):
    """Ctrl-C says where the batch is found and exits with 130; the service is not told."""
    service.states = [state("running", 3, 1)]
    command = [sys.executable, "-m", "tta_sync.cli", "batch", *files, "--url", service.url]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        eventually(lambda: service.polls)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said == f"tta-sync: not watching any more; the service goes on, see {service.url}/api/batches/1\n"


def test_nothing_is_said_when_ctrl_c_comes_before_the_posting(files, monkeypatch, capsys):
    """Ctrl-C before anything was posted has nothing to report."""

    def interrupted(files):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "read_files", interrupted)
    assert main(["batch", *files]) == 130
    assert capsys.readouterr().err == ""


def test_bar_is_shown_when_stderr_is_a_terminal(service, files):
    """On a terminal a progress bar counts the documents, the failed ones in words."""
    results = [{"index": index, "document_id": None, "error": "no"} for index in range(3)]
    service.states = [state("running", 3, 1), state("done", 3, 2, 1, results[2:])]
    terminal, end = os.openpty()
    command = [sys.executable, "-m", "tta_sync.cli", "batch", *files, "--url", service.url]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=end, env={**os.environ, "TERM": "xterm"}):
        os.close(end)
        shown = b""
        try:
            while chunk := os.read(terminal, 65536):
                shown += chunk
        except OSError:  # how Linux says that the other end was closed
            pass
    os.close(terminal)
    assert b"3/3" in shown
    assert b"1 failed" in shown


def test_proxy_is_not_asked_when_the_service_is_on_loopback(service, files, monkeypatch):
    """http_proxy is for the outside world."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert main(["batch", *files, "--url", service.url]) == 0
    assert main(["batch", *files, "--url", service.url.replace("127.0.0.1", "localhost")]) == 0
    assert main(["batch", *files, "--url", "http://service.invalid"]) == 2
