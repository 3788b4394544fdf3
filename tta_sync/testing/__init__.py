"""For tests: a clock that jumps, and pytest fixtures (see tta_sync.testing.plugin)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta_sync.testing.clock import FakeClock as FakeClock

__all__ = ["FakeClock"]


def __getattr__(name: str) -> Any:
    # pytest loads this package before coverage measures: what is worth measuring loads at first use.
    if name == "FakeClock":
        from tta_sync.testing.clock import FakeClock

        return FakeClock
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
