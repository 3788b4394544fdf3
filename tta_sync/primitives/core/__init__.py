"""The primitives that workflows are composed of: function steps, sequence, parallel, choice, map.

Modules load at the first use of a name from them.
"""
# one import per module, not per name

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta_sync.context import WorkflowContext as WorkflowContext
    from tta_sync.primitives.core.base import (
        MISS as MISS,
        CallerPrimitive as CallerPrimitive,
        LambdaPrimitive as LambdaPrimitive,
        ThreadPrimitive as ThreadPrimitive,
        WorkflowPrimitive as WorkflowPrimitive,
        caller_step as caller_step,
        step as step,
        thread_step as thread_step,
    )
    from tta_sync.primitives.core.composition import CompositionWarning as CompositionWarning
    from tta_sync.primitives.core.conditional import ConditionalPrimitive as ConditionalPrimitive
    from tta_sync.primitives.core.mapping import MapPrimitive as MapPrimitive
    from tta_sync.primitives.core.parallel import ParallelPrimitive as ParallelPrimitive
    from tta_sync.primitives.core.routing import RouterPrimitive as RouterPrimitive, SwitchPrimitive as SwitchPrimitive
    from tta_sync.primitives.core.sequential import SequentialPrimitive as SequentialPrimitive

_HOMES = {
    "base": (
        "MISS",
        "CallerPrimitive",
        "LambdaPrimitive",
        "ThreadPrimitive",
        "WorkflowContext",  # TTA.dev gives it here, too
        "WorkflowPrimitive",
        "caller_step",
        "step",
        "thread_step",
    ),
    "composition": ("CompositionWarning",),
    "conditional": ("ConditionalPrimitive",),
    "mapping": ("MapPrimitive",),
    "parallel": ("ParallelPrimitive",),
    "routing": ("RouterPrimitive", "SwitchPrimitive"),
    "sequential": ("SequentialPrimitive",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # one table, not two that drift apart


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
