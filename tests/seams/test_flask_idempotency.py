"""Idempotency keys on views: done once, replayed byte for byte, to nobody else."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from flask import Blueprint, Flask, Response, abort, make_response, request, send_file, session
from flask.views import MethodView
from hypothesis import given, settings, strategies as st
from marshmallow import Schema, fields
from werkzeug.exceptions import NotFound

from tta_sync.context import current_context
from tta_sync.exceptions import (
    ConfigurationError,
    IdempotencyMismatchError,
    LoopUnavailableError,
    SaturatedError,
)
from tta_sync.facade import run_sync
from tta_sync.flask import Problem, TTASync
from tta_sync.flask.idempotency import LocalKeys, parse_key
from tta_sync.primitives.core.base import step
from tta_sync.primitives.performance.stores import RedisBackend
from tta_sync.redis import IdempotencyStore


def make_site(url: str | None = None) -> Flask:
    site = Flask("legacy")
    site.config["TTA_DEADLINE"] = 60.0
    if url is not None:
        site.config["TTA_REDIS_URL"] = url
    return site


@pytest.fixture(params=["memory", "redis"])
def site(request: pytest.FixtureRequest) -> Flask:
    """An application without Redis, and one with it."""
    return make_site(request.getfixturevalue("url") if request.param == "redis" else None)


class Counter:
    """Counts what was done, and can be told what to answer, to fail, and to wait."""

    def __init__(self) -> None:
        self.done = 0
        self.answer: Callable[[], Any] = lambda: {"number": self.done}
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, **url: Any) -> Any:
        self.done += 1
        self.begun.set()
        assert self.go_on.wait(30)
        return self.answer()

    async def later(self, **url: Any) -> Any:
        self.done += 1
        self.begun.set()
        while not self.go_on.is_set():
            await asyncio.sleep(0.005)
        return self.answer()


@pytest.fixture(params=["plain", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def serve(site: Flask, kind: str = "plain", path: str = "/pay", **options: Any) -> Counter:
    """Put an idempotent view at *path*, and return what it does."""
    counter = Counter()

    def plain(**url: Any) -> Any:
        return counter(**url)

    async def asynchronous(**url: Any) -> Any:
        return await counter.later(**url)

    tta = TTASync(site)
    view = tta.idempotent(**options)(asynchronous if kind == "async" else plain)
    site.add_url_rule(path, path.strip("/"), view, methods=["GET", "POST", "PUT", "PATCH"])
    return counter


def post(site: Flask, key: str | None = "k", path: str = "/pay", data: Any = b"{}", **options: Any) -> Any:
    headers = dict(options.pop("headers", {}))
    if key is not None:
        headers["Idempotency-Key"] = key
    return site.test_client(use_cookies=False).open(path, method="POST", data=data, headers=headers, **options)


def refused(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.data
    assert response.content_type == "application/problem+json"
    body: dict[str, Any] = json.loads(response.data)
    assert (body["status"], body["code"]) == (status, code)
    return body


# ---- replay ----------------------------------------------------------------------------------------------------------


def test_first_response_is_replayed_when_a_request_comes_again(site: Flask, kind: str) -> None:
    """The view runs once; status, body and headers are the first one's, and a marker says so."""
    counter = serve(site, kind)
    counter.answer = lambda: (b"\x00\xff bytes", 201, {"Location": "/pay/1", "X-Own": "ü", "Content-Type": "x/y"})
    first, again, other = post(site), post(site), post(site, "other")
    assert counter.done == 2
    assert (first.status, first.data) == (again.status, again.data) == ("201 CREATED", b"\x00\xff bytes")
    for name in ("Location", "X-Own", "Content-Type", "Content-Length"):
        assert first.headers.getlist(name) == again.headers.getlist(name)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert "Idempotent-Replayed" not in other.headers
    assert first.headers["X-Request-ID"] != again.headers["X-Request-ID"]


@pytest.mark.parametrize(
    "answer",
    [
        lambda: "text ü 漢",
        lambda: ("", 204),
        lambda: (b"", 200, [("Link", "<a>"), ("Link", "<b>")]),
        lambda: ({"a": 1.5}, "202 Taken"),
        lambda: ("moved", 303, {"Location": "/elsewhere"}),
        lambda: ("\x01" * 1000, 404),
        lambda: (bytes(range(256)) * 4000, 200),
        lambda: make_response("made", 299),
        lambda: Problem(404, "no_such_account", "It was closed.", headers={"X-Own": "1"}),
        lambda: NotFound(),
    ],
)
def test_replay_is_the_same_byte_for_byte_whatever_was_answered(site: Flask, answer: Callable[[], Any]) -> None:
    """Empty, binary, large, escaped, errors of the client: all come back as they were."""
    counter = serve(site)
    counter.answer = answer
    first, again = post(site), post(site)
    assert counter.done == 1
    assert (first.status, first.data) == (again.status, again.data)
    own = [(name, value) for name, value in first.headers if name not in ("X-Request-ID", "Idempotent-Replayed")]
    theirs = [(name, value) for name, value in again.headers if name not in ("X-Request-ID", "Idempotent-Replayed")]
    assert own == theirs


