"""What a workflow is made of, seen from outside: its parts, and compositions that defeat themselves.

Three class-level answers carry this, all optional: ``children()`` (the direct parts), ``details()`` (the options worth
reading) and ``conflict(inner, direct)`` (why having *inner* inside makes no sense). They are asked of the class, so a
user's instance attribute of the same name is no matter; nor is a user's method of that name that means something else.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta_sync.primitives.core.base import WorkflowPrimitive

    Primitive = WorkflowPrimitive[Any, Any]


class CompositionWarning(UserWarning):
    """A workflow is built so that one part keeps another from doing its work."""


def children_of(primitive: Primitive) -> tuple[Primitive, ...]:
    """Return the direct parts of *primitive*; () for a leaf, or where a user's class has its own `children`."""
    from tta_sync.primitives.core.base import WorkflowPrimitive

    parts = answer_of(primitive, "children")
    if not isinstance(parts, (tuple, list)):
        return ()
    return tuple(part for part in parts if isinstance(part, WorkflowPrimitive))


def is_unbound(step: object) -> bool:
    """Say whether *step* waits for a chain to give it its inner step (see core.sequential)."""
    return getattr(step, "unbound", False) is True and callable(getattr(step, "bind", None))


def details_of(primitive: Primitive) -> str:
    """Return the options worth reading of *primitive*, as ``name=value, ...``."""
    text = answer_of(primitive, "details")
    return text if isinstance(text, str) else ""


def answer_of(primitive: Primitive, question: str) -> Any:
    """Return what the method *question* of the class says; None where a user's own method fails, or must be awaited."""
    method = getattr(type(primitive), question, None)
    if not callable(method):
        return None
    try:
        answer = method(primitive)
    except Exception:
        if str(getattr(method, "__module__", "")).partition(".")[0] == "tta_sync":
            raise
        return None  # it wants other arguments, or is not ready: it was never meant as an answer to this
    if inspect.iscoroutine(answer):
        answer.close()  # else Python complains that nobody awaited it
    return answer


def inside(primitive: Primitive) -> Iterator[tuple[Primitive, bool]]:
    """Yield every part of *primitive* at any depth, with True where only wrappers of one part stand between."""
    seen = {id(primitive)}
    found = [(primitive, True)]
    while found:
        outer, direct = found.pop()
        parts = children_of(outer)
        alone = sum(not is_unbound(part) for part in parts) == 1
        for part in parts:
            if id(part) not in seen:
                seen.add(id(part))
                # A cache at the end of a chain is a wrapper in another spelling.
                straight = direct and (alone or is_unbound(part))
                yield part, straight
                found.append((part, straight))


def check_composition(primitive: Primitive) -> None:
    """Warn of each part inside *primitive* that ``primitive.conflict`` objects to. Composites call it when built."""
    for inner, direct in inside(primitive):
        objection = primitive.conflict(inner, direct)
        if objection:
            warn_user(objection)


def warn_user(message: str) -> None:
    """Emit a CompositionWarning that points at the line outside tta_sync that built the workflow."""
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "tta_sync":
        frame = frame.f_back
        level += 1
    warnings.warn(message, CompositionWarning, stacklevel=level)
