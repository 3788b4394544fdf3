"""The Flask extension: request ids, the request's context, decorated views, and which errors it answers."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import uuid
from collections.abc import Callable
from typing import Any

import flask
import pytest
import redis.exceptions
from flask import Blueprint, Flask, abort, redirect, request
from flask.views import MethodView
from marshmallow import Schema, ValidationError, fields
from sqlalchemy.exc import IntegrityError
from werkzeug.exceptions import HTTPException, NotFound, ServiceUnavailable, TooManyRequests
from werkzeug.routing import Rule

import tta_sync.flask
from tta_sync.context import WorkflowContext, context_providers, current_context
from tta_sync.exceptions import (
    BulkheadFullError,
    CircuitOpenError,
    ConfigurationError,
    DeadlineExceededError,
    LoopUnavailableError,
    RateLimitedError,
    SaturatedError,
    StepTimeoutError,
    TTASyncError,
    WouldDeadlockError,
)
from tta_sync.facade import call_sync, run_sync
from tta_sync.flask import Problem, TTASync
from tta_sync.primitives.core.base import caller_step, step


class Request(Schema):
    text = fields.String(required=True)
    tasks = fields.List(fields.String())


class Answer(Schema):
    length = fields.Integer()


@step
async def measure(data: dict[str, Any], context: WorkflowContext) -> dict[str, Any]:
    return {"length": len(data["text"]), "secret": "not for the outside"}


def raising(error: BaseException) -> Any:
    @step
    async def fail(data: Any, context: WorkflowContext) -> Any:
        raise error

    return fail


@pytest.fixture
def site() -> Flask:
    return Flask("legacy")


def problem(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.get_data(as_text=True)
    assert response.content_type == "application/problem+json"
    body: dict[str, Any] = json.loads(response.data)
    assert body["status"] == status
    assert body["code"] == code
    assert body["type"]
    assert body["title"]
    assert body["correlation_id"] == response.headers["X-Request-ID"]
    return body


# ---- request id and context ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "x" * 128, "A-z.0_9", "-"])
def test_request_id_is_taken_over_when_it_is_well_formed(site: Flask, given: str) -> None:
    """A well-formed X-Request-ID is the request's correlation id and comes back as a header."""
    TTASync(site)

    @site.get("/")
    def view() -> Any:
        context = current_context()
        assert context is not None
        return {"id": context.correlation_id}

    response = site.test_client().get("/", headers={"X-Request-ID": given})
    assert response.headers["X-Request-ID"] == given
    assert response.json == {"id": given}


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a,b", "é", "a/b", "a\tb", "{}", "a;b"])
def test_request_id_is_replaced_when_it_is_not_well_formed(site: Flask, given: str) -> None:
    """Anything else is replaced by a fresh id, never echoed."""
    TTASync(site)
    response = site.test_client().get("/", headers={"X-Request-ID": given})
    assert response.headers["X-Request-ID"] != given
    assert uuid.UUID(response.headers["X-Request-ID"])


def test_request_id_is_replaced_when_the_header_comes_twice(site: Flask) -> None:
    """Two ids are no id."""
    TTASync(site)
    response = site.test_client().get("/", headers=[("X-Request-ID", "a"), ("X-Request-ID", "b")])
    assert uuid.UUID(response.headers["X-Request-ID"])


def test_context_is_one_per_request_when_a_test_shares_an_application_context(site: Flask) -> None:
    """Two requests inside one pushed application context have different ids, as pytest-flask makes them."""
    TTASync(site)
    with site.app_context():
        first = site.test_client().get("/").headers["X-Request-ID"]
        second = site.test_client().get("/").headers["X-Request-ID"]
    assert first != second


def test_context_is_shared_by_the_calls_of_a_request_but_not_their_state(site: Flask) -> None:
    """Two run_sync calls of one request share id, deadline and tenant, and not what their steps noted."""
    TTASync(site)
    seen: list[WorkflowContext] = []

    @step
    async def look(data: Any, context: WorkflowContext) -> None:
        context.state["left"] = True
        seen.append(context)

    @site.get("/")
    def view() -> Any:
        context = current_context()
        assert context is not None
        context.tenant = "acme"
        run_sync(look, None)
        assert "left" not in context.state
        run_sync(look, None)
        return ""

    assert site.test_client().get("/").status_code == 200
    first, second = seen
    assert first is not second
    assert first.correlation_id == second.correlation_id
    assert first.tenant == second.tenant == "acme"
    assert first.deadline is not None
    assert first.deadline is second.deadline


