"""Name processes so that others can tell whether they still live.

A name holds the machine (its boot and its process namespace), the process's id and the moment it began: after a
reboot, in another container, or when the id is given to somebody else, the name fits nobody.
"""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

PROC = Path("/proc")  # Linux; elsewhere there is less to tell processes apart by


def _read(name: str) -> str | None:
    try:
        return (PROC / name).read_text(encoding="ascii", errors="replace")
    except OSError:
        return None


def machine() -> str:
    """Name this machine, as far as process ids mean the same."""
    boot = _read("sys/kernel/random/boot_id")
    try:
        namespace = str((PROC / "self/ns/pid").stat().st_ino)
    except OSError:
        namespace = "0"
    return f"{boot.strip() if boot else socket.gethostname()}.{namespace}".replace("/", "_")


def _began(pid: int) -> str | None:
    """Return when the process began, in the kernel's ticks; None where it has ended, "" where nobody says."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""  # somebody else's: alive, and that is all we may know
    stat = _read(f"{pid}/stat")
    if stat is None:
        return None if (PROC / "self/stat").exists() else ""
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]  # a zombie has ended; nobody has looked yet


def new_owner() -> str:
    """Name this process, and this use of the name: two claims by one process differ."""
    pid = os.getpid()
    return f"{machine()}/{pid}/{_began(pid)}/{uuid.uuid4().hex[:12]}"


def lives(owner: str) -> bool | None:
    """Say whether the process so named lives; None where it is of another machine, or the name none of ours."""
    try:
        where, pid, began, _ = owner.split("/")
        number = int(pid)
    except ValueError:
        return None
    if where != machine() or number <= 0:
        return None
    now = _began(number)
    if now is None:
        return False
    return now == "" or began == "" or now == began
