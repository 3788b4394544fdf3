"""Stand-ins for the outside world, and a test case that catches leaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tta_sync.primitives.testing.mocks import MockPrimitive as MockPrimitive

if TYPE_CHECKING:
    from tta_sync.primitives.testing.case import WorkflowTestCase as WorkflowTestCase

__all__ = ["MockPrimitive", "WorkflowTestCase"]


def __getattr__(name: str) -> Any:
    # The test case needs unittest, which no application should have to load.
    if name == "WorkflowTestCase":
        from tta_sync.primitives.testing.case import WorkflowTestCase

        return WorkflowTestCase
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
