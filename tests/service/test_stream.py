"""The stream: heard piece by piece while it is made, truthful to its end, and over as soon as nobody listens."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from flask import has_request_context
from flask.testing import FlaskClient
from werkzeug.test import EnvironBuilder, TestResponse

from blueprints.documents import chunks, llm as provider, local, stream, workflow
from blueprints.documents.chunks import ChunkReader, MalformedAnswerError, StreamedSummary
from blueprints.documents.models import Document
from tests.service.llm_server import SUMMARY, LLMServer, delta, event
from tta_sync import WorkflowContext, call_sync, iterate_sync, step
from tta_sync.facade import default_facade

MakeClient = Callable[..., FlaskClient]
Events = list[tuple[str, Any]]

TEXT = "The bridge carries async work. Callers stay synchronous."
SENTENCES = ["The bridge carries async work.", " Callers stay synchronous."]
TOKENS = ["A", " summary", " from", " the", " provider."]
MODEL = "test-model"
# For a provider that hangs: as a whole it then has 3 s, a piece 0.5 s.
QUICK = {"TTA_DEADLINE": 6, "TTA_LLM_TIMEOUT": 0.5}


@pytest.fixture
def client(llm: LLMServer, make_client: MakeClient) -> FlaskClient:
    """A service whose provider is the loopback one."""
    return make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_API_KEY="the-key", TTA_LLM_MODEL=MODEL)


@pytest.fixture
def quick_client(llm: LLMServer, make_client: MakeClient) -> FlaskClient:
    """The same, with little patience."""
    return make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_MODEL=MODEL, **QUICK)


def decode(raw: bytes) -> tuple[str, Any]:
    """Take one event apart, as strictly as it is promised: two lines and an empty one."""
    first, second, end = raw.decode("ascii").split("\n", 2)
    assert end == "\n"
    assert first.startswith("event: ")
    assert second.startswith("data: ")
    return first.removeprefix("event: "), json.loads(second.removeprefix("data: "))


def begin(client: FlaskClient, text: str = TEXT, **more: Any) -> TestResponse:
    """Return the response with the stream in it, of which the test client has awaited the first event."""
    response = client.post("/api/process/stream", json={"text": text, **more})
    assert response.status_code == 200, response.text
    assert response.content_type == "text/event-stream; charset=utf-8"
    return response


def read(client: FlaskClient, text: str = TEXT, **more: Any) -> Events:
    with begin(client, text, **more) as response:
        return [decode(raw) for raw in response.iter_encoded()]


def process(client: FlaskClient, text: str = TEXT, **more: Any) -> dict[str, Any]:
    """Stream a text; return the document after checking all that holds for every stream that is done."""
    events = read(client, text, **more)
    kind, document = events[-1]
    assert kind == "done", events[-1]
    assert "".join(heard(events)) == document["summary"]
    assert client.get(f"/api/documents/{document['id']}").json == document
    done: dict[str, Any] = document
    return done


def heard(events: Events) -> list[str]:
    """The pieces since the last reset."""
    pieces: list[str] = []
    for kind, data in events:
        if kind == "reset":
            assert (data, bool(pieces)) == ({}, True)
            pieces.clear()
        elif kind == "token":
            assert set(data) == {"text"}
            assert data["text"]
            pieces.append(data["text"])
    return pieces


def stored(client: FlaskClient) -> int:
    with client.application.extensions["database"].engine.connect() as connection:
        count: int = connection.scalar(sa.select(sa.func.count()).select_from(Document))
    return count


def outcome(document: dict[str, Any]) -> tuple[str, bool, bool]:
    return document["provider"], document["degraded"], document["cached"]


# ---- without a provider


def test_sentences_come_one_by_one_when_no_provider_is_set(make_client: MakeClient) -> None:
    """The local summary is told sentence by sentence, and is not degraded; the document is whole."""
    client = make_client()
    events = read(client)
    assert [kind for kind, _ in events] == ["token", "token", "done"]
    assert heard(events) == SENTENCES
    document = events[-1][1]
    assert outcome(document) == ("local", False, False)
    assert document["language"] == "en"
    assert document["word_count"] == 8
    assert "synchronous" in " ".join(document["keywords"])
    assert client.get("/api/documents").json == {"items": [document], "next_cursor": None}


def test_pieces_are_whole_sentences_when_the_text_is_long(make_client: MakeClient) -> None:
    """A long text is told by sentences of its own, as many as its summary has."""
    text = (
        "The event loop runs on one thread. It rained. Every caller of the event loop waits for the event loop. " * 30
    )
    events = read(make_client(), text)
    assert [piece.strip() for piece in heard(events)] == local.summary_sentences(text)
    assert len(heard(events)) == 2
    assert events[-1][1]["summary"] == local.summarise(text)


def test_only_the_tasks_asked_for_are_done(make_client: MakeClient) -> None:
    """As with /api/process, what was not asked for is empty."""
    document = process(make_client(), tasks=["summary"])
    assert (document["summary"], document["keywords"], document["language"]) == (TEXT, [], None)


@pytest.mark.parametrize("text", ["line\u2028separator", "a\r\nb\rc\n\nd", "日本語。テスト。", "An emoji: 👩‍👩‍👧. 😀!"])
def test_any_character_arrives_as_it_is(make_client: MakeClient, text: str) -> None:
    """Line breaks and characters of any plane neither break an event nor change."""
    assert process(make_client(), text)["summary"] == local.summarise(text)


# ---- the response


def test_response_is_kept_by_no_cache_and_held_by_no_proxy(make_client: MakeClient) -> None:
    """The headers say so, and the request's id is in them as in the document."""
    response = make_client().post("/api/process/stream", json={"text": TEXT}, headers={"X-Request-ID": "r-1"})
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["X-Request-ID"] == "r-1"
    assert response.content_length is None
    *_, done = response.get_data().split(b"\n\n")[:-1]
    assert decode(done + b"\n\n")[1]["correlation_id"] == "r-1"


