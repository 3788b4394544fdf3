"""The stream over real HTTP, from real gunicorn: heard as it is said, and over when the client has gone."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from tests.conftest import free_port
from tests.e2e.conftest import starter
from tests.running import request
from tests.service.llm_server import LLMServer

THREADS = 32  # of the service: two workers with 16 each


WORDS = ["Well,", *(f" word {number}" for number in range(2000))]  # for as long as anybody listens
SETTINGS = {"TTA_LLM_MODEL": "model-1", "TTA_LLM_TIMEOUT": "60", "TTA_DEADLINE": "90"}


@pytest.fixture(scope="module")
def port():
    """Where the provider of each test is to listen: the service outlives it."""
    return free_port()


@pytest.fixture
def llm(port):
    """A provider that says one of many words each time it is told to."""
    server = LLMServer(port)
    server.mode, server.tokens = "paced", WORDS
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def service(port, tmp_path_factory):
    """The service with this provider, for all tests of the module that leave it running."""
    for start in starter(tmp_path_factory.mktemp("service")):
        yield start(TTA_LLM_BASE_URL=f"http://127.0.0.1:{port}/v1", **SETTINGS)


class Listener:
    """One client of the stream; it reads an event when it is told to."""

    def __init__(self, url: str, text: str) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        body = json.dumps({"text": text})
        self.connection.request("POST", "/api/process/stream", body, {"Content-Type": "application/json"})
        self.response = self.connection.getresponse()

    def next(self):
        """The next event; None at the end."""
        lines = [self.response.readline() for _ in range(3)]
        if lines == [b"", b"", b""]:
            return None
        kind, data, empty = lines
        assert empty == b"\n"
        return kind.removeprefix(b"event: ").decode().strip(), json.loads(data.removeprefix(b"data: "))

    def leave(self, *, rudely: bool = False) -> None:
        """Close the connection in the middle; *rudely*: as a process that is killed would."""
        if rudely:
            linger = struct.pack("ii", 1, 0)
            self.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.response.close()
        self.connection.close()


def test_tokens_arrive_while_the_provider_still_speaks(service, llm, documents):
    """Each event is sent at once; the answer is chunked, uncached and unbuffered, and ends with the document."""
    llm.tokens = ["One", " two", " three."]
    before = documents(service)
    llm.go()
    listener = Listener(service.url, "A text for the provider.")
    assert listener.response.status == 200
    assert listener.response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert listener.response.headers["Cache-Control"] == "no-store"
    for token in llm.tokens:
        assert listener.next() == ("token", {"text": token})
        assert documents(service) == before
        llm.go()
    kind, document = listener.next()
    assert (kind, document["summary"], document["provider"]) == ("done", "One two three.", "model-1")
    assert listener.next() is None
    assert documents(service) == [document, *before]
    listener.connection.close()


def test_many_streams_are_heard_at_once(service, llm, documents):
    """Sixteen clients listen at the same time, each to its own text."""
    llm.mode, llm.tokens = "good", ["One", " two", " three."]
    before = len(documents(service))

    def listen(number):
        listener = Listener(service.url, f"Text {number} for many.")
        heard = []
        while (event := listener.next()) is not None:
            heard.append(event)
        listener.connection.close()
        return heard

    with ThreadPoolExecutor(16) as pool:
        for heard in pool.map(listen, range(48)):
            assert [data["text"] for kind, data in heard if kind == "token"] == llm.tokens
            assert heard[-1][0] == "done"
    assert len(documents(service)) == before + 48


@pytest.mark.parametrize("rudely", [False, True], ids=["closed", "reset"])
def test_work_ends_and_nothing_is_stored_when_the_client_goes_away(service, llm, documents, eventually, rudely):
    """The provider's connection is closed, the thread is free again, and nobody complains; however often it happens."""
    said, stored = service.output, documents(service)

    def gone():
        llm.go()
        return llm.left.acquire(blocking=False)

    for number in range(THREADS + 4):
        llm.go()
        listener = Listener(service.url, f"Text {number}, {rudely}.")
        assert listener.next() == ("token", {"text": "Well,"})
        listener.leave(rudely=rudely)
        eventually(gone, what="the end of the provider's connection")
        while llm.take_back():
            pass
    assert llm.calls == THREADS + 4
    assert documents(service) == stored
    llm.mode = "good"
    llm.tokens = ["Fine."]
    with ThreadPoolExecutor(THREADS) as pool:
        answers = pool.map(lambda n: service.post("/api/process", {"text": f"After {n}, {rudely}."}), range(THREADS))
        assert {answer.status for answer in answers} == {200}
    assert service.output == said


def test_stream_is_finished_when_the_service_is_told_to_stop(llm, eventually, start_small, documents):
    """SIGTERM refuses new work; a client that listens hears the end, and the document is kept."""
    service = start_small(TTA_LLM_BASE_URL=llm.base_url, **SETTINGS)
    llm.tokens = ["One", " two", " three."]
    llm.go()
    listener = Listener(service.url, "A text for the provider.")
    assert listener.next() == ("token", {"text": "One"})
    service.process.send_signal(signal.SIGTERM)

    def refused():
        try:
            request("GET", f"{service.url}/livez", timeout=2)
        except OSError:
            return True
        return False

    eventually(refused, within=60, what="the refusal of new work")
    llm.go(3)
    assert [listener.next()[1]["text"] for _ in range(2)] == [" two", " three."]
    kind, document = listener.next()
    assert kind == "done"
    listener.connection.close()
    assert service.process.wait(60) == 0
    assert "Traceback" not in service.output
    assert documents(start_small()) == [document]