def test_secrets_and_moments_are_not_kept_when_a_response_is(url: str) -> None:
    """No cookie, date or request id of the first response is in Redis, nor comes back."""
    site = make_site(url)
    counter = serve(site)
    counter.answer = lambda: (
        "done",
        200,
        {"Set-Cookie": "session=hidden", "Date": "yesterday", "X-Request-ID": "first", "Connection": "close"},
    )
    first, again = post(site, headers={"Authorization": "Bearer secret"}), None
    again = post(site, headers={"Authorization": "Bearer secret"})
    assert first.headers["Set-Cookie"] == "session=hidden"
    assert counter.done == 1
    assert not {"Set-Cookie", "Date", "Connection"} & set(again.headers.keys())
    with redis.Redis.from_url(url) as client:
        (name,) = client.keys("*:idempotency:*")
        stored = name + b"".join(client.hgetall(name).values())
        assert not any(word in stored for word in (b"hidden", b"secret", b"yesterday"))
        assert 86_300_000 < client.pttl(name) <= 86_400_000


def test_response_is_forgotten_when_its_ttl_is_over(site: Flask) -> None:
    """ttl seconds, a day by default."""
    counter = serve(site, ttl=0.2)
    post(site)
    give_up = time.monotonic() + 20
    while counter.done == 1:
        post(site)
        assert time.monotonic() < give_up
        time.sleep(0.02)
    assert counter.done == 2


# ---- what frees the key ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 502, 503, 408, 409, 425, 429, 401, 403, 423])
def test_key_is_free_again_when_the_response_says_that_nothing_was_done(site: Flask, kind: str, status: int) -> None:
    """5xx and "try again" are not kept: the next request with the key does the work."""
    counter = serve(site, kind)
    counter.answer = lambda: ("no", status)
    assert post(site).status_code == status
    counter.answer = lambda: "done"
    assert post(site).data == b"done"
    assert post(site).headers["Idempotent-Replayed"] == "true"
    assert counter.done == 2


@pytest.mark.parametrize("status", [400, 404, 410, 422])
def test_client_s_mistake_is_replayed_when_it_is_repeated(site: Flask, status: int) -> None:
    """What would be refused again is refused from memory."""
    counter = serve(site)
    counter.answer = lambda: ("no", status)
    assert [post(site).status_code for _ in range(2)] == [status] * 2
    assert counter.done == 1


class Broken(Response):
    """A response whose body is not to be had."""

    def get_data(self, as_text: bool = False) -> Any:
        raise LookupError("no body")


@pytest.mark.parametrize("error", [LookupError("x"), SystemExit(3), "abort", "not a response", "no body"])
def test_key_is_free_again_when_the_view_raises(site: Flask, kind: str, error: Any) -> None:
    """Nothing is known to have been done; the error goes where it went before."""
    counter = serve(site, kind)
    site.config["PROPAGATE_EXCEPTIONS"] = False

    def fail() -> Any:
        if error == "abort":
            abort(404)
        if error == "no body":
            return Broken("x")
        if isinstance(error, BaseException):
            raise error
        return None  # of which Flask makes no response

    counter.answer = fail
    if isinstance(error, SystemExit):
        with pytest.raises(SystemExit):
            post(site)
    else:
        assert post(site).status_code in (404, 500)
    counter.answer = lambda: "done"
    assert post(site).data == b"done"
    assert counter.done == 2


def test_first_response_is_the_client_s_when_it_cannot_be_kept(site: Flask) -> None:
    """Too large, or a stream: sent once, and repeated requests are told that it was done, which it is only once."""
    tta = TTASync(site)
    done: list[str] = []

    @site.post("/large")
    @tta.idempotent(max_bytes=100)
    def large() -> str:
        done.append("large")
        return "x" * 101

    @site.post("/headers")
    @tta.idempotent()
    def headers() -> Any:
        done.append("headers")
        return "x", {"X-Long": "x" * 17_000}

    @site.post("/stream")
    @tta.idempotent()
    def stream() -> Any:
        done.append("stream")
        return Response(iter(["a", "b"]))

    @site.post("/file")
    @tta.idempotent()
    def file() -> Any:
        done.append("file")
        return send_file(__file__)

    for path, length in (("/large", 101), ("/headers", 1), ("/stream", 2), ("/file", os.path.getsize(__file__))):
        first = post(site, path=path)
        assert (first.status_code, len(first.data)) == (200, length)
        first.close()
        for _ in range(2):
            refused(post(site, path=path), 409, "idempotency_not_kept")
    assert done == ["large", "headers", "stream", "file"]


