"""Metrics and log lines of what primitives tell."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import structlog

from tta_sync import events
from tta_sync.context import Deadline, WorkflowContext
from tta_sync.events import records
from tta_sync.exceptions import ConfigurationError
from tta_sync.observability import (
    Observability,
    initialize as initialize_module,
    initialize_observability,
    logs as logs_module,
    prometheus as prometheus_module,
)
from tta_sync.observability.logs import JSONFormatter, event_name, logfmt
from tta_sync.primitives import MockPrimitive, RetryPrimitive, step
from tta_sync.testing import FakeClock


@pytest.fixture
def started() -> Iterator[Callable[..., Observability]]:
    """``initialize_observability`` on a free port, ended after the test."""
    made: list[Observability] = []

    def start(service_name: str = "shop", **options: Any) -> Observability:
        made.append(initialize_observability(service_name, **{"prometheus_port": 0, **options}))
        return made[-1]

    yield start
    for each in made:
        each.shutdown()
    assert events.bus.emit is None


def scrape(observability: Observability) -> dict[str, float]:
    """What a Prometheus server would read: sample names with labels, and their values."""
    assert observability.server is not None
    url = f"http://localhost:{observability.server.port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def run(workflow: Any, data: Any = "x") -> Any:
    return asyncio.run(workflow.execute(data, WorkflowContext(clock=FakeClock(), correlation_id="id")))


# One of each, with what it must become.
EVENTS: list[tuple[records.Event, str, str]] = [
    (
        records.StepEnded(step="s", seconds=0.2),
        'tta_step_duration_seconds_count{outcome="ok",step="s"}',
        "step_ended step=s seconds=0.2",
    ),
    (
        records.StepEnded(step="s", seconds=0.2, error=ValueError("secret")),
        'tta_step_duration_seconds_count{outcome="error",step="s"}',
        "step_ended step=s seconds=0.2 error=ValueError",
    ),
    (
        records.StepEnded(step="s", seconds=0.2, error=asyncio.CancelledError()),
        'tta_step_duration_seconds_count{outcome="cancelled",step="s"}',
        "step_ended step=s seconds=0.2 error=CancelledError",
    ),
    (
        records.RetryScheduled(step="s", attempt=1, delay=0.25, error=ValueError("secret")),
        'tta_retries_total{step="s"}',
        "retry_scheduled step=s attempt=1 delay=0.25 error=ValueError",
    ),
    (
        records.RetryExhausted(
            step="s", attempts=3, error=ValueError("secret"), reason="none is left", code="no_attempts"
        ),
        'tta_retries_exhausted_total{reason="no_attempts",step="s"}',
        'retry_exhausted step=s attempts=3 error=ValueError reason="none is left" code=no_attempts',
    ),
    (
        records.StepTimedOut(step="s", timeout=1.0, detached=True),
        'tta_step_timeouts_total{detached="true",step="s"}',
        "step_timed_out step=s timeout=1.0 detached=true",
    ),
    (
        records.FallbackUsed(step="s", failed="s", used="t", error=ValueError("secret")),
        'tta_fallbacks_total{step="s",used="t"}',
        "fallback_used step=s failed=s used=t error=ValueError",
    ),
    (
        records.BreakerOpened(step="s", failures=5, retry_after=60.0),
        'tta_circuit_transitions_total{circuit="s",to="open"}',
        "breaker_opened step=s failures=5 retry_after=60.0",
    ),
    (
        records.BreakerHalfOpened(step="s"),
        'tta_circuit_transitions_total{circuit="s",to="half_open"}',
        "breaker_half_opened step=s",
    ),
    (
        records.BreakerClosed(step="s"),
        'tta_circuit_transitions_total{circuit="s",to="closed"}',
        "breaker_closed step=s",
    ),
    (
        records.CallRejected(step="s", by="bulkhead", retry_after=0.5),
        'tta_calls_rejected_total{by="bulkhead",step="s"}',
        "call_rejected step=s by=bulkhead retry_after=0.5",
    ),
    (records.HedgeStarted(step="s", delay=0.1), 'tta_hedges_total{step="s"}', "hedge_started step=s delay=0.1"),
    (
        records.CompensationFailed(step="s", error=KeyError("secret")),
        'tta_compensations_failed_total{step="s"}',
        "compensation_failed step=s error=KeyError",
    ),
    (
        records.MapProgressed(step="s", done=1, total=2, failed=0),
        'tta_map_items_total{step="s"}',
        "map_progressed step=s done=1 total=2 failed=0",
    ),
    (
        records.CacheHit(step="s"),
        'tta_cache_requests_total{layer="memory",result="hit",step="s"}',
        "cache_hit step=s layer=memory stale=false",
    ),
    (
        records.CacheHit(step="s", layer="redis", stale=True),
        'tta_cache_requests_total{layer="redis",result="stale",step="s"}',
        "cache_hit step=s layer=redis stale=true",
    ),
    (
        records.CacheMiss(step="s"),
        'tta_cache_requests_total{layer="memory",result="miss",step="s"}',
        "cache_miss step=s layer=memory reason=absent",
    ),
    (
        records.CacheMiss(step="s", layer="redis", reason="foreign"),
        'tta_cache_misses_total{layer="redis",reason="foreign",step="s"}',
        "cache_miss step=s layer=redis reason=foreign",
    ),
    (
        records.CacheBypassed(step="s", reason="redis is down"),
        'tta_cache_requests_total{layer="memory",result="bypass",step="s"}',
        'cache_bypassed step=s reason="redis is down" layer=memory',
    ),
    (
        records.CacheStored(step="s", ttl=60.0),
        'tta_cache_stores_total{layer="memory",step="s"}',
        "cache_stored step=s ttl=60.0 layer=memory",
    ),
    (
        records.LoopStalled(step="s", where="app.py:3", seconds=0.5, waiting=2),
        "tta_loop_stall_seconds_count",
        "loop_stalled step=s where=app.py:3 seconds=0.5 waiting=2",
    ),
    (
        records.CallOrphaned(step="s", reason="timeout", age=1.5),
        "tta_calls_orphaned_total",
        "call_orphaned step=s reason=timeout age=1.5",
    ),
    (records.LoopRestarted(step="s", waiting=2), "tta_loop_restarts_total", "loop_restarted step=s waiting=2"),
    (
        records.TransactionHeld(step="s", seconds=0.3),
        "tta_transaction_held_seconds_count",
        "transaction_held step=s seconds=0.3",
    ),
]


# ---- metrics ------------------------------------------------------------------------------------------------------


def test_every_event_becomes_a_metric(started: Callable[..., Observability]) -> None:
    """Each record is counted under its step; only a step's start has no metric of its own."""
    observability = started()
    for event, _, _ in EVENTS:
        events.bus.emit(event)  # type: ignore[misc]
    samples = scrape(observability)
    for event, sample, _ in EVENTS:
        assert samples.get(sample) == 1.0, event
    assert samples['tta_circuit_state{circuit="s"}'] == 0.0
    assert samples['tta_step_duration_seconds_sum{outcome="ok",step="s"}'] == 0.2
    told = {type(event).__name__ for event, _, _ in EVENTS}
    assert told == {
        name for name, kind in vars(records).items() if isinstance(kind, type) and kind.__base__ is records.Event
    } - {"StepStarted"}


