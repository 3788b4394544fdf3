"""The ``tta-sync`` command."""

from tta_sync.cli.commands import main

__all__ = ["main"]
