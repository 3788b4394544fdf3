"""Another step's answer where the first one fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tta_sync import events
from tta_sync.context import WorkflowContext, cut_off
from tta_sync.exceptions import ConfigurationError, came_before_call, was_called
from tta_sync.primitives.core.base import (
    In,
    Out,
    StepLike,
    WorkflowPrimitive,
    as_primitive,
    note,
    peek_value,
    shown,
)
from tta_sync.primitives.core.composition import check_composition
from tta_sync.primitives.core.options import error_types
from tta_sync.primitives.recovery.naming import call_name


class FallbackPrimitive(WorkflowPrimitive[In, Out]):
    """Ask the next step, with the same data, when one fails.

    The first that succeeds answers; the context is then marked ``degraded``. When all have failed, the primary's error
    comes out as itself, with the others in its notes. A cancellation, and a call whose time is up, never fall back.

    Args:
        primary: the step that should answer.
        fallback: the step to ask instead (TTA.dev's spelling).
        fallbacks: several of them, in order.
        fallback_on: exception types for which another step is asked; others pass through.

    Raises:
        ConfigurationError: there is no fallback.

    Source: TTA.dev; the types of error as in Polly's ``ShouldHandle``.
    """

    _tta_kind = "fallback"
    peeks = True

    def __init__(
        self,
        primary: StepLike[In, Out],
        fallback: StepLike[In, Out] | None = None,
        fallbacks: Sequence[StepLike[Any, Any]] | None = None,
        *,
        fallback_on: type[Exception] | tuple[type[Exception], ...] = Exception,
        name: str | None = None,
    ) -> None:
        if isinstance(fallbacks, (str, bytes)) or not (fallbacks is None or isinstance(fallbacks, Sequence)):
            raise ConfigurationError(f"fallbacks is a list of steps, not {fallbacks!r}: write fallbacks=[step]")
        steps = [] if fallback is None else [fallback]
        steps.extend(fallbacks or ())
        if not steps:
            raise ConfigurationError("a fallback needs a step to fall back on: FallbackPrimitive(primary, fallback)")
        self.primary: WorkflowPrimitive[In, Out] = as_primitive(primary)
        self.fallbacks: tuple[WorkflowPrimitive[In, Out], ...] = tuple(map(as_primitive, steps))
        self.fallback_on = fallback_on
        self.answers_all = any(kind in (Exception, BaseException) for kind in error_types("fallback_on", fallback_on))
        if name is not None:
            self.name = name
        self._inner = self.primary._run
        check_composition(self)

    @property
    def fallback(self) -> WorkflowPrimitive[In, Out]:
        """The first fallback, under TTA.dev's name."""
        return self.fallbacks[0]

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return (self.primary, *self.fallbacks)

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        inner = self._inner  # a local: called on self, it would first be looked for in the class
        try:
            return await inner(data, context)
        except Exception as error:
            if not isinstance(error, self.fallback_on):
                raise
            first = error
        try:
            return await self._fall_back(first, data, context)
        finally:
            del first  # its frames lead back to this one

    async def _fall_back(self, first: Exception, data: In, context: WorkflowContext) -> Out:
        failed: WorkflowPrimitive[In, Out] = self.primary
        error = first
        try:
            for position, step in enumerate(self.fallbacks, 1):
                end = cut_off(context)
                if end is not None and end <= context.clock.monotonic():
                    note(first, f"no time was left for {shown(step)}")
                    break
                if events.bus.emit is not None:
                    events.bus.emit(
                        events.FallbackUsed(
                            step=call_name(self),
                            correlation_id=context.correlation_id,
                            failed=call_name(failed),
                            used=call_name(step),
                            error=error,
                        )
                    )
                try:
                    answer = await step._run(data, context)
                except Exception as next_error:
                    if not came_before_call(next_error):
                        was_called(first)
                    if next_error is not first:
                        which = f"fallback {position} of {len(self.fallbacks)}, {shown(step)}"
                        note(first, f"{which}, failed as well: {shown(next_error)}")
                    failed, error = step, next_error
                except BaseException as cut:
                    if not came_before_call(first):
                        was_called(cut)
                    raise
                else:
                    context.mark_degraded()
                    return answer
            raise first
        finally:
            del first, error

    def peek(self, data: In, context: WorkflowContext) -> Out | Any:
        # What the primary would raise is no answer: the fallback has one, on the loop.
        return peek_value(self.primary, data, context)