def test_context_is_gone_when_the_request_has_ended(site: Flask) -> None:
    """Outside a request nobody finds a request's context, on this thread or in this context."""
    TTASync(site)
    site.test_client().get("/")
    assert current_context() is None
    with site.app_context():
        assert current_context() is None


def test_context_is_not_given_by_an_application_without_the_extension(site: Flask) -> None:
    """A second application of the process, without TTASync, has no context."""
    TTASync(site)
    with Flask("other").test_request_context("/"):
        assert current_context() is None


def test_provider_is_registered_once_when_many_applications_join() -> None:
    """However many applications are made, as tests do, the list of providers does not grow."""
    TTASync(Flask("a"))
    before = len(context_providers)
    TTASync(Flask("b"))
    TTASync(Flask("c"))
    assert len(context_providers) == before


def test_deadline_counts_from_the_arrival_of_the_request(site: Flask) -> None:
    """TTA_DEADLINE starts when the request does, not when its first workflow does."""
    site.config["TTA_DEADLINE"] = 5
    TTASync(site)

    @site.get("/")
    def view() -> Any:
        held = request.environ["tta_sync.request"].deadline
        context = current_context()
        assert context is not None
        assert context.deadline is held
        return {"seconds": held.seconds}

    assert site.test_client().get("/").json == {"seconds": 5}


def test_deadline_is_absent_when_the_setting_is_none(site: Flask) -> None:
    """TTA_DEADLINE = None means no deadline."""
    site.config["TTA_DEADLINE"] = None
    TTASync(site)
    with site.test_request_context("/"):
        context = current_context()
        assert context is not None
        assert context.deadline is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TTA_DEADLINE", 0),
        ("TTA_DEADLINE", -1.0),
        ("TTA_DEADLINE", "15"),
        ("TTA_DEADLINE", float("inf")),
        ("TTA_DEADLINE", float("nan")),
        ("TTA_DEADLINE", True),
        ("TTA_MAX_BODY", 0),
        ("TTA_MAX_BODY", "1M"),
        ("TTA_MAX_DEPTH", True),
        ("TTA_MAX_DEPTH", 1.5),
    ],
)
def test_settings_are_refused_at_start_when_they_cannot_be(site: Flask, name: str, value: Any) -> None:
    """A setting that makes no sense is an error at start, which names it."""
    site.config[name] = value
    with pytest.raises(ConfigurationError, match=name):
        TTASync(site)


def test_traceparent_is_taken_into_the_context_when_it_is_valid(site: Flask) -> None:
    """A W3C traceparent gives the context its trace, parent span and flags."""
    TTASync(site)
    header = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
    with site.test_request_context("/", headers={"traceparent": header}):
        context = current_context()
        assert context is not None
        assert context.trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"
        assert context.parent_span_id == "00f067aa0ba902b7"
        assert context.trace_flags == 0


@pytest.mark.parametrize(
    "header",
    [
        "",
        "garbage",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\n",
    ],
)
def test_traceparent_is_ignored_when_it_is_not_valid(site: Flask, header: str) -> None:
    """What the standard calls invalid starts no trace."""
    TTASync(site)
    with site.test_request_context("/", environ_overrides={"HTTP_TRACEPARENT": header}):
        context = current_context()
        assert context is not None
        assert context.trace_id is None


def test_traceparent_of_a_later_version_is_read_as_far_as_known(site: Flask) -> None:
    """A later version may have more fields."""
    TTASync(site)
    header = "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more"
    with site.test_request_context("/", headers={"traceparent": header}):
        context = current_context()
        assert context is not None
        assert context.trace_id is not None


# ---- decorated views -----------------------------------------------------------------------------------------------


def test_view_loads_runs_dumps_and_touches_when_it_is_decorated(site: Flask) -> None:
    """schema → run_sync → schema → the function; only the dump schema's fields leave."""
    tta = TTASync(site)

    @site.post("/measure/<kind>")
    @tta.workflow(measure, load=Request, dump=Answer)
    def view(result: dict[str, Any], kind: str) -> Any:
        return {**result, "kind": kind}

    response = site.test_client().post("/measure/long", json={"text": "abc"})
    assert response.status_code == 200
    assert response.json == {"length": 3, "kind": "long"}


def test_view_works_for_every_request_when_schemas_are_instances(site: Flask) -> None:
    """Schemas may be given as instances."""
    tta = TTASync(site)

    @site.post("/")
    @tta.workflow(measure, load=Request(), dump=Answer(only=["length"]))
    def view(result: Any) -> Any:
        return result

    for text in ("a", "ab"):
        assert site.test_client().post("/", json={"text": text}).json == {"length": len(text)}


