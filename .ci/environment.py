"""Bring .venv up to date for the extras that a goal needs, then become that goal's command.

    python .ci/environment.py service,dev .venv/bin/pytest ...

Standard library only: it is the first thing that runs in a fresh clone. Several at once are fine (one installs, the
others wait), and so is one that was stopped half-way (nothing counts as installed before pip has said so).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"


def main(extras: str, *command: str) -> int:
    (ROOT / ".cache").mkdir(exist_ok=True)
    with open(ROOT / ".cache" / "environment.lock", "w") as lock:  # closed by exec, or by the kernel
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another make that sets up .venv", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_current(extras) and (status := install(extras)) != 0:
            return status
    if command:
        os.execvp(command[0], command)  # the signals that make sends are the command's from here on
    return 0


def is_current(extras: str) -> bool:
    """Say whether all *extras* were installed from today's setup.cfg, by an interpreter that still exists."""
    if not (VENV / "bin" / "python").exists():
        return False
    wanted = set(extras.split(","))
    return any(
        wanted <= set(found.name.split("-")[1:]) and found.read_text() == fingerprint()
        for found in VENV.glob(stamp("*").name)
    )


def stamp(extras: str) -> Path:
    return VENV / f".installed-{extras.replace(',', '-')}"


def fingerprint() -> str:
    sources = (ROOT / "setup.cfg").read_bytes() + (ROOT / "setup.py").read_bytes()
    return hashlib.sha256(sources + str(ROOT).encode()).hexdigest()


def install(extras: str) -> int:
    python = VENV / "bin" / "python"
    if not usable(python):
        print(f"Setting up .venv with Python {sys.version.split()[0]} (once; about half a minute)", flush=True)
        if run([sys.executable, "-m", "venv", "--clear", str(VENV)]) != 0:
            return fail("cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv")
    else:
        print(f"Bringing .venv up to date for {extras}", flush=True)
    if run([str(python), "-c", "import pip"], quiet=True) != 0 and run([str(python), "-m", "ensurepip"]) != 0:
        return fail(".venv has no pip; remove .venv and try again")
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input"]
    if run([*pip, "--editable", f"{ROOT}[{extras}]"]) != 0:
        return fail("pip could not install what setup.cfg asks for; its message is above")
    stamp(extras).write_text(fingerprint())
    return 0


def usable(python: Path) -> bool:
    """Say whether *python* runs and is new enough; in a venv whose base interpreter was removed it does not."""
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([python, "-c", check], stderr=subprocess.DEVNULL, check=False).returncode == 0
    except OSError:
        return False


def run(command: list[str], *, quiet: bool = False) -> int:
    """Run *command* to its end; a SIGTERM to us ends it first."""
    errors = subprocess.DEVNULL if quiet else None
    child: subprocess.Popen[bytes] | None = None
    came: list[int] = []

    def stop(signum: int, _frame: object) -> None:
        came.append(signum)
        if child is not None:
            child.send_signal(signum)

    before = signal.signal(signal.SIGTERM, stop)  # before there is a child that it could miss
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=errors, preexec_fn=end_with_parent)
    if came:
        child.send_signal(came[0])
    try:
        status = child.wait()
    except KeyboardInterrupt:  # the terminal told the child, too
        child.wait()
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)
    if status < 0:
        sys.exit(128 - status)
    return status


def end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: killed with us


def fail(message: str) -> int:
    print(f"{Path(__file__).name}: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