def test_circuit_state_follows_the_circuit(started: Callable[..., Observability]) -> None:
    """The gauge says where the circuit stands now."""
    observability = started()
    for event, state in (
        (records.BreakerOpened(step="s", failures=5, retry_after=60.0), 2.0),
        (records.BreakerHalfOpened(step="s"), 1.0),
        (records.BreakerClosed(step="s"), 0.0),
    ):
        events.bus.emit(event)  # type: ignore[misc]
        assert scrape(observability)['tta_circuit_state{circuit="s"}'] == state


def test_workflow_is_measured_without_a_word_of_its_own(started: Callable[..., Observability]) -> None:
    """Steps of any chain are timed, retries counted; the service stands in the metrics; the process is measured too."""
    observability = started(service_version="1.2")
    flaky = MockPrimitive("flaky", side_effect=[ValueError(), "answer"])
    assert run(step(str, name="prepare") >> RetryPrimitive(flaky, max_retries=1)) == "answer"
    samples = scrape(observability)
    assert samples['tta_step_duration_seconds_count{outcome="ok",step="prepare"}'] == 1.0
    assert samples['tta_retries_total{step="flaky"}'] == 1.0
    assert samples['tta_service_info{service_name="shop",service_version="1.2"}'] == 1.0
    assert any(name.startswith("python_info") for name in samples)