def test_view_gets_the_url_arguments_as_data_when_nothing_is_loaded(site: Flask) -> None:
    """Without a load schema the workflow's data is the dict of the URL's arguments."""
    tta = TTASync(site)

    @step
    async def echo(data: Any) -> Any:
        return data

    @site.get("/items/<int:number>")
    @tta.workflow(echo)
    def view(result: Any, number: int) -> Any:
        return {"result": result, "number": number}

    assert site.test_client().get("/items/7").json == {"result": {"number": 7}, "number": 7}


def test_view_answers_with_its_status_unless_the_function_says_otherwise(site: Flask) -> None:
    """status= is the default; a tuple or a response of the function wins."""
    tta = TTASync(site)
    answers = {"plain": lambda r: r, "tuple": lambda r: (r, 202, {"Location": "/x"})}
    answers["response"] = lambda r: flask.jsonify(r)

    for name, answer in answers.items():
        site.add_url_rule(
            f"/{name}",
            name,
            tta.workflow(measure, load=Request, dump=Answer, status=201)(answer),
            methods=["POST"],
        )
    client = site.test_client()
    assert client.post("/plain", json={"text": ""}).status_code == 201
    response = client.post("/tuple", json={"text": ""})
    assert (response.status_code, response.headers["Location"]) == (202, "/x")
    assert client.post("/response", json={"text": ""}).status_code == 200


def test_functions_may_stand_for_workflows(site: Flask) -> None:
    """A coroutine function runs on the loop, a plain one on the request's thread; what is neither is refused."""
    tta = TTASync(site)

    async def on_the_loop(data: Any, context: WorkflowContext) -> Any:
        return {"thread": threading.get_ident(), "id": context.correlation_id}

    def on_the_request(data: Any) -> Any:
        return {"thread": threading.get_ident(), "path": request.path}

    site.add_url_rule("/a", "a", tta.workflow(on_the_loop)(lambda result: result))
    site.add_url_rule("/b", "b", tta.workflow(on_the_request)(lambda result: result))
    answer = site.test_client().get("/a", headers={"X-Request-ID": "r"}).json
    assert answer["id"] == "r"
    assert answer["thread"] != threading.get_ident()
    assert site.test_client().get("/b").json == {"thread": threading.get_ident(), "path": "/b"}
    with pytest.raises(ConfigurationError, match="cannot be a step"):
        tta.workflow(42)


def test_methods_of_view_classes_are_views_too(site: Flask) -> None:
    """A MethodView's methods are decorated as functions are."""
    tta = TTASync(site)

    class Measure(MethodView):
        unit = "characters"

        @tta.workflow(measure, load=Request, dump=Answer)
        def post(self, result: dict[str, Any], name: str) -> Any:
            return {**result, "unit": self.unit, "name": name}

    site.add_url_rule("/<name>", view_func=Measure.as_view("measure"))
    answer = site.test_client().post("/x", json={"text": "abc"})
    assert answer.json == {"length": 3, "unit": "characters", "name": "x"}


def test_caller_step_runs_on_the_request_thread_when_a_view_is_decorated(site: Flask) -> None:
    """A caller step has the request: same thread, flask.g, request."""
    tta = TTASync(site)

    @caller_step
    def where(data: Any) -> Any:
        return {"thread": threading.get_ident(), "path": request.path, "user": flask.g.user}

    @site.before_request
    def log_in() -> None:
        flask.g.user = "ada"

    @site.get("/")
    @tta.workflow(where)
    def view(result: Any) -> Any:
        return result

    assert site.test_client().get("/").json == {"thread": threading.get_ident(), "path": "/", "user": "ada"}


