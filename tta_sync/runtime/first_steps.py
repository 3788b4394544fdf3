"""An asyncio loop on which a new task may take its first step at once.

asyncio queues that step for the loop's next turn. Most calls end with it: run where the bell is answered, they cost no
handle, no turn of the loop, and no second look at the descriptors, which is a fifth of a call's time. (Python 3.12 can
begin tasks eagerly, but only where a task or a callback runs already.)
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any


class FirstStepLoop(asyncio.SelectorEventLoop):
    """asyncio's loop, which hands out the first step of a task instead of queueing it, if asked to.

    A new task gives its first step to ``call_soon``. For that moment this is another function; at any other time, and
    for everybody else, nothing differs from asyncio's loop.
    """

    def __init__(self, selector: Any = None) -> None:
        super().__init__(selector)
        self._usual_call_soon: Any = None  # while a task is made
        self._keeping_call_soon = self._keep
        self._beginning: Coroutine[Any, Any, Any] | None = None
        self._first_step: Callable[[], object] | None = None

    def new_task(
        self, coroutine: Coroutine[Any, Any, Any], name: str | None, context: contextvars.Context
    ) -> tuple[asyncio.Task[Any], Callable[[], object] | None]:
        """Make a task, and return it with its first step, to be run in *context*; None if the loop will run it."""
        self._beginning = coroutine
        usual = self._usual_call_soon = self.call_soon  # perhaps somebody's own, which traces it
        self.call_soon = self._keeping_call_soon  # type: ignore[assignment,method-assign]
        try:
            task = asyncio.Task(coroutine, loop=self, name=name, context=context)
        finally:
            self.call_soon = usual  # type: ignore[method-assign]
            first_step, self._beginning, self._first_step = self._first_step, None, None
        return task, first_step

    def _keep(self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None) -> Any:
        task = getattr(callback, "__self__", None)
        if isinstance(task, asyncio.Task) and task.get_coro() is self._beginning:
            self._first_step = callback
            return None  # a new task does not look at it
        return self._usual_call_soon(callback, *args, context=context)  # a finalizer's, in the middle of all this

    def has_nothing_to_do(self) -> bool:
        """Say whether no callback is due, no timer runs, and nobody has stopped the loop."""
        return not (self._ready or self._scheduled or self._stopping)  # type: ignore[attr-defined]

    def close(self) -> None:
        super().close()
        for name in ("call_soon", "_usual_call_soon", "_keeping_call_soon"):  # no cycle waits for the collector
            self.__dict__.pop(name, None)