# ---- two at a time ---------------------------------------------------------------------------------------------------


def test_concurrent_request_is_refused_when_the_first_is_being_worked_on(site: Flask, kind: str) -> None:
    """409, with Retry-After; afterwards the response."""
    counter = serve(site, kind)
    counter.go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, site)
        try:
            assert counter.begun.wait(30)
            response = post(site)
            refused(response, 409, "idempotency_conflict")
            assert response.headers["Retry-After"] == "1"
            refused(post(site, data=b"other"), 422, "idempotency_mismatch")
            counter.go_on.set()
        finally:
            counter.go_on.set()
        assert first.result(30).status_code == 200
    assert post(site).data == first.result().data
    assert counter.done == 1


def test_concurrent_requests_get_the_one_response_when_they_wait(site: Flask, kind: str) -> None:
    """wait=True: eight at once, one execution, eight equal responses."""
    counter = serve(site, kind, wait=True)
    counter.go_on.clear()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(post, site) for _ in range(8)]
        try:
            assert counter.begun.wait(30)
        finally:
            counter.go_on.set()
        responses = [each.result(30) for each in waiting]
    assert {response.data for response in responses} == {responses[0].data}
    assert [response.status_code for response in responses] == [200] * 8
    assert sum("Idempotent-Replayed" in response.headers for response in responses) == 7
    assert counter.done == 1


def test_waiting_request_does_the_work_when_the_first_one_fails(site: Flask, kind: str) -> None:
    """A key that is freed goes to whoever waits for it."""
    counter = serve(site, kind, wait=True)
    counter.go_on.clear()
    counter.answer = lambda: ("no", 500) if counter.done == 1 else "done"
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, site)]
        try:
            assert counter.begun.wait(30)
            waiting.append(pool.submit(post, site))
        finally:
            counter.go_on.set()
        assert sorted(each.result(30).status_code for each in waiting) == [200, 500]
    assert counter.done == 2


def test_waiting_request_is_refused_when_its_time_is_over(site: Flask, kind: str) -> None:
    """A wait ends before the request's deadline does, with a 409 that can be answered by trying again."""
    counter = serve(site, kind, wait=True)
    site.config["TTA_DEADLINE"] = 30.0
    counter.go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, site)
        try:
            assert counter.begun.wait(30)
            site.config["TTA_DEADLINE"] = 0.8
            refused(post(site), 409, "idempotency_conflict")
        finally:
            counter.go_on.set()
        assert first.result(30).status_code == 200


# ---- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ('"8e03978e-40d5-43dd-bc93-6894a57f9324"', "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        ("8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        ('  "a b"\t', "a b"),
        (r'"a\"b\\"', 'a"b\\'),
        ("YWJj+/=", "YWJj+/="),
        ("x" * 255, "x" * 255),
        ("", None),
        (" ", None),
        ('""', None),
        ('"a', None),
        ('a"', None),
        ('"a"b"', None),
        (r'"a\b"', None),
        ("a,b", None),
        ('"a", "b"', None),
        ('"a";b=1', None),
        ("a b", None),
        ("é", None),
        ("a\x00", None),
        ("a\nb", None),
        ("x" * 256, None),
        ('"' + "x" * 256 + '"', None),
    ],
)
def test_key_is_read_when_it_is_one_string(header: str, key: str | None) -> None:
    """Quoted, as the draft has it, or bare, as most clients send it; nothing that could be read in two ways."""
    assert parse_key(header) == key


@pytest.mark.parametrize("key", ["", '"', "a,b", "a b", "x" * 300, "é"])
def test_request_is_refused_when_its_key_is_malformed(site: Flask, key: str) -> None:
    """400, and the view does not run."""
    counter = serve(site)
    refused(post(site, key), 400, "idempotency_key_malformed")
    assert counter.done == 0


def test_request_is_refused_when_it_has_two_keys(site: Flask) -> None:
    """Two keys are no key."""
    counter = serve(site)
    response = site.test_client().post("/pay", headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "b")])
    refused(response, 400, "idempotency_key_malformed")
    assert counter.done == 0


def test_view_runs_as_ever_when_there_is_no_key(site: Flask, kind: str) -> None:
    """Without a key each request is its own; required=True asks for one."""
    counter, strict = serve(site, kind), serve(site, kind, path="/strict", required=True)
    assert [post(site, None).json["number"] for _ in range(2)] == [1, 2]
    refused(post(site, None, path="/strict"), 400, "idempotency_key_missing")
    assert (strict.done, counter.done) == (0, 2)