@pytest.mark.parametrize(
    ("body", "status", "fields"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b'{"text": "\xff"}', 400, None),
        (b"[" * 10_000, 400, None),
        (b'{"text": ""}', 422, {"text"}),
        (b'{"text": "a\\u0000b"}', 422, {"text"}),
        (b'{"text": "\\ud800"}', 422, {"text"}),
        (b'{"text": "a", "colour": 1}', 422, {"colour"}),
        (b'{"text": "a", "tasks": []}', 422, {"tasks"}),
        (b'{"text": "a", "tasks": ["song"]}', 422, {"tasks"}),
        (b'{"text": "a", "tasks": ["keywords", "language"]}', 422, {"tasks"}),
        (json.dumps({"text": "a" * 200_001}).encode(), 422, {"text"}),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else "",
)
def test_bad_body_is_refused_before_the_stream_begins(
    client: FlaskClient, llm: LLMServer, body: bytes, status: int, fields: set[str] | None
) -> None:
    """It is a plain 4xx problem, as from /api/process; nobody is asked and nothing is stored."""
    response = client.post("/api/process/stream", data=body, content_type="application/json")
    assert response.status_code == status
    assert response.content_type == "application/problem+json"
    assert response.json["code"]
    assert response.json["correlation_id"] == response.headers["X-Request-ID"]
    assert response.json.get("errors", {}).keys() == (fields or set())
    assert (stored(client), llm.calls) == (0, 0)


def test_wrong_method_type_or_size_is_refused_before_the_stream_begins(make_client: MakeClient) -> None:
    """405 with Allow, 415 and 413, as with /api/process."""
    client = make_client(TTA_MAX_BODY=1000)
    wrong = client.get("/api/process/stream")
    assert (wrong.status_code, "POST" in wrong.headers["Allow"]) == (405, True)
    assert client.post("/api/process/stream", data="text=a").status_code == 415
    assert client.post("/api/process/stream", json={"text": "a" * 1000}).status_code == 413


# ---- a provider that works


