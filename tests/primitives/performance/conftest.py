"""What the tests of the cache share: a step to cache, a clock that only the test moves, and all events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

from tta_sync import events
from tta_sync.context import WorkflowContext
from tta_sync.primitives.core.base import WorkflowPrimitive
from tta_sync.testing.clock import FakeClock

settings.register_profile("unhurried", deadline=None, database=None)
settings.load_profile("unhurried")


class Step(WorkflowPrimitive[Any, Any]):
    """A step that counts its calls, and can be told what to answer, to fail, and to wait at a gate."""

    def __init__(self, answer: Callable[[Any], Any] = lambda data: {"for": data}) -> None:
        self.calls = 0
        self.answer = answer
        self.error: BaseException | None = None
        self.gate: asyncio.Event | None = None
        self.started = asyncio.Event()
        self.contexts: list[WorkflowContext] = []
        self.ended: list[str] = []

    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        self.calls += 1
        self.contexts.append(context)
        self.started.set()
        try:
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # clean-up takes its time
            self.ended.append("cancelled")
            raise
        if self.error is not None:
            raise self.error
        return self.answer(data)


@pytest.fixture(name="Step")
def _step() -> type[Step]:
    """The class of counting steps."""
    return Step


@pytest.fixture
def step() -> Step:
    """One counting step."""
    return Step()


@pytest.fixture
def clock() -> FakeClock:
    """A clock that stands still until the test moves it."""
    return FakeClock(start=1000.0, autojump_threshold=None)


@pytest.fixture
def heard() -> Iterator[list[Any]]:
    """Every event of the test."""
    records: list[Any] = []
    stop = events.bus.subscribe(records.append)
    yield records
    stop()


@pytest.fixture
def call(clock: FakeClock) -> Callable[..., Any]:
    """``call(cache, data)``: execute on a fresh loop, on the test's clock; keywords go to the context."""

    def run(cache: Any, data: Any = 1, **options: Any) -> Any:
        return asyncio.run(cache.execute(data, WorkflowContext(clock=clock, **options)))

    return run
