"""The one call that an application makes at its start."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tta_sync import events
from tta_sync.exceptions import ConfigurationError
from tta_sync.observability.logs import LogHook
from tta_sync.observability.prometheus import MetricsServer, PrometheusHook
from tta_sync.primitives.core.options import is_count

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class Observability:
    """What :func:`initialize_observability` has set up in this process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.server: MetricsServer | None = None
        self.metrics: PrometheusHook | None = None
        self.logs: LogHook | None = None
        self._unsubscribe: list[Callable[[], None]] = []

    def shutdown(self) -> None:
        """Remove the hooks, free the port, and unregister the metrics. A second call does nothing."""
        global _current
        with _lock:
            if _current is self:
                _current = None
            while self._unsubscribe:
                self._unsubscribe.pop()()
            for part in (self.server, self.metrics, self.logs):
                if part is not None:
                    part.close()
            self.server = self.metrics = self.logs = None

    def _start(self) -> None:
        settings = self.settings
        if settings["enable_prometheus"]:
            self.metrics = PrometheusHook(
                settings["service_name"], settings["service_version"], settings["prometheus_registry"]
            )
            self._unsubscribe.append(events.bus.subscribe(self.metrics))
            if settings["prometheus_port"] is not None:
                self.server = MetricsServer(
                    self.metrics.registry, settings["prometheus_host"], settings["prometheus_port"]
                )
        if settings["enable_logs"]:
            self.logs = LogHook(settings["service_name"], error_text=settings["error_text"])
            self._unsubscribe.append(events.bus.subscribe(self.logs))


_lock = threading.RLock()  # guards _current, and each set-up as a whole
_current: Observability | None = None


def initialize_observability(
    service_name: str = "tta_sync",
    service_version: str = "",
    *,
    enable_prometheus: bool = True,
    enable_logs: bool = True,
    prometheus_port: int | None = 9464,
    prometheus_host: str = "127.0.0.1",
    prometheus_registry: CollectorRegistry | None = None,
    error_text: bool = False,
) -> Observability:
    """Serve Prometheus metrics, and write structured log lines, of all workflows in this process.

    Call it once at the start. A second call with the same settings returns what is there; with other settings it
    replaces it. A forked child keeps hooks and metrics, and leaves the port to its parent.

    Args:
        service_name: what metrics and log lines call this service.
        service_version: stands beside it in the metric ``tta_service_info``.
        enable_prometheus: count and time events, and serve them on ``/metrics``.
        enable_logs: write a line per event to the logger ``tta_sync.events``.
        prometheus_port: where to serve; 0 takes any free port (see ``result.server.port``), None serves nothing, for
            applications with a ``/metrics`` of their own. A taken port is one warning in the log, not an error.
        prometheus_host: the address to bind; ``"0.0.0.0"`` lets other machines scrape.
        prometheus_registry: where the metrics live; by default a registry of its own.
        error_text: put the text of errors into log lines, not only their type. It may hold secrets.

    Raises:
        ConfigurationError: prometheus_client is not installed and *enable_prometheus* is True; or the port is no port.

    Source: TTA.dev's function of the same name, which the seeds call.
    """
    global _current
    if prometheus_port is not None and not (is_count(prometheus_port, 0) and prometheus_port <= 65535):
        raise ConfigurationError(f"prometheus_port is a number from 0 to 65535, or None, not {prometheus_port!r}")
    settings = {
        "service_name": service_name,
        "service_version": service_version,
        "enable_prometheus": enable_prometheus,
        "enable_logs": enable_logs,
        "prometheus_port": prometheus_port,
        "prometheus_host": prometheus_host,
        "prometheus_registry": prometheus_registry,
        "error_text": error_text,
    }
    with _lock:
        if _current is not None:
            if _current.settings == settings:
                return _current
            _current.shutdown()
        made = Observability(settings)
        try:
            made._start()
        except BaseException:
            made.shutdown()
            raise
        _current = made
        return made


def _in_child() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it
    if _current is not None and _current.server is not None:
        _current.server.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
