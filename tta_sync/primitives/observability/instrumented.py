"""A step that tells when it begins and ends."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from tta_sync import events
from tta_sync.context import WorkflowContext
from tta_sync.primitives.core.base import In, Out, WorkflowPrimitive, context_first


class _ClassName:
    """The name of a step whose author has given it none, here nor in its class: that of the class."""

    def __get__(self, step: object, kind: type) -> str:
        return kind.__name__


class _Span:
    """A span of ours, or what was in its place on the context before."""

    __slots__ = ("around", "over", "parent_span_id", "span_id")

    def __init__(self, span_id: str | None, parent_span_id: str | None, around: _Span | None) -> None:
        self.span_id = span_id
        self.parent_span_id = parent_span_id
        self.around = around
        self.over = False


_running: dict[str, _Span] = {}
"""Our spans that have not ended, by their ids. Each call adds and removes its own: atomic operations."""

_making_trace = threading.Lock()
"""Held while a call gets its trace id: the branches of one may begin on several threads."""


def _in_child() -> None:
    global _making_trace
    _making_trace = threading.Lock()  # a thread of the parent may have held it


os.register_at_fork(after_in_child=_in_child)


def _begin(context: WorkflowContext) -> _Span:
    """Give *context* a span of its own, and a trace id where its call has none."""
    if context.trace_id is None:
        give_trace(context)
    here = context.span_id
    around = _running.get(here) if here is not None else None
    if around is None:
        around = _Span(here, context.parent_span_id, None)
    span = _Span(os.urandom(8).hex(), here or context.parent_span_id, around)
    _running[span.span_id] = span  # type: ignore[index]  # it has just been made
    context.parent_span_id, context.span_id = span.parent_span_id, span.span_id
    return span


def _end(span: _Span, context: WorkflowContext) -> None:
    """Put on *context* what was there before *span*, past those that have ended meanwhile: calls may overlap."""
    span.over = True
    del _running[span.span_id]  # type: ignore[arg-type]  # a span of ours
    around = span.around
    while around is not None and around.over:
        around = around.around
    span.around = around  # those that began inside this one need not keep what has ended
    if context.span_id == span.span_id and around is not None:
        # Else another has begun since, or it was left behind, and the call has gone on without it.
        context.span_id, context.parent_span_id = around.span_id, around.parent_span_id


def give_trace(context: WorkflowContext) -> None:
    """Give *context* its call's trace id: that of the nearest ancestor, or a new one, which all of them then have.

    For those, too, who are about to make a context without an ancestor for a part of the call.
    """
    with _making_trace:
        without = [context]
        while without[-1].trace_id is None and without[-1]._parent is not None:
            without.append(without[-1]._parent)
        trace_id = without[-1].trace_id or os.urandom(16).hex()
        for each in without:
            each.trace_id = trace_id


class InstrumentedPrimitive(WorkflowPrimitive[In, Out]):
    """A step with a span, a metric and two checkpoints of its own: define ``async _execute_impl(self, data, context)``.

    While it runs, ``context.span_id`` is the step's span and ``context.parent_span_id`` the one around it, both in W3C
    form; where a call has no ``trace_id`` yet, it gets one, the same for all its branches. The context notes
    ``{name}.start`` and ``{name}.end``, also when the step fails, and ``StepStarted`` and ``StepEnded`` events are
    emitted, of which the hooks of ``tta_sync.observability`` make the metric and the log line. Subclasses need not call
    ``super().__init__()``.

    Args:
        name: what the span, the metric and the checkpoints are called; the class's name by default.

    Source: TTA.dev's InstrumentedPrimitive.
    """

    tells_itself = True

    if TYPE_CHECKING:
        name: str
    else:
        name = _ClassName()

    def __init__(self, name: str | None = None) -> None:
        if name:
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
        name = self.name or type(self).__name__  # an `__init__` of the user's may have set it to None
        span = _begin(context)
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
            _end(span, context)
            emit = events.bus.emit
            if emit is not None:
                seconds = context.clock.monotonic() - began
                emit(events.StepEnded(step=name, correlation_id=context.correlation_id, seconds=seconds, error=failed))
            failed = None  # else the error's frames would lead back to it
