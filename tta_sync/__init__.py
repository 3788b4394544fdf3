"""Run async workflows from synchronous code, on one managed event loop per process.

Modules load at the first use of a name from them: pytest imports this package for its fixtures before coverage begins
to measure, and whoever wants only an exception's name should not pay for asyncio.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta_sync.context import WorkflowContext as WorkflowContext, current_context as current_context
    from tta_sync.facade import (
        SyncFacade as SyncFacade,
        async_to_sync as async_to_sync,
        call_sync as call_sync,
        iterate_sync as iterate_sync,
        resource as resource,
        run_on_caller as run_on_caller,
        run_sync as run_sync,
    )
    from tta_sync.primitives.core.base import caller_step as caller_step, step as step, thread_step as thread_step

_HOMES = {
    "tta_sync.context": ("WorkflowContext", "current_context"),
    "tta_sync.facade": (
        "SyncFacade",
        "async_to_sync",
        "call_sync",
        "iterate_sync",
        "resource",
        "run_on_caller",
        "run_sync",
    ),
    "tta_sync.primitives.core.base": ("caller_step", "step", "thread_step"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # one table, not two that drift apart


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
