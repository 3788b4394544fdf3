"""Fixtures for pytest, there as soon as tta_sync is installed. Everything heavy loads inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import asyncio

    from tta_sync.context import WorkflowContext
    from tta_sync.events import Event
    from tta_sync.testing.clock import FakeClock


@pytest.fixture
def fake_clock() -> FakeClock:
    """A clock that jumps to the next timer when all tasks wait."""
    from tta_sync.testing.clock import FakeClock

    return FakeClock()


@pytest.fixture
def workflow_context(fake_clock: FakeClock) -> WorkflowContext:
    """A fresh context on the fake clock."""
    from tta_sync.context import WorkflowContext

    return WorkflowContext(clock=fake_clock)


@pytest.fixture
def workflow_events() -> Iterator[list[Event]]:
    """What primitives and the runtime emit during the test, as a growing list of records."""
    from tta_sync import events

    seen: list[Event] = []
    unsubscribe = events.bus.subscribe(seen.append)
    yield seen
    unsubscribe()


@pytest.fixture
def caller_here() -> Iterator[None]:
    """Run caller steps on the test's own thread, under a bare ``asyncio.run(flow.execute(...))`` too."""
    from tta_sync.context import current_caller

    class Here:
        deadline: float | None = None
        task: asyncio.Task[Any] | None = None  # nothing for it to cut: the test waits inside the loop

        def step_left_behind(self) -> None:
            """Leave it to the test."""

        async def run(self, fn: Callable[..., Any], *args: Any) -> Any:
            return fn(*args)

    token = current_caller.set(Here())
    yield
    current_caller.reset(token)