def test_tokens_come_one_by_one_when_the_provider_streams(client: FlaskClient, llm: LLMServer) -> None:
    """Each token is sent on before the provider says the next one; the document is stored after the last."""
    llm.mode = "paced"
    llm.go()
    with begin(client) as response:
        arriving = response.iter_encoded()
        for token in TOKENS:
            assert decode(next(arriving)) == ("token", {"text": token})
            assert stored(client) == 0
            llm.go()
        (done,) = [decode(raw) for raw in arriving]
    assert done[0] == "done"
    assert (done[1]["summary"], *outcome(done[1])) == (SUMMARY, MODEL, False, False)
    assert stored(client) == 1


def test_provider_is_asked_as_always_but_for_the_stream(client: FlaskClient, llm: LLMServer) -> None:
    """Same address, key, model and messages as for /api/process; only the stream is asked for in addition."""
    process(client)
    client.post("/api/process", json={"text": TEXT + " More."})
    streamed, plain = llm.requests
    assert streamed["body"].pop("stream") is True
    assert streamed["headers"]["Authorization"] == "Bearer the-key"
    assert streamed["headers"]["Accept-Encoding"] == "identity"
    assert (streamed["path"], streamed["body"]["model"]) == (plain["path"], MODEL)
    plain["body"]["messages"][1]["content"] = TEXT
    assert streamed["body"] == plain["body"]


def test_connection_is_kept_when_a_stream_has_ended(client: FlaskClient, llm: LLMServer) -> None:
    """Streams and plain calls share the pooled connections: what follows [DONE] is read."""
    for number in range(3):
        process(client, f"{TEXT} {number}")
        assert client.post("/api/process", json={"text": f"{TEXT} {number} plain"}).json["provider"] == MODEL
    assert len({request["port"] for request in llm.requests}) == 1


END = {"index": 0, "delta": {"content": "Short."}, "finish_reason": "stop"}
ENDS = {
    "by saying so without another line": ("raw", [event(delta("Short.")), b"data: [DONE]"]),
    "by saying so and going on": ("raw", [event({"choices": [END]}), b": " + b"x" * provider.MAX_ANSWER]),
    "by saying so and never hanging up": ("open", [event({"choices": [END]})]),
}


@pytest.mark.parametrize(("mode", "raw"), ENDS.values(), ids=ENDS)
def test_stream_is_done_when_the_summary_is(
    quick_client: FlaskClient, llm: LLMServer, monkeypatch: pytest.MonkeyPatch, mode: str, raw: list[bytes]
) -> None:
    """What a provider sends after the summary's end, or does not send, spoils nothing, and is not waited for."""
    monkeypatch.setattr(provider, "DRAIN_SECONDS", 2 * QUICK["TTA_LLM_TIMEOUT"])
    llm.mode, llm.raw = mode, raw
    document = process(quick_client)
    assert (document["summary"], *outcome(document)) == ("Short.", MODEL, False, False)
    if mode == "open":
        assert llm.left.acquire(timeout=20)


def test_time_for_a_token_begins_anew_with_each(llm: LLMServer, make_client: MakeClient) -> None:
    """TTA_LLM_TIMEOUT is for the next token: all together may take longer."""
    client = make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_MODEL=MODEL, TTA_LLM_TIMEOUT=3)
    llm.mode = "paced"
    llm.go()
    began = time.monotonic()
    with begin(client) as response:
        arriving = response.iter_encoded()
        for token in TOKENS:
            assert decode(next(arriving)) == ("token", {"text": token})
            time.sleep(0.8)  # the provider's, not a wait for something
            llm.go()
        kind, document = decode(next(arriving))
    assert time.monotonic() - began > 3
    assert (kind, *outcome(document)) == ("done", MODEL, False, False)


def test_provider_that_does_not_stream_is_heard_as_one_piece(client: FlaskClient, llm: LLMServer) -> None:
    """A plain answer is one token."""
    llm.mode = "ignored"
    events = read(client)
    assert heard(events) == [SUMMARY]
    assert outcome(events[-1][1]) == (MODEL, False, False)


