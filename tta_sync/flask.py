"""Flask: schema → workflow → schema in a view, one context per request, and errors as RFC 9457 problem details.

In a blueprint that is dropped into somebody's application::

    bp = Blueprint("summaries", __name__)
    tta = TTASync(bp)


    @bp.post("/api/summaries")
    @tta.workflow(flow, load=SummaryRequest, dump=SummaryResponse)
    def summarise(result):
        return result

``app.register_blueprint(bp)`` is all that the application does. ``TTASync(app)``, or ``init_app``, is for an
application of one's own. Nothing is kept outside ``app.extensions["tta_sync"]``, ``app.config`` and the request.

Settings, in ``app.config``:

=================  ==========  =========================================================================================
TTA_DEADLINE       15.0        seconds that a request may take, from its arrival; None: no deadline
TTA_MAX_BODY       16 MiB      bytes of a body that is loaded, where MAX_CONTENT_LENGTH does not say
TTA_MAX_DEPTH      100         nesting of a JSON body
=================  ==========  =========================================================================================
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NoReturn, Protocol, TypeVar, cast

from flask import Blueprint, Flask, Response, current_app, got_request_exception, has_request_context, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, RequestEntityTooLarge, default_exceptions
from werkzeug.http import HTTP_STATUS_CODES
from werkzeug.routing import RoutingException

from tta_sync.context import Deadline, WorkflowContext, context_providers
from tta_sync.exceptions import (
    BulkheadFullError,
    CircuitOpenError,
    ConfigurationError,
    DeadlineExceededError,
    LoopUnavailableError,
    RateLimitedError,
    SaturatedError,
    StepTimeoutError,
)

__all__ = ["Problem", "TTASync"]

T = TypeVar("T")
View = TypeVar("View", bound=Callable[..., Any])
Problems = Literal["auto", "app", "blueprint"]

_ENVIRON = "tta_sync.request"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_DEFAULTS: dict[str, Any] = {"TTA_DEADLINE": 15.0, "TTA_MAX_BODY": 16 * 1024 * 1024, "TTA_MAX_DEPTH": 100}


class Schema(Protocol):
    """What is asked of a schema: marshmallow's, or anything with the same two methods."""

    def load(self, data: Any) -> Any: ...

    def dump(self, obj: Any) -> Any: ...


class UnitOfWork(Protocol):
    """What is asked of a unit of work: ``tta_sync.sqlalchemy.unit_of_work(Session)`` is one."""

    def run(self, fn: Callable[..., T], /, *args: Any, **keywords: Any) -> T: ...


# ---- problems --------------------------------------------------------------------------------------------------------

_TABLE: dict[str, tuple[int, str, str | None]] = {
    # By name, so that nobody imports marshmallow or SQLAlchemy who does not use them: status, code, what may be said.
    "marshmallow.exceptions.ValidationError": (422, "validation_error", "Some fields are not valid."),
    "sqlalchemy.exc.IntegrityError": (409, "conflict", "The request conflicts with what is stored."),
    "redis.exceptions.ConnectionError": (503, "redis_unavailable", None),
    "redis.exceptions.TimeoutError": (503, "redis_unavailable", None),
    **{
        f"{error.__module__}.{error.__qualname__}": (status, code, detail)
        for error, status, code, detail in (
            (RateLimitedError, 429, "rate_limited", "Too many calls; try again later."),
            (SaturatedError, 503, "saturated", "Too many calls are in flight; try again later."),
            (BulkheadFullError, 503, "bulkhead_full", "Too many calls are in flight; try again later."),
            (CircuitOpenError, 503, "circuit_open", "A service that this needs is failing; try again later."),
            (LoopUnavailableError, 503, "loop_unavailable", "The service is shutting down; try again later."),
            (StepTimeoutError, 504, "step_timeout", "A step took longer than it may."),
            (DeadlineExceededError, 504, "deadline_exceeded", "The request took longer than it may."),
        )
    },
}
_UNSAFE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_MAX_FIELDS = 100  # of a problem's errors; a body of a million bad items must not be answered by a million messages
_MAX_TEXT = 200


