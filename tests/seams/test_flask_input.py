"""What Flask views load: strict JSON, bounded, and every bad body answered with the right 4xx."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from hypothesis import given, strategies as st
from marshmallow import Schema, fields, validate

from tta_sync.flask import Problem, TTASync
from tta_sync.flask.body import parse_json, unsafe_strings
from tta_sync.flask.problems import flatten_errors
from tta_sync.primitives.core.base import step


class Item(Schema):
    text = fields.String(required=True, validate=validate.Length(min=1, max=1000))


class Body(Schema):
    text = fields.String(required=True, validate=validate.Length(min=1, max=1000))
    tasks = fields.List(fields.String(validate=validate.OneOf(["summary", "keywords"])))
    items = fields.List(fields.Nested(Item))
    extra = fields.Dict()


@step
async def count(data: dict[str, Any]) -> dict[str, Any]:
    return {"length": len(data["text"])}


def make_app() -> Flask:
    application = Flask(__name__)
    tta = TTASync(application, problems="app")
    application.add_url_rule("/", "view", tta.workflow(count, load=Body)(lambda r: r), methods=["POST"])
    return application


@pytest.fixture
def post() -> Callable[..., Any]:
    client = make_app().test_client()

    def send(body: bytes | str, content_type: str | None = "application/json", **more: Any) -> Any:
        return client.post("/", data=body, content_type=content_type, **more)

    return send


def refused(response: Any, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(response.data)
    assert (response.status_code, body["code"]) == (status, code), body
    assert response.content_type == "application/problem+json"
    assert body["correlation_id"]
    return body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"{'text': 'x'}",
        b'{"text": "x"',
        b'{"text": "x"} {}',
        b'{"text": "x",}',
        b'\xff\xfe{"text"',
        b'{"text": "\xed\xa0\x80"}',
        b'{"text": "a\x00b"}',
        b'{"text": "a\nb"}',
        b'{"extra": {"n": NaN}}',
        b'{"extra": {"n": Infinity}}',
        b'{"extra": {"n": -Infinity}}',
        b'{"extra": {"n": 1e999}}',
        b'{"extra": {"n": ' + b"9" * 5000 + b"}}",
        b"[" * 10_000 + b"]" * 10_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b"[" * 100_000,
        b'{"text": "a", "text": "b"}',
        b'{"text": "a", "extra": {"k": 1, "k": 1}}',
        '{"text": "a"}'.encode("utf-16"),
    ],
)
def test_body_is_400_when_it_is_no_json_that_can_be_read(post: Callable[..., Any], body: bytes) -> None:
    """Not JSON, not UTF-8, a number or a nesting that cannot be held, a member named twice: 400."""
    detail = refused(post(body), 400, "malformed_json")["detail"]
    assert len(detail) < 300
    assert "\x00" not in detail


def test_nesting_is_bounded_by_a_setting() -> None:
    """TTA_MAX_DEPTH levels are read, one more is refused."""
    assert parse_json(b"[" * 100 + b"]" * 100)
    with pytest.raises(Problem) as caught:
        parse_json(b"[" * 101 + b"]" * 101)
    assert caught.value.code == 400
    assert parse_json(b'{"a": [{"b": []}]}', max_depth=4)
    with pytest.raises(Problem):
        parse_json(b'{"a": [{"b": []}]}', max_depth=3)
    assert len(parse_json(b"[" + b"[]," * 1000 + b"[]]", max_depth=2)) == 1001


def test_byte_order_mark_is_passed_over() -> None:
    """RFC 8259 lets a parser ignore it, and some clients send it."""
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "text/json"])
def test_body_is_415_when_it_is_not_declared_as_json(post: Callable[..., Any], content_type: str | None) -> None:
    """Another content type, or none, is 415 whatever the body."""
    refused(post('{"text": "a"}', content_type), 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", "application/merge-patch+json"]
)
def test_body_is_read_when_it_is_declared_as_json(post: Callable[..., Any], content_type: str) -> None:
    """application/json with parameters, and its relatives, are read."""
    assert post('{"text": "\N{SNOWMAN}"}'.encode(), content_type).json == {"length": 1}


def test_body_is_415_when_it_is_compressed(post: Callable[..., Any]) -> None:
    """A Content-Encoding that we do not undo is refused, not misread."""
    refused(post(b"\x1f\x8b", headers={"Content-Encoding": "gzip"}), 415, "unsupported_media_type")
    assert post(b'{"text": "a"}', headers={"Content-Encoding": "identity"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ("null", "_schema"),
        ("[]", "_schema"),
        ('"text"', "_schema"),
        ("1", "_schema"),
        ("{}", "text"),
        ('{"text": null}', "text"),
        ('{"text": 1}', "text"),
        ('{"text": ""}', "text"),
        ('{"text": "%s"}' % ("a" * 1001), "text"),
        ('{"text": "a", "bogus": 1}', "bogus"),
        ('{"text": "a", "tasks": "summary"}', "tasks"),
        ('{"text": "a", "tasks": ["bogus"]}', "tasks"),
        ('{"text": "a", "tasks": ["summary", 1]}', "tasks"),
        ('{"text": "a", "items": [{"text": "a"}, {"text": ""}]}', "items.1.text"),
        ('{"text": "a", "items": [1]}', "items"),
        (r'{"text": "a\u0000b"}', "text"),
        (r'{"text": "\ud800"}', "text"),
        (r'{"text": "\uDFFF\uD800"}', "text"),
        (r'{"text": "a", "bo\u0000gus": 1}', "bo\ufffdgus"),
        (r'{"text": "a", "extra": {"\ud800": 1}}', "extra.\ufffd"),
        (r'{"text": "a", "extra": {"deep": [[{"er": "\u0000"}]]}}', "extra.deep.0.0.er"),
        (r'{"text": "a", "tasks": ["\u0000"]}', "tasks"),
        (r'"\u0000"', "_schema"),
    ],
)
def test_body_is_422_with_field_errors_when_it_is_json_but_not_valid(
    post: Callable[..., Any], body: str, field: str
) -> None:
    """Well-formed but not valid, NUL and lone surrogates included: 422, {field: [messages]}."""
    errors = refused(post(body.encode()), 422, "validation_error")["errors"]
    assert field in errors
    assert all(isinstance(m, str) and m for messages in errors.values() for m in messages)
    assert all(isinstance(messages, list) for messages in errors.values())


def test_item_is_named_when_a_list_of_plain_values_has_a_bad_one(post: Callable[..., Any]) -> None:
    """The message says which of the items, the key says which field."""
    errors = refused(post(b'{"text": "a", "tasks": ["summary", "bogus"]}'), 422, "validation_error")["errors"]
    assert errors == {"tasks": ["Item 1: Must be one of: summary, keywords."]}


def test_surrogate_pairs_and_escaped_backslashes_are_fine(post: Callable[..., Any]) -> None:
    """A pair of surrogate escapes is one character, and \\\\u0000 is text."""
    assert post(rb'{"text": "\ud83d\ude00"}').json == {"length": 1}
    assert post(rb'{"text": "\\u0000"}').json == {"length": 6}


def test_answer_is_bounded_when_a_million_things_are_wrong(post: Callable[..., Any]) -> None:
    """Neither the number of messages nor a field's name grows with the request."""
    many = {"text": "a", **{f"{i}" + "x" * 300: 1 for i in range(5000)}}
    response = post(json.dumps(many))
    errors = refused(response, 422, "validation_error")["errors"]
    assert len(response.data) < 60_000
    assert max(map(len, errors)) <= 200
    unsafe = {"text": "a", "items": [{"text": "\x00"} for _ in range(5000)]}
    response = post(json.dumps(unsafe))
    refused(response, 422, "validation_error")
    assert len(response.data) < 60_000
    assert len(unsafe_strings(unsafe)) == 100
    response = post(json.dumps({"text": "a", "tasks": ["bogus"] * 5000}))
    refused(response, 422, "validation_error")
    assert len(response.data) < 60_000