@pytest.mark.parametrize(
    "other",
    [
        {"data": b"{} "},
        {"data": b""},
        {"path": "/pay?x=1"},
        {"method": "PUT"},
    ],
)
def test_key_is_refused_when_it_comes_with_another_request(site: Flask, other: dict[str, Any]) -> None:
    """Another body, query or method is another request: 422, and the view does not run."""
    counter = serve(site)
    post(site)
    client = site.test_client(use_cookies=False)
    asked = {"path": "/pay", "data": b"{}", "method": "POST", "headers": {"Idempotency-Key": "k"}} | other
    refused(client.open(**asked), 422, "idempotency_mismatch")
    assert counter.done == 1


def test_key_is_refused_when_it_comes_with_another_path_of_the_view(site: Flask) -> None:
    """/orders/1 and /orders/2 are one view and two requests."""
    counter = serve(site, path="/orders/<number>")
    assert post(site, path="/orders/1").status_code == 200
    refused(post(site, path="/orders/2"), 422, "idempotency_mismatch")
    assert counter.done == 1


def test_views_have_keys_of_their_own_unless_they_share_a_name(site: Flask) -> None:
    """The same key on two endpoints is two keys; a common name makes them one."""
    counters = [serve(site, path=path) for path in ("/a", "/b")]
    shared = [serve(site, path=path, name="money") for path in ("/c", "/d")]
    assert [post(site, path=path).status_code for path in ("/a", "/b")] == [200, 200]
    assert [counter.done for counter in counters] == [1, 1]
    assert post(site, path="/c").status_code == 200
    refused(post(site, path="/d"), 422, "idempotency_mismatch")
    assert [counter.done for counter in shared] == [1, 0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"headers": {"Authorization": "Bearer a"}}, {"headers": {"Authorization": "Bearer b"}}),
        ({"headers": {"X-Api-Key": "a"}}, {"headers": {"X-Api-Key": "b"}}),
        ({"headers": {"Authorization": "a"}}, {"headers": {"X-Api-Key": "a"}}),
        ({"headers": {"Cookie": "session=a"}}, {"headers": {"Cookie": "session=b"}}),
        ({"headers": {"Authorization": "a", "Cookie": "session=a"}}, {"headers": {"Authorization": "a"}}),
        ({"environ_base": {"REMOTE_ADDR": "192.0.2.1"}}, {"environ_base": {"REMOTE_ADDR": "192.0.2.2"}}),
        ({"headers": {"X-Tenant": "a"}}, {"headers": {"X-Tenant": "b"}}),
    ],
)
def test_nobody_gets_another_client_s_response_when_keys_are_equal(
    site: Flask, one: dict[str, Any], other: dict[str, Any]
) -> None:
    """Credentials, session, tenant, else the address: equal keys of two clients are two keys."""

    @site.before_request
    def set_tenant() -> None:
        context = current_context()
        assert context is not None
        context.tenant = request.headers.get("X-Tenant")

    counter = serve(site)
    assert [post(site, **dict(who)).json["number"] for who in (one, other, one, other)] == [1, 2, 1, 2]
    assert counter.done == 2


def test_user_counts_when_the_session_names_one(site: Flask) -> None:
    """Of a session the user is the client: its cookie changes with everything that is written into it."""
    site.secret_key = "s"
    counter = serve(site)

    @site.post("/login/<user>")
    def login(user: str) -> str:
        session.update(_user_id=user, at=os.urandom(4).hex())
        return ""

    headers = {"Idempotency-Key": "k"}
    ann, bob = site.test_client(), site.test_client()
    for client, user in ((ann, "ann"), (bob, "bob"), (ann, "ann")):
        client.post(f"/login/{user}")
        client.post("/pay", data=b"{}", headers=headers)
    assert counter.done == 2


def test_caller_decides_when_a_function_is_given(site: Flask) -> None:
    """caller= says who a client is, whatever token it has today."""
    counter = serve(site, caller=lambda: request.headers["X-User"])
    for token in ("a", "b"):
        assert post(site, headers={"X-User": "ann", "Authorization": token}).json == {"number": 1}
    assert post(site, headers={"X-User": "bob", "Authorization": "a"}).json == {"number": 2}
    assert counter.done == 2


# ---- on every kind of view -------------------------------------------------------------------------------------------


