"""What people call a step that is wrapped: events and errors speak of the call, not of what stands around it."""

from __future__ import annotations

from typing import Any

from tta_sync.primitives.core.base import WorkflowPrimitive, step_name
from tta_sync.primitives.core.composition import children_of


def call_name(step: WorkflowPrimitive[Any, Any]) -> str:
    """Return the name of *step*; of a wrapper without one, that of what it wraps."""
    while not step.name:
        parts = children_of(step)
        if not parts or (len(parts) > 1 and step.strategy not in ("fallback", "timeout")):
            break
        step = parts[0]
    return step_name(step)