class Problem(HTTPException):
    """An error that leaves as ``application/problem+json``, whoever handles errors: raise it, or ``return`` it.

    Args:
        status: the HTTP status, 400 to 599.
        code: what programs tell errors apart by; made of the status where it is None.
        detail: what people may read about this occurrence.
        errors: messages by field; nested ones, as marshmallow gives them, become dotted paths.
        headers: further response headers.
        members: further members of the body.

    Source: RFC 9457.
    """

    def __init__(
        self,
        status: int,
        code: str | None = None,
        detail: str | None = None,
        *,
        errors: Mapping[Any, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(detail)
        self.code = status
        self.problem_code = code or _snake(HTTP_STATUS_CODES.get(status, "error"))
        self.errors = None if errors is None else flatten_errors(errors)
        self.headers = dict(headers or {})
        self.members = members

    def get_body(self, environ: Any = None, scope: Any = None) -> str:
        assert self.code is not None
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTP_STATUS_CODES.get(self.code, "Unknown Error"),
            "status": self.code,
            "code": self.problem_code,
        }
        if self.description is not None:
            body["detail"] = self.description
        if self.errors is not None:
            body["errors"] = self.errors
        body.update(self.members)
        if has_request_context():
            body["correlation_id"] = _Request.current().id
        return json.dumps(body, default=str)

    def get_headers(self, environ: Any = None, scope: Any = None) -> list[tuple[str, str]]:
        return [("Content-Type", "application/problem+json"), *self.headers.items()]


def _snake(phrase: str) -> str:
    return re.sub(r"\W+", "_", phrase.lower()).strip("_")


def _printable(text: object) -> str:
    """Bound what is echoed, and take out what no parser should be given."""
    return _UNSAFE.sub("\ufffd", str(text))[:_MAX_TEXT]


def flatten_errors(errors: Mapping[Any, Any]) -> dict[str, list[str]]:
    """Bring nested messages to ``{field: [messages]}``.

    A field inside a list or an object gets a dotted path (``documents.3.text``); an item of a list of plain values is
    named in the message instead (``tasks``: "Item 1: ..."), so that every key is a field's.
    """
    flat: dict[str, list[str]] = {}
    for path, message in _leaves(errors):
        items: list[str] = []
        while len(path) > 1 and (isinstance(path[-1], int) or path[-1] == "_schema"):
            last = path.pop()
            if isinstance(last, int):
                items.insert(0, str(last))
        field = ".".join(_printable(part) for part in path)
        if field not in flat and len(flat) >= _MAX_FIELDS:
            continue
        messages = flat.setdefault(field, [])
        if len(messages) < _MAX_FIELDS:
            text = _printable(message)
            messages.append(f"Item {'.'.join(items)}: {text}" if items else text)
    return flat


def _leaves(errors: Mapping[Any, Any]) -> Iterator[tuple[list[Any], Any]]:
    waiting: list[tuple[list[Any], Any]] = [([], errors)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting.extend(([*path, key], inner) for key, inner in reversed(list(value.items())))
        elif isinstance(value, (list, tuple, set)):
            for message in value:
                yield list(path), message
        else:
            yield list(path), value


# ---- the request -----------------------------------------------------------------------------------------------------


class _Request:
    """What one request is known by.

    It stands in the WSGI environment: a test that holds an application context open over two requests shares
    ``flask.g`` between them, and must not share this.
    """

    __slots__ = ("_context", "_id", "arrived")

    def __init__(self) -> None:
        self.arrived: Deadline | None = None
        self._id: str | None = None
        self._context: WorkflowContext | None = None
        seconds = current_app.config.get("TTA_DEADLINE", _DEFAULTS["TTA_DEADLINE"])
        if seconds is not None:
            self.arrived = Deadline.after(seconds)

    @classmethod
    def current(cls) -> _Request:
        environ = request.environ
        held = environ.get(_ENVIRON)
        if held is None:
            held = environ[_ENVIRON] = cls()
        return cast(_Request, held)

    @property
    def id(self) -> str:
        if self._id is None:
            given = request.headers.get("X-Request-ID", "")
            self._id = given if _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
        return self._id

    @property
    def context(self) -> WorkflowContext:
        if self._context is None:
            context = self._context = WorkflowContext(correlation_id=self.id, deadline=self.arrived)
            trace = _TRACEPARENT.fullmatch(request.headers.get("traceparent", ""))
            if trace is not None:
                version, trace_id, span_id, flags, more = trace.groups()
                # W3C Trace Context: ff is no version, all zeros no id, and version 00 has four fields only.
                if version != "ff" and trace_id.strip("0") and span_id.strip("0") and (version != "00" or not more):
                    context.trace_id, context.parent_span_id = trace_id, span_id
                    context.trace_flags = int(flags, 16)
        return self._context


def _request_context() -> WorkflowContext | None:
    """Give the request's context to whoever asks ``current_context()`` in a view."""
    if has_request_context() and "tta_sync" in current_app.extensions:
        return _Request.current().context
    return None


# ---- strict JSON -----------------------------------------------------------------------------------------------------

_SUSPICIOUS = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object names a member twice")
    return members


_decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)


def parse_json(body: bytes, max_depth: int = 100) -> Any:
    """Parse *body* as RFC 8259 has it, UTF-8 and nothing else.

    NaN and Infinity, numbers too large to hold, an object that names a member twice (parsers read it differently, and
    attackers know it) and nesting deeper than *max_depth* are refused.

    Raises:
        Problem: 400 ``malformed_json``.
    """
    try:
        data = _decoder.decode(body.decode("utf-8-sig"))
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise _malformed(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _malformed("it is empty" if not body.strip() else f"{error.msg} at character {error.pos}") from None
    except ValueError as error:  # ours, or an int of more digits than Python reads
        raise _malformed(_printable(error)) from None
    if body.count(b"[") + body.count(b"{") > max_depth and _deeper(data, max_depth):
        raise _malformed("it is nested too deeply")
    return data


def _malformed(why: str) -> Problem:
    return Problem(400, "malformed_json", f"The body is not JSON that can be read: {why}.")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _deeper(data: Any, limit: int) -> bool:
    level = [data]
    for _ in range(limit):
        level = [child for value in level for child in _children(value) if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def unsafe_strings(data: Any) -> dict[str, list[str]]:
    """Return field errors for every string in *data*, keys too, that has a NUL or a lone surrogate."""
    errors: dict[str, list[str]] = {}
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), data)]
    nested: dict[Any, Any] = {}
    while waiting and len(errors) < _MAX_FIELDS:
        path, value = waiting.pop()
        if isinstance(value, str):
            _check(value, path, errors, nested)
        elif isinstance(value, list):
            waiting.extend(((*path, i), child) for i, child in enumerate(value) if isinstance(child, (str, list, dict)))
        elif isinstance(value, dict):
            for key, child in value.items():
                _check(key, (*path, key), errors, nested)
                waiting.append(((*path, key), child))
    return errors


