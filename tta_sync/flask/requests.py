"""What one request is known by: its id, its trace, its deadline."""

from __future__ import annotations

import math
import re
import uuid
from typing import Any, TypeVar

from flask import Flask, current_app, has_request_context, request

from tta_sync.context import Deadline, WorkflowContext
from tta_sync.exceptions import ConfigurationError

T = TypeVar("T")

ENVIRON = "tta_sync.request"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_DEFAULTS: dict[str, Any] = {"TTA_DEADLINE": 15.0, "TTA_MAX_BODY": 16 * 1024 * 1024, "TTA_MAX_DEPTH": 100}


def _behind(proxy: T) -> T:
    """Return what one of Flask's proxies stands for now: every call asks, and each attribute of a proxy costs 1 us."""
    found: T = proxy._get_current_object()  # type: ignore[attr-defined]
    return found


class RequestInfo:
    """What one request is known by.

    It stands in the WSGI environment: a test that holds an application context open over two requests shares
    ``flask.g`` between them, and must not share this. Every request makes one, so it does no more than it must.
    """

    __slots__ = ("_context", "_trace", "deadline", "id")

    def __init__(self, environ: dict[str, Any], seconds: float | None) -> None:
        given = environ.get("HTTP_X_REQUEST_ID")
        self.id: str = given if given and _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
        self.deadline = None if seconds is None else Deadline.after(seconds)  # from the request's arrival on
        self._trace: str | None = environ.get("HTTP_TRACEPARENT")
        self._context: WorkflowContext | None = None

    @classmethod
    def current(cls) -> RequestInfo:
        """Return the current request's, made at its arrival; or now, for a request that a test has only pushed."""
        environ = _behind(request).environ
        held: RequestInfo | None = environ.get(ENVIRON)
        if held is None:
            held = environ[ENVIRON] = cls(environ, current_app.config["TTA_DEADLINE"])
        return held

    @property
    def context(self) -> WorkflowContext:
        if self._context is None:
            context = self._context = WorkflowContext(correlation_id=self.id, deadline=self.deadline)
            trace = self._trace and _TRACEPARENT.fullmatch(self._trace)
            if trace:
                version, trace_id, span_id, flags, more = trace.groups()
                # W3C Trace Context: ff is no version, all zeros no id, and version 00 has four fields only.
                if version != "ff" and trace_id.strip("0") and span_id.strip("0") and (version != "00" or not more):
                    context.trace_id, context.parent_span_id = trace_id, span_id
                    context.trace_flags = int(flags, 16)
        return self._context


def request_context() -> WorkflowContext | None:
    """Give the request's context to whoever asks ``current_context()`` in a view."""
    if has_request_context() and "tta_sync" in _behind(current_app).extensions:
        return RequestInfo.current().context
    return None


def prepare_settings(app: Flask) -> None:
    """Put the defaults into the application's configuration.

    Raises:
        ConfigurationError: a setting has a value that it cannot have.
    """
    for name, default in _DEFAULTS.items():
        app.config.setdefault(name, default)
    seconds = app.config["TTA_DEADLINE"]
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if seconds is not None and not (number and 0 < seconds < math.inf):
        raise ConfigurationError(f"TTA_DEADLINE is a number of seconds above 0, or None, not {seconds!r}")
    for name in ("TTA_MAX_BODY", "TTA_MAX_DEPTH"):
        value = app.config[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"{name} is a whole number above 0, not {value!r}")
