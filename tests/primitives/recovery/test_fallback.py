"""Another answer: in order, marked, and never in place of a cancellation."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest

from tta_sync import events
from tta_sync.context import Deadline, WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import MISS, WorkflowPrimitive, step
from tta_sync.primitives.recovery import (
    BulkheadPrimitive,
    FallbackPrimitive,
    RetryPrimitive,
    TimeoutPrimitive,
)
from tta_sync.testing import FakeClock


def failing(error: BaseException, calls: list[Any] | None = None, name: str = "failing") -> WorkflowPrimitive[Any, Any]:
    async def fail(data: Any) -> None:
        if calls is not None:
            calls.append(data)
        raise error

    return step(fail, name=name)


def answering(answer: Any, calls: list[Any] | None = None) -> WorkflowPrimitive[Any, Any]:
    async def give(data: Any) -> Any:
        if calls is not None:
            calls.append(data)
        return answer

    return step(give, name=f"answer {answer}")


def run(primitive: WorkflowPrimitive[Any, Any], context: WorkflowContext | None = None) -> Any:
    return asyncio.run(primitive.execute("x", context or WorkflowContext(clock=FakeClock())))


def test_primary_answers_alone_when_it_succeeds() -> None:
    """No fallback is asked, and nothing is degraded."""
    asked: list[Any] = []
    context = WorkflowContext()
    assert run(FallbackPrimitive(answering("primary"), answering("backup", asked)), context) == "primary"
    assert asked == []
    assert not context.degraded


def test_fallbacks_are_asked_in_order_with_the_same_data() -> None:
    """The first that succeeds answers; those behind it are not asked."""
    asked: list[Any] = []
    workflow = FallbackPrimitive(
        primary=failing(OSError(), asked),
        fallbacks=[failing(ValueError(), asked), answering("second", asked), answering("third", asked)],
    )
    assert run(workflow) == "second"
    assert asked == ["x", "x", "x"]


def test_both_spellings_can_be_combined() -> None:
    """TTA.dev's single fallback comes before the list."""
    workflow = FallbackPrimitive(failing(OSError()), failing(OSError()), fallbacks=[answering("last")])
    assert run(workflow) == "last"
    assert workflow.fallback is workflow.fallbacks[0]


def test_context_is_degraded_in_every_ancestor_when_a_fallback_answered() -> None:
    """Whoever made the call can tell that the answer is the lesser one."""
    parent = WorkflowContext()
    child = parent.create_child_context()
    run(FallbackPrimitive(failing(OSError()), answering(1)), child)
    assert child.degraded
    assert parent.degraded


def test_primary_error_comes_out_with_the_others_in_its_notes_when_all_fail() -> None:
    """The very object that the primary raised; the context is not degraded, as nothing answered."""
    error = OSError("primary down")
    context = WorkflowContext()
    workflow = FallbackPrimitive(
        failing(error), fallbacks=[failing(ValueError("first")), failing(error), failing(KeyError("third"))]
    )
    with pytest.raises(OSError, match="primary down") as caught:
        run(workflow, context)
    assert caught.value is error
    assert [note.partition(", ")[0] for note in error.__notes__] == ["fallback 1 of 3", "fallback 3 of 3"]
    assert "ValueError('first')" in error.__notes__[0]
    assert not context.degraded


@pytest.mark.parametrize("interrupt", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["primary", "fallback"])
def test_interrupts_never_fall_back(interrupt: type[BaseException], where: str) -> None:
    """Who cancels wants no answer, whichever step the cancellation lands in."""
    asked: list[Any] = []
    first = failing(interrupt() if where == "primary" else OSError())
    workflow = FallbackPrimitive(first, fallbacks=[failing(interrupt(), asked), answering(1, asked)])
    with pytest.raises(interrupt):
        workflow.execute("x", WorkflowContext()).send(None)
    assert asked == ([] if where == "primary" else ["x"])


