"""The extension: what it sets up in an application, the decorated view, and whose errors it answers."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar, cast

from flask import Blueprint, Flask, Response, current_app, got_request_exception, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, default_exceptions
from werkzeug.routing import RoutingException

from tta_sync.context import context_providers
from tta_sync.exceptions import ConfigurationError, TTASyncError
from tta_sync.facade import async_to_sync, run_sync
from tta_sync.flask.body import load as load_request
from tta_sync.flask.problems import TABLE, Problem, Row, problem_of
from tta_sync.flask.requests import RequestInfo, prepare_settings, request_context
from tta_sync.flask.storage import Storage, remote_address
from tta_sync.primitives.core.base import as_primitive, caller_step

T = TypeVar("T")
Problems = Literal["auto", "app", "blueprint"]


class UnitOfWork(Protocol):
    """What is asked of a unit of work: ``tta_sync.sqlalchemy.unit_of_work(Session)`` is one."""

    def run(self, fn: Callable[..., T], /, *args: Any, **keywords: Any) -> T: ...


class _State:
    """What one application knows of its TTASync objects; ``app.extensions["tta_sync"]``."""

    def __init__(self) -> None:
        self.problems: Problems = "blueprint"
        self.blueprints: set[str] = set()  # by name as registered
        self.table: dict[str, Row] = dict(TABLE)
        self.storage = Storage()

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
        problem = problem_of(error, self.table)
        if problem is not None and problem.status >= 500 and not isinstance(error, HTTPException):
            # It leaves without its text, so this is the only trace. The text of others' errors may hold what was sent.
            said = f": {error}" if isinstance(error, TTASyncError) else ""
            current_app.logger.warning(
                "%s on %s [%s], correlation id %s%s",
                type(error).__qualname__,
                request.path,
                request.method,
                RequestInfo.current().id,
                said,
            )
        return problem


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
            if not http and problem.status in default_exceptions:
                # The right status, on whatever page the application has for it.
                page = default_exceptions[problem.status]()
                if "Retry-After" in dict(problem.headers):
                    page.retry_after = int(dict(problem.headers)["Retry-After"])  # type: ignore[attr-defined]
                return current_app.handle_http_exception(page)
    if http:
        return error
    raise error  # to Flask, which logs it, or hands it to the tests


_HANDLERS = (_on_error,)


def _arrive() -> Any:
    """Note the request; answer a wrong method on one of our URLs before the application's own page for it would."""
    RequestInfo.current()
    error = request.routing_exception
    if error is not None and not _passes_through(error):
        state: _State = current_app.extensions["tta_sync"]
        if state.is_ours():
            return state.problem(error)
    return None


def _leave(response: Response) -> Response:
    response.headers["X-Request-ID"] = RequestInfo.current().id
    return response