def test_errors_flatten_to_lists_by_field() -> None:
    """Whatever marshmallow gives becomes {field: [messages]}; order is kept."""
    assert flatten_errors({"a": ["x", "y"], "b": {"c": {0: {"d": ["z"]}}}}) == {"a": ["x", "y"], "b.c.0.d": ["z"]}
    assert flatten_errors({"a": {0: ["x"], 2: ["y"]}}) == {"a": ["Item 0: x", "Item 2: y"]}
    assert flatten_errors({"a": {0: {1: ["x"]}}}) == {"a": ["Item 0.1: x"]}
    assert flatten_errors({"a": {"_schema": ["x"]}, "_schema": ["y"]}) == {"a": ["x"], "_schema": ["y"]}
    assert flatten_errors({0: {"a": ["x"]}, 1: ["y"]}) == {"0.a": ["x"], "1": ["y"]}
    assert flatten_errors({"a": "x", "b": 1}) == {"a": ["x"], "b": ["1"]}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_parsing_gives_back_what_was_written(value: Any) -> None:
    """Whatever JSON can write within the bounds is read as it was meant."""
    assert parse_json(json.dumps(value).encode()) == value


@given(json_values)
def test_unsafe_strings_finds_exactly_those_that_cannot_be_stored(value: Any) -> None:
    """There is an error exactly where some string, key or value, has a NUL or no UTF-8 form."""

    def strings(part: Any) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            for key, inner in part.items():
                yield key
                yield from strings(inner)
        elif isinstance(part, list):
            for inner in part:
                yield from strings(inner)

    bad = any("\x00" in s or any("\ud800" <= c <= "\udfff" for c in s) for s in strings(value))
    assert bool(unsafe_strings(value)) == bad


