"""What travels with a call: identity, deadline, state, and the moments at which it is cut."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import re
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any

import pytest

from tta_sync import context as context_module
from tta_sync.clock import SYSTEM_CLOCK
from tta_sync.context import (
    Deadline,
    TimeLimit,
    WorkflowContext,
    cancel_reason,
    context_providers,
    current_context,
    cut_off,
    running_context,
    time_limit,
)
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError
from tta_sync.testing import FakeClock

# ---- the contract of WorkflowContext ------------------------------------------------------------------------------


def test_context_has_the_fields_of_the_contract() -> None:
    """All keywords of the library that the seeds describe, with its defaults, and ours."""
    context = WorkflowContext()
    assert context.trace_flags == 1
    assert (context.metadata, context.state, context.baggage, context.tags, context.checkpoints) == ({}, {}, {}, {}, [])
    given: dict[str, Any] = {
        "workflow_id": "w", "session_id": "s", "player_id": "p", "metadata": {"m": 1}, "state": {"s": 1},
        "trace_id": "t", "span_id": "sp", "parent_span_id": "ps", "trace_flags": 0, "correlation_id": "c",
        "causation_id": "ca", "baggage": {"b": "1"}, "tags": {"t": "1"}, "start_time": 5.0, "checkpoints": [("a", 1.0)],
        "tenant": "te",
    }  # fmt: skip
    context = WorkflowContext(**given)
    assert {name: getattr(context, name) for name in given} == given


def test_context_refuses_an_unknown_keyword() -> None:
    """A misspelt field is an error, not a field nobody reads."""
    with pytest.raises(TypeError, match="corelation_id"):
        WorkflowContext(corelation_id="x")  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        WorkflowContext().corelation_id = "x"  # type: ignore[attr-defined]


def test_correlation_id_is_made_once_when_none_is_given() -> None:
    """A fresh UUID text, made at first use and kept; it can be set."""
    context = WorkflowContext(correlation_id=None)
    assert str(uuid.UUID(context.correlation_id)) == context.correlation_id
    assert WorkflowContext().correlation_id != context.correlation_id
    context.correlation_id = "mine"
    assert context.correlation_id == "mine"
    assert "mine" in repr(context)


def test_checkpoints_and_elapsed_time_follow_the_clock() -> None:
    """Both are on the call's own clock."""
    clock = FakeClock(epoch=100.0)
    context = WorkflowContext(clock=clock)
    clock.jump(1.5)
    context.checkpoint("half-way")
    assert context.checkpoints == [("half-way", 101.5)]
    assert context.elapsed_ms() == 1500.0


def test_child_shares_identity_and_copies_the_rest() -> None:
    """Same id, trace, deadline, tenant and clock; state, metadata, baggage and tags are shallow copies."""
    clock = FakeClock()
    shared = object()
    parent = WorkflowContext(
        workflow_id="w", session_id="s", player_id="p", trace_id="t", span_id="span", trace_flags=0, tenant="te",
        state={"shared": shared}, metadata={"m": 1}, baggage={"b": "1"}, tags={"t": "1"}, checkpoints=[("a", 1.0)],
        deadline=Deadline.after(5.0, clock), clock=clock,
    )  # fmt: skip
    child = parent.create_child_context()
    for name in "workflow_id", "session_id", "player_id", "trace_id", "trace_flags", "correlation_id", "tenant":
        assert getattr(child, name) == getattr(parent, name), name
    assert child.causation_id == parent.correlation_id
    assert (child.parent_span_id, child.span_id) == ("span", None)
    assert child.deadline is parent.deadline
    assert child.clock is parent.clock
    for name in "state", "metadata", "baggage", "tags":
        assert getattr(child, name) == getattr(parent, name)
        assert getattr(child, name) is not getattr(parent, name)
    assert child.state["shared"] is shared
    assert child.checkpoints == []


def test_siblings_share_the_id_when_nobody_asked_for_it_before() -> None:
    """An id made late is the same for the whole family."""
    parent = WorkflowContext()
    one, two = parent.create_child_context(), parent.create_child_context()
    assert one.correlation_id == two.correlation_id == parent.correlation_id