def test_names_are_bounded(started: Callable[..., Observability], monkeypatch: pytest.MonkeyPatch) -> None:
    """Step names made at run time share one label once there are too many."""
    monkeypatch.setattr(prometheus_module, "MAX_NAMES", 3)
    observability = started()
    for number in range(10):
        events.bus.emit(records.HedgeStarted(step=f"step{number}", delay=0.1))  # type: ignore[misc]
    samples = scrape(observability)
    assert samples['tta_hedges_total{step="step2"}'] == 1.0
    assert samples['tta_hedges_total{step="other"}'] == 7.0
    assert 'tta_hedges_total{step="step3"}' not in samples


def test_retries_that_give_up_are_counted_by_a_code_when_their_reasons_have_numbers(
    started: Callable[..., Observability],
) -> None:
    """Under a deadline each reason is another text: the metric has one series for all."""
    observability = started()
    for deadline in (0.05, 0.06, 0.07):
        clock = FakeClock()
        context = WorkflowContext(clock=clock, deadline=Deadline.after(deadline, clock))
        flow = RetryPrimitive(MockPrimitive("flaky", raise_error=ConnectionError()), backoff_strategy="constant")
        with pytest.raises(ConnectionError):
            asyncio.run(flow.execute("x", context))
    told = {name: value for name, value in scrape(observability).items() if name.startswith("tta_retries_exhausted_t")}
    assert told == {'tta_retries_exhausted_total{reason="no_time",step="flaky"}': 3.0}


OTHER_LABELS: list[tuple[str, Callable[[str], records.Event]]] = [
    ("circuit", lambda text: records.BreakerClosed(step=text)),
    ("used", lambda text: records.FallbackUsed(step="s", failed="s", used=text, error=ValueError())),
    ("reason", lambda text: records.RetryExhausted(step="s", attempts=1, error=ValueError(), reason="", code=text)),
    ("by", lambda text: records.CallRejected(step="s", by=text, retry_after=0.0)),
    ("layer", lambda text: records.CacheStored(step="s", ttl=1.0, layer=text)),
    ("layer", lambda text: records.CacheHit(step="s", layer=text)),
    ("reason", lambda text: records.CacheMiss(step="s", reason=text)),
]


@pytest.mark.parametrize(("label", "event"), OTHER_LABELS)
def test_labels_have_a_bound_each_and_do_not_crowd_out_step_names(
    started: Callable[..., Observability],
    monkeypatch: pytest.MonkeyPatch,
    label: str,
    event: Callable[[str], records.Event],
) -> None:
    """Many values of one label end in "other", and a step that comes later still has its own name."""
    monkeypatch.setattr(prometheus_module, "MAX_NAMES", 3)
    observability = started()
    for number in range(10):
        events.bus.emit(event(f"value{number}"))  # type: ignore[misc]
    events.bus.emit(records.HedgeStarted(step="late", delay=0.1))  # type: ignore[misc]
    samples = scrape(observability)
    assert samples['tta_hedges_total{step="late"}'] == 1.0
    values = {value for name in samples for value in re.findall(rf'\b{label}="(value\d+|other)"', name)}
    assert values == {"value0", "value1", "value2", "other"}


def test_metrics_may_live_in_the_applications_registry(started: Callable[..., Observability]) -> None:
    """With a registry of its own and no port, an application serves them itself; shutdown takes them out again."""
    registry = prometheus_client.CollectorRegistry()
    for _ in range(2):
        observability = started(prometheus_registry=registry, prometheus_port=None)
        assert observability.server is None
        assert b"tta_retries_total" in prometheus_client.generate_latest(registry)
        observability.shutdown()
        assert prometheus_client.generate_latest(registry) == b""


# ---- the port -----------------------------------------------------------------------------------------------------


