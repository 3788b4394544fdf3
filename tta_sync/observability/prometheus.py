"""Prometheus metrics of events, and the port on which they are served."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.recovery.forks import renew_after_fork

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from tta_sync.events import Event

logger = logging.getLogger("tta_sync")

_LOCK = type(threading.Lock())

MAX_NAMES = 1000
"""How many different values a label has: a name made at run time must not fill the server's memory."""


class _Values:
    """The values of one label; beyond MAX_NAMES of them the rest are all called "other"."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._lock = threading.Lock()  # guards _known while a new one is let in

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, value: str) -> str:
        if value in self._known:
            return value
        with self._lock:
            if len(self._known) >= MAX_NAMES:
                return "other"
            self._known.add(value)
            return value


class PrometheusHook:
    """Count and time events in *registry*; None makes one of its own.

    Raises:
        ConfigurationError: prometheus_client is not installed.
    """

    def __init__(self, service_name: str, service_version: str = "", registry: CollectorRegistry | None = None) -> None:
        try:
            import prometheus_client as client
        except ImportError:
            raise ConfigurationError("metrics need the prometheus extra: pip install 'tta-sync[prometheus]'") from None
        self._collectors: list[Any] = []
        if registry is None:
            registry = client.CollectorRegistry()
            for about_the_process in client.ProcessCollector, client.PlatformCollector, client.GCCollector:
                about_the_process(registry=registry)
        self.registry = registry

        def counter(name: str, text: str, *labels: str) -> Any:
            return self._made(client.Counter(name, text, labels, registry=self.registry))

        def gauge(name: str, text: str, *labels: str) -> Any:
            return self._made(client.Gauge(name, text, labels, registry=self.registry, multiprocess_mode="max"))

        def histogram(name: str, text: str, *labels: str) -> Any:
            return self._made(client.Histogram(name, text, labels, registry=self.registry))

        # A gauge, not an Info: those do not work where several processes share their metrics.
        service = gauge("tta_service_info", "Which service this is", "service_name", "service_version")
        service.labels(service_name, service_version).set(1)

        steps = histogram("tta_step_duration_seconds", "How long steps took", "step", "outcome")
        retries = counter("tta_retries", "Attempts that failed and were repeated", "step")
        exhausted = counter("tta_retries_exhausted", "Retries that gave up", "step", "reason")
        timeouts = counter("tta_step_timeouts", "Steps that were cut at their limit", "step", "detached")
        fallbacks = counter("tta_fallbacks", "Answers by a fallback", "step", "used")
        changes = counter("tta_circuit_transitions", "Changes of a circuit", "circuit", "to")
        circuit = gauge("tta_circuit_state", "0 closed, 1 half-open, 2 open", "circuit")
        rejected = counter("tta_calls_rejected", "Calls that were turned away", "step", "by")
        hedges = counter("tta_hedges", "Second attempts beside a slow first", "step")
        compensations = counter("tta_compensations_failed", "Compensations that failed", "step")
        items = counter("tta_map_items", "Items of maps that ended", "step")
        cache = counter("tta_cache_requests", "Cache look-ups", "step", "layer", "result")
        misses = counter("tta_cache_misses", "Cache look-ups without an answer, by reason", "step", "layer", "reason")
        stores = counter("tta_cache_stores", "Values stored in a cache", "step", "layer")
        stalls = histogram("tta_loop_stall_seconds", "How long code blocked the event loop")
        orphans = counter("tta_calls_orphaned", "Calls left running after their caller went")
        restarts = counter("tta_loop_restarts", "Deaths of the event loop's thread")
        transactions = histogram("tta_transaction_held_seconds", "How long transactions were held across an await")

        # One store of values for each label: what is strange in one must not crowd out the names of another.
        self._values = tuple(_Values() for _ in range(7))
        step, name, used, code, by, layer, reason = self._values

        def looked_up(event: Any, result: str) -> None:
            cache.labels(step(event.step), layer(event.layer), result).inc()

        def missed(event: Any) -> None:
            looked_up(event, "miss")
            misses.labels(step(event.step), layer(event.layer), reason(event.reason)).inc()

        def changed(state: str, value: int) -> Callable[[Any], None]:
            def record(event: Any) -> None:
                changes.labels(name(event.step), state).inc()
                circuit.labels(name(event.step)).set(value)

            return record

        self._records: dict[str, Callable[[Any], None]] = {
            "StepEnded": lambda e: steps.labels(step(e.step), _outcome(e.error)).observe(e.seconds),
            "RetryScheduled": lambda e: retries.labels(step(e.step)).inc(),
            "RetryExhausted": lambda e: exhausted.labels(step(e.step), code(e.code)).inc(),
            "StepTimedOut": lambda e: timeouts.labels(step(e.step), str(e.detached).lower()).inc(),
            "FallbackUsed": lambda e: fallbacks.labels(step(e.step), used(e.used)).inc(),
            "BreakerClosed": changed("closed", 0),
            "BreakerHalfOpened": changed("half_open", 1),
            "BreakerOpened": changed("open", 2),
            "CallRejected": lambda e: rejected.labels(step(e.step), by(e.by)).inc(),
            "HedgeStarted": lambda e: hedges.labels(step(e.step)).inc(),
            "CompensationFailed": lambda e: compensations.labels(step(e.step)).inc(),
            "MapProgressed": lambda e: items.labels(step(e.step)).inc(),
            "CacheHit": lambda e: looked_up(e, "stale" if e.stale else "hit"),
            "CacheMiss": missed,
            "CacheBypassed": lambda e: looked_up(e, "bypass"),
            "CacheStored": lambda e: stores.labels(step(e.step), layer(e.layer)).inc(),
            "LoopStalled": lambda e: stalls.observe(e.seconds),
            "CallOrphaned": lambda e: orphans.inc(),
            "LoopRestarted": lambda e: restarts.inc(),
            "TransactionHeld": lambda e: transactions.observe(e.seconds),
        }
        renew_after_fork(self)

    def __call__(self, event: Event) -> None:
        record = self._records.get(type(event).__name__)
        if record is not None:
            record(event)

    def after_fork(self) -> None:
        """In a forked child: free the locks that threads of the parent may have held, a scrape's for instance."""
        for values in self._values:
            values.after_fork()
        _free(self.registry)
        for collector in self._collectors:
            _free(collector)
        _free_shared_values()

    def close(self) -> None:
        """Take the metrics out of the registry."""
        for collector in self._collectors:
            self.registry.unregister(collector)

    def _made(self, collector: Any) -> Any:
        self._collectors.append(collector)
        return collector