def test_other_errors_pass_through_when_fallback_on_is_given() -> None:
    """Only the listed types are answered for."""
    workflow = FallbackPrimitive(failing(ValueError("bug")), answering(1), fallback_on=(OSError, TimeoutError))
    with pytest.raises(ValueError, match="bug"):
        run(workflow)
    assert run(FallbackPrimitive(failing(TimeoutError()), answering(1), fallback_on=OSError)) == 1


def test_no_fallback_is_asked_when_the_time_is_up() -> None:
    """Behind a deadline or a limit there is nobody left to answer."""
    asked: list[Any] = []
    clock = FakeClock()

    async def late(data: Any) -> None:
        clock.jump(5.0)
        raise OSError("late")

    context = WorkflowContext(clock=clock, deadline=Deadline.after(1.0, clock))
    with pytest.raises(OSError, match="late") as caught:
        run(FallbackPrimitive(late, answering(1, asked)), context)
    assert asked == []
    assert "no time was left" in caught.value.__notes__[0]


def test_timeout_of_the_primary_falls_back() -> None:
    """The limit of one step is that step's failure."""
    slow = TimeoutPrimitive(lambda data: asyncio.get_running_loop().create_future(), 1.0)
    assert run(FallbackPrimitive(slow, answering("quick"))) == "quick"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"FallbackPrimitive\(primary, fallback\)"),
        ({"fallbacks": []}, "needs a step"),
        ({"fallbacks": "ab"}, "is a list of steps"),
        ({"fallbacks": answering(1)}, "is a list of steps"),
        ({"fallback": {"a": 1}}, "cannot be a step"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_remedy(options: dict[str, Any], said: str) -> None:
    """Each mistake is told at construction."""
    with pytest.raises(ConfigurationError, match=said):
        FallbackPrimitive(answering(1), **options)


def test_events_name_who_failed_and_who_answers(workflow_events: list[events.Event]) -> None:
    """One FallbackUsed for each step that is asked instead."""
    first, second = OSError("1"), OSError("2")
    run(FallbackPrimitive(failing(first, name="a"), fallbacks=[failing(second, name="b"), answering("c")], name="f"))
    told = [(e.step, e.failed, e.used, e.error) for e in workflow_events if isinstance(e, events.FallbackUsed)]
    assert told == [("f", "a", "b", first), ("f", "b", "answer c", second)]


class Known(WorkflowPrimitive[Any, Any]):
    peeks = True

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        return "executed"

    def peek(self, data: Any, context: WorkflowContext) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_peek_gives_the_primarys_value_only() -> None:
    """An error of the primary has an answer on the loop; a full bulkhead is not even asked."""
    context = WorkflowContext()
    backup = answering(1)
    assert FallbackPrimitive(Known("cached"), backup).peek(1, context) == "cached"
    assert FallbackPrimitive(Known(OSError()), backup).peek(1, context) is MISS
    assert FallbackPrimitive(backup, backup).peek(1, context) is MISS
    full = BulkheadPrimitive(backup, 1)
    full._in_use = 1
    assert FallbackPrimitive(full, backup).peek(1, context) is MISS


def test_composition_reads_well_and_takes_functions() -> None:
    """repr shows primary and fallbacks; lambdas are steps."""
    workflow = FallbackPrimitive(RetryPrimitive(answering(1)), lambda data: data)
    assert repr(workflow).startswith("Fallback(Retry(answer 1, max_retries=3), ")
    assert len(workflow.children()) == 2


def test_error_leaves_no_reference_cycle() -> None:
    """Once the caller lets go of the error it is gone, without the garbage collector."""

    class Mark(Exception):
        pass

    async def fail(data: Any) -> None:
        raise Mark

    async def main() -> weakref.ref[Mark]:
        try:
            await FallbackPrimitive(fail, fallbacks=[fail, fail]).execute(1)
        except Mark as error:
            return weakref.ref(error)
        raise AssertionError

    gc.disable()
    try:
        assert asyncio.run(main())() is None
    finally:
        gc.enable()
