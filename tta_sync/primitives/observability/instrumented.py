"""A step that tells when it begins and ends."""

from __future__ import annotations

import os
from typing import Any

from tta_sync import events
from tta_sync.context import WorkflowContext
from tta_sync.primitives.core.base import In, Out, WorkflowPrimitive, context_first, step_name


class InstrumentedPrimitive(WorkflowPrimitive[In, Out]):
    """A step with a span, a metric and two checkpoints of its own: define ``async _execute_impl(self, data, context)``.

    While it runs, ``context.span_id`` is the step's span and ``context.parent_span_id`` the one around it, both in W3C
    form; where a call has no ``trace_id`` yet, it gets one. The context notes ``{name}.start`` and ``{name}.end``, also
    when the step fails, and ``StepStarted`` and ``StepEnded`` events are emitted, of which the hooks of
    ``tta_sync.observability`` make the metric and the log line. Subclasses need not call ``super().__init__()``.

    Args:
        name: what the span, the metric and the checkpoints are called; the class's name by default.

    Source: TTA.dev's InstrumentedPrimitive.
    """

    tells_itself = True

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        written = cls.__dict__.get("_execute_impl")
        if written is not None and context_first(written):
            cls._execute_impl = lambda self, data, context: written(self, context, data)  # type: ignore[method-assign]

    async def _execute_impl(self, data: In, context: WorkflowContext) -> Out:
        raise NotImplementedError(
            f"{type(self).__name__} has no _execute_impl(data, context): define it as `async def`"
        )

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        name = step_name(self)
        outer = context.span_id, context.parent_span_id
        if context.trace_id is None:
            context.trace_id = os.urandom(16).hex()
        span_id = os.urandom(8).hex()
        context.parent_span_id, context.span_id = context.span_id or context.parent_span_id, span_id
        context.checkpoint(f"{name}.start")
        began = context.clock.monotonic()
        emit = events.bus.emit
        if emit is not None:
            emit(events.StepStarted(step=name, correlation_id=context.correlation_id))
        failed: BaseException | None = None
        try:
            return await self._execute_impl(data, context)
        except BaseException as error:
            failed = error
            raise
        finally:
            context.checkpoint(f"{name}.end")
            if context.span_id == span_id:  # else it was left behind, and the call has gone on without it
                context.span_id, context.parent_span_id = outer
            emit = events.bus.emit
            if emit is not None:
                seconds = context.clock.monotonic() - began
                emit(events.StepEnded(step=name, correlation_id=context.correlation_id, seconds=seconds, error=failed))
            failed = None  # else the error's frames would lead back to it
