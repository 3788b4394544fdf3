"""Errors as RFC 9457 problem details, and the one table that says which error is which status."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flask import has_request_context
from werkzeug.exceptions import HTTPException
from werkzeug.http import HTTP_STATUS_CODES

from tta_sync.exceptions import (
    BulkheadFullError,
    CircuitOpenError,
    DeadlineExceededError,
    IdempotencyConflictError,
    IdempotencyMismatchError,
    LoopUnavailableError,
    RateLimitedError,
    SaturatedError,
    StepTimeoutError,
    WouldDeadlockError,
)
from tta_sync.flask.requests import RequestInfo

Row = tuple[int, str, str | None]
"""Status, code, and what may be said."""

TABLE: dict[str, Row] = {
    # By name, so that nobody imports marshmallow or SQLAlchemy who does not use them.
    "marshmallow.exceptions.ValidationError": (422, "validation_error", "Some fields are not valid."),
    "sqlalchemy.exc.IntegrityError": (409, "conflict", "The request conflicts with what is stored."),
    "redis.exceptions.ConnectionError": (503, "redis_unavailable", None),
    "redis.exceptions.TimeoutError": (503, "redis_unavailable", None),
    **{
        f"{error.__module__}.{error.__qualname__}": (status, code, detail)
        for error, status, code, detail in (
            (RateLimitedError, 429, "rate_limited", "Too many calls; try again later."),
            (IdempotencyConflictError, 409, "idempotency_conflict", "The same request is being worked on."),
            (IdempotencyMismatchError, 422, "idempotency_mismatch", "This key was used for another request."),
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
MAX_FIELDS = 100  # of a problem's errors; a body of a million bad items must not be answered by a million messages
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
        headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
        **members: Any,
    ) -> None:
        super().__init__(detail)
        self.code = self.status = status
        self.problem_code = code or _snake(HTTP_STATUS_CODES.get(status, "error"))
        self.errors = None if errors is None else flatten_errors(errors)
        self.headers = list(headers.items() if isinstance(headers, Mapping) else headers)
        self.members = members

    def get_body(self, environ: Any = None, scope: Any = None) -> str:
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTP_STATUS_CODES.get(self.status, "Unknown Error"),
            "status": self.status,
            "code": self.problem_code,
        }
        if self.description is not None:
            body["detail"] = self.description
        if self.errors is not None:
            body["errors"] = self.errors
        body.update(self.members)
        if has_request_context():
            body["correlation_id"] = RequestInfo.current().id
        return json.dumps(body, default=str)

    def get_headers(self, environ: Any = None, scope: Any = None) -> list[tuple[str, str]]:
        return [("Content-Type", "application/problem+json"), *self.headers]


def _snake(phrase: str) -> str:
    return re.sub(r"\W+", "_", phrase.lower()).strip("_")


def printable(text: object) -> str:
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
        field = ".".join(printable(part) for part in path)
        if field not in flat and len(flat) >= MAX_FIELDS:
            continue
        messages = flat.setdefault(field, [])
        if len(messages) < MAX_FIELDS:
            text = printable(message)
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


def problem_of(error: Exception, table: Mapping[str, Row]) -> Problem | None:
    """Return *error* as a problem, or None where neither it nor a base of it is in the table."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):
        assert error.code is not None
        headers = [(k, v) for k, v in error.get_headers() if k.lower() not in ("content-type", "content-length")]
        # What Flask made of an unexpected error has a description that says nothing; only authors' words are passed on.
        return Problem(error.code, None, None if error.code == 500 else error.description, headers=headers)
    for cls in type(error).__mro__:
        row = table.get(f"{cls.__module__}.{cls.__qualname__}")
        if row is not None:
            status, code, detail = row
            messages = getattr(error, "normalized_messages", None)  # marshmallow's
            later = status in (429, 503) or isinstance(error, IdempotencyConflictError)
            return Problem(
                status,
                code,
                detail,
                headers={"Retry-After": _retry_after(error)} if later else (),
                errors=None if messages is None else messages(),
            )
        if cls is WouldDeadlockError:  # a bug, which must not look like the outage that its base stands for
            return None
    return None


def _retry_after(error: Exception) -> str:
    """Return whole seconds, as HTTP has them, and never 0: that would be an invitation to a busy loop."""
    return str(max(1, math.ceil(getattr(error, "retry_after", None) or 1)))
