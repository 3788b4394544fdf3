"""Steps that outlived their cancellation: they are left behind, and what they are and where they stand is told."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import types
from typing import Any

from tta_sync import events
from tta_sync.context import current_caller
from tta_sync.primitives.core.base import LambdaPrimitive, WorkflowPrimitive
from tta_sync.primitives.core.naming import call_name, called

GRACE = 1.0
"""Seconds that a step has to end in after it was cancelled at its limit; then it is left behind."""

orphans: set[asyncio.Task[Any]] = set()
"""Steps that swallowed their cancellation and still run. Held here because a loop holds its tasks only weakly."""

excuses: dict[types.CodeType, str] = {}
"""Primitives' own code that goes on after a cancellation because it has to, and what it is at then."""


def leave_behind(orphan: asyncio.Task[Any], coroutine: Any, step: WorkflowPrimitive[Any, Any]) -> str:
    """Keep the task of *step*, which outlived its cancellation, until it ends; count it; return why it was left."""
    orphans.add(orphan)
    orphan.add_done_callback(_orphan_ended)
    caller = current_caller.get()
    level = logging.DEBUG if caller is not None and caller.step_left_behind() == "quietly" else logging.WARNING
    frame, excuse = _standing(coroutine)
    if frame is not None:
        name, place = frame.f_code.co_qualname, f"{frame.f_code.co_filename}:{frame.f_lineno}"
    else:  # it waits inside a primitive, for tasks that do not show
        name, place = call_name(step), _place_of(step)
    if excuse:
        reason = f"{excuse} {GRACE:g} s after its cancellation"
    else:
        reason = f"it swallowed its cancellation for {GRACE:g} s"
    events.logger.log(level, "%s runs on as an orphan: %s%s", name, reason, place and f"; it stands at {place}")
    if events.bus.emit is not None:
        events.bus.emit(events.CallOrphaned(step=name, reason=reason, age=GRACE))
    return reason


def _orphan_ended(orphan: asyncio.Task[Any]) -> None:
    orphans.discard(orphan)
    if not orphan.cancelled() and orphan.exception() is not None:
        events.logger.warning("a step that was left behind ended with %s", type(orphan.exception()).__qualname__)


def _standing(coroutine: Any) -> tuple[types.FrameType | None, str]:
    """Return where a suspended step stands, the innermost frame that is the user's, and what else there is to say.

    A primitive that waits for tasks of its own swallows nothing: who does stands in one of them.
    """
    innermost = None
    excuse = "it had not ended"
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is not None:
            path = frame.f_code.co_filename
            if frame.f_code in excuses:
                excuse = excuses[frame.f_code]
                break
            if not path.startswith(_not_the_users()):
                innermost, excuse = frame, ""
            elif path.startswith(_primitives()):
                excuse = "it had not ended"
        coroutine = awaited_by(coroutine)
    return innermost, excuse


def _place_of(step: WorkflowPrimitive[Any, Any]) -> str:
    """Return ``file:line`` where the code of *step* begins; "" where it is none of the user's."""
    step = called(step)
    function = step.func if isinstance(step, LambdaPrimitive) else type(step).execute
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or code.co_filename.startswith(_not_the_users()):
        return ""
    return f"{code.co_filename}:{code.co_firstlineno}"


@functools.cache
def _not_the_users() -> tuple[str, ...]:
    """Return where asyncio and this package live."""
    return str(asyncio.__file__).rpartition("__init__")[0], _primitives().rpartition("primitives")[0]


@functools.cache
def _primitives() -> str:
    return __file__.rpartition("recovery")[0]


def awaited_by(coroutine: Any) -> Any:
    """Return what a suspended coroutine, or a generator in its place, is waiting for inside itself."""
    return getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
