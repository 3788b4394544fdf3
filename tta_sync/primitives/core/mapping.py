"""One step over many items."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from reprlib import recursive_repr
from typing import Any

from tta_sync import events
from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import In, Out, StepLike, WorkflowPrimitive, as_primitive, shown, told
from tta_sync.primitives.core.branches import run_windowed
from tta_sync.primitives.core.naming import call_name
from tta_sync.primitives.core.parallel import OnError, check_concurrency, check_on_error


class MapPrimitive(WorkflowPrimitive[Iterable[In] | AsyncIterable[In], list[Out]]):
    """Run one step for every item of the input, some at a time; return the results as a list, in the items' order.

    The input is any iterable, or an asynchronous one, which is read to its end first.

    Each item gets a child context. The first failure cancels the items in flight, waits until they have ended, starts
    no more, and comes out as itself. With ``on_error="collect"`` all items run, and an error stands in the list in the
    place of its result. After each item a ``MapProgressed`` event is emitted.

    Args:
        step: what to run for each item.
        max_concurrency: how many items run at a time.
        on_error: "raise" or "collect".

    Raises:
        ConfigurationError: an option makes no sense.
        TypeError: the input is no collection of items.
    """

    tells_itself = True
    _tta_kind = "map"

    def __init__(self, step: StepLike[In, Out], *, max_concurrency: int = 10, on_error: OnError = "raise") -> None:
        self.step: WorkflowPrimitive[In, Out] = as_primitive(step)
        if max_concurrency is None:
            raise ConfigurationError("max_concurrency is a number of items; the items may be any number")
        check_concurrency(max_concurrency)
        self._collect = check_on_error(on_error)
        self.max_concurrency = max_concurrency
        self.on_error = on_error

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return (self.step,)

    async def _run(self, data: Iterable[In] | AsyncIterable[In], context: WorkflowContext) -> list[Out]:
        if isinstance(data, AsyncIterable) and not isinstance(data, Iterable):
            items = [item async for item in data]
        else:
            try:
                if isinstance(data, (str, bytes)):
                    raise TypeError
                iterator = iter(data)
            except TypeError:
                kind = type(data).__name__
                raise TypeError(f"{self!r} needs a collection of items, not {kind}: put it in a list") from None
            items = list(iterator)
        total = len(items)
        name, run = call_name(self.step), told(self.step) if events.bus.emit is not None else self.step._run

        def progress(left: int, failed: int) -> None:
            emit = events.bus.emit
            if emit is not None:
                emit(
                    events.MapProgressed(
                        step=name,
                        correlation_id=context.correlation_id,
                        done=total - left,
                        total=total,
                        failed=failed,
                    )
                )

        def label(index: int) -> str:
            return f"item {index + 1} of {total}: {shown(self.step)}"

        calls: Any = ((name, run, item, context.create_child_context()) for item in items)
        return await run_windowed(calls, total, self.max_concurrency, label, self._collect, progress)

    def details(self) -> str:
        return f"max_concurrency={self.max_concurrency}" + (', on_error="collect"' if self._collect else "")

    @recursive_repr()
    def __repr__(self) -> str:
        return f"Map({self.step!r}, {self.details()})"
