"""Sagas: what is undone, in what order, out of whose reach, and what comes out."""

from __future__ import annotations

import asyncio
import gc
import itertools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from tta_sync import caller_step, events, run_sync
from tta_sync.context import Deadline, WorkflowContext, cut_off, time_limit
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError, SagaError, StepTimeoutError, WorkflowError
from tta_sync.primitives.core.base import WorkflowPrimitive, step
from tta_sync.primitives.recovery import (
    CompensationPrimitive,
    RetryPrimitive,
    SagaPrimitive,
    TimeoutPrimitive,
    orphans as left_behind,
)
from tta_sync.testing import FakeClock


class Ledger:
    """Steps that write down what was done and undone, and can be told to fail or to take time."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, Any]] = []
        self.fails: dict[str, BaseException] = {}
        self.takes: dict[str, float] = {}

    def step(self, name: str) -> WorkflowPrimitive[Any, Any]:
        async def run(data: Any, context: WorkflowContext) -> Any:
            self.entries.append((name, data))
            if name in self.takes:
                await context.clock.sleep(self.takes[name])
            if name in self.fails:
                raise self.fails[name]
            return f"{data}>{name}"

        return step(run, name=name)

    def saga(self, *names: str, kind: Any = SagaPrimitive, **options: Any) -> SagaPrimitive[Any, Any]:
        saga: SagaPrimitive[Any, Any] = kind(
            [(self.step(name), self.step(f"undo {name}")) for name in names], **options
        )
        return saga

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.entries]


def run(saga: WorkflowPrimitive[Any, Any], context: WorkflowContext | None = None) -> Any:
    return asyncio.run(saga.execute("x", context or WorkflowContext(clock=FakeClock())))


def test_steps_run_in_order_each_with_the_result_before_it() -> None:
    """Without a failure nothing is undone, and the last result comes out."""
    ledger = Ledger()
    assert run(ledger.saga("a", "b")) == "x>a>b"
    assert ledger.entries == [("a", "x"), ("b", "x>a")]


def test_failure_undoes_in_reverse_each_with_the_input_of_its_own_step() -> None:
    """The failing step's compensation runs too, first; the error comes out as itself."""
    ledger = Ledger()
    error = ledger.fails["b"] = OSError("down")
    with pytest.raises(OSError, match="down") as caught:
        run(ledger.saga("a", "b", "c"))
    assert caught.value is error
    assert ledger.entries == [("a", "x"), ("b", "x>a"), ("undo b", "x>a"), ("undo a", "x")]
    assert error.__notes__ == ["in step 2 of 3 of a saga: b"]


def test_step_without_compensation_is_passed_over() -> None:
    """None where there is nothing to undo."""
    ledger = Ledger()
    ledger.fails["b"] = OSError("down")
    saga: SagaPrimitive[Any, Any] = SagaPrimitive([(ledger.step("a"), ledger.step("undo a")), (ledger.step("b"), None)])
    with pytest.raises(OSError, match="down"):
        run(saga)
    assert ledger.names == ["a", "b", "undo a"]


def test_saga_error_holds_the_step_error_and_those_of_the_compensations() -> None:
    """All compensations run, even if one fails; the group can be split and pickled."""
    ledger = Ledger()
    ledger.fails = {"c": OSError("step"), "undo c": ValueError("first"), "undo a": KeyError("second")}
    with pytest.raises(SagaError) as caught:
        run(ledger.saga("a", "b", "c"))
    assert ledger.names == ["a", "b", "c", "undo c", "undo b", "undo a"]
    assert list(caught.value.exceptions) == [ledger.fails["c"], ledger.fails["undo c"], ledger.fails["undo a"]]
    assert "in the compensation of step 3 of 3: undo c" in ledger.fails["undo c"].__notes__
    with pytest.raises(ExceptionGroup) as kept:
        raise caught.value
    assert kept.value.subgroup(OSError) is not None
    assert len(pickle.loads(pickle.dumps(caught.value)).exceptions) == 3


def test_cancellation_undoes_everything_and_comes_out_as_itself(run_shuffled: Callable[..., Any]) -> None:
    """Nobody waits any more, and still all that was begun is undone before the cancellation goes on."""

    async def main() -> None:
        ledger = Ledger()
        ledger.takes = {"b": 3600, "undo a": 2, "undo b": 2}
        clock = FakeClock()
        task = asyncio.ensure_future(ledger.saga("a", "b", "c").execute("x", WorkflowContext(clock=clock)))
        for _ in range(4):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ledger.names == ["a", "b", "undo b", "undo a"]
        assert clock.monotonic() == 4.0

    for seed in range(5):
        run_shuffled(main(), seed)