def test_workflow_runs_in_the_unit_of_work_that_ends_before_the_dump(site: Flask) -> None:
    """The unit of work is committed when the schema reads the result."""
    happened: list[str] = []

    class Units:
        def run(self, fn: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
            happened.append("begin")
            result = fn(*args, **keywords)
            happened.append("commit")
            return result

    class Noting:
        def dump(self, obj: Any) -> Any:
            happened.append("dump")
            return obj

        def load(self, data: Any) -> Any:
            happened.append("load")
            return data

    tta = TTASync(site, unit_of_work=Units())

    @site.post("/")
    @tta.workflow(measure, load=Noting, dump=Noting)
    def view(result: Any) -> Any:
        return result

    assert site.test_client().post("/", json={"text": ""}).status_code == 200
    assert happened == ["load", "begin", "commit", "dump"]


def test_workflow_has_its_own_timeout_when_the_view_says_so(site: Flask) -> None:
    """timeout= ends the workflow within the request's deadline, as a 504."""
    tta = TTASync(site)

    @step
    async def hang(data: Any) -> None:
        await asyncio.Event().wait()

    @site.get("/")
    @tta.workflow(hang, timeout=0.05)
    def view(result: Any) -> Any:
        raise AssertionError("unreachable")

    problem(site.test_client().get("/"), 504, "deadline_exceeded")


def test_decorated_view_says_what_is_missing_when_the_application_was_not_joined(site: Flask) -> None:
    """Forgetting init_app is told, with what to write."""
    tta = TTASync()

    @site.get("/")
    @tta.workflow(raising(ValueError()))
    def view(result: Any) -> Any: ...

    site.testing = True
    with pytest.raises(ConfigurationError, match="init_app"):
        site.test_client().get("/")


def test_async_views_run_on_the_managed_loop_when_the_application_is_joined(site: Flask) -> None:
    """An `async def` view runs on the loop thread on which call_sync runs too."""
    TTASync(site)

    async def here() -> int:
        return threading.get_ident()

    @site.get("/")
    async def view() -> Any:
        return {"thread": threading.get_ident(), "id": current_context().correlation_id}  # type: ignore[union-attr]

    response = site.test_client().get("/", headers={"X-Request-ID": "r"})
    from tta_sync.facade import call_sync

    assert response.json == {"thread": call_sync(here), "id": "r"}


def test_async_last_touch_is_awaited_when_the_function_is_async(site: Flask) -> None:
    """The function of a decorated view may be a coroutine function."""
    tta = TTASync(site)

    @site.post("/")
    @tta.workflow(measure, load=Request, dump=Answer)
    async def view(result: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        return {**result, "touched": True}

    assert site.test_client().post("/", json={"text": "a"}).json == {"length": 1, "touched": True}


def test_query_string_is_loaded_when_the_source_is_query(site: Flask) -> None:
    """source="query" loads the query string; a field that is a list gets all its values."""
    tta = TTASync(site)

    @step
    async def echo(data: Any) -> Any:
        return data

    @site.get("/")
    @tta.workflow(echo, load=Request, source="query")
    def view(result: Any) -> Any:
        return result

    client = site.test_client()
    assert client.get("/?text=a&tasks=x").json == {"text": "a", "tasks": ["x"]}
    assert client.get("/?text=a&tasks=x&tasks=y").json == {"text": "a", "tasks": ["x", "y"]}
    body = problem(client.get("/?text=a&text=b"), 422, "validation_error")
    assert body["errors"] == {"text": ["Given more than once."]}
    body = problem(client.get("/?text=%00"), 422, "validation_error")
    assert list(body["errors"]) == ["text"]


def test_load_reads_the_request_in_a_plain_view(site: Flask) -> None:
    """tta.load(Schema) is the decorator's strict reading for any view."""
    tta = TTASync(site, problems="app")

    @site.post("/")
    def view() -> Any:
        return tta.load(Request)

    client = site.test_client()
    assert client.post("/", json={"text": "a"}).json == {"text": "a"}
    problem(client.post("/", json={"text": 1}), 422, "validation_error")
    problem(client.post("/", data="{", content_type="application/json"), 400, "malformed_json")


# ---- the table of errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (ValidationError({"text": ["Too short."]}), 422, "validation_error", None),
        (IntegrityError("insert secret", {}, ValueError("secret")), 409, "conflict", None),
        (RateLimitedError("api", 2.1), 429, "rate_limited", "3"),
        (SaturatedError(10, 0.2), 503, "saturated", "1"),
        (BulkheadFullError("db", 0.0), 503, "bulkhead_full", "1"),
        (CircuitOpenError("llm", 29.5), 503, "circuit_open", "30"),
        (LoopUnavailableError("shut down"), 503, "loop_unavailable", "1"),
        (StepTimeoutError("fetch", 1.0), 504, "step_timeout", None),
        (DeadlineExceededError(15.0), 504, "deadline_exceeded", None),
    ],
)
def test_error_has_its_status_when_a_workflow_raises_it(
    site: Flask, error: Exception, status: int, code: str, retry_after: str | None
) -> None:
    """One table maps error types to status, also while testing; the message of the error itself stays inside."""
    site.testing = True
    tta = TTASync(site)
    site.add_url_rule("/", "view", tta.workflow(raising(error))(lambda result: result))
    response = site.test_client().get("/")
    body = problem(response, status, code)
    assert response.headers.get("Retry-After") == retry_after
    assert "secret" not in response.get_data(as_text=True)
    assert ("errors" in body) == (status == 422)


