"""Steps that give their result piece by piece."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import AsyncIterator, Callable
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
        ConfigurationError: at the definition of a subclass whose ``stream`` returns instead of yielding, or is no async
            generator.

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
        if inspect.isgeneratorfunction(written):
            raise ConfigurationError(
                f"{cls.__name__}.stream is a plain generator, which would hold the loop between its items: "
                "write `async def stream(self, data, context)`"
            )
        # A class that is made again from its own parts, as dataclass(slots=True) does, has it in place already.
        if isinstance(written, types.FunctionType) and not hasattr(written, "_sorts"):
            cls.stream = _sorting(written)  # type: ignore[method-assign]  # same call, looser spelling

    def stream(self, data: In, context: WorkflowContext) -> AsyncIterator[Out]:
        """Yield the items of the result."""
        raise NotImplementedError(
            f"{type(self).__name__} has no stream(data, context): define it as an async generator"
        )

    async def _run(self, data: In, context: WorkflowContext) -> list[Out]:
        return [item async for item in self.stream(data, context)]


_ARGUMENTS = frozenset({"data", "input_data", "context"})


def _sorting(written: Callable[..., Any]) -> Callable[..., Any]:
    """Make the public ``stream`` over what the author has *written*: its arguments come in any spelling."""
    turned = context_first(written)

    @functools.wraps(written)
    def stream(self: Any, *given: Any, **named: Any) -> Any:
        if len(given) > 2 or not named.keys() <= _ARGUMENTS:
            return written(self, *given, **named)  # it takes more than data and context: the author's own call
        data, context = (*given, None, None)[:2]
        data, context = sort_arguments(data, context, named)
        return written(self, context, data) if turned else written(self, data, context)

    stream._sorts = True  # type: ignore[attr-defined]
    return stream