def _check(text: str, path: tuple[Any, ...], errors: dict[str, list[str]], nested: dict[Any, Any]) -> None:
    if "\x00" in text:
        why = "Contains a NUL character."
    else:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            why = "Contains a lone surrogate, which is not a character."
        else:
            return
    fold: Any = [why]
    for part in reversed(path or ("_schema",)):
        fold = {part: fold}
    for field, messages in flatten_errors(fold).items():
        errors.setdefault(field, []).extend(messages)


# ---- the extension ---------------------------------------------------------------------------------------------------


class _State:
    """What one application knows of its TTASync objects; ``app.extensions["tta_sync"]``."""

    def __init__(self) -> None:
        self.problems: Problems = "blueprint"
        self.blueprints: set[str] = set()  # by name as registered
        self.table: dict[str, tuple[int, str, str | None]] = dict(_TABLE)

    def widen(self, problems: Problems) -> None:
        order: tuple[Problems, ...] = ("blueprint", "auto", "app")
        self.problems = max(self.problems, problems, key=order.index)

    # -- whose error is it?

    def is_ours(self) -> bool:
        """Say whether the request is for a view of ours: decorated, in a blueprint of ours, or on a URL of one."""
        endpoint = request.endpoint
        if endpoint is None and isinstance(request.routing_exception, MethodNotAllowed):
            endpoint = _endpoint_for_another_method(request.routing_exception)
        if endpoint is None:
            return False
        view = current_app.view_functions.get(endpoint)
        return hasattr(view, "tta_workflow") or any(endpoint.startswith(f"{name}.") for name in self.blueprints)

    def own_handler(self, error: Exception, ours: bool) -> Callable[[Any], Any] | None:
        """Return the handler that the application itself has for *error*, however general, looked up as Flask does.

        Inside our own views an application's general pages do not count: only its blueprint's, and those for a class of
        error of its own.
        """
        spec = current_app.error_handler_spec
        http = isinstance(error, HTTPException)
        for code in (error.code, None) if isinstance(error, HTTPException) else (None,):
            for name in (*request.blueprints, None):
                handlers = spec.get(name, {}).get(code, {})
                for cls in type(error).__mro__:
                    handler = handlers.get(cls)
                    if handler is None or handler in _HANDLERS:
                        continue
                    if ours and name is None and (http or cls is Exception):
                        continue
                    return cast("Callable[[Any], Any]", handler)
        return None

    def problem(self, error: Exception) -> Problem | None:
        """Return *error* as a problem, or None where the table does not know it."""
        if isinstance(error, Problem):
            return error
        if isinstance(error, HTTPException):
            return _problem_of(error)
        for cls in type(error).__mro__:
            row = self.table.get(f"{cls.__module__}.{cls.__qualname__}")
            if row is not None:
                status, code, detail = row
                headers = {}
                if status in (429, 503):
                    headers["Retry-After"] = str(max(1, math.ceil(getattr(error, "retry_after", 1.0))))
                messages = getattr(error, "normalized_messages", None)
                return Problem(status, code, detail, headers=headers, errors=messages() if messages else None)
        return None