def test_degraded_in_a_child_reaches_all_its_ancestors() -> None:
    """And no sibling."""
    parent = WorkflowContext()
    child, sibling = parent.create_child_context(), parent.create_child_context()
    child.create_child_context().mark_degraded()
    assert (parent.degraded, child.degraded, sibling.degraded) == (True, True, False)


def test_next_call_keeps_identity_and_drops_state() -> None:
    """A second run in one request shares id, deadline and tenant, not what steps told each other."""
    first = WorkflowContext(state={"a": 1}, tenant="te", deadline=Deadline.after(5.0), baggage={"b": "1"})
    second = first.next_call()
    assert (second.correlation_id, second.tenant, second.deadline) == (first.correlation_id, "te", first.deadline)
    assert (second.state, second.baggage) == ({}, {"b": "1"})


def test_otel_attributes_are_those_of_the_contract() -> None:
    """What is None is "unknown"."""
    clock = FakeClock()
    context = WorkflowContext(correlation_id="c", session_id="s", clock=clock)
    clock.jump(0.5)
    assert context.to_otel_context() == {
        "workflow.id": "unknown",
        "workflow.session_id": "s",
        "workflow.player_id": "unknown",
        "workflow.correlation_id": "c",
        "workflow.elapsed_ms": 500.0,
    }


def test_context_crosses_to_another_process_as_json() -> None:
    """Everything but the clock comes back; the deadline is the same moment on the other process's clock."""
    here, there = FakeClock(epoch=1000.0), FakeClock(start=77.0, epoch=1001.0 - 77.0)
    sent = WorkflowContext(
        workflow_id="w", state={"a": [1]}, checkpoints=[("a", 1.0)], tenant="te", trace_id="t", baggage={"b": "1"},
        deadline=Deadline.after(5.0, here), clock=here,
    )  # fmt: skip
    sent.mark_degraded()
    got = WorkflowContext.from_dict(json.loads(json.dumps(sent.to_dict())), clock=there)
    for name in "workflow_id", "state", "checkpoints", "tenant", "trace_id", "baggage", "correlation_id", "degraded":
        assert getattr(got, name) == getattr(sent, name), name
    assert got.deadline is not None
    assert got.deadline.remaining() == 4.0  # one second went by on the wall
    assert WorkflowContext.from_dict(WorkflowContext().to_dict()).deadline is None


# ---- deadlines ----------------------------------------------------------------------------------------------------


def test_deadline_counts_down_on_its_clock() -> None:
    """Seconds left, negative once it has passed, and the error that belongs to it."""
    clock = FakeClock()
    deadline = Deadline.after(2.0, clock)
    clock.jump(0.5)
    assert deadline.remaining() == 1.5
    assert repr(deadline) == "Deadline(1.500 s left)"
    clock.jump(2.0)
    assert deadline.remaining() == -0.5
    with pytest.raises(DeadlineExceededError, match=re.escape("deadline of 2 s has passed")):
        deadline.raise_exceeded()


@pytest.mark.parametrize(
    ("deadline", "limit", "expected"),
    [(None, None, None), (5.0, None, 5.0), (None, 3.0, 3.0), (5.0, 3.0, 3.0), (2.0, 3.0, 2.0)],
)
def test_cut_off_is_the_earlier_of_deadline_and_limit(
    deadline: float | None, limit: float | None, expected: float | None
) -> None:
    """Whichever comes first cuts the step."""
    clock = FakeClock()
    context = WorkflowContext(clock=clock, deadline=None if deadline is None else Deadline.after(deadline, clock))
    token = time_limit.set(None if limit is None else TimeLimit(limit))
    try:
        assert cut_off(context) == expected
    finally:
        time_limit.reset(token)


def test_cancel_reason_tells_who_cut_the_step() -> None:
    """A limit or the deadline, if one of them has struck; else it was somebody else's cancellation."""
    context = WorkflowContext(deadline=Deadline.after(5.0))
    assert cancel_reason(context) is None
    inner = TimeLimit(1.0)
    inner.outer = outer = TimeLimit(2.0)
    token = time_limit.set(inner)
    try:
        assert cancel_reason(context) is None
        outer.struck = True
        assert cancel_reason(context) == "timeout"
    finally:
        time_limit.reset(token)
    assert context.deadline is not None
    context.deadline.struck = True
    assert cancel_reason(context) == "deadline"
    assert cancel_reason(WorkflowContext()) is None


