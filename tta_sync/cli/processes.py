"""The processes below this one: found by pid, whatever session they moved to, and ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

__all__ = ["adopt_orphans", "family", "kill_family", "reap_orphans"]


def adopt_orphans() -> None:
    """Make this process the parent of every orphan below it, so that :func:`family` misses none (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def family(root: int, spare: Collection[int] = ()) -> list[int]:
    """Return the pids of all descendants of *root*, parents first, but not those in *spare* nor their descendants."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents().items():
        children.setdefault(parent, []).append(pid)
    found, todo = [], [root]
    while todo:
        for pid in children.get(todo.pop(0), []):
            if pid not in spare:
                found.append(pid)
                todo.append(pid)
    return found


def reap_orphans(known: Collection[int]) -> None:
    """Collect the exit status of adopted children that have ended; *known* ones belong to somebody who will ask."""
    me = os.getpid()
    for pid, parent in _parents().items():
        if parent == me and pid not in known:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def kill_family(root: int, spare: Collection[int] = (), *, budget: float = 5.0) -> None:
    """SIGKILL all descendants of *root* until none is left, for at most *budget* seconds (the kernel may need some)."""
    give_up = time.monotonic() + budget
    while (left := family(root, spare)) and time.monotonic() < give_up:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if root == os.getpid():
            reap_orphans(spare)
        time.sleep(0.01)


def _parents() -> dict[int, int]:
    """Return pid → parent's pid of every process on this machine, zombies too."""
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        lines = subprocess.run(["/bin/ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        return {int(pid): int(parent) for pid, parent in map(str.split, lines.splitlines())}
    found = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                # pid (name) state parent ...; the name may hold anything, brackets too
                found[int(entry.name)] = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it ended while we looked
    return found