def _problem_of(error: HTTPException) -> Problem:
    assert error.code is not None
    headers = {k: v for k, v in error.get_headers() if k.lower() not in ("content-type", "content-length")}
    detail = None if error.code >= 500 and getattr(error, "original_exception", None) else error.description
    return Problem(error.code, None, detail if error.code != 500 else None, headers=headers)


def _endpoint_for_another_method(error: MethodNotAllowed) -> str | None:
    adapter = current_app.create_url_adapter(request)
    try:
        if adapter is not None and error.valid_methods:
            return cast(str, adapter.match(method=next(iter(error.valid_methods)))[0])
    except HTTPException:  # a redirect to the canonical URL, say
        pass
    return None


def _wants_html() -> bool:
    best = request.accept_mimetypes.best_match(["application/problem+json", "application/json", "text/html"])
    return best == "text/html"


def _passes_through(error: HTTPException) -> bool:
    """A redirect, a response that somebody made already, Flask's own routing: not errors."""
    return error.code is None or error.code < 400 or error.response is not None or isinstance(error, RoutingException)


def _on_error(error: Exception) -> Any:
    """Answer for the application, for whatever Flask found no more specific handler."""
    state: _State = current_app.extensions["tta_sync"]
    http = isinstance(error, HTTPException)
    if isinstance(error, HTTPException) and _passes_through(error):
        return error
    ours = state.is_ours()
    if state.problems != "app" or ours:
        own = state.own_handler(error, ours)
        if own is not None:
            return current_app.ensure_sync(own)(error)
    if ours or state.problems != "blueprint":
        problem = state.problem(error)
        if problem is not None:
            if ours or state.problems == "app" or not _wants_html():
                return problem
            if not http:  # the right status, on whatever page the application has for it
                assert problem.code is not None
                page = default_exceptions[problem.code]()
                return current_app.handle_http_exception(page)
    if http:
        return error
    raise error  # to Flask, which logs it, or hands it to the tests


_HANDLERS = (_on_error,)


def _note_routing_error() -> Any:
    """Answer a wrong method on one of our URLs, before the application's own page for it would."""
    error = request.routing_exception
    if error is not None and not _passes_through(error):
        state: _State = current_app.extensions["tta_sync"]
        if state.is_ours():
            return state.problem(error)
    return None


def _arrive() -> Any:
    _Request.current()
    return _note_routing_error()


def _leave(response: Response) -> Response:
    response.headers["X-Request-ID"] = _Request.current().id
    return response


def _log_exception(app: Flask, exc_info: Any) -> None:
    app.logger.error(
        "Exception on %s [%s], correlation id %s",
        request.path,
        request.method,
        _Request.current().id,
        exc_info=exc_info,
    )


def _async_to_sync(func: Callable[..., Any]) -> Callable[..., Any]:
    from tta_sync.facade import async_to_sync

    return cast("Callable[..., Any]", async_to_sync(func))


