"""Find the command that was asked for and run it; only that one's module is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

# Each module has add_arguments(parser) and run(arguments) -> exit status.
COMMANDS = {
    "dev": ("tta_sync.cli.dev", "run the service of this checkout: Redis, database, gunicorn, RQ worker"),
    "batch": ("tta_sync.cli.batch", "have the running service process text files, with a progress bar"),
    "cache": ("tta_sync.cli.cache", "look at what caches keep in Redis, and make them forget it"),
    "outbox": ("tta_sync.cli.outbox", "enqueue what is left in the transactional outbox, and look after it"),
    "jobs": ("tta_sync.cli.jobs", "follow or cancel a background job of the running service"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tta-sync`` with *argv* and return the exit status: 0 done, 1 failed, 2 not possible as asked."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="tta-sync", description="Async workflows in synchronous services.")
    parser.add_argument("--version", action="version", version=f"tta-sync {version('tta-sync')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary)
        if name in arguments[:1]:
            import_module(module).add_arguments(subparser)
    chosen = parser.parse_args(arguments)
    try:
        return int(import_module(COMMANDS[chosen.command][0]).run(chosen))
    except KeyboardInterrupt:
        return 130