def test_every_kind_of_view_acts_once_when_it_is_decorated(site: Flask) -> None:
    """Bare routes, class-based views, workflows outside and inside, blueprints, and beside a rate limit."""
    tta = TTASync(site)
    done: list[str] = []

    @step
    async def pay(data: Any, context: Any) -> Any:
        done.append("flow")
        return {"paid": len(done)}

    @site.route("/get")
    @tta.idempotent()
    def get() -> Any:
        done.append("get")
        return run_sync(pay, {})

    @site.post("/flow")
    @tta.rate_limit(0.01, burst=3)
    @tta.idempotent()
    @tta.workflow(pay, status=201)
    def flow(result: Any) -> Any:
        return result

    @site.post("/within")
    @tta.workflow(pay)
    @tta.idempotent()
    async def within(result: Any) -> Any:
        return result

    class Thing(MethodView):
        decorators = [tta.idempotent()]  # as Flask has it

        def post(self) -> str:
            done.append("thing")
            return str(len(done))

    site.add_url_rule("/thing", view_func=Thing.as_view("thing"))
    blueprint = Blueprint("part", __name__)

    @blueprint.post("/part")
    @tta.idempotent()
    def part() -> str:
        done.append("part")
        return str(len(done))

    site.register_blueprint(blueprint)
    for path in ("/get", "/flow", "/thing", "/part"):
        method = "GET" if path == "/get" else "POST"
        client, headers = site.test_client(), {"Idempotency-Key": "k"}
        first, again = (client.open(path, method=method, headers=headers) for _ in range(2))
        assert first.data == again.data, path
        assert first.status == again.status
        assert "Idempotent-Replayed" in again.headers
    assert done == ["get", "flow", "flow", "thing", "part"]
    assert again.status_code == 200
    assert client.post("/flow", headers=headers).headers["RateLimit"] == '"flow";r=0;t=100'
    assert [post(site, path="/within").json for _ in range(2)] == [{"paid": 6}] * 2


def test_problem_of_a_workflow_is_replayed_when_its_data_do_not_fit(site: Flask) -> None:
    """What @tta.workflow refuses with 422 is kept as any other answer; what it answers with 503 is not."""
    tta = TTASync(site)
    done: list[str] = []

    class Amount(Schema):
        amount = fields.Integer(required=True)

    @step
    async def pay(data: Any, context: Any) -> Any:
        done.append("pay")
        raise SaturatedError(1, 1.0)

    def touch(result: Any) -> Any:
        return result

    site.add_url_rule("/flow", "flow", tta.idempotent()(tta.workflow(pay, load=Amount)(touch)), methods=["POST"])
    first, again = (post(site, path="/flow", content_type="application/json") for _ in range(2))
    refused(again, 422, "validation_error")
    assert (first.data, again.headers["Idempotent-Replayed"]) == (again.data, "true")
    for _ in range(2):
        sent = post(site, "k2", "/flow", b'{"amount": 5}', content_type="application/json")
        refused(sent, 503, "saturated")
    assert done == ["pay", "pay"]


def test_view_reads_its_body_when_it_was_read_for_the_key(site: Flask) -> None:
    """JSON and forms are there as ever."""
    tta = TTASync(site)

    @site.post("/echo")
    @tta.idempotent()
    def echo() -> Any:
        return {"form": request.form, "json": request.get_json(silent=True)}

    assert post(site, "a", "/echo", data={"x": "1"}).json == {"form": {"x": "1"}, "json": None}
    sent = post(site, "b", "/echo", data=b'{"y": 2}', content_type="application/json")
    assert sent.json == {"form": {}, "json": {"y": 2}}


def test_body_is_refused_when_it_is_too_long_to_be_compared(site: Flask) -> None:
    """TTA_MAX_BODY bounds what is read for a key: 413."""
    counter = serve(site)
    site.config["TTA_MAX_BODY"] = 10
    refused(post(site, data=b"x" * 11), 413, "request_entity_too_large")
    assert counter.done == 0
    assert post(site, None, data=b"x" * 11).status_code == 200


def test_application_answers_itself_when_it_has_a_handler_for_the_error(site: Flask) -> None:
    """The errors carry the client's own key."""
    serve(site)

    @site.errorhandler(IdempotencyMismatchError)
    def page(error: IdempotencyMismatchError) -> Any:
        return error.key, 418

    post(site)
    response = post(site, data=b"other")
    assert (response.status_code, response.data) == (418, b"k")


def test_view_keeps_its_face_when_it_is_idempotent() -> None:
    """Name, docstring and what it wraps stay; an async view stays async."""
    tta = TTASync()

    def view() -> str:
        """What it does."""
        return ""

    async def asynchronous() -> str:
        return ""

    made = tta.idempotent()(view)
    assert (made.__name__, made.__doc__, made.__wrapped__) == ("view", "What it does.", view)  # type: ignore[attr-defined]
    assert inspect.iscoroutinefunction(tta.idempotent()(asynchronous))


