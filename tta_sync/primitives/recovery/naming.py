"""What people call a step that is wrapped: events and errors speak of the call, not of what stands around it."""

from __future__ import annotations

from typing import Any

from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import LambdaPrimitive, WorkflowPrimitive, step_name
from tta_sync.primitives.core.composition import children_of


def call_name(step: WorkflowPrimitive[Any, Any]) -> str:
    """Return the name of *step*; of a wrapper without one, that of what it wraps."""
    return step_name(_called(step))


def _called(step: WorkflowPrimitive[Any, Any]) -> WorkflowPrimitive[Any, Any]:
    while not step.name:
        parts = children_of(step)
        if not parts or (len(parts) > 1 and type(step).strategy not in ("fallback", "timeout")):
            break
        step = parts[0]
    return step


def shared_name(step: WorkflowPrimitive[Any, Any], what: str) -> str:
    """Return a name for *step* that every process has for it, and no other step: the one it was given, or its place.

    Raises:
        ConfigurationError: there is none; *what* needs a name of its own.
    """
    called = _called(step)
    if called.name and not (isinstance(called, LambdaPrimitive) and called.name == step_name(called.func)):
        return called.name
    from tta_sync.primitives.performance.cache import describe

    text = describe(step)
    if "<locals>" in text or "<lambda>" in text or "functools.partial" in text:
        raise ConfigurationError(
            f"{text} has no name that is the same in every process: give the {what} name=..., "
            "or define the step at the top of a module"
        )
    return text
