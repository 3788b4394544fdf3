"""What people call a step: events and errors speak of the call, not of what stands around it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from tta_sync.primitives.core.composition import children_of

if TYPE_CHECKING:
    from tta_sync.primitives.core.base import WorkflowPrimitive


def step_name(candidate: object) -> str:
    """Return the name by which people know a step: its own, its function's, or its class's."""
    while isinstance(candidate, functools.partial):
        candidate = candidate.func
    name = getattr(candidate, "name", None) or getattr(candidate, "__qualname__", None)
    return name if isinstance(name, str) else type(candidate).__qualname__


def call_name(step: WorkflowPrimitive[Any, Any]) -> str:
    """Return the name of *step*; of a wrapper without one, that of what it wraps."""
    return step_name(called(step))


def called(step: WorkflowPrimitive[Any, Any]) -> WorkflowPrimitive[Any, Any]:
    """Return what is called where *step* is: the first step inside that has a name, or does not just wrap another."""
    above = set()
    while not step.name:
        parts = children_of(step)
        if not parts or (len(parts) > 1 and type(step)._tta_kind not in ("fallback", "timeout")):
            break
        above.add(id(step))
        if id(parts[0]) in above:  # a workflow that contains itself
            break
        step = parts[0]
    return step