def test_cache_is_shared_with_plain_requests_in_both_directions(client: FlaskClient, llm: LLMServer) -> None:
    """What was streamed once answers /api/process, and the other way round; a hit is one token, and says cached."""
    assert not process(client)["cached"]
    plain = client.post("/api/process", json={"text": TEXT}).json
    assert (plain["summary"], *outcome(plain)) == (SUMMARY, MODEL, False, True)
    assert not client.post("/api/process", json={"text": TEXT + " Two."}).json["cached"]
    events = read(client, TEXT + " Two.")
    assert heard(events) == [SUMMARY]
    assert outcome(events[-1][1]) == (MODEL, False, True)
    assert llm.calls == 2
    assert stored(client) == 4


def test_every_stream_hears_its_tokens_when_many_want_the_same(client: FlaskClient, llm: LLMServer) -> None:
    """Streams of one text at once do not wait for each other, nor for a plain request for it."""
    llm.script = ["held"]
    with ThreadPoolExecutor(5) as threads:
        plain = threads.submit(client.application.test_client().post, "/api/process", json={"text": TEXT})
        assert llm.arrived.acquire(timeout=20)
        streams = [threads.submit(read, client.application.test_client()) for _ in range(4)]
        for future in streams:
            events = future.result(timeout=20)
            # The first of them to end leaves the answer for those that have not yet begun.
            assert heard(events) == ([SUMMARY] if events[-1][1]["cached"] else TOKENS)
        assert not plain.done()
        llm.release.set()
        assert plain.result(timeout=20).json["summary"] == SUMMARY


def test_stream_is_no_hit_when_another_one_was_quicker(client: FlaskClient, llm: LLMServer) -> None:
    """Whoever asked the provider does not say cached, even if the answer lay there by the time it had its own."""
    llm.script = ["paced"]
    llm.go()
    with begin(client) as slow:
        assert outcome(process(client)) == (MODEL, False, False)
        llm.go(len(TOKENS))
        kind, document = [decode(raw) for raw in slow.iter_encoded()][-1]
    assert (kind, *outcome(document)) == ("done", MODEL, False, False)
    assert process(client)["cached"]
    assert llm.calls == 2


# ---- a provider that fails


@pytest.mark.parametrize(
    ("mode", "calls"),
    [
        *[(mode, 3) for mode in ("unavailable", "closed", "truncated")],
        *[(mode, 1) for mode in ("limited", "refused", "redirect", "garbage", "gzip", "empty", "wrong", "nul", "huge")],
        *[(mode, 1) for mode in ("number", "surrogate", "long", "deep", "list")],
    ],
)
def test_sentences_come_when_the_provider_fails_before_its_first_token(
    client: FlaskClient, llm: LLMServer, mode: str, calls: int
) -> None:
    """The local summary is told instead, nothing has to be unsaid; only what may pass is tried again."""
    llm.mode, llm.retry_after = mode, "3600"
    events = read(client)
    assert [kind for kind, _ in events] == ["token", "token", "done"]
    assert heard(events) == SENTENCES
    assert outcome(events[-1][1]) == ("local", True, False)
    assert llm.calls == calls


def test_tokens_come_when_another_attempt_does_better(client: FlaskClient, llm: LLMServer) -> None:
    """Before its first token a provider may fail twice."""
    llm.script = ["unavailable", "closed"]
    events = read(client)
    assert heard(events) == TOKENS
    assert outcome(events[-1][1]) == (MODEL, False, False)
    assert llm.calls == 3


@pytest.mark.parametrize("mode", ["cut", "ended", "spoiled", "stalled"])
def test_tokens_are_unsaid_when_the_provider_fails_after_some(
    quick_client: FlaskClient, llm: LLMServer, mode: str
) -> None:
    """A reset, then the local summary, degraded: nobody is left with half a sentence. Nothing is kept in the cache."""
    llm.script = [mode]
    events = read(quick_client)
    assert [kind for kind, _ in events] == ["token", "token", "reset", "token", "token", "done"]
    assert [data["text"] for _, data in events[:2]] == TOKENS[:2]
    assert heard(events) == SENTENCES
    assert (events[-1][1]["summary"], *outcome(events[-1][1])) == (TEXT, "local", True, False)
    assert llm.calls == 1  # another attempt would say other words
    assert outcome(process(quick_client)) == (MODEL, False, False)