def test_default_port_is_9464_on_this_machine_only() -> None:
    """Without options the metrics are where the documents say, and no other machine can read them."""
    code = """if True:
        import urllib.request
        from tta_sync.observability import initialize_observability
        made = initialize_observability(service_name="my-backend-api", enable_prometheus=True)
        if made.server.port is not None:
            print(made.server.port, made.server._server.server_address[0])
            assert b"tta_service_info" in urllib.request.urlopen("http://localhost:9464/metrics").read()
        else:
            print("taken")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    # Another process of this machine may have the port: that is one warning, and no more.
    assert (done.stdout.strip(), done.stderr) == ("9464 127.0.0.1", "") or done.stderr.count("\n") == 1


def test_taken_port_is_one_warning(started: Callable[..., Observability], caplog: pytest.LogCaptureFixture) -> None:
    """The application starts all the same; the warning says what to do; metrics are counted still."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        observability = started(prometheus_port=port)
    assert observability.server is not None
    assert observability.server.port is None
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert f"port {port} on 127.0.0.1 cannot be had" in warned[0].getMessage()
    run(RetryPrimitive(MockPrimitive("flaky", side_effect=[ValueError(), 1])))
    assert observability.metrics is not None
    assert b'tta_retries_total{step="flaky"} 1.0' in prometheus_client.generate_latest(observability.metrics.registry)


@pytest.mark.parametrize("port", [-1, 70000, "9464", 9464.0, True])
def test_impossible_port_is_refused(port: Any) -> None:
    """A number that is no port is a mistake in the code, not on the machine."""
    with pytest.raises(ConfigurationError, match="from 0 to 65535"):
        initialize_observability("shop", prometheus_port=port)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without prometheus_client the error says what to install, and nothing stays half set up."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigurationError, match=r"tta-sync\[prometheus\]"):
        initialize_observability("shop")
    assert events.bus.emit is None


def test_shutdown_frees_the_port_and_silences_the_hooks(started: Callable[..., Observability]) -> None:
    """Afterwards the port can be bound, nobody listens, and a second shutdown is nothing."""
    observability = started()
    assert observability.server is not None
    port = observability.server.port
    observability.shutdown()
    observability.shutdown()
    assert events.bus.emit is None
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


def test_second_call_changes_only_what_differs(started: Callable[..., Observability]) -> None:
    """The same settings give what is there; others replace it, and no event is counted twice."""
    first = started()
    assert started() is first
    second = started("other")
    assert second is not first
    assert first.server is None
    events.bus.emit(records.HedgeStarted(step="s", delay=0.1))  # type: ignore[misc]
    assert scrape(second)['tta_hedges_total{step="s"}'] == 1.0


