"""Undo what was done when a later step fails."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

from tta_sync import events
from tta_sync.context import Deadline, WorkflowContext, time_limit
from tta_sync.exceptions import ConfigurationError, SagaError, WorkflowError, was_called
from tta_sync.primitives.core.base import In, Out, WorkflowPrimitive, as_primitive, note, shown
from tta_sync.primitives.core.composition import check_composition
from tta_sync.primitives.core.options import is_number
from tta_sync.primitives.recovery.naming import call_name
from tta_sync.primitives.recovery.orphans import excuses
from tta_sync.primitives.recovery.timeout import TimeoutPrimitive

if TYPE_CHECKING:
    from tta_sync.primitives.core.diagram import Outline

Step = WorkflowPrimitive[Any, Any]


class SagaPrimitive(WorkflowPrimitive[In, Out]):
    """Run steps in order, and undo them in reverse when one fails or the call is cancelled.

    Each forward step gets the result of the one before it; each compensation gets the input of its own forward step.
    The compensation of the step that failed runs too, as the step may have had its effect: compensations must cope with
    there being nothing to undo. They run in a task of their own that no cancellation of the call reaches, each with a
    deadline of its own, and all of them run, even if one fails.

    Then the step's error comes out as itself; or, when the saga was cancelled or interrupted, that.

    Args:
        steps: pairs ``(forward, compensation)``; None as the compensation where there is nothing to undo. Or one
            *forward* step, before its *compensation*.
        compensation: what undoes the one forward step.
        forward: the one forward step, by name.
        compensation_timeout: seconds that each compensation may take.

    Raises:
        SagaError: compensations failed: the step's error, then theirs. After a cancellation it holds theirs alone and
            is the ``__cause__`` of what comes out.
        ConfigurationError: the steps are neither a pair nor a list of pairs.

    Source: Garcia-Molina and Salem, *Sagas*.
    """

    _tta_kind = "saga"

    def __init__(
        self,
        steps: Any = None,
        compensation: Any = None,
        *,
        forward: Any = None,
        compensation_timeout: float = 30.0,
        name: str | None = None,
    ) -> None:
        if not (is_number(compensation_timeout) and compensation_timeout > 0):
            raise ConfigurationError(f"compensation_timeout is a positive number of seconds: {compensation_timeout!r}")
        if forward is not None:
            if steps is not None:
                raise ConfigurationError(f"forward is the first step of one pair: {_how(self)}")
            steps = forward
        if compensation is not None:
            if isinstance(steps, (list, tuple)):
                raise ConfigurationError(f"a list of pairs brings its own compensations: {_how(self)}")
            steps = [(steps, compensation)]
        self.steps: tuple[tuple[Step, Step | None], ...] = _pairs(steps, _how(self))
        self.forward, self.compensation = self.steps[0]
        self.compensation_timeout = compensation_timeout
        if name is not None:
            self.name = name
        self._undo = [
            None if undo is None else TimeoutPrimitive(_Compensation(undo), compensation_timeout, track_timeouts=False)
            for _, undo in self.steps
        ]
        check_composition(self)

    def children(self) -> tuple[Step, ...]:
        return tuple(step for pair in self.steps for step in pair if step is not None)

    def outline(self) -> Outline:
        from tta_sync.primitives.core.diagram import Outline

        labels = [label for _, undo in self.steps for label in ("", "undo")[: 1 if undo is None else 2]]
        return Outline("saga", type(self).__name__.removesuffix("Primitive"), labels)

    @recursive_repr()
    def __repr__(self) -> str:
        pairs = ", ".join(f"({forward!r}, {undo!r})" for forward, undo in self.steps)
        return f"{type(self).__name__.removesuffix('Primitive')}({pairs})"

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        inputs: list[Any] = []  # of the forward steps that have begun
        value: Any = data
        try:
            for forward, _ in self.steps:
                inputs.append(value)
                value = await forward._run(value, context)
        except GeneratorExit:
            raise  # the coroutine was closed: nothing can be awaited here any more
        except BaseException as error:
            failure = error
            if len(inputs) > 1:
                was_called(error)
        else:
            result: Out = value
            return result
        try:
            raise await self._undone(inputs, context, failure)
        finally:
            del failure  # its frames lead back to this one

    async def _undone(self, inputs: list[Any], context: WorkflowContext, failure: BaseException) -> BaseException:
        """Undo the steps that have begun, last one first; return what is to come out."""
        errors: list[Exception] = []
        interrupts: list[BaseException] = []
        try:
            if isinstance(failure, Exception):
                position = len(inputs) - 1
                note(
                    failure, f"in step {position + 1} of {len(self.steps)} of a saga: {shown(self.steps[position][0])}"
                )
            undoing = asyncio.get_running_loop().create_task(
                self._compensate(inputs, context, errors, interrupts), name=f"compensations of {call_name(self)}"
            )
            while not undoing.done():
                try:
                    await asyncio.wait((undoing,))
                except asyncio.CancelledError as cancelled:
                    interrupts.insert(0, cancelled)  # it waits until all is undone
            if isinstance(failure, Exception) and not interrupts:
                if not errors:
                    return failure
                return SagaError(f"a step failed, and {len(errors)} of its compensations too", [failure, *errors])
            ending = interrupts[-1] if isinstance(failure, Exception) else failure
            if ending is not failure and ending.__context__ is None:
                ending.__context__ = failure  # as a `finally` would leave it
            if errors:
                ending.__cause__ = SagaError(f"{len(errors)} compensations failed", errors)
                # Who cancels rarely looks at the cause, run_sync's caller has only a timeout: people must hear of it.
                kinds = ", ".join(type(error).__qualname__ for error in errors)
                events.logger.error(
                    "%s was cancelled, and %d of its compensations failed: %s", call_name(self), len(errors), kinds
                )
            return ending
        finally:
            del failure, interrupts  # their frames lead back to this one

    async def _compensate(
        self, inputs: list[Any], context: WorkflowContext, errors: list[Exception], interrupts: list[BaseException]
    ) -> None:
        time_limit.set(None)  # in this task only: the limits around the saga do not hold for its compensations
        for position in reversed(range(len(inputs))):
            undo = self._undo[position]
            if undo is None:
                continue
            own = context.create_child_context()
            own.state, own.metadata, own.tags, own.baggage = (
                context.state,
                context.metadata,
                context.tags,
                context.baggage,
            )
            own.deadline = None
            try:
                await undo._run(inputs[position], own)
                continue
            except Exception as failed:
                error = failed
            except asyncio.CancelledError:
                error = WorkflowError("the compensation was cancelled before it had ended")
            except BaseException as interrupt:
                interrupts.append(interrupt)  # it comes out of the saga, after the other compensations
                continue
            try:
                self._failed(position, error, context)
                errors.append(error)
            finally:
                del error

    def _failed(self, position: int, error: Exception, context: WorkflowContext) -> None:
        compensation = self.steps[position][1]
        assert compensation is not None  # it has just failed
        note(error, f"in the compensation of step {position + 1} of {len(self.steps)}: {shown(compensation)}")
        if events.bus.emit is not None:
            events.bus.emit(
                events.CompensationFailed(
                    step=call_name(compensation), correlation_id=context.correlation_id, error=error
                )
            )


excuses[SagaPrimitive._undone.__code__] = "its compensations were still running"


class CompensationPrimitive(SagaPrimitive[In, Out]):
    """A saga under TTA.dev's name: ``CompensationPrimitive(forward, compensation)``, or a list of such pairs."""