def test_cancel_at_every_await_point_leaves_nothing_half_done(run_shuffled: Callable[..., Any]) -> None:
    """Cancelled once or twice in any moments, either all is done or all that was begun is undone."""

    async def main(first: int, second: int) -> bool:
        ledger = Ledger()
        ledger.takes = dict.fromkeys(["a", "b", "undo a", "undo b"], 0.5)
        clock = FakeClock(autojump_threshold=None)
        task = asyncio.ensure_future(ledger.saga("a", "b").execute("x", WorkflowContext(clock=clock)))
        for tick in range(60):
            if tick == first or tick == first + second:
                if task.done():
                    break
                task.cancel()
            await asyncio.sleep(0)
            clock.jump(0.2)
        await asyncio.wait([task])
        done = [name for name in ledger.names if not name.startswith("undo")]
        undone = [name.removeprefix("undo ") for name in ledger.names if name.startswith("undo")]
        if task.cancelled():
            assert undone == done[::-1]
        else:
            assert (done, undone) == (["a", "b"], [])
        return not task.cancelled()

    for seed, second in itertools.product(range(2), (1, 3, 6)):
        for first in itertools.count():
            if run_shuffled(main(first, second), seed):
                break


def test_outer_timeout_undoes_too() -> None:
    """A total limit around a saga leaves nothing half done."""
    ledger = Ledger()
    ledger.takes["b"] = 3600
    with pytest.raises(StepTimeoutError):
        run(TimeoutPrimitive(ledger.saga("a", "b"), 1.0))
    assert ledger.names == ["a", "b", "undo b", "undo a"]


def test_compensations_go_on_when_the_caller_can_no_longer_wait() -> None:
    """A timeout leaves a slow clean-up behind after its grace; the compensations end all the same."""
    ledger = Ledger()
    ledger.takes = {"a": 3600, "undo a": 10}
    clock = FakeClock()

    async def main() -> None:
        with pytest.raises(StepTimeoutError):
            await TimeoutPrimitive(ledger.saga("a"), 1.0).execute("x", WorkflowContext(clock=clock))
        assert clock.monotonic() == 2.0
        await asyncio.wait(set(left_behind.orphans))

    asyncio.run(main())
    assert clock.monotonic() == 11.0


def test_failure_is_the_context_of_a_cancellation_that_hits_its_compensations() -> None:
    """The cancellation comes out, and what the compensations were for can still be read from it."""
    ledger = Ledger()
    failed = ledger.fails["a"] = OSError("down")
    ledger.takes["undo a"] = 10

    async def main() -> BaseException:
        clock = FakeClock()
        task = asyncio.ensure_future(ledger.saga("a").execute("x", WorkflowContext(clock=clock)))
        while ledger.names != ["a", "undo a"]:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        return caught.value

    assert asyncio.run(main()).__context__ is failed


def test_failed_compensations_are_the_cause_when_the_saga_was_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    """On cancellation the original comes out; a SagaError of the compensations alone hangs on it; the log has it."""
    ledger = Ledger()
    ledger.takes["a"] = 3600
    failed = ledger.fails["undo a"] = OSError("undo")

    async def main() -> BaseException:
        task = asyncio.ensure_future(ledger.saga("a").execute("x", WorkflowContext(clock=FakeClock())))
        await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError as cancelled:
            return cancelled
        raise AssertionError

    cancelled = asyncio.run(main())
    assert isinstance(cancelled.__cause__, SagaError)
    assert list(cancelled.__cause__.exceptions) == [failed]
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage() == "SagaPrimitive was cancelled, and 1 of its compensations failed: OSError"


