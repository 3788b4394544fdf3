"""A name that every process has for the same step."""

from __future__ import annotations

from typing import Any

from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import LambdaPrimitive, WorkflowPrimitive
from tta_sync.primitives.core.naming import call_name as call_name, called, step_name


def shared_name(step: WorkflowPrimitive[Any, Any], what: str) -> str:
    """Return a name for *step* that every process has for it, and no other step: the one it was given, or its place.

    Raises:
        ConfigurationError: there is none; *what* needs a name of its own.
    """
    inner = called(step)
    own = step_name(inner.func) if isinstance(inner, LambdaPrimitive) else type(inner).__name__
    if inner.name and inner.name != own:  # that of a function or class alone may be another's in another module
        return inner.name
    from tta_sync.primitives.performance.cache import describe

    text = describe(step)
    if "<locals>" in text or "<lambda>" in text or "functools.partial" in text:
        raise ConfigurationError(
            f"{text} has no name that is the same in every process: give the {what} name=..., "
            "or define the step at the top of a module"
        )
    return text
