"""The main job over real HTTP: documents, batches, health, and what no client should send."""

from __future__ import annotations

import http.client
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.running import TOP, request

LICENSES = sorted(path for path in Path("/usr/share/common-licenses").glob("*") if path.is_file())
TEXTS = [TOP / "README.md", TOP / "CHANGELOG.md", *LICENSES[:6]]


def test_printed_curl_line_is_answered_when_pasted_into_a_shell(service):
    """The line that the newcomer is told to try works as it stands."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine, and the line is for curl")
    line = service.output.splitlines()[1]
    assert line.startswith("curl ")
    answer = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=30, check=True).stdout
    assert '"provider":"local"' in answer


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_document_is_answered_and_kept_when_a_real_text_is_processed(service, path):
    """A real text comes back with a summary of its own words, keywords, its language, and can be read again."""
    text = path.read_text(encoding="utf-8", errors="replace")
    answer = service.post("/api/process", {"text": text})
    assert answer.status == 200
    document = answer.body
    words = set(text.split())
    assert document["summary"]
    assert set(document["summary"].split()) <= words
    assert len(document["summary"]) < len(text)
    assert document["keywords"]
    assert all(keyword.lower() in text.lower() for keyword in document["keywords"])
    assert document["language"] == "en"
    assert document["word_count"] > 20
    assert (document["provider"], document["degraded"], document["cached"]) == ("local", False, False)
    assert answer.headers["X-Request-ID"] == document["correlation_id"]
    assert service.get(f"/api/documents/{document['id']}").body == document


def test_listing_holds_each_document_once_when_read_page_by_page(service, documents):
    """Newest first, whole, in the same order for every page size, from whichever gunicorn worker."""
    made = [service.post("/api/process", {"text": f"Page {n}.", "tasks": ["keywords"]}).body["id"] for n in range(7)]
    everything = [document["id"] for document in documents(service)]
    assert everything[:7] == made[::-1]
    assert len(everything) == len(set(everything))
    short, cursor = [], ""
    while cursor is not None:
        page = service.get(f"/api/documents?limit=3{cursor and '&cursor=' + cursor}").body
        short += [document["id"] for document in page["items"]]
        cursor = page["next_cursor"]
    assert short == everything


def test_every_request_is_answered_when_sixty_four_come_at_once(service):
    """64 clients at once each get their own document."""
    with ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(lambda n: service.post("/api/process", {"text": f"Client {n} asks."}), range(64)))
    assert [answer.status for answer in answers] == [200] * 64
    assert len({answer.body["id"] for answer in answers}) == 64
    assert all(f"Client {n} asks." == answer.body["summary"] for n, answer in enumerate(answers))


@pytest.mark.timeout(400)
def test_two_hundred_files_are_processed_when_posted_from_a_terminal(service, texts, tmp_path):
    """`tta-sync batch` with 200 files: each is processed by the forking worker, and listed with its document."""
    files = []
    for number, text in enumerate(texts(200)):
        path = tmp_path / f"{number:03}.txt"
        path.write_text(text)
        files.append(str(path))
    command = [sys.executable, "-m", "tta_sync.cli", "batch", *files, "--url", service.url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "tta-sync: 200 done, 0 failed\n")
    listed = dict(reversed(line.split("\t")) for line in result.stdout.splitlines())
    assert list(listed) == files
    assert len(set(listed.values())) == 200
    last = service.get(f"/api/documents/{listed[files[-1]]}").body
    assert "Document 199." in last["summary"]


def test_health_is_told_when_everything_is_up(service):
    """The probes answer over gunicorn as they are promised."""
    assert service.get("/livez").status == 200
    ready = service.get("/readyz")
    assert (ready.status, ready.body["checks"]) == (200, {"loop": "ok", "redis": "ok", "database": "ok"})
    assert service.get("/health").body == {"status": "healthy"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"not json", 400),
        (b"[" * 10_000 + b"]" * 10_000, 400),
        (b'{"text": "\xff"}', 400),
        (b'{"text": ""}', 422),
        (b'{"text": "a\\u0000b"}', 422),
        (b'{"text": "\\ud800"}', 422),
        (b'{"text": "x", "tasks": ["dance"]}', 422),
        (b'{"text": "x", "more": 1}', 422),
    ],
)
def test_bad_input_is_a_problem_when_it_comes_over_http(service, documents, body, status):
    """Whatever is wrong with the body: 4xx problem+json with code and correlation id, and nothing stored."""
    before = len(documents(service))
    answer = service.post("/api/process", body)
    assert 400 <= answer.status < 500
    assert answer.status == status or (answer.status in (400, 422) and body.startswith(b"["))
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert {"code", "title", "status", "correlation_id"} <= set(answer.body)
    assert len(documents(service)) == before


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
def test_refusal_can_be_read_when_the_body_is_too_large(service, chunked):
    """A client that sends 24 MiB before it reads still gets its 413, and the service goes on."""
    address = urlsplit(service.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    piece = b'{"text": "' + b"x" * (2**20 - 10)

    def pieces():
        for _ in range(24):
            yield piece

    headers = {"Content-Type": "application/json"}
    if not chunked:
        headers["Content-Length"] = str(24 * len(piece))
    connection.request("POST", "/api/process", pieces(), headers, encode_chunked=chunked)
    answer = connection.getresponse()
    assert answer.status == 413
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert b'"code"' in answer.read()
    connection.close()
    assert service.get("/livez").status == 200


def test_unknown_address_and_method_are_problems_when_asked_for(service):
    """404 and 405 are problem+json, the latter with Allow."""
    assert service.get("/nowhere").headers["Content-Type"] == "application/problem+json"
    wrong = request("DELETE", service.url + "/api/process")
    assert (wrong.status, wrong.headers["Content-Type"]) == (405, "application/problem+json")
    assert "POST" in wrong.headers["Allow"]
