"""Steps that give their result piece by piece."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator
from typing import Any

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import In, Out, WorkflowPrimitive, context_first, sort_arguments


class StreamingPrimitive(WorkflowPrimitive[In, list[Out]]):
    """A step that yields: define ``stream(self, data, context)`` as an async generator.

    ``execute`` collects the items into a list, so a streaming step stands in any workflow;
    :func:`tta_sync.iterate_sync` hands them to synchronous code one by one, with back-pressure, and ``async for`` over
    ``stream(data, context)`` does so on the loop. Subclasses need not call ``super().__init__()``.

    Args:
        name: what reprs, events and messages call it.

    Raises:
        ConfigurationError: at the definition of a subclass whose ``stream`` returns instead of yielding.

    Source: TTA.dev's StreamingPrimitive.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        written = cls.__dict__.get("stream")
        if written is None:
            return
        if inspect.iscoroutinefunction(written):
            raise ConfigurationError(f"{cls.__name__}.stream returns instead of yielding: yield its items one by one")
        if context_first(written):

            @functools.wraps(written)
            def stream(self: Any, data: Any = None, context: Any = None, /, **named: Any) -> Any:
                data, context = sort_arguments(data, context, named)
                return written(self, context, data)

            cls.stream = stream  # type: ignore[assignment]  # same call, looser spelling

    def stream(self, data: In, context: WorkflowContext) -> AsyncIterator[Out]:
        """Yield the items of the result."""
        raise NotImplementedError(
            f"{type(self).__name__} has no stream(data, context): define it as an async generator"
        )

    async def _run(self, data: In, context: WorkflowContext) -> list[Out]:
        return [item async for item in self.stream(data, context)]