def _log_exception(app: Flask, exc_info: Any) -> None:
    app.logger.error(
        "Exception on %s [%s], correlation id %s",
        request.path,
        request.method,
        RequestInfo.current().id,
        exc_info=exc_info,
    )


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
        self._table: dict[str, Row] = {}
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
            prepare_settings(app)
            state = app.extensions["tta_sync"] = _State()
            for kind in (HTTPException, Exception):
                if kind not in app.error_handler_spec[None][None]:
                    app.register_error_handler(kind, _on_error)
            app.before_request_funcs.setdefault(None, []).insert(0, _arrive)
            app.after_request(_leave)
            app.async_to_sync = cast(Any, async_to_sync)  # type: ignore[method-assign]  # Flask's own way to replace it
            if type(app).log_exception is Flask.log_exception:
                app.log_exception = functools.partial(_log_exception, app)  # type: ignore[method-assign]
            if request_context not in context_providers:
                context_providers.append(request_context)
        state.table.update(self._table)
        return state

    def load(self, schema: Any, source: Literal["json", "query"] = "json") -> Any:
        """Load the request's body, or its query string, with *schema*, in any view.

        Raises:
            Problem: 400 not JSON, 413 too long, 415 not declared as JSON, 422 a NUL or a lone surrogate in it.
            marshmallow.ValidationError: it does not fit; it leaves as a 422.
        """
        return load_request(_instance(schema), source)

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
            flow: any workflow, or a function; a plain one runs on the request's own thread.
            load: the schema of what comes in; without one the data is the dict of the URL's arguments.
            dump: the schema of what goes out.
            source: where *load* reads, the JSON body or the query string.
            status: of the answer, unless the function says otherwise.
            timeout: seconds for the workflow, within the request's deadline.
            unit_of_work: what the workflow runs in, instead of the extension's; it ends before the result is dumped.

        The function gets the dumped result, and the URL's arguments by name; what it returns is what a view may return.
        """
        loads, dumps, runs = _instance(load), _instance(dump), _workflow(flow)

        def decorate(view: Callable[..., Any]) -> Callable[..., Any]:
            is_async = inspect.iscoroutinefunction(view)

            @functools.wraps(view)
            def run(*args: Any, **url: Any) -> Any:  # args: a method's self
                try:
                    data = dict(url) if loads is None else load_request(loads, source)
                    unit = unit_of_work or self.unit_of_work
                    if unit is None:
                        result = run_sync(runs, data, timeout=timeout)
                    else:
                        result = unit.run(run_sync, runs, data, timeout=timeout)
                    if dumps is not None:
                        result = dumps.dump(result)
                    touch = current_app.ensure_sync(view) if is_async else view
                    answer = touch(*args, result, **url)
                except Exception as error:
                    return _answer(error)
                return answer if status == 200 or isinstance(answer, (tuple, Response)) else (answer, status)

            run.tta_workflow = flow  # type: ignore[attr-defined]  # survives other decorators' functools.wraps
            return run

        return decorate

    def rate_limit(
        self,
        rate: float,
        burst: int = 1,
        key: Callable[..., Any] | None = remote_address,
        *,
        name: str | None = None,
        fail: Literal["local", "open", "closed"] = "local",
        workers: int | None = None,
        storage: Any = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Let each client make at most *rate* requests per second of a view, after a burst of *burst*; else 429.

        In any t seconds at most ``burst + rate * t`` requests go through. Every response, refusals too, carries
        RateLimit and RateLimit-Policy, and their forerunners RateLimit-* and X-RateLimit-*; a refusal Retry-After.
        The limit is shared by all processes through Redis, where the application has TTA_REDIS_URL or REDIS_URL in its
        configuration or environment; else each process has its own. Stands below ``@app.route``, on any view.

        Args:
            rate: requests per second; may be less than 1.
            burst: how many requests may come at once after a pause.
            key: a function of nothing, or of the request: a limit for each value it returns; None: one for all. By
                default :func:`remote_address`, the client's address, of IPv6 its /64 network.
            name: the limit's name; views that give the same one share it. By default the endpoint's.
            fail: what holds while Redis is down: "local", this process's share of the rate; "open", no limit;
                "closed", 503. The first request that notices waits a tenth of a second, the next ones do not.
            workers: how many processes share the rate while Redis is down; WEB_CONCURRENCY, or 1.
            storage: a client, a URL or a ``RedisBackend``, in place of the application's Redis.

        Raises:
            ConfigurationError: an option makes no sense.

        Source: GCRA, ITU-T I.371; draft-ietf-httpapi-ratelimit-headers-10.
        """
        from tta_sync.flask.limits import RateLimit

        made = (rate, burst, key, name, fail, workers, storage)
        RateLimit(*made)  # refused here, at the line that says so
        return lambda view: RateLimit(*made).wrap(view, _answer)

    def idempotent(
        self,
        ttl: float = 86_400.0,
        wait: bool = False,
        *,
        required: bool = False,
        caller: Callable[..., Any] | None = None,
        name: str | None = None,
        fail: Literal["closed", "open"] = "closed",
        max_bytes: int = 1 << 20,
        storage: Any = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Act once per Idempotency-Key: whoever repeats a request gets the first response, byte for byte.

        A replayed response has the first one's status, body and headers (but for cookies), and ``Idempotent-Replayed:
        true``. While the first request is being worked on, a repeated one gets 409, or waits. The same key with another
        method, URL or body is 422, a malformed key 400. A response with 5xx, or that says "try again", and an error
        that the view raises free the key. Keys are apart by view and by caller: nobody gets another one's response.
        They are shared by all processes through Redis, found as for :meth:`rate_limit`; else each process has its own.
        Stands below ``@app.route``, on any view.

        Args:
            ttl: seconds for which a response is kept; a day by default.
            wait: wait for the first request's response, within 30 s and the request's deadline.
            required: answer 400 to a request without a key; by default it runs as if undecorated.
            caller: a function of nothing, or of the request, that tells clients apart; by default tenant, credentials
                (Authorization, X-Api-Key) and session, and the address of those who have none of them.
            name: what the keys belong to; by default the endpoint.
            fail: what a request with a key gets while Redis is down: "closed", 503; "open", it runs unprotected.
            max_bytes: the longest body that is kept; a longer one, or a stream, is sent once, and repeated requests
                get 409.
            storage: a client, a URL or a ``RedisBackend``, in place of the application's Redis.

        Raises:
            ConfigurationError: an option makes no sense.

        Source: draft-ietf-httpapi-idempotency-key-header-07; what is replayed, and the marker, after Stripe.
        """
        from tta_sync.flask.idempotency import Idempotency

        made = Idempotency(ttl, wait, required, caller, name, fail, max_bytes, storage)
        return lambda view: made.wrap(view, _answer)


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


def _workflow(flow: Any) -> Any:
    """Return *flow* as a workflow, so that what cannot be one is refused when the view is made."""
    plain = inspect.isroutine(flow) and not inspect.iscoroutinefunction(flow)
    return caller_step(flow) if plain else as_primitive(flow)


def _instance(schema: Any) -> Any:
    """Make the schema once: building one costs a hundred times what using it does."""
    return schema() if isinstance(schema, type) else schema


def _registered_name(setup: Any) -> str:
    return f"{setup.name_prefix}.{setup.name}".lstrip(".")
