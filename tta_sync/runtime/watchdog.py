"""Notice code that blocks the loop, while it does, and say where it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tta_sync.runtime.loop import ManagedLoop


class Watchdog:
    """PROVISIONAL: replaced by the real one in the same change set."""

    def __init__(self, loop: ManagedLoop) -> None:
        self.parked = False
        self.lag = 0.0

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def unpark(self) -> None: ...