# ---- Redis, and without ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["config", "environment", "argument", "client", "back end"])
def test_processes_share_the_keys_when_redis_is_named(url: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two applications, as in two processes, with one Redis."""
    storage: Any = None
    if where == "environment":
        monkeypatch.setenv("REDIS_URL", url)
    elif where != "config":
        storage = {"argument": url, "client": redis.Redis.from_url(url), "back end": RedisBackend(url, "x:")}[where]
    sites = [make_site(url if where == "config" else None) for _ in range(2)]
    counters = [serve(site, storage=storage) for site in sites]
    assert [post(site).json for site in (*sites, *sites)] == [{"number": 1}] * 4
    assert [counter.done for counter in counters] == [1, 0]
    with redis.Redis.from_url(url) as client:
        assert client.keys("*:idempotency:*")[0].startswith(b"x:1:" if where == "back end" else b"tta:1:")


@pytest.mark.parametrize(("fail", "status"), [("closed", 503), ("open", 200)])
def test_request_is_answered_as_configured_when_redis_is_gone(
    free_port: Any, kind: str, fail: Any, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Closed, a request with a key is a 503, as nobody knows whether it was done; one without a key runs as ever."""
    site = make_site(f"redis://:hidden@127.0.0.1:{free_port()}")
    counter = serve(site, kind, fail=fail)
    for _ in range(2):
        response = post(site)
        assert response.status_code == status
        if fail == "closed":
            refused(response, 503, "redis_unavailable")
            assert response.headers["Retry-After"] == "1"
    assert counter.done == (0 if fail == "closed" else 2)
    assert post(site, None).status_code == 200
    assert "hidden" not in caplog.text


def test_requests_are_refused_soon_when_redis_swallows_everything(own_redis_server: Any) -> None:
    """A black hole holds no thread for long, and when it is gone keys work again."""
    site = make_site(own_redis_server.url)
    counter = serve(site)
    assert post(site).status_code == 200
    os.kill(own_redis_server.pid, signal.SIGSTOP)
    try:
        took = []
        for number in range(6):
            began = time.monotonic()
            refused(post(site, f"k{number}"), 503, "redis_unavailable")
            took.append(time.monotonic() - began)
        assert max(took) < 10
        assert sorted(took[1:])[2] < 1
    finally:
        os.kill(own_redis_server.pid, signal.SIGCONT)
    give_up = time.monotonic() + 20
    while post(site).status_code != 200:
        assert time.monotonic() < give_up
        time.sleep(0.02)
    assert counter.done == 1


def test_response_is_the_client_s_when_redis_dies_during_the_work(
    own_redis_server: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The work is done and answered; that it was not kept leaves a trace."""
    site = make_site(own_redis_server.url)
    counter = serve(site, kind)
    counter.answer = lambda: (own_redis_server.stop(signal.SIGKILL), "done")[1]
    assert post(site).data == b"done"
    assert "was not kept for its idempotency key" in caplog.text
    assert counter.done == 1


def test_key_runs_out_when_redis_dies_and_the_view_fails(own_redis_server: Any, kind: str) -> None:
    """A claim that cannot be given back is nobody's error."""
    site = make_site(own_redis_server.url)
    counter = serve(site, kind)
    counter.answer = lambda: (own_redis_server.stop(signal.SIGKILL), ("no", 502))[1]
    assert post(site).status_code == 502


def test_response_is_kept_when_the_facade_is_saturated_or_the_deadline_over(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done is kept, whatever else goes on; what cannot be kept at all is logged."""
    from tta_sync.flask import idempotency

    site, real = make_site(url), idempotency.from_sync
    counter = serve(site)
    site.config["TTA_DEADLINE"] = 1.0
    counter.answer = lambda: (time.sleep(1.1), "late")[1]
    assert post(site).data == b"late"
    assert post(site).headers["Idempotent-Replayed"] == "true"
    failures = 3

    def saturated(*arguments: Any, **options: Any) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise SaturatedError(1, 0.1)
        return real(*arguments, **options)

    counter.answer = lambda: "done"
    monkeypatch.setattr(idempotency, "from_sync", saturated)
    assert post(site, "b").data == b"done"
    assert post(site, "b").headers["Idempotent-Replayed"] == "true"
    failures = 10**9
    monkeypatch.setattr(idempotency, "_FINISH_WITHIN", 0.0)
    assert post(site, "c").data == b"done"
    counter.answer = lambda: ("no", 500)
    assert post(site, "d").status_code == 500


def test_request_is_a_503_when_the_loop_cannot_be_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows whether the request was carried out before, so it is not."""
    site = make_site(url)
    counter = serve(site)

    def ended(*arguments: Any, **options: Any) -> None:
        raise LoopUnavailableError("ended")

    monkeypatch.setattr("tta_sync.flask.idempotency.call_sync", ended)
    refused(post(site), 503, "loop_unavailable")
    assert counter.done == 0


def test_claim_is_not_renewed_when_its_owner_was_lost(url: str) -> None:
    """A claim that nobody holds any more, after an interrupt say, runs out."""

    async def main() -> None:
        store = IdempotencyStore(url)
        claim = await store.begin("k")
        timer = claim._timer  # type: ignore[union-attr]  # it is a claim
        assert timer is not None
        timer._run()
        assert claim._timer is not timer  # type: ignore[union-attr]
        timer = claim._timer  # type: ignore[union-attr]
        lost = weakref.ref(claim)
        del claim
        assert lost() is None
        timer._run()  # type: ignore[union-attr]  # finds nobody, and is the last one

    asyncio.run(main())


def test_keys_of_this_process_are_said_to_be_so_when_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """Without Redis in production, one line says that other workers do not know the keys."""
    site = make_site()
    serve(site)
    post(site), post(site)
    assert caplog.text.count("set TTA_REDIS_URL") + caplog.text.count("need TTA_REDIS_URL") == 1


def test_memory_is_bounded_when_keys_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bounds the oldest response is forgotten, and none that is being worked on."""
    from tta_sync.flask import idempotency

    monkeypatch.setattr(idempotency, "_MAX_RECORDS", 3)
    keys = LocalKeys()
    working = keys.begin("first", "m", 0.0)
    for number in range(5):
        keys.finish(keys.begin(str(number), "m", 0.0), ["result"], 10, 100.0)  # type: ignore[arg-type]  # a claim
    assert set(keys._records) == {"first", "3", "4"}
    assert keys._bytes == 20
    monkeypatch.setattr(idempotency, "_MAX_MEMORY", 25)
    keys.finish(working, ["result"], 20, 100.0)  # type: ignore[arg-type]
    assert set(keys._records) == {"first"}
    monkeypatch.setattr(idempotency, "_MAX_MEMORY", 5)
    keys.finish(keys.begin("large", "m", 0.0), ["result"], 10, 100.0)  # type: ignore[arg-type]
    assert set(keys._records) == {"large"}
    keys.begin("new", "m", 100.0)
    assert set(keys._records) == {"new"}
    assert keys._bytes == 0


def test_expired_key_is_new_when_others_are_older() -> None:
    """An expired response is not replayed, also where it is not its turn to be swept."""
    keys = LocalKeys()
    for name in ("a", "b", "c", "d"):
        keys.finish(keys.begin(name, "m", 0.0), ["result"], 10, 5.0 if name == "d" else 100.0)  # type: ignore[arg-type]
    assert keys.begin("d", "other", 5.0).name == "d"  # type: ignore[union-attr]  # a claim
    assert keys._bytes == 30


def test_response_is_kept_when_the_request_is_cut_off_as_it_is_stored(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An async view that has done its work is not undone by the end of its request."""
    from tta_sync.redis.idempotency import Claim

    site, real, finished = make_site(url), Claim.finish, threading.Event()
    counter = serve(site, "async")
    site.config["TTA_DEADLINE"] = 0.5
    fail = False

    async def slowly(self: Claim, result: Any) -> None:
        try:
            await asyncio.sleep(1.0)
            if fail:
                raise ConnectionError("gone")
            await real(self, result)
        finally:
            finished.set()

    monkeypatch.setattr(Claim, "finish", slowly)
    assert post(site).status_code == 504
    assert finished.wait(30)
    site.config["TTA_DEADLINE"] = 30.0
    give_up = time.monotonic() + 20
    while (response := post(site)).status_code == 409:
        assert time.monotonic() < give_up
    assert response.headers["Idempotent-Replayed"] == "true"
    assert counter.done == 1
    fail = True
    site.config["TTA_DEADLINE"] = 0.5
    assert post(site, "b").status_code == 504
    while "was not kept for its idempotency key: gone" not in caplog.text:
        assert time.monotonic() < give_up
        time.sleep(0.01)


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["k", '"k"', "other", None, "a,b"]),
        st.sampled_from([b"", b"x"]),
        st.sampled_from(["ann", "bob"]),
        st.sampled_from([200, 201, 404, 422, 409, 429, 500, 503, "raise", "stream"]),
    ),
    max_size=12,
)