def test_forked_child_leaves_the_port_to_its_parent() -> None:
    """A child that outlives its parent does not hold the port; its own hooks go on."""
    code = """if True:
        import os, socket, sys
        from tta_sync import events
        from tta_sync.events import HedgeStarted
        from tta_sync.observability import initialize_observability
        made = initialize_observability("shop", prometheus_port=0, enable_logs=False)
        port = made.server.port
        child = os.fork()
        if child == 0:
            assert made.server.port is None
            events.bus.emit(HedgeStarted(step="s", delay=0.1))
            assert initialize_observability("shop", prometheus_port=0, enable_logs=False) is made
            made.shutdown()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert made.server.port == port
        pipe, end = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(pipe, 1)
            os._exit(0)
        made.shutdown()
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", port))
            free.listen()
        os.write(end, b".")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print("free")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == ("free", "")


@pytest.mark.parametrize("shared", [False, True])
def test_forked_child_goes_on_when_another_thread_held_a_lock(shared: bool, tmp_path: Path) -> None:
    """It counts, writes, serves and shuts down, whichever lock a thread of its parent had at the fork."""
    code = """if True:
        import os, signal, threading, warnings
        import prometheus_client
        from prometheus_client import values
        from tta_sync import events
        from tta_sync.events import BreakerOpened, CacheMiss, HedgeStarted, LoopRestarted, StepEnded
        from tta_sync.observability import initialize, initialize_observability

        warnings.filterwarnings("ignore", "This process .* is multi-threaded")
        registry = prometheus_client.CollectorRegistry()
        made = initialize_observability(
            "shop", prometheus_port=None, enable_logs=False, prometheus_registry=registry
        )

        def tell(step):
            for event in (
                HedgeStarted(step=step, delay=0.1), StepEnded(step=step, seconds=0.1),
                LoopRestarted(step="", waiting=1), CacheMiss(step=step),
                BreakerOpened(step=step, failures=1, retry_after=1.0),
            ):
                events.bus.emit(event)

        tell("s")
        by_name = {collector._name: collector for collector in made.metrics._collectors}
        hedges, steps = by_name["tta_hedges"], by_name["tta_step_duration_seconds"]
        locks = {
            "bus": events.bus._lock,
            "initialize": initialize._lock,
            "registry": registry._lock,
            "labels": hedges._lock,
            "names": made.metrics._values[0]._lock,
        }
        if values.ValueClass is values.MutexValue:
            locks["value"] = hedges.labels("s")._value._lock
            locks["value without labels"] = by_name["tta_loop_restarts"]._value._lock
            locks["gauge"] = by_name["tta_circuit_state"].labels("s")._value._lock
            locks["sum"] = steps.labels("s", "ok")._sum._lock
            locks["bucket"] = steps.labels("s", "ok")._buckets[-1]._lock
        else:
            names = values.ValueClass.inc.__code__.co_freevars
            locks["values"] = values.ValueClass.inc.__closure__[names.index("lock")].cell_contents

        def hold(lock):
            with lock:
                held.set()
                forked.wait(60)

        for name, lock in locks.items():
            held, forked = threading.Event(), threading.Event()
            thread = threading.Thread(target=hold, args=(lock,))
            thread.start()
            assert held.wait(20)
            child = os.fork()
            if child == 0:
                signal.alarm(10)  # a child that hangs is killed
                tell("s")
                tell("new")
                if values.ValueClass is values.MutexValue:
                    assert hedges.labels("s")._value.get() == 2.0
                prometheus_client.generate_latest(registry)
                made.shutdown()
                os._exit(0)
            print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            forked.set()
            thread.join()
    """
    environment = {**os.environ, **({"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)} if shared else {})}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    told = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert (set(told.values()), done.stderr) == ({"0"}, ""), told
    assert len(told) == (6 if shared else 10)


def test_fork_hook_closes_only_the_port(started: Callable[..., Observability]) -> None:
    """In the child the server is forgotten and the hooks stay; without a server there is nothing to do."""
    observability = started()
    assert observability.server is not None
    server, thread = observability.server._server, observability.server._thread
    initialize_module._in_child()
    initialize_module._in_child()
    assert observability.server.port is None
    assert server.socket.fileno() == -1
    assert events.bus.emit is not None
    server.shutdown()
    thread.join(20)
    started("quiet", enable_prometheus=False)
    initialize_module._in_child()


def test_fork_hook_frees_every_lock_of_the_metrics(
    started: Callable[..., Observability], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of labels, of values, of sums and buckets, and the one that values have in common where processes share them."""
    metrics = started(prometheus_port=None).metrics
    assert metrics is not None
    for event, _, _ in EVENTS:
        events.bus.emit(event)  # type: ignore[misc]
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    shared = prometheus_client.values.MultiProcessValue()
    monkeypatch.setattr(prometheus_client.values, "ValueClass", shared)
    cell = shared.inc.__closure__[shared.inc.__code__.co_freevars.index("lock")]

    def locks() -> dict[int, Any]:
        parts = [metrics.registry, *metrics._values, *metrics._collectors]
        for part in parts:  # grows meanwhile
            parts += [*getattr(part, "_metrics", {}).values(), *getattr(part, "_buckets", ())]
            parts += [getattr(part, name) for name in ("_value", "_sum") if hasattr(part, name)]
        found = [part._lock for part in parts if hasattr(part, "_lock")]
        return {id(lock): lock for lock in (*found, cell.cell_contents)}

    held = locks()
    assert len(held) > 100
    for lock in held.values():
        assert lock.acquire(blocking=False)
    metrics.after_fork()
    freed = locks()
    assert len(freed) == len(held)
    for lock in freed.values():
        assert lock.acquire(blocking=False)
        lock.release()