def _free(part: Any) -> None:
    """Give *part* of prometheus_client, and the parts that it is made of, locks that nobody holds.

    The library does nothing about forks. Its metrics have a lock for their labels and one for each value.
    """
    if hasattr(part, "_lock"):
        part._lock = threading.RLock()  # in the place of a Lock or an RLock: the library's versions differ
    for inner in (*getattr(part, "_metrics", {}).values(), *getattr(part, "_buckets", ())):
        _free(inner)
    for name in ("_value", "_sum"):
        if hasattr(part, name):
            _free(getattr(part, name))


def _free_shared_values() -> None:
    """Free the one lock that all values have which processes share; it is a variable of the function that made them."""
    from prometheus_client import values

    for cell in getattr(getattr(values.ValueClass, "inc", None), "__closure__", None) or ():
        if isinstance(cell.cell_contents, _LOCK):
            cell.cell_contents = threading.Lock()


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "error"


class MetricsServer:
    """Serve a registry over HTTP in a thread of its own; where the port is taken, warn once and serve nothing.

    Where ``PROMETHEUS_MULTIPROC_DIR`` is set, one server serves the sums of all processes that share the directory.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        from prometheus_client import CollectorRegistry, multiprocess, start_http_server

        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # prometheus_client's own
        self._server: Any = None
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            logger.warning(
                "metrics are not served by this process: port %s on %s cannot be had (%s); "
                "choose another prometheus_port, or set PROMETHEUS_MULTIPROC_DIR where several processes share one",
                port,
                host,
                error.strerror,
            )

    @property
    def port(self) -> int | None:
        """The port on which this process serves, or None."""
        return None if self._server is None else int(self._server.server_port)

    def close(self) -> None:
        """Stop serving; the port is free on return."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            self._thread.join()
            server.server_close()

    def after_fork(self) -> None:
        """In a forked child: give back the port, which only the parent's thread can serve."""
        if self._server is not None:
            server, self._server = self._server, None
            server.socket.close()