@pytest.mark.parametrize(
    "bad",
    [
        delta("a\x00b"),
        delta(42),
        delta("x" * 20_001),
        delta("\ud800"),
        {"error": {"message": "overloaded"}},
        {"choices": "none"},
        {"choices": [7]},
        {"choices": [{"delta": "text"}]},
        [],
        None,
    ],
    ids=lambda bad: repr(bad)[:60],
)
def test_tokens_are_unsaid_when_a_chunk_is_no_part_of_a_summary(client: FlaskClient, llm: LLMServer, bad: Any) -> None:
    """What could not be stored, or is no chunk of a chat completion, counts as a failure."""
    raw = f"data: {json.dumps(bad)}\n\n".encode()
    llm.mode, llm.raw = "raw", [event(delta("Half a")), raw, event(delta(" summary")), b"data: [DONE]\n\n"]
    events = read(client)
    assert [kind for kind, _ in events[:3]] == ["token", "reset", "token"]
    assert heard(events) == SENTENCES
    assert outcome(events[-1][1]) == ("local", True, False)


def test_sentences_come_in_time_when_the_provider_says_nothing(quick_client: FlaskClient, llm: LLMServer) -> None:
    """The first token has TTA_LLM_TIMEOUT; comments and empty chunks are none."""
    for mode in ("slow", "drip"):
        llm.mode = mode
        began = time.monotonic()
        assert outcome(process(quick_client)) == ("local", True, False)
        assert time.monotonic() - began < QUICK["TTA_DEADLINE"]


def test_sentences_come_in_time_when_the_tokens_have_no_end(quick_client: FlaskClient, llm: LLMServer) -> None:
    """However steadily it talks, the provider has TTA_DEADLINE - 3 s as a whole; its connection is closed then."""
    llm.mode = "trickle"
    began = time.monotonic()
    events = read(quick_client)
    assert time.monotonic() - began < QUICK["TTA_DEADLINE"]
    assert len(events) > 6
    assert heard(events) == SENTENCES
    assert outcome(events[-1][1]) == ("local", True, False)
    assert llm.left.acquire(timeout=20)