def test_compensation_that_cannot_run_is_told_when_the_caller_has_left(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever waits in run_sync gets its timeout; that a caller step could undo nothing any more is in the log."""
    begun: list[Any] = []

    async def hang(data: Any) -> None:
        begun.append(data)
        await asyncio.sleep(3600)

    for more in range(8):  # a machine that stalls may let the time pass before it begins
        with pytest.raises(DeadlineExceededError):
            run_sync(SagaPrimitive([(hang, caller_step(lambda data: None))]), 1, timeout=0.05 * 2**more)
        if begun:
            break
    assert "SagaPrimitive was cancelled, and 1 of its compensations failed: NoCallerError" in caplog.text


def test_cancellation_during_the_compensations_waits_for_them_and_comes_out() -> None:
    """It does not interrupt them; the step's error gives way to it."""
    ledger = Ledger()
    ledger.fails = {"a": OSError("step"), "undo a": ValueError("undo")}
    ledger.takes["undo a"] = 5.0

    async def main() -> BaseException:
        task = asyncio.ensure_future(ledger.saga("a").execute("x", WorkflowContext(clock=FakeClock())))
        for _ in range(4):
            await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError as cancelled:
            return cancelled
        raise AssertionError

    cancelled = asyncio.run(main())
    assert ledger.names == ["a", "undo a"]
    assert isinstance(cancelled.__cause__, SagaError)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["b", "undo b"])
def test_interrupt_undoes_and_comes_out(interrupt: type[BaseException], where: str) -> None:
    """An exit of the interpreter, in a step or in a compensation, waits for the other compensations."""
    ledger = Ledger()
    ledger.fails["b"] = OSError("step")
    ledger.fails[where] = interrupt()
    with pytest.raises(interrupt):
        run(ledger.saga("a", "b"))
    assert ledger.names == ["a", "b", "undo b", "undo a"]


def test_cancelled_compensation_is_a_failed_one_and_the_others_run() -> None:
    """Whatever cancels a compensation from within, the rest is undone."""
    ledger = Ledger()
    ledger.fails = {"b": OSError("step"), "undo b": asyncio.CancelledError()}
    with pytest.raises(SagaError) as caught:
        run(ledger.saga("a", "b"))
    assert ledger.names[-1] == "undo a"
    assert isinstance(caught.value.exceptions[1], WorkflowError)


def test_compensations_have_a_deadline_of_their_own() -> None:
    """The call's deadline has passed, and they get their time; one that hangs is cut, and the next has its own."""
    ledger = Ledger()
    ledger.takes = {"b": 5.0, "undo b": 3600, "undo a": 3.0}
    ledger.fails["b"] = OSError("late")
    clock = FakeClock()
    seen: list[Any] = []

    async def look(data: Any, context: WorkflowContext) -> None:
        assert context.deadline is not None
        seen.append((context.deadline.remaining(), cut_off(context)))
        await ledger.step("undo a").execute(data, context)

    saga: SagaPrimitive[Any, Any] = SagaPrimitive(
        [(ledger.step("a"), look), (ledger.step("b"), ledger.step("undo b"))], compensation_timeout=10.0
    )
    context = WorkflowContext(clock=clock, deadline=Deadline.after(4.0, clock))

    async def main() -> None:
        time_limit.set(4.0)
        with pytest.raises(SagaError) as caught:
            await saga.execute("x", context)
        assert isinstance(caught.value.exceptions[1], (StepTimeoutError, DeadlineExceededError))
        assert time_limit.get() == 4.0

    asyncio.run(main())
    assert clock.monotonic() == 5.0 + 10.0 + 3.0
    assert seen == [(10.0, 25.0)]
    assert context.deadline is not None
    assert context.deadline.at == 4.0


def test_compensations_share_the_state_of_the_call() -> None:
    """What a step has noted its compensation can read, and what that notes the caller can."""

    async def reserve(data: Any, context: WorkflowContext) -> None:
        context.state["reservation"] = 7
        raise OSError("after the effect")

    async def release(data: Any, context: WorkflowContext) -> None:
        context.state["released"] = context.state["reservation"]
        context.tags["undone"] = "yes"

    context = WorkflowContext(correlation_id="id")
    with pytest.raises(OSError, match="after the effect"):
        run(CompensationPrimitive(reserve, release), context)
    assert context.state["released"] == 7
    assert context.tags == {"undone": "yes"}


def test_closing_the_coroutine_is_not_mistaken_for_a_failure() -> None:
    """When the loop is gone nothing can be awaited: the close goes through."""
    ledger = Ledger()
    ledger.takes["a"] = 1.0

    async def main() -> None:
        coroutine = ledger.saga("a").execute("x", WorkflowContext(clock=FakeClock(autojump_threshold=None)))
        coroutine.send(None)
        coroutine.close()

    asyncio.run(main())
    assert ledger.names == ["a"]


