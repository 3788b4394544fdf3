"""What an option may be: asked at construction, so that what cannot work is refused before the first call."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeGuard

from tta_sync.exceptions import ConfigurationError

ErrorTypes = type[BaseException] | tuple[type[BaseException], ...]

_LARGEST = sys.float_info.max


def is_number(value: Any) -> TypeGuard[float]:
    """Say whether *value* is a finite number that a float can hold; True and False are none."""
    # Not math.isfinite: it raises for an int beyond the floats. A NaN fails both comparisons.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def is_count(value: Any, least: int) -> TypeGuard[int]:
    """Say whether *value* is a whole number, *least* or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_async(function: Callable[..., Any]) -> bool:
    """Say whether calling *function* gives something to await or to iterate over, and no answer."""
    while isinstance(function, functools.partial):
        function = function.func
    forms = (function, type(function).__call__)
    return any(inspect.iscoroutinefunction(form) or inspect.isasyncgenfunction(form) for form in forms)


def error_types(option: str, given: ErrorTypes) -> tuple[type[BaseException], ...]:
    """Return *given* as a tuple of exception types, which `isinstance` will take without complaint later.

    Raises:
        ConfigurationError: it is something else.
    """
    kinds = given if isinstance(given, tuple) else (given,)
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise ConfigurationError(f"{option} takes an exception type or a tuple of them, not {given!r}")
    return kinds