# ---- the current context ------------------------------------------------------------------------------------------


def test_current_context_is_the_running_one_else_a_providers() -> None:
    """The workflow's own first; then the first provider that knows one; else None."""
    running, request = WorkflowContext(), WorkflowContext()
    providers = [lambda: None, lambda: request]
    context_providers.extend(providers)
    try:
        assert current_context() is request
        token = running_context.set(running)
        assert current_context() is running
        running_context.reset(token)
    finally:
        for provider in providers:
            context_providers.remove(provider)
    assert current_context() is None


# ---- the machine's clock ------------------------------------------------------------------------------------------


def test_system_clock_calls_back_on_the_running_loop() -> None:
    """A moment that has passed is called at once, a cancelled one never."""
    seen: list[str] = []

    async def main() -> None:
        done = asyncio.get_running_loop().create_future()
        SYSTEM_CLOCK.call_at(SYSTEM_CLOCK.monotonic() + 3600, seen.append, "never").cancel()
        SYSTEM_CLOCK.call_at(SYSTEM_CLOCK.monotonic() - 1, done.set_result, None)
        await asyncio.wait_for(done, 20)
        await SYSTEM_CLOCK.sleep(0)

    asyncio.run(main())
    assert seen == []
    assert SYSTEM_CLOCK.time() > 1_600_000_000


def test_ancestors_are_degraded_when_a_child_is_set_so():
    """``child.degraded = True`` says it of the whole call; taking it back concerns the child alone."""
    parent = WorkflowContext()
    child = parent.create_child_context().create_child_context()
    child.degraded = True
    assert parent.degraded
    child.degraded = False
    assert parent.degraded
    assert not child.degraded


def test_one_id_is_given_when_many_threads_ask_first(monkeypatch):
    """Whoever asks first on whichever thread, all get the same correlation id."""
    meeting = threading.Barrier(8)
    real = uuid.uuid4

    def slow():
        meeting.wait(10)  # all have seen that there is none
        return real()

    monkeypatch.setattr("tta_sync.context.uuid.uuid4", slow)
    for _ in range(20):
        context = WorkflowContext()
        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(attrgetter("correlation_id"), [context] * 8))
        assert len({*ids, context.correlation_id}) == 1
    assert context_module._asked_first == {}


def test_deadline_on_another_clock_is_refused():
    """A fake clock would never come to a moment of the real one."""
    clock = FakeClock()
    with pytest.raises(
        ConfigurationError, match=r"on another clock than the context: write Deadline.after\(seconds, clock\)"
    ):
        WorkflowContext(clock=clock, deadline=Deadline.after(5.0))
    context = WorkflowContext(clock=clock)
    context.deadline = Deadline.after(5.0)  # as run_sync(timeout=5.0) sets it, which waits on the real one
    assert context.create_child_context().deadline is context.deadline is context.next_call().deadline


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda context: pickle.loads(pickle.dumps(context))])
def test_copy_has_the_same_id_when_nobody_has_asked_for_it(copied):
    """The id is made at first use; a copy counts as one."""
    context = WorkflowContext()
    assert copied(context).correlation_id == context.correlation_id


def test_child_of_a_subclass_is_one_with_all_that_it_has():
    """A branch of a parallel finds the attributes that the user's own class has added."""

    class Own(WorkflowContext):
        def __init__(self, user):
            super().__init__(state={"a": 1})
            self.user = user

    parent = Own("ada")
    child = parent.create_child_context()
    assert (type(child), child.user, child.state) == (Own, "ada", {"a": 1})
    assert child.state is not parent.state
    assert (child.causation_id, child._parent) == (parent.correlation_id, parent)


def test_number_in_the_place_of_a_deadline_is_refused():
    """The error says what to write instead."""
    with pytest.raises(TypeError, match=r"Deadline\.after\(seconds\)"):
        WorkflowContext(deadline=5)