class TTASync:
    """Join an application, or one blueprint, to the managed loop.

    Args:
        target: the :class:`flask.Flask` or the :class:`flask.Blueprint`; or none, and :meth:`init_app` later.
        problems: which errors leave as problem details. "auto": all but those for which the application has a page of
            its own and those of a client that asks for HTML. "app": all. "blueprint": those of decorated views and of
            the blueprints given to :meth:`init_blueprint`. These two are always included.
        unit_of_work: what each decorated view's workflow runs in, ``tta_sync.sqlalchemy.unit_of_work(Session)`` say.

    The application's ``async_to_sync`` becomes ours, so its ``async def`` views run on the managed loop too.
    """

    def __init__(
        self,
        target: Flask | Blueprint | None = None,
        *,
        problems: Problems = "auto",
        unit_of_work: UnitOfWork | None = None,
    ) -> None:
        if problems not in ("auto", "app", "blueprint"):
            raise ConfigurationError(f'problems is "auto", "app" or "blueprint", not {problems!r}')
        self.problems: Problems = problems
        self.unit_of_work = unit_of_work
        self._table: dict[str, tuple[int, str, str | None]] = {}
        if isinstance(target, Blueprint):
            self.init_blueprint(target)
        elif target is not None:
            self.init_app(target)

    def init_app(self, app: Flask) -> None:
        """Set the application up; more than once is as good as once.

        Raises:
            ConfigurationError: a TTA_ setting has a value that it cannot have.
        """
        self._join(app).widen(self.problems)

    def init_blueprint(self, blueprint: Blueprint) -> None:
        """Let every error of *blueprint* leave as a problem, and set up whichever application it is registered on."""
        for code in default_exceptions:
            # By code too: Flask asks an application's handler for a code before a blueprint's for a class.
            if code >= 400:
                blueprint.register_error_handler(code, _on_error)
        blueprint.register_error_handler(HTTPException, _on_error)
        blueprint.register_error_handler(Exception, _on_error)
        blueprint.record(lambda setup: self._join(cast(Flask, setup.app)).blueprints.add(_registered_name(setup)))

    def map_error(self, error: type[Exception], status: int, code: str, detail: str | None = None) -> None:
        """Answer *error* with *status* and *code*; before ``init_app``."""
        self._table[f"{error.__module__}.{error.__qualname__}"] = (status, code, detail)

    def _join(self, app: Flask) -> _State:
        state: _State | None = app.extensions.get("tta_sync")
        if state is None:
            state = app.extensions["tta_sync"] = _State()
            for name, value in _DEFAULTS.items():
                app.config.setdefault(name, value)
            _check_settings(app)
            for kind in (HTTPException, Exception):
                if kind not in app.error_handler_spec[None][None]:
                    app.register_error_handler(kind, _on_error)
            app.before_request_funcs.setdefault(None, []).insert(0, _arrive)
            app.after_request(_leave)
            app.async_to_sync = _async_to_sync  # type: ignore[method-assign]  # Flask's own way to replace it
            if type(app).log_exception is Flask.log_exception:
                app.log_exception = functools.partial(_log_exception, app)  # type: ignore[method-assign]
            if _request_context not in context_providers:
                context_providers.append(_request_context)
        state.table.update(self._table)
        return state

    def load(self, schema: Any, source: Literal["json", "query"] = "json") -> Any:
        """Load the request's body, or its query string, with *schema*, in any view.

        Raises:
            Problem: 400 not JSON, 413 too long, 415 not declared as JSON, 422 a NUL or a lone surrogate in it.
            marshmallow.ValidationError: it does not fit; it leaves as a 422.
        """
        return _load(_instance(schema), source)

    def workflow(
        self,
        flow: Any,
        *,
        load: Any = None,
        dump: Any = None,
        source: Literal["json", "query"] = "json",
        status: int = 200,
        timeout: float | None = None,
        unit_of_work: UnitOfWork | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Make a view of *flow*: load the request, run, dump the result, give it to the function for a last touch.

        Args:
            flow: any workflow.
            load: the schema of what comes in; without one the data is the dict of the URL's arguments.
            dump: the schema of what goes out.
            source: where *load* reads, the JSON body or the query string.
            status: of the answer, unless the function says otherwise.
            timeout: seconds for the workflow, within the request's deadline.
            unit_of_work: what the workflow runs in, instead of the extension's; it ends before the result is dumped.

        The function gets the dumped result, and the URL's arguments by name; what it returns is what a view may return.
        """
        loads, dumps = _instance(load), _instance(dump)

        def decorate(view: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(view)
            def run(**url: Any) -> Any:
                try:
                    from tta_sync.facade import run_sync

                    data = dict(url) if loads is None else _load(loads, source)
                    unit = unit_of_work or self.unit_of_work
                    if unit is None:
                        result = run_sync(flow, data, timeout=timeout)
                    else:
                        result = unit.run(run_sync, flow, data, timeout=timeout)
                    if dumps is not None:
                        result = dumps.dump(result)
                    answer = current_app.ensure_sync(view)(result, **url)
                except Exception as error:
                    return _answer(error)
                return answer if status == 200 or isinstance(answer, (tuple, Response)) else (answer, status)

            run.tta_workflow = flow  # type: ignore[attr-defined]  # survives other decorators' functools.wraps
            return run

        return decorate


def _answer(error: Exception) -> Any:
    """Answer for a decorated view. Raises what Flask, or a handler of the application's own, should see."""
    state: _State | None = current_app.extensions.get("tta_sync")
    if state is None:
        raise ConfigurationError(
            "this application does not know TTASync: call tta.init_app(app), or build TTASync(blueprint)"
        ) from error
    if isinstance(error, HTTPException) and _passes_through(error):
        raise error
    if state.own_handler(error, ours=True) is not None:
        raise error
    problem = state.problem(error)
    if problem is not None:
        return problem
    propagate = current_app.config["PROPAGATE_EXCEPTIONS"]
    if current_app.testing or current_app.debug if propagate is None else propagate:
        raise error
    # What Flask.handle_exception does, but for the application's own page for a 500.
    got_request_exception.send(
        current_app._get_current_object(),  # type: ignore[attr-defined]
        _async_wrapper=current_app.ensure_sync,
        exception=error,
    )
    current_app.log_exception(sys.exc_info())
    return Problem(500)


def _instance(schema: Any) -> Any:
    """Make the schema once: building one costs a hundred times what using it does."""
    return schema() if isinstance(schema, type) else schema


def _registered_name(setup: Any) -> str:
    return f"{setup.name_prefix}.{setup.name}".lstrip(".")


def _load(schema: Schema, source: str) -> Any:
    if source == "query":
        data: Any = _query(schema)
        suspicious = True
    else:
        body = _body()
        data = parse_json(body, current_app.config["TTA_MAX_DEPTH"])
        suspicious = _SUSPICIOUS.search(body) is not None
    if suspicious:
        errors = unsafe_strings(data)
        if errors:
            raise Problem(422, "validation_error", "Some fields are not valid.", errors=errors)
    return schema.load(data)


def _body() -> bytes:
    if request.mimetype != "application/json" and not request.mimetype.endswith("+json"):
        raise Problem(415, "unsupported_media_type", "Send the body as application/json.")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem(415, "unsupported_media_type", "Send the body without a Content-Encoding.")
    if request.max_content_length is None:
        request.max_content_length = current_app.config["TTA_MAX_BODY"]
    body = request.get_data(cache=True)
    # Werkzeug stops reading a chunked body at the limit, without a word: is there more?
    if (
        request.content_length is None
        and len(body) >= request.max_content_length
        and request.environ["wsgi.input"].read(1)
    ):
        raise RequestEntityTooLarge
    return body


def _query(schema: Schema) -> dict[str, Any]:
    """Return the query string as data: a list where the schema's field is one, else the single value."""
    from marshmallow.fields import List

    lists = {field.data_key or name for name, field in getattr(schema, "fields", {}).items() if isinstance(field, List)}
    data: dict[str, Any] = {}
    for name, values in request.args.lists():
        if name in lists:
            data[name] = values
        elif len(values) == 1:
            data[name] = values[0]
        else:
            raise Problem(
                422, "validation_error", "Some fields are not valid.", errors={name: ["Given more than once."]}
            )
    return data


def _check_settings(app: Flask) -> None:
    seconds = app.config["TTA_DEADLINE"]
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if seconds is not None and not (number and 0 < seconds < math.inf):
        raise ConfigurationError(f"TTA_DEADLINE is a number of seconds above 0, or None, not {seconds!r}")
    for name in ("TTA_MAX_BODY", "TTA_MAX_DEPTH"):
        value = app.config[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"{name} is a whole number above 0, not {value!r}")