def test_memory_and_redis_answer_alike_whatever_comes(url: str) -> None:
    """For any order of requests nobody can tell from the responses where they are kept; and both are as a dict is."""
    sites = [make_site(), make_site(url)]
    counters = [serve(site) for site in sites]
    for site in sites:
        site.config["PROPAGATE_EXCEPTIONS"] = False
    kept: dict[tuple[str, str], tuple[bytes, Any]] = {}
    round_number = itertools.count()

    def answer(counter: Counter, outcome: Any) -> Any:
        if outcome == "raise":
            raise LookupError
        if outcome == "stream":
            return Response(iter([b"a", b"b"]))
        return str(counter.done), outcome

    def expected(key: str | None, body: bytes, who: str, outcome: Any, done: int) -> tuple[int, bytes | None, bool]:
        """Status, body (None: a problem) and whether it is a replay."""
        if key == "a,b":
            return 400, None, False
        name = ((key or "").strip('"'), who)
        if key is not None and name in kept:
            mark, response = kept[name]
            if mark != body:
                return 422, None, False
            return (409, None, False) if response is None else (*response, True)
        status, said = {"raise": (500, None), "stream": (200, b"ab")}.get(outcome, (outcome, b"%d" % done))
        if key is not None and status < 500 and status not in (409, 429):
            kept[name] = body, None if outcome == "stream" else (status, said)
        return status, said, False

    @settings(max_examples=40, deadline=None, database=None)
    @given(REQUESTS)
    def compare(requests: list[tuple[str | None, bytes, str, Any]]) -> None:
        kept.clear()
        tenant = next(round_number)
        for key, body, who, outcome in requests:
            told = expected(key, body, who, outcome, counters[0].done + 1)
            for site, counter in zip(sites, counters, strict=True):
                counter.answer = functools.partial(answer, counter, outcome)
                response = post(site, key, data=body, headers={"Authorization": f"{who} {tenant}"})
                replayed = "Idempotent-Replayed" in response.headers
                data = response.data if told[1] is not None else None
                assert (response.status_code, data, replayed) == told
            assert counters[0].done == counters[1].done

    compare()
    assert counters[0].done > 10


