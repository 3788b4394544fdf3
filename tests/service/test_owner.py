"""Owners: a name tells whether its process lives, and never speaks for another machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import owner
from jobs.owner import lives, new_owner


def test_owner_lives_when_it_is_this_process() -> None:
    """This process lives, and its names differ from each other."""
    first, second = new_owner(), new_owner()
    assert first != second
    assert lives(first) is True
    assert len(first) <= 200


def test_owner_is_dead_when_its_process_has_ended() -> None:
    """A process that was killed is dead, before and after its parent has looked."""
    program = "from jobs.owner import new_owner; print(new_owner(), flush=True); import time; time.sleep(60)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    assert lives(name) is True
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert lives(name) is False
    process.wait()
    process.stdout.close()
    assert lives(name) is False


def test_owner_is_dead_when_its_id_was_given_to_another_process() -> None:
    """The same process id with another beginning is another process."""
    where, pid, began, token = new_owner().split("/")
    assert lives(f"{where}/{pid}/{int(began) + 1}/{token}") is False


@pytest.mark.parametrize("name", ["", "x", "a/b/c/d", "other.1/1/5/x", "a/b", "///"])
def test_owner_is_unknown_when_it_is_of_another_machine_or_none_of_ours(name: str) -> None:
    """Of what this machine cannot know it says nothing."""
    assert lives(name) is None


def test_owner_is_unknown_when_its_process_id_is_impossible() -> None:
    """Ids that mean groups of processes are never asked about."""
    where = new_owner().split("/")[0]
    assert lives(f"{where}/0/5/x") is None
    assert lives(f"{where}/-1/5/x") is None


def test_owner_lives_when_it_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of another user lives, as far as we may know."""

    def refuse(pid: int, signum: int) -> None:
        raise PermissionError

    name = new_owner()
    monkeypatch.setattr(os, "kill", refuse)
    assert lives(name) is True


def test_owner_is_told_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc, the host's name and the process id have to do."""
    monkeypatch.setattr(owner, "PROC", Path("/nowhere"))
    name = new_owner()
    assert socket.gethostname().replace("/", "_") in name
    assert lives(name) is True