def test_shared_directory_is_served_where_it_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: Callable[..., Observability]
) -> None:
    """The server then reads the directory, not the process's own registry."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert scrape(started()) == {}


def test_processes_that_share_a_directory_serve_their_sum(tmp_path: Path) -> None:
    """With PROMETHEUS_MULTIPROC_DIR, one server answers for parent and child."""
    code = """if True:
        import os, urllib.request
        from tta_sync import events
        from tta_sync.events import HedgeStarted
        from tta_sync.observability import initialize_observability
        made = initialize_observability("shop", prometheus_port=0, enable_logs=False)
        child = os.fork()
        events.bus.emit(HedgeStarted(step="s", delay=0.1))
        if child == 0:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        text = urllib.request.urlopen(f"http://localhost:{made.server.port}/metrics").read().decode()
        print([line for line in text.splitlines() if line.startswith("tta_hedges_total")])
        made.shutdown()
    """
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("""['tta_hedges_total{step="s"} 2.0']""", "")


# ---- log lines ----------------------------------------------------------------------------------------------------


def test_every_event_becomes_a_log_line(
    started: Callable[..., Observability], caplog: pytest.LogCaptureFixture
) -> None:
    """Each record is one line of logfmt, without the text of errors, and the record carries the fields."""
    caplog.set_level(logging.DEBUG, logger="tta_sync.events")
    started(enable_prometheus=False)
    for event, _, line in EVENTS:
        caplog.clear()
        events.bus.emit(event)  # type: ignore[misc]
        assert caplog.messages == [line]
        told = caplog.records[0].tta  # type: ignore[attr-defined]
        assert told["service"] == "shop"
        assert told["event"] == event_name(event)
    assert "secret" not in caplog.text


def test_levels_show_an_operator_what_matters(
    started: Callable[..., Observability], caplog: pytest.LogCaptureFixture
) -> None:
    """At INFO there is nothing of the daily thousands; trouble is a warning or worse."""
    caplog.set_level(logging.INFO, logger="tta_sync.events")
    started(enable_prometheus=False)
    for event, _, _ in EVENTS:
        events.bus.emit(event)  # type: ignore[misc]
    levels = {record.tta["event"]: record.levelname for record in caplog.records}  # type: ignore[attr-defined]
    assert levels["breaker_opened"] == levels["retry_exhausted"] == levels["call_rejected"] == "WARNING"
    assert levels["compensation_failed"] == levels["loop_restarted"] == "ERROR"
    assert levels["retry_scheduled"] == "INFO"
    assert not {"step_ended", "cache_hit", "cache_miss", "map_progressed"} & set(levels)


def test_error_text_is_told_when_asked_for(
    started: Callable[..., Observability], caplog: pytest.LogCaptureFixture
) -> None:
    """With error_text the line has what the error says, cut to a bounded length."""
    started(enable_prometheus=False, error_text=True)
    events.bus.emit(records.CompensationFailed(step="s", error=ValueError("no\n" + "x" * 500)))  # type: ignore[misc]
    assert caplog.messages == ['compensation_failed step=s error=ValueError error_text="no\\n' + "x" * 197 + '"']


def test_json_lines_go_to_stderr_where_no_handler_would_show_them() -> None:
    """An application that has not set up logging still gets one JSON object per event."""
    code = """if True:
        from tta_sync import events
        from tta_sync.events import BreakerOpened, CacheHit
        from tta_sync.observability import initialize_observability
        made = initialize_observability("shop", enable_prometheus=False)
        events.bus.emit(CacheHit(step="s"))
        events.bus.emit(BreakerOpened(step="s", correlation_id="id", failures=5, retry_after=60.0))
        made.shutdown()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    line = json.loads(done.stderr)
    assert isinstance(line.pop("timestamp"), float)
    assert line == {
        "level": "warning",
        "event": "breaker_opened",
        "service": "shop",
        "step": "s",
        "correlation_id": "id",
        "failures": 5,
        "retry_after": 60.0,
    }