class _Compensation(WorkflowPrimitive[Any, Any]):
    """A compensation that finds the limit set for it as its context's deadline."""

    def __init__(self, compensation: Step) -> None:
        self.compensation = compensation
        self.name = call_name(compensation)

    def children(self) -> tuple[Step, ...]:
        return (self.compensation,)

    async def _run(self, data: Any, context: WorkflowContext) -> Any:
        limit = time_limit.get()
        assert limit is not None  # set by the TimeoutPrimitive around this
        context.deadline = Deadline(float(limit), clock=context.clock)
        return await self.compensation._run(data, context)


def _how(saga: SagaPrimitive[Any, Any]) -> str:
    kind = type(saga).__name__
    return (
        f"write {kind}(forward, compensation), or give a list of such pairs, "
        f"{kind}([(forward, compensation), ...]), with None as the compensation where there is nothing to undo"
    )


def _pairs(steps: Iterable[tuple[Any, Any]], how: str) -> tuple[tuple[Step, Step | None], ...]:
    try:
        pairs = [(forward, undo) for forward, undo in steps]
    except (TypeError, ValueError):
        raise ConfigurationError(f"a saga takes a step and its compensation: {how}") from None
    if not pairs:
        raise ConfigurationError("a saga needs at least one pair (forward, compensation)")
    return tuple((as_primitive(forward), None if undo is None else as_primitive(undo)) for forward, undo in pairs)
