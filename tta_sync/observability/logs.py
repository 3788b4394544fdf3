"""Log lines of events: logfmt text by default, JSON where we own the handler, structlog where the app has set it up."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tta_sync.events import Event

LOGGER = "tta_sync.events"

# What an operator should see unasked. All else is DEBUG: steps, cache look-ups and progress come by the thousand.
_LEVELS = {
    "BreakerClosed": logging.INFO,
    "BreakerHalfOpened": logging.INFO,
    "BreakerOpened": logging.WARNING,
    "CallOrphaned": logging.WARNING,
    "CallRejected": logging.WARNING,
    "CompensationFailed": logging.ERROR,
    "FallbackUsed": logging.WARNING,
    "HedgeStarted": logging.INFO,
    "LoopRestarted": logging.ERROR,
    "LoopStalled": logging.WARNING,
    "RetryExhausted": logging.WARNING,
    "RetryScheduled": logging.INFO,
    "StepTimedOut": logging.WARNING,
    "TransactionHeld": logging.WARNING,
}


def event_name(event: Event) -> str:
    """Return the event's name as logs and metrics spell it: ``RetryScheduled`` is ``retry_scheduled``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()


def event_fields(event: Event, *, error_text: bool) -> dict[str, Any]:
    """Return the event's fields as plain values, without those that are None.

    Of an error only its type is told, since its text is the user's and may hold a secret; *error_text* adds it, cut to
    200 characters.
    """
    told: dict[str, Any] = {}
    for field in fields(event):
        value = getattr(event, field.name)
        if isinstance(value, BaseException):
            told[field.name] = type(value).__qualname__
            if error_text:
                told[f"{field.name}_text"] = str(value)[:200]
        elif isinstance(value, float):
            told[field.name] = round(value, 6)
        elif value is not None:
            told[field.name] = value if isinstance(value, (bool, int)) else str(value)
    return told


def logfmt(name: str, told: Mapping[str, Any]) -> str:
    """Return one line of ``key=value`` pairs; values that need it are quoted as JSON strings."""
    return " ".join((name, *(f"{key}={_value(value)}" for key, value in told.items())))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return json.dumps(text) if re.search(r'[\s"=\\]|^$|[^ -~]', text) else text


class JSONFormatter(logging.Formatter):
    """One JSON object per line, with the event's fields where the record has them."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"timestamp": record.created, "level": record.levelname.lower()}
        told = getattr(record, "tta", None)
        line.update(told if isinstance(told, dict) else {"event": record.getMessage()})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class LogHook:
    """Write a log line per event to the logger ``tta_sync.events``.

    Where structlog is configured, it gets event and fields. Else the line is logfmt text, and the record carries the
    fields as ``record.tta``; where no handler would show it, a handler is added that writes JSON lines to stderr. That
    handler is taken away as soon as the application has one, as by a later ``logging.basicConfig()``: no line appears
    twice.
    """

    def __init__(self, service_name: str, *, error_text: bool = False) -> None:
        self._service = service_name
        self._error_text = error_text
        self._logger = logging.getLogger(LOGGER)
        self._structlog = _configured_structlog()
        self._handler: logging.Handler | None = None
        if self._structlog is None and not self._logger.hasHandlers():
            self._handler = logging.StreamHandler(sys.stderr)
            self._handler.setFormatter(JSONFormatter())
            self._logger.addHandler(self._handler)
            self._level_before = self._logger.level
            self._logger.setLevel(logging.INFO)

    def __call__(self, event: Event) -> None:
        level = _LEVELS.get(type(event).__name__, logging.DEBUG)
        if self._structlog is not None:
            told = event_fields(event, error_text=self._error_text)
            self._structlog.log(level, event_name(event), service=self._service, **told)
            return
        if self._handler is not None and self._shown_by_others():
            self.close()
        if self._logger.isEnabledFor(level):
            name = event_name(event)
            told = event_fields(event, error_text=self._error_text)
            extra = {"tta": {"event": name, "service": self._service, **told}}
            self._logger.log(level, "%s", logfmt(name, told), extra=extra)

    def _shown_by_others(self) -> bool:
        """Say whether a handler of somebody else's gets our lines as well."""
        logger: logging.Logger | None = self._logger
        while logger is not None:
            if any(handler is not self._handler for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False

    def close(self) -> None:
        """Take the handler away, if one was added."""
        if self._handler is not None:
            self._logger.removeHandler(self._handler)
            if self._logger.level == logging.INFO:  # else somebody has set his own
                self._logger.setLevel(self._level_before)
            self._handler = None


def _configured_structlog() -> Any:
    # Only where the application has imported and configured it: its defaults would print to stdout.
    structlog = sys.modules.get("structlog")
    return structlog.get_logger(LOGGER) if structlog is not None and structlog.is_configured() else None