@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_handlers_that_the_application_adds_later_take_over(level: str) -> None:
    """A line appears once: as JSON before, then in the application's own format and from its own level on."""
    code = f"""if True:
        import logging
        from tta_sync import events
        from tta_sync.events import BreakerOpened, HedgeStarted
        from tta_sync.observability import initialize_observability
        made = initialize_observability("shop", enable_prometheus=False)
        def tell(step):
            events.bus.emit(HedgeStarted(step=step, delay=0.1))
            events.bus.emit(BreakerOpened(step=step, failures=5, retry_after=60.0))
        tell("before")
        logging.basicConfig(level="{level}", format="app: %(message)s")
        tell("after")
        made.shutdown()
        logger = logging.getLogger("tta_sync.events")
        assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    lines = done.stderr.splitlines()
    assert [json.loads(line)["event"] for line in lines[:2]] == ["hedge_started", "breaker_opened"]
    hedge = ["app: hedge_started step=after delay=0.1"] if level == "INFO" else []
    assert lines[2:] == [*hedge, "app: breaker_opened step=after failures=5 retry_after=60.0"]


def test_handler_of_ours_goes_with_the_first_line_that_another_shows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The application's handler has the line, ours is gone, and the level is its own again."""
    logger = logging.getLogger("tta_sync.events")
    with monkeypatch.context() as patch:
        patch.setattr(logging.Logger, "hasHandlers", lambda self: False)
        hook = logs_module.LogHook("shop")
    assert (len(logger.handlers), logger.level) == (1, logging.INFO)
    hook(records.BreakerHalfOpened(step="quiet"))
    hook(records.BreakerOpened(step="s", failures=5, retry_after=60.0))
    assert (logger.handlers, logger.level) == ([], logging.NOTSET)
    assert caplog.messages == ["breaker_opened step=s failures=5 retry_after=60.0"]
    assert capsys.readouterr().err == ""


def test_handler_of_ours_stays_while_others_are_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger that does not propagate keeps its lines from the root's handlers; a level set by hand is left alone."""
    logger = logging.getLogger("tta_sync.events")
    monkeypatch.setattr(logger, "propagate", False)
    hook = logs_module.LogHook("shop")
    hook(records.HedgeStarted(step="s", delay=0.1))
    assert len(logger.handlers) == 1
    logger.setLevel(logging.ERROR)
    hook.close()
    hook.close()
    assert (logger.handlers, logger.level) == ([], logging.ERROR)
    logger.setLevel(logging.NOTSET)


def test_json_formatter_serves_other_records_too() -> None:
    """A plain record becomes its message, an exception its traceback."""
    handler = logging.StreamHandler(stream := io.StringIO())
    handler.setFormatter(JSONFormatter())
    logger = logging.Logger("plain")
    logger.addHandler(handler)
    logger.info("hello %s", "you")
    try:
        raise ValueError("mine")
    except ValueError:
        logger.exception("failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["level"]) == ("hello you", "info")
    assert second["traceback"].endswith("ValueError: mine")


def test_structlog_gets_the_fields_where_the_application_uses_it(started: Callable[..., Observability]) -> None:
    """A configured structlog is preferred: the event's name and its fields, not a line of text."""
    seen: list[Any] = []

    def keep(logger: Any, method: str, fields: Any) -> Any:
        seen.append(fields)
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.stdlib.add_log_level, keep])
    try:
        started(enable_prometheus=False)
        events.bus.emit(records.HedgeStarted(step="s", delay=0.1))  # type: ignore[misc]
    finally:
        structlog.reset_defaults()
    assert seen == [{"event": "hedge_started", "level": "info", "service": "shop", "step": "s", "delay": 0.1}]


def test_handler_is_taken_away_at_shutdown(
    started: Callable[..., Observability], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logger is as it was before."""
    logger = logging.getLogger("tta_sync.events")
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda self: False)
    observability = started(enable_prometheus=False)
    assert len(logger.handlers) == 1
    observability.shutdown()
    assert (logger.handlers, logger.level) == ([], logging.NOTSET)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ('a"b', '"a\\"b"'),
        ("", '""'),
        ("a=b", '"a=b"'),
        ("line\nbreak", '"line\\nbreak"'),
        ("\x1b[31m", '"\\u001b[31m"'),
        (True, "true"),
        (1.5, "1.5"),
    ],
)
def test_logfmt_quotes_what_would_break_the_line(value: Any, text: str) -> None:
    """No value can forge another field, another line, or a terminal's command."""
    assert logfmt("event", {"key": value}) == f"event key={text}"


def test_modules_load_no_library_before_the_call() -> None:
    """Importing the package needs neither prometheus_client nor structlog."""
    code = "import sys, tta_sync.observability; print({'prometheus_client', 'structlog'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
    assert logs_module.LOGGER == "tta_sync.events"