def test_unexpected_error_is_a_500_without_detail_and_logged_once(
    site: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of an unexpected error leaves; one log record has its traceback and the correlation id."""
    tta = TTASync(site)
    site.add_url_rule("/ours", "ours", tta.workflow(raising(RuntimeError("secret")))(lambda result: result))

    @site.get("/plain")
    def plain() -> Any:
        raise RuntimeError("secret")

    for path in ("/ours", "/plain"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            response = site.test_client().get(path, headers={"X-Request-ID": "abc-1"})
        body = problem(response, 500, "internal_server_error")
        assert "detail" not in body
        assert "secret" not in response.get_data(as_text=True)
        (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
        assert "abc-1" in record.getMessage()
        assert record.exc_info is not None
        assert isinstance(record.exc_info[1], RuntimeError)


@pytest.mark.parametrize("error", [ConfigurationError("x"), TTASyncError("x")])
def test_error_of_ours_is_a_500_when_the_table_does_not_know_it(site: Flask, error: Exception) -> None:
    """A programming error is no client's fault."""
    tta = TTASync(site)
    site.add_url_rule("/", "view", tta.workflow(raising(error))(lambda result: result))
    problem(site.test_client().get("/"), 500, "internal_server_error")


def test_unexpected_error_reaches_the_test_when_the_application_is_testing(site: Flask) -> None:
    """With site.testing, pytest sees the error itself, with its own traceback."""
    site.testing = True
    tta = TTASync(site)
    site.add_url_rule("/", "view", tta.workflow(raising(KeyError("mine")))(lambda result: result))
    with pytest.raises(KeyError, match="mine") as caught:
        site.test_client().get("/")
    assert caught.traceback[-1].name == "fail"


@pytest.mark.parametrize("testing", [True, False])
def test_call_on_the_loop_thread_is_a_bug_when_a_workflow_makes_it(site: Flask, testing: bool) -> None:
    """It reaches the test that makes it, and is a 500 elsewhere: not a service that is down."""
    site.testing = testing
    tta = TTASync(site)

    async def answer() -> None: ...

    @step
    async def mistaken(data: Any) -> None:
        call_sync(answer)

    site.add_url_rule("/", "view", tta.workflow(mistaken)(lambda result: result))
    if testing:
        with pytest.raises(WouldDeadlockError, match="await it instead"):
            site.test_client().get("/")
    else:
        problem(site.test_client().get("/"), 500, "internal_server_error")


def test_signal_is_sent_once_when_an_error_is_unexpected(site: Flask) -> None:
    """got_request_exception, on which error trackers rely, comes exactly once."""
    tta = TTASync(site)
    site.add_url_rule("/", "view", tta.workflow(raising(RuntimeError()))(lambda result: result))
    heard: list[BaseException] = []

    def hear(sender: Any, exception: BaseException, **more: Any) -> None:
        heard.append(exception)

    with flask.got_request_exception.connected_to(hear, site):
        site.test_client().get("/")
        assert [type(e) for e in heard] == [RuntimeError]
        site.config["PROPAGATE_EXCEPTIONS"] = True
        with pytest.raises(RuntimeError):
            site.test_client().get("/")
        assert len(heard) == 2


def test_own_log_exception_is_kept_when_the_application_has_one() -> None:
    """An application that overrides log_exception keeps its own."""
    logged: list[Any] = []

    class Legacy(Flask):
        def log_exception(self, exc_info: Any) -> None:
            logged.append(exc_info)

    app = Legacy("legacy")
    tta = TTASync(app)
    app.add_url_rule("/", "view", tta.workflow(raising(RuntimeError()))(lambda result: result))
    app.test_client().get("/")
    assert len(logged) == 1


def test_errors_can_be_added_to_the_table(site: Flask) -> None:
    """map_error gives an application's own error a status and a code; a subclass's as well."""

    class Gone(Exception):
        pass

    class LongGone(Gone):
        pass

    tta = TTASync()
    tta.map_error(Gone, 410, "gone", "It is no longer here.")
    tta.init_app(site)
    site.add_url_rule("/", "view", tta.workflow(raising(LongGone("secret")))(lambda result: result))
    body = problem(site.test_client().get("/"), 410, "gone")
    assert body["detail"] == "It is no longer here."


def test_problem_can_be_raised_in_any_view_when_it_is_the_authors_own(site: Flask) -> None:
    """Problem leaves as itself wherever it is raised, with headers and further members."""
    TTASync(site, problems="blueprint")

    @site.get("/raised")
    def raised() -> Any:
        raise Problem(409, "already_running", "It runs.", headers={"Retry-After": "5"}, job="j1")

    @site.get("/returned")
    def returned() -> Any:
        return Problem(404)

    response = site.test_client().get("/raised")
    body = problem(response, 409, "already_running")
    assert (body["detail"], body["job"]) == ("It runs.", "j1")
    assert response.headers["Retry-After"] == "5"
    problem(site.test_client().get("/returned"), 404, "not_found")


# ---- HTTP errors ---------------------------------------------------------------------------------------------------


def test_http_errors_keep_their_headers(site: Flask) -> None:
    """405 has Allow, 429 and 503 keep Retry-After, 401 keeps WWW-Authenticate."""
    TTASync(site, problems="app")

    @site.get("/")
    def view() -> Any:
        return ""

    @site.get("/429")
    def limited() -> Any:
        raise TooManyRequests(retry_after=7)

    @site.get("/503")
    def down() -> Any:
        raise ServiceUnavailable("Down for maintenance.", retry_after=60)

    client = site.test_client()
    response = client.delete("/")
    problem(response, 405, "method_not_allowed")
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    assert client.get("/429").headers["Retry-After"] == "7"
    response = client.get("/503")
    assert problem(response, 503, "service_unavailable")["detail"] == "Down for maintenance."
    assert response.headers["Retry-After"] == "60"
    problem(client.get("/nowhere"), 404, "not_found")


def test_redirects_and_ready_responses_are_left_alone(site: Flask) -> None:
    """3xx, abort(Response) and Flask's own slash redirect are no errors."""
    TTASync(site, problems="app")

    @site.get("/moved")
    def moved() -> Any:
        abort(redirect("/there"))

    @site.get("/slash/")
    def slash() -> Any:
        abort(flask.Response("mine", 418))

    class NotModified(HTTPException):
        code = 304

    @site.get("/304")
    def not_modified() -> Any:
        raise NotModified

    @site.get("/404")
    def ready() -> Any:
        raise NotFound(response=flask.Response("mine", 404))

    client = site.test_client()
    assert client.get("/moved").status_code == 302
    assert client.get("/slash").status_code == 308
    response = client.get("/slash/")
    assert (response.status_code, response.data) == (418, b"mine")
    assert client.get("/304").status_code == 304
    assert client.get("/304").mimetype != "application/problem+json"
    response = client.get("/404")
    assert (response.status_code, response.data) == (404, b"mine")


def test_abort_in_a_decorated_view_is_a_problem(site: Flask) -> None:
    """abort(404, ...) in the last touch leaves as a problem with the author's description."""
    tta = TTASync(site, problems="blueprint")

    @site.post("/")
    @tta.workflow(measure, load=Request)
    def view(result: Any) -> Any:
        abort(404, "No such document.")

    @site.post("/moved")
    @tta.workflow(measure, load=Request)
    def moved(result: Any) -> Any:
        abort(redirect("/"))

    body = problem(site.test_client().post("/", json={"text": ""}), 404, "not_found")
    assert body["detail"] == "No such document."
    assert site.test_client().post("/moved", json={"text": ""}).status_code == 302


# ---- whose errors --------------------------------------------------------------------------------------------------


def legacy(problems: Any, **pages: Any) -> Flask:
    """An application with pages of its own, a decorated view, a blueprint of ours and plain views."""
    app = Flask("legacy")
    for name, exception in {"not_found": 404, "gone": KeyError, "error": 500, "all": Exception}.items():
        if name in pages:
            app.register_error_handler(exception, lambda error, page=pages[name]: (page, 599))
    bp = Blueprint("api", __name__, url_prefix="/api")
    tta = TTASync(bp)
    if problems is not None:
        TTASync(app, problems=problems)

    @bp.get("/missing")
    def missing() -> Any:
        abort(404)

    @bp.get("/broken")
    def broken() -> Any:
        raise ZeroDivisionError

    @bp.get("/key")
    def key() -> Any:
        raise KeyError("k")

    @bp.get("/timeout")
    def timeout() -> Any:
        raise StepTimeoutError("s", 1)

    @bp.get("/decorated")
    @tta.workflow(raising(ZeroDivisionError()))
    def decorated(result: Any) -> Any: ...

    @bp.get("/decorated-key")
    @tta.workflow(raising(KeyError("k")))
    def decorated_key(result: Any) -> Any: ...

    app.register_blueprint(bp)
    for path, view in {"/missing": missing, "/broken": broken, "/key": key, "/timeout": timeout}.items():
        app.add_url_rule(path, path.strip("/"), view)
    return app


HTML = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


@pytest.mark.parametrize("problems", [None, "blueprint", "auto", "app"])
@pytest.mark.parametrize("headers", [{}, HTML])
def test_blueprint_of_ours_answers_with_problems_whatever_pages_the_application_has(
    problems: Any, headers: dict[str, str]
) -> None:
    """In a blueprint of ours, and in decorated views, the application's general pages do not count."""
    app = legacy(problems, not_found="their 404", error="their 500", all="their all")
    client = app.test_client()
    problem(client.get("/api/missing", headers=headers), 404, "not_found")
    problem(client.get("/api/broken", headers=headers), 500, "internal_server_error")
    problem(client.get("/api/timeout", headers=headers), 504, "step_timeout")
    problem(client.get("/api/decorated", headers=headers), 500, "internal_server_error")
    response = client.post("/api/missing", headers=headers)
    problem(response, 405, "method_not_allowed")
    assert "GET" in response.headers["Allow"]


def test_handler_for_a_class_of_error_wins_when_the_application_has_one() -> None:
    """errorhandler(KeyError) is meant for exactly that error, also in a blueprint of ours."""
    client = legacy(None, gone="their page").test_client()
    for path in ("/api/key", "/api/decorated-key", "/key"):
        assert (client.get(path).status_code, client.get(path).text) == (599, "their page")


def test_handler_of_the_blueprint_wins_in_its_own_views(site: Flask) -> None:
    """What the blueprint's author registered is asked before the table."""
    bp = Blueprint("api", __name__)
    tta = TTASync(bp)

    @bp.errorhandler(404)
    def page(error: HTTPException) -> Any:
        return "mine", 404

    @bp.get("/")
    @tta.workflow(raising(ValueError()))
    def view(result: Any) -> Any: ...

    @bp.get("/aborts/<int:code>")
    @tta.workflow(step(lambda data: data))
    def aborts(result: Any, code: int) -> Any:
        abort(code)

    site.register_blueprint(bp)
    client = site.test_client()
    problem(client.get("/"), 500, "internal_server_error")
    assert client.get("/aborts/404").text == "mine"
    problem(client.get("/aborts/410"), 410, "gone")


@pytest.mark.parametrize("problems", [None, "blueprint", "auto"])
def test_pages_of_the_application_stay_when_problems_are_not_for_all(problems: Any) -> None:
    """An application's own pages are not taken from it, nor its catch-all."""
    client = legacy(problems, not_found="their 404", all="their all").test_client()
    assert client.get("/missing").text == "their 404"
    assert client.get("/nowhere").text == "their 404"
    assert client.get("/broken").text == "their all"


def test_application_is_as_before_when_only_a_blueprint_is_ours(site: Flask) -> None:
    """A dropped-in blueprint changes nothing outside it: Flask's own pages, and errors that reach the tests."""
    site = legacy(None)
    client = site.test_client()
    for path, status in (("/missing", 404), ("/nowhere", 404), ("/broken", 500), ("/timeout", 500)):
        response = client.get(path)
        assert (response.status_code, response.mimetype) == (status, "text/html")
    assert client.post("/missing").mimetype == "text/html"
    site.testing = True
    with pytest.raises(StepTimeoutError):
        client.get("/timeout")


def test_browser_gets_pages_and_programs_get_problems_when_problems_is_auto() -> None:
    """By default an error is a problem for everybody but those who ask for HTML; the status is right for both."""
    client = legacy("auto").test_client()
    problem(client.get("/missing"), 404, "not_found")
    problem(client.get("/missing", headers={"Accept": "application/json"}), 404, "not_found")
    problem(client.get("/broken"), 500, "internal_server_error")
    problem(client.get("/timeout"), 504, "step_timeout")
    for path, status in (("/missing", 404), ("/broken", 500), ("/timeout", 504)):
        response = client.get(path, headers=HTML)
        assert (response.status_code, response.mimetype) == (status, "text/html")


def test_page_for_a_browser_keeps_retry_after(site: Flask) -> None:
    """Where the page is the application's, Retry-After is still ours to say; an odd status needs no page."""
    tta = TTASync()
    tta.map_error(KeyError, 499, "odd")
    tta.init_app(site)
    site.add_url_rule("/busy", "busy", lambda: run_sync(raising(BulkheadFullError("db", 7.0)), None))
    site.add_url_rule("/odd", "odd", lambda: {}["odd"])
    response = site.test_client().get("/busy", headers=HTML)
    assert (response.status_code, response.mimetype, response.headers["Retry-After"]) == (503, "text/html", "7")
    assert site.test_client().get("/odd", headers=HTML).status_code == 500


def test_failing_call_leaves_a_trace_when_it_leaves_as_5xx(site: Flask, caplog: pytest.LogCaptureFixture) -> None:
    """One warning names the error and the correlation id; the text of errors that are not ours stays out of the log."""
    tta = TTASync(site)
    ours, theirs = StepTimeoutError("fetch", 1.0), redis.exceptions.ConnectionError("secret")
    for path, error in {"/ours": ours, "/theirs": theirs, "/4xx": ValidationError("x")}.items():
        site.add_url_rule(path, path.strip("/"), tta.workflow(raising(error))(lambda result: result))
    client = site.test_client()
    for path in ("/ours", "/theirs", "/4xx"):
        client.get(path, headers={"X-Request-ID": f"id-{path[1:]}"})
    first, second = [r.getMessage() for r in caplog.records if r.name == site.logger.name]
    assert first == "StepTimeoutError on /ours [GET], correlation id id-ours: fetch took longer than its 1 s"
    assert second == "ConnectionError on /theirs [GET], correlation id id-theirs"


def test_wrong_method_on_a_url_that_would_redirect_is_no_failure(site: Flask) -> None:
    """Asking what a wrong method's URL belongs to copes with Flask's own redirects."""
    bp = Blueprint("api", __name__, url_prefix="/api")
    TTASync(bp)
    bp.add_url_rule("/slash/", "view", lambda: "")
    bp.add_url_rule("/slash", "other", lambda: "", methods=["PUT"])
    site.register_blueprint(bp)
    site.url_map.add(Rule("/old", redirect_to="/api/slash/", methods=["GET"]))
    assert site.test_client().delete("/api/slash").status_code == 405
    assert site.test_client().delete("/api/slash/").status_code == 405
    assert site.test_client().delete("/old").status_code == 405


def test_everybody_gets_problems_when_problems_is_app() -> None:
    """problems="app" is for an API: problems for browsers too."""
    client = legacy("app").test_client()
    problem(client.get("/missing", headers=HTML), 404, "not_found")
    problem(client.get("/broken", headers=HTML), 500, "internal_server_error")


def test_blueprint_is_known_by_its_name_when_it_is_nested_or_renamed(site: Flask) -> None:
    """A blueprint inside another, or registered twice under two names, is ours under each of them."""
    inner, outer = Blueprint("inner", __name__), Blueprint("outer", __name__, url_prefix="/o")
    TTASync(inner)

    @inner.get("/")
    def view() -> Any:
        return ""

    outer.register_blueprint(inner, url_prefix="/i")
    site.register_blueprint(outer)
    site.register_blueprint(inner, name="again", url_prefix="/again")
    client = site.test_client()
    problem(client.post("/o/i/"), 405, "method_not_allowed")
    problem(client.post("/again/"), 405, "method_not_allowed")


def test_two_extensions_share_an_application(site: Flask) -> None:
    """Two dropped-in blueprints with an extension each, and one for the application, get along."""
    for name in ("a", "b"):
        bp = Blueprint(name, __name__, url_prefix=f"/{name}")
        tta = TTASync(bp)
        bp.add_url_rule("/", "view", tta.workflow(measure, load=Request, dump=Answer)(lambda r: r), methods=["POST"])
        site.register_blueprint(bp)
    TTASync(site).init_app(site)
    client = site.test_client()
    for name in ("a", "b"):
        assert client.post(f"/{name}/", json={"text": "abc"}).json == {"length": 3}
    assert len(site.after_request_funcs[None]) == 1
    problem(client.get("/nowhere"), 404, "not_found")


def test_later_handlers_of_the_application_are_respected(site: Flask) -> None:
    """A catch-all registered after the extension replaces ours for the application's own views."""
    TTASync(site)
    site.register_error_handler(Exception, lambda error: ("theirs", 500))

    @site.get("/")
    def view() -> Any:
        raise RuntimeError

    assert site.test_client().get("/").text == "theirs"


def test_unknown_scope_of_problems_is_refused() -> None:
    """problems= takes three words."""
    with pytest.raises(ConfigurationError, match="auto"):
        TTASync(problems="all")  # type: ignore[arg-type]


def test_module_exports_what_it_says() -> None:
    """__all__ is the public surface."""
    assert tta_sync.flask.__all__ == ["Problem", "TTASync", "remote_address"]