def test_compensation_primitive_takes_a_pair_or_a_list_of_pairs() -> None:
    """TTA.dev's spelling is a saga of one; a retry inside and outside works as with any step."""
    ledger = Ledger()
    one = CompensationPrimitive(ledger.step("a"), ledger.step("undo a"))
    assert isinstance(one, SagaPrimitive)
    assert (one.forward.name, one.compensation and one.compensation.name) == ("a", "undo a")
    many = ledger.saga("a", "b", kind=CompensationPrimitive, compensation_timeout=1.0, name="saga")
    assert run(many) == "x>a>b"
    assert many.name == "saga"
    ledger.fails["a"] = OSError("down")
    with pytest.raises(OSError, match="down"):
        run(RetryPrimitive(one, max_retries=1, backoff_strategy="constant"))
    assert ledger.names[-4:] == ["a", "undo a", "a", "undo a"]


@pytest.mark.parametrize("kind", [SagaPrimitive, CompensationPrimitive])
@pytest.mark.parametrize("spelled", ["positional", "keywords", "mixed", "pairs", "a generator of pairs"])
def test_one_pair_is_taken_when_spelled_in_any_way(kind: Any, spelled: str) -> None:
    """Both classes construct from (forward, compensation), positional or by name, and from pairs."""
    ledger = Ledger()
    forward, undo = ledger.step("a"), ledger.step("undo a")
    saga = {
        "positional": lambda: kind(forward, undo),
        "keywords": lambda: kind(forward=forward, compensation=undo),
        "mixed": lambda: kind(forward, compensation=undo),
        "pairs": lambda: kind([(forward, undo)]),
        "a generator of pairs": lambda: kind(pair for pair in [(forward, undo)]),
    }[spelled]()
    assert (saga.forward, saga.compensation) == (forward, undo)
    ledger.fails["a"] = OSError("down")
    with pytest.raises(OSError, match="down"):
        run(saga)
    assert ledger.names == ["a", "undo a"]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: SagaPrimitive([]), "at least one pair"),
        (lambda: SagaPrimitive([lambda data: data]), "list of such pairs"),
        (lambda: SagaPrimitive(7), "list of such pairs"),
        (lambda: SagaPrimitive(), "list of such pairs"),
        (lambda: SagaPrimitive(len), r"SagaPrimitive\(forward, compensation\)"),
        (lambda: SagaPrimitive([(len, None)], len), "brings its own compensations"),
        (lambda: SagaPrimitive([(len, None)], forward=len), "first step of one pair"),
        (lambda: SagaPrimitive([(len, 5)]), "cannot be a step"),
        (lambda: SagaPrimitive([(len, None)], compensation_timeout=0), "compensation_timeout"),
        (lambda: CompensationPrimitive(len), r"CompensationPrimitive\(forward, compensation\)"),
        (lambda: CompensationPrimitive([(len, None)], len), r"CompensationPrimitive\(forward, compensation\)"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_remedy(build: Callable[[], Any], said: str) -> None:
    """Each mistake is told at construction."""
    with pytest.raises(ConfigurationError, match=said):
        build()


def test_event_tells_of_each_failed_compensation(workflow_events: list[events.Event]) -> None:
    """CompensationFailed names it."""
    ledger = Ledger()
    ledger.fails = {"a": OSError(), "undo a": ValueError("undo")}
    with pytest.raises(SagaError):
        run(ledger.saga("a"))
    (failed,) = workflow_events
    assert isinstance(failed, events.CompensationFailed)
    assert (failed.step, failed.error) == ("undo a", ledger.fails["undo a"])


def test_repr_shows_the_pairs() -> None:
    """A workflow can be read, and drawn from its parts."""
    ledger = Ledger()
    saga: SagaPrimitive[Any, Any] = SagaPrimitive([(ledger.step("a"), ledger.step("undo a")), (ledger.step("b"), None)])
    assert repr(saga) == "Saga((a, undo a), (b, None))"
    assert [part.name for part in saga.children()] == ["a", "undo a", "b"]


@pytest.mark.parametrize("undo_fails", [False, True])
def test_error_leaves_no_reference_cycle(undo_fails: bool) -> None:
    """Once the caller lets go of the error it is gone, without the garbage collector."""

    class Mark(Exception):
        pass

    async def fail(data: Any) -> None:
        raise Mark

    return_value: list[weakref.ref[Any]] = []

    async def main() -> weakref.ref[Any]:
        try:
            await SagaPrimitive([(fail, fail if undo_fails else len)]).execute("x")
        except* Mark as group:
            return_value.append(weakref.ref(group.exceptions[0]))
        return return_value[0]

    gc.disable()
    try:
        assert asyncio.run(main())() is None
    finally:
        gc.enable()
