"""The event bus: nobody pays where nobody listens, and no hook can harm a workflow."""

from __future__ import annotations

import dataclasses
import logging
import threading

import pytest

from tta_sync import events
from tta_sync.events import Event, EventBus, HedgeStarted, records


def test_emit_is_none_until_somebody_listens() -> None:
    """One attribute test tells whether a record need be made."""
    bus = EventBus()
    assert bus.emit is None
    stop_one = bus.subscribe(lambda event: None)
    stop_two = bus.subscribe(lambda event: None)
    assert bus.emit is not None
    stop_one()
    assert bus.emit is not None
    stop_two()
    stop_two()
    assert bus.emit is None


def test_every_hook_gets_every_event_in_order() -> None:
    """In the order in which they subscribed."""
    bus, seen = EventBus(), []
    bus.subscribe(lambda event: seen.append(("one", event)))
    bus.subscribe(lambda event: seen.append(("two", event)))
    event = HedgeStarted(step="s", delay=0.1)
    assert bus.emit is not None
    bus.emit(event)
    assert seen == [("one", event), ("two", event)]


def test_failing_hook_is_logged_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    """The other hooks and the workflow go on; the log has the traceback."""
    bus, seen = EventBus(), []

    def broken(event: Event) -> None:
        raise ValueError("mine")

    bus.subscribe(broken)
    bus.subscribe(seen.append)
    assert bus.emit is not None
    bus.emit(HedgeStarted(step="s", delay=0.1))
    assert len(seen) == 1
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "HedgeStarted" in record.getMessage()
    assert record.exc_info is not None


def test_one_hook_twice_is_ended_one_by_one() -> None:
    """Each subscription has its own end."""
    bus, seen = EventBus(), []
    hook = seen.append
    first, second = bus.subscribe(hook), bus.subscribe(hook)
    first()
    assert bus.emit is not None
    bus.emit(HedgeStarted(step="s", delay=0.1))
    assert len(seen) == 1
    second()
    assert bus.emit is None


def test_hooks_may_come_and_go_from_many_threads() -> None:
    """No subscription is lost, and at the end nobody listens."""
    bus = EventBus()

    def work() -> None:
        for _ in range(200):
            stop = bus.subscribe(lambda event: None)
            emit = bus.emit
            assert emit is not None
            emit(HedgeStarted(step="s", delay=0.1))
            stop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bus.emit is None


def test_records_are_frozen_and_load_by_name() -> None:
    """A hook cannot change what the next one sees; the package has every record, and nothing else."""
    event = HedgeStarted(step="s", delay=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.delay = 2.0  # type: ignore[misc]
    kinds = [kind for kind in vars(records).values() if isinstance(kind, type) and issubclass(kind, Event)]
    assert len(kinds) > 20
    for kind in kinds:
        assert getattr(events, kind.__name__) is kind
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        events.Nothing
