"""Copies of results: what is kept is never what a caller holds, and every reader gets one of its own."""

from __future__ import annotations

import marshal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from tta_sync.primitives.performance.keys import SCALARS, is_plain

Load = Callable[[Any], Any]


class Snapshot(NamedTuple):
    """A result as it was: ``stored``, how to ``load`` a copy of it (None: it cannot change), its size in bytes."""

    stored: Any
    load: Load | None
    size: int

    def copy(self) -> Any:
        return self.stored if self.load is None else self.load(self.stored)


def take(value: Any) -> Snapshot | None:
    """Copy *value*; None if it cannot be copied (a generator, an open file, a lock ...)."""
    kind = type(value)
    if kind in SCALARS:
        return Snapshot(value, None, sys.getsizeof(value))
    if is_plain(value):
        # Version 4 keeps what is shared inside the value shared, and reads faster than 2.
        form = marshal.dumps(value, 4)
        return Snapshot(form, marshal.loads, sys.getsizeof(form))
    from copy import deepcopy

    try:
        return Snapshot(deepcopy(value), deepcopy, _size(value))
    except Exception:  # whatever a __deepcopy__ or __reduce__ raises, it means: not to be copied
        return None


def _size(value: Any, depth: int = 0, budget: list[int] | None = None) -> int:
    """Estimate the bytes that *value* holds; good enough for a bound, and bounded itself."""
    budget = [10_000] if budget is None else budget
    budget[0] -= 1
    total = sys.getsizeof(value, 64)
    if depth > 20 or budget[0] < 0:
        return total
    parts: list[Any] = []
    if isinstance(value, dict):
        parts.extend(value)
        parts.extend(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts.extend(value)
    elif type(value).__module__ != "builtins":
        parts.extend(getattr(value, "__dict__", {}).values())
    for part in parts:
        total += _size(part, depth + 1, budget)
    return total