def test_circuit_is_shared_with_plain_requests(
    llm: LLMServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams that break off open the circuit for plain requests, too; an open one is told locally, at once."""
    monkeypatch.setattr(workflow, "FAILURE_THRESHOLD", 4)
    client = make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_MODEL=MODEL)
    llm.mode = "cut"
    for number in range(3):
        assert process(client, f"{TEXT} {number}")["degraded"]
    llm.mode = "garbage"
    assert client.post("/api/process", json={"text": TEXT}).json["degraded"]
    llm.mode = "good"
    events = read(client)
    assert [kind for kind, _ in events] == ["token", "token", "done"]
    assert events[-1][1]["degraded"]
    assert client.post("/api/process", json={"text": TEXT}).json["degraded"]
    assert llm.calls == 4


def test_neither_key_nor_text_is_in_the_logs_when_the_provider_fails(
    client: FlaskClient, llm: LLMServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its failures are logged in a line each, without what is nobody's business, and without a traceback."""
    caplog.set_level(logging.INFO)
    for mode in ("cut", "spoiled", "refused"):
        llm.mode = mode
        process(client)
    assert len([line for line in caplog.messages if "the provider failed" in line]) == 3
    assert "the-key" not in caplog.text
    assert "bridge" not in caplog.text
    assert "Traceback" not in caplog.text


# ---- failures of our own, once the stream has begun


def test_error_is_the_last_event_when_saving_fails(make_client: MakeClient) -> None:
    """The status is long gone: the problem comes as an event, with the request's id."""
    client = make_client()
    with client.application.extensions["database"].engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE documents"))
    response = client.post("/api/process/stream", json={"text": TEXT}, headers={"X-Request-ID": "r-2"})
    events = [decode(raw) for raw in response.iter_encoded()]
    assert [kind for kind, _ in events] == ["token", "token", "error"]
    problem = events[-1][1]
    assert (problem["status"], problem["code"]) == (503, "database_unavailable")
    assert problem["correlation_id"] == "r-2"


def test_error_says_nothing_and_is_logged_when_nobody_foresaw_it(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug is a 500 without detail for the client, and a traceback in the log."""

    def broken(text: str) -> int:
        raise LookupError("a secret")

    monkeypatch.setattr(local, "count_words", broken)
    client = make_client()
    kind, problem = read(client)[-1]
    assert (kind, problem["status"]) == ("error", 500)
    assert "secret" not in json.dumps(problem)
    assert "LookupError: a secret" in caplog.text
    assert stored(client) == 0


def test_deadline_ends_the_stream_when_it_passes_in_the_middle(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TTA_DEADLINE holds for the whole stream, and nothing is stored that comes later."""
    go_on = threading.Event()
    monkeypatch.setattr(local, "count_words", lambda text: go_on.wait(20) and 1)
    client = make_client(TTA_DEADLINE=3.2)
    began = time.monotonic()
    try:
        events = read(client)
    finally:
        go_on.set()
    assert time.monotonic() - began < 8
    assert heard(events) == SENTENCES
    kind, problem = events[-1]
    assert (kind, problem["status"], problem["code"]) == ("error", 504, "deadline_exceeded")
    assert stored(client) == 0


def test_nothing_is_stored_when_the_reader_takes_longer_than_the_deadline(
    client: FlaskClient, llm: LLMServer, make_client: MakeClient, eventually: Callable[..., Any]
) -> None:
    """The deadline holds for a client that does not read, too: what was promised in time is not given late."""
    client = make_client(TTA_DEADLINE=3.2)
    with begin(client) as response:
        arriving = response.iter_encoded()
        assert decode(next(arriving)) == ("token", {"text": SENTENCES[0]})
        give_up = time.monotonic() + 3.3
        eventually(lambda: time.monotonic() > give_up)
        assert [decode(raw)[0] for raw in arriving][-1] == "error"
    assert stored(client) == 0


# ---- where it runs


def test_document_is_saved_on_the_requests_own_thread(client: FlaskClient) -> None:
    """The session is used where the request is, in one transaction, after the provider has said all."""
    seen = []
    engine = client.application.extensions["database"].engine

    @sa.event.listens_for(engine, "before_cursor_execute")
    def look(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append((statement.split()[0], threading.get_ident(), has_request_context()))

    with begin(client) as response:
        arriving = response.iter_encoded()
        next(arriving)
        assert seen == []
        list(arriving)
    assert "INSERT" in {statement for statement, _, _ in seen}
    assert {(ident, inside) for _, ident, inside in seen} == {(threading.get_ident(), True)}


def test_comment_is_sent_when_nothing_is_said_for_long(
    client: FlaskClient, llm: LLMServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps proxies from hanging up, finds out about clients that have, and loses no token."""
    monkeypatch.setattr(stream, "KEEP_ALIVE", 0.05)
    silence = b": keep-alive\n\n"
    llm.mode = "paced"
    with begin(client) as response:
        arriving = response.iter_encoded()
        for token in TOKENS:
            assert next(arriving) == silence
            llm.go()
            assert decode(next(raw for raw in arriving if raw != silence)) == ("token", {"text": token})
        llm.go()
        assert decode(list(arriving)[-1])[1]["summary"] == SUMMARY


# ---- a client that goes away


@pytest.fixture
def left_in_the_middle(client: FlaskClient, llm: LLMServer) -> Iterator[TestResponse]:
    """A response of which one token was read, and whose provider has more to say."""
    llm.mode = "paced"
    llm.go()
    response = begin(client)
    yield response
    response.close()


async def running() -> set[str]:
    """What runs on the loop."""
    return {task.get_name() for task in asyncio.all_tasks()}


def test_work_ends_when_the_response_is_closed(
    left_in_the_middle: TestResponse, client: FlaskClient, llm: LLMServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The provider's connection is closed, nothing is stored, nothing runs on, and nobody complains."""
    orphans = default_facade().stats().orphans
    left_in_the_middle.close()
    assert "document stream" not in call_sync(running)
    assert default_facade().in_flight() == []
    assert llm.left.acquire(timeout=20)
    assert stored(client) == 0
    assert not has_request_context()
    assert caplog.messages == []
    assert default_facade().stats().orphans == orphans


def test_provider_is_not_blamed_when_the_client_leaves(
    client: FlaskClient, llm: LLMServer, monkeypatch: pytest.MonkeyPatch, make_client: MakeClient
) -> None:
    """Clients that go away open no circuit."""
    monkeypatch.setattr(workflow, "FAILURE_THRESHOLD", 2)
    client = make_client(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_MODEL=MODEL)
    llm.mode = "paced"
    for _ in range(4):
        llm.go()
        begin(client).close()
        assert llm.left.acquire(timeout=20)
    llm.mode = "good"
    assert outcome(process(client)) == (MODEL, False, False)


def start_response(status: str, headers: Any, error: Any = None) -> Callable[[bytes], object]:
    assert status == "200 OK"
    return lambda written: None


@pytest.mark.parametrize("ends", ["closed", "dropped"])
def test_work_ends_when_the_response_is_never_read(
    ends: str, client: FlaskClient, llm: LLMServer, eventually: Callable[..., Any]
) -> None:
    """A response that is closed, or dropped, before its first event ends the work as well."""
    llm.mode = "paced"
    environ = EnvironBuilder(path="/api/process/stream", method="POST", json={"text": TEXT}).get_environ()
    response: Any = client.application.wsgi_app(environ, start_response)
    assert llm.arrived.acquire(timeout=20)
    if ends == "closed":
        response.close()
    del response
    gc.collect()  # a traceback somewhere may hold what was dropped
    assert llm.left.acquire(timeout=20)
    eventually(lambda: default_facade().in_flight() == [])
    assert stored(client) == 0


def test_failure_at_the_end_is_told_to_the_log_when_the_client_has_left(
    left_in_the_middle: TestResponse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where closing fails there is nobody to send it to: one line in the log, and the server is not troubled."""
    from tta_sync.runtime.streaming import Stream

    close = Stream.close

    def broken(self: Stream[Any]) -> None:
        close(self)
        raise LookupError("late")

    monkeypatch.setattr(Stream, "close", broken)
    left_in_the_middle.close()
    assert caplog.messages == ["a stream that its client had left ended with LookupError"]


def test_nobody_complains_when_the_clean_up_fails_after_the_client_has_left(caplog: pytest.LogCaptureFixture) -> None:
    """A failure that nobody can be told of any more ends with the stream, and asyncio has nothing to say about it."""

    async def branches(data: Any, context: WorkflowContext) -> None:
        listener = workflow.listener_of(context)
        assert listener is not None
        listener.say("One")
        try:
            await asyncio.sleep(3600)
        finally:
            raise LookupError("in the clean-up")

    events = iterate_sync(stream.DocumentStream(step(branches)), {})
    assert next(events) == ("token", {"text": "One"})
    events.close()
    gc.collect()
    call_sync(asyncio.sleep, 0)
    assert caplog.messages == []


# ---- reading a stream: pure functions of the bytes


def summary_of(raw: bytes, *cuts: int) -> str:
    """What is heard of *raw*, cut where *cuts* says."""
    reader, summary = ChunkReader(), StreamedSummary()
    said = []
    for begin_, end in zip((0, *cuts), (*cuts, len(raw)), strict=True):
        said += [summary.add(chunk) for chunk in reader.feed(raw[begin_:end])]
    said += [summary.add(chunk) for chunk in reader.end()]
    assert "".join(said) == summary.end()
    return summary.end()


SAID = "Grüße, 世界 😀"
WHOLE = event(delta(SAID))
WELL = {
    "as most send it": event(delta("Grüße, ")) + event(delta("世界 😀")) + b"data: [DONE]\n\n",
    "with CRLF": WHOLE.replace(b"\n", b"\r\n") + b"data: [DONE]\r\n\r\n",
    "with CR": WHOLE.replace(b"\n", b"\r"),
    "with a mark at its start": b"\xef\xbb\xbf" + WHOLE,
    "without a space": WHOLE.replace(b"data: ", b"data:"),
    "with comments and fields": b": hello\n\nevent: chunk\nid: 1\nretry: 5\n" + WHOLE + b":\n\n",
    "in several lines": WHOLE.replace(b'{"', b'{\ndata: "'),
    "in several lines with CRLF": WHOLE.replace(b'{"', b'{\ndata: "').replace(b"\n", b"\r\n"),
    "without empty lines": (event(delta("Grüße,")) + event(delta(" 世界 😀"))).replace(b"\n\n", b"\n"),
    "without an end": WHOLE.rstrip(),
    "in halves of characters": WHOLE.replace("😀".encode(), b"\\ud83d")
    + b'data: {"choices":[{"delta":{"content":"\\ude00"}}]}\n\n',
    "in white space": event(delta(" \n ")) + event(delta("\tGrüße, ")) + event(delta("世界 😀 ")) + event(delta("\n")),
    "with chunks that say nothing": b"".join(
        map(event, [{"choices": []}, delta(None), delta(""), {"choices": [{}]}, {"choices": [{"delta": None}]}])
    )
    + WHOLE,
    "with more after its end": WHOLE + b"data: [DONE]\n\n" + event(delta("!")) + b"data: {\n\n",
}


@pytest.mark.parametrize("raw", WELL.values(), ids=WELL)
def test_summary_is_the_same_wherever_the_network_cuts(raw: bytes) -> None:
    """Lines, line ends and characters may be cut anywhere; every way to write a stream that there is, is read."""
    assert summary_of(raw) == SAID
    for cut in range(len(raw)):
        assert summary_of(raw, cut) == SAID
    assert summary_of(raw, *range(1, len(raw))) == SAID


def test_piece_is_said_with_the_chunk_that_brings_it() -> None:
    """Only white space, which may be the end's, and half a character wait for the next chunk."""
    summary = StreamedSummary()
    said = [summary.add(delta(text)) for text in ("  ", "One", " two ", " ", "three\n", "four \ud83d", "\ude00", " ")]
    assert said == ["", "One", " two", "", "  three", "\nfour", " 😀", ""]
    assert summary.end() == "One two  three\nfour 😀"


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"data: {oops\n\n", "not JSON"),
        (b'data: "\xff"\n\n', "not JSON"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "not JSON"),
        (b"data: {\ndata: [DONE]\n\n", "not JSON"),
        (b"data: {oops", "not JSON"),
        (b": " + b"x" * chunks.MAX_LINE, "line .* longer"),
        (b"data:\n" * (chunks.MAX_STREAM // 6 + 1), "stream is longer"),
        (b'data: {"choices":[{"delta":{"content":"\\udc00"}}]}\n\n', "surrogate"),
        (b'data: {"choices":[{"delta":{"content":"a\\ud800"}}]}\n\n', "surrogate"),
        (event(delta("a\x00b")), "NUL"),
        (event(delta(["text"])), "not a text"),
        (event([]), "no choices"),
        (event(delta("x" * 10_001)) * 2, "summary is longer"),
        (event(delta(" " * 20_001)), "summary is longer"),
        (event(delta(" \n ")), "empty"),
        (b"data: [DONE]\n\n", "empty"),
        (b"<html>Welcome to nginx!</html>", "empty"),
        (b"", "empty"),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_stream_is_refused_when_it_is_none_or_has_no_bounds(raw: bytes, why: str) -> None:
    """Whatever is not JSON, not a summary, or too much of anything is the provider's failure."""
    with pytest.raises(MalformedAnswerError, match=why):
        summary_of(raw)


def test_long_line_is_refused_when_it_comes_in_small_parts() -> None:
    """The bound holds for a line that never ends, before it has filled the memory."""
    reader = ChunkReader()
    for _ in range(chunks.MAX_LINE // 64):
        assert list(reader.feed(b"x" * 64)) == []
    with pytest.raises(MalformedAnswerError, match="line"):
        list(reader.feed(b"x"))


def test_longest_summary_fits_into_one_line() -> None:
    """The bounds do not contradict each other: each character may take two escapes."""
    raw = b'data: {"choices":[{"delta":{"content":"' + b"\\ud83d\\ude00" * chunks.MAX_SUMMARY + b'"}}]}\n\n'
    assert summary_of(raw) == "😀" * chunks.MAX_SUMMARY