SERVED = """
import os, time
from flask import Flask
import redis
from tta_sync.flask import TTASync

app = Flask("served")
tta = TTASync(app)
client = redis.Redis.from_url(os.environ["REDIS_URL"])


@app.post("/pay")
@tta.idempotent(wait=True)
def pay():
    number = client.incr("executions")
    time.sleep(0.3)
    return {"number": number, "pid": os.getpid()}


@app.post("/hang")
@tta.idempotent(wait=True)
def hang():
    if client.incr("hanging") == 1:
        client.set("pid", os.getpid())
        time.sleep(60)
    return {"done": "by the next"}


@app.get("/up")
def up():
    return "up"
"""


@pytest.fixture
def served(url: str, tmp_path: Path, free_port: Any) -> Iterator[str]:
    """A real gunicorn with four workers."""
    (tmp_path / "serving.py").write_text(SERVED)
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "-k",
        "gthread",
        "-w",
        "4",
        "--threads",
        "4",
        "-b",
        f"127.0.0.1:{port}",
    ]
    process = subprocess.Popen(
        [*command, "--no-control-socket", "--log-level", "critical", "serving:app"],
        cwd=tmp_path,
        env={**os.environ, "REDIS_URL": url, "TTA_DEADLINE": "60", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    try:
        give_up = time.monotonic() + 60
        while True:
            try:
                if send(f"http://127.0.0.1:{port}/up")[0] == 200:
                    break
            except OSError:
                assert time.monotonic() < give_up
                assert process.poll() is None
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def send(target: str, key: str | None = None) -> tuple[int, dict[str, str], bytes]:
    headers = {} if key is None else {"Idempotency-Key": key}
    sent = urllib.request.Request(target, b"{}" if key else None, headers, method="POST" if key else "GET")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sent, timeout=60) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def test_work_is_done_once_when_gunicorn_serves_with_several_workers(served: str, url: str) -> None:
    """Sixteen requests with one key at four real workers: one execution, sixteen equal bodies."""
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: send(f"{served}/pay", "k"), range(16)))
    assert {(status, body) for status, _, body in answers} == {(200, answers[0][2])}
    assert sum("Idempotent-Replayed" in headers for _, headers, _ in answers) == 15
    with redis.Redis.from_url(url) as client:
        assert client.get("executions") == b"1"


def test_waiting_request_takes_over_when_the_worker_is_killed(served: str, url: str) -> None:
    """kill -9 of the worker that does the work: its claim runs out, and the waiting request does it."""
    with ThreadPoolExecutor(2) as pool, redis.Redis.from_url(url) as client:
        first = pool.submit(send, f"{served}/hang", "k")
        give_up = time.monotonic() + 30
        while not client.exists("pid"):
            assert time.monotonic() < give_up
            time.sleep(0.01)
        second = pool.submit(send, f"{served}/hang", "k")
        os.kill(int(client.get("pid") or 0), signal.SIGKILL)
        with pytest.raises(OSError, match=r"(?i)reset|closed"):
            first.result(60)
        try:
            answer = second.result(60)
        except OSError:  # it was the killed worker that had it: what a client does then is what keys are for
            answer = send(f"{served}/hang", "k")
        assert json.loads(answer[2]) == {"done": "by the next"}


# ---- built wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ttl": 0}, "ttl="),
        ({"ttl": True}, "ttl="),
        ({"ttl": float("nan")}, "ttl="),
        ({"ttl": "1d"}, "ttl="),
        ({"max_bytes": 0}, "max_bytes is"),
        ({"max_bytes": 1.5}, "max_bytes is"),
        ({"fail": "local"}, "fail is"),
        ({"caller": "user"}, "caller is"),
        ({"caller": asyncio.sleep}, "caller is"),
    ],
)
def test_option_is_refused_when_it_makes_no_sense(options: dict[str, Any], named: str) -> None:
    """At the line that writes it, before there is a view."""
    with pytest.raises(ConfigurationError, match=f"^{named}"):
        TTASync().idempotent(**options)