@given(st.binary(max_size=200))
def test_parsing_never_fails_otherwise_than_with_a_problem(body: bytes) -> None:
    """Any bytes are JSON or a Problem."""
    with contextlib.suppress(Problem):
        parse_json(body)


def test_body_is_413_when_it_is_too_long(post: Callable[..., Any]) -> None:
    """Past MAX_CONTENT_LENGTH, or TTA_MAX_BODY where that is not set, a body is refused."""
    application = make_app()
    application.config["TTA_MAX_BODY"] = 100
    client = application.test_client()
    response = client.post("/", json={"text": "a" * 100})
    assert (response.status_code, response.content_type) == (413, "application/problem+json")
    assert client.post("/", json={"text": "a" * 50}).status_code == 200
    application.config["MAX_CONTENT_LENGTH"] = 200
    assert client.post("/", json={"text": "a" * 100}).status_code == 200
    assert client.post("/", json={"text": "a" * 200}).status_code == 413


SERVED = """
from flask import Flask
from marshmallow import Schema, fields
from tta_sync.flask import TTASync
from tta_sync.primitives.core.base import step

class Body(Schema):
    text = fields.String(required=True)

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 1000
tta = TTASync(app, problems="app")

@step
async def count(data):
    return {"length": len(data["text"])}

@app.post("/")
@tta.workflow(count, load=Body)
def view(result):
    return result
"""


@pytest.fixture
def gunicorn(tmp_path: Path, free_port: Callable[[], int], eventually: Callable[..., Any]) -> Iterator[int]:
    """A real gunicorn with one gthread worker; its port."""
    (tmp_path / "served.py").write_text(SERVED)
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "served:app", "--bind", f"127.0.0.1:{port}", "--chdir", str(tmp_path)]
    server = subprocess.Popen(
        [*command, "--threads", "2", "--no-control-socket", "--log-level", "error"],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    eventually(answers, what="gunicorn's socket")
    yield port
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0


def talk(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def chunked(body: bytes, size: int = 100) -> bytes:
    head = (
        b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def test_chunked_bodies_are_read_and_bounded_when_gunicorn_serves(gunicorn: int) -> None:
    """A body without Content-Length is read as any other, and refused with 413 past the limit."""
    answer = talk(gunicorn, chunked(b'{"text": "%s"}' % (b"a" * 500)))
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'{"length":500}' in answer
    answer = talk(gunicorn, chunked(b'{"text": "%s"}' % (b"a" * 5000)))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"application/problem+json" in answer
    exact = b'{"text": "%s"}' % (b"a" * 988)
    assert len(exact) == 1000
    assert talk(gunicorn, chunked(exact)).startswith(b"HTTP/1.1 200")
    assert talk(gunicorn, chunked(exact + b" ")).startswith(b"HTTP/1.1 413")
    assert talk(gunicorn, chunked(b"")).startswith(b"HTTP/1.1 400")
