"""``make run`` as a process: the set-up, the recipe, and what a signal to make alone does."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.running import TOP, Run

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make run needs make")


def environment_of(clone):
    """Load the clone's .ci/environment.py as a module."""
    spec = importlib.util.spec_from_file_location("environment", clone / ".ci" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clone(tmp_path):
    """A clone's files as committed or about to be, without a .venv."""
    top = tmp_path / "clone"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=TOP, capture_output=True, text=True, check=False
    )
    names = listed.stdout.split() if listed.returncode == 0 else [str(p.relative_to(TOP)) for p in TOP.rglob("*.*")]
    for name in names:
        if (TOP / name).is_file() and not name.startswith(("tests/", ".venv/", ".git/")):
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TOP / name, top / name)
    return top


@pytest.fixture
def installed(clone):
    """The clone with a .venv that counts as up to date: what is installed here, tta_sync from the clone."""
    venv.create(clone / ".venv", symlinks=True)
    python = clone / ".venv" / "bin" / "python"
    site = clone / ".venv" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "here.pth").write_text(f"{clone}\n{sysconfig.get_paths()['purelib']}\n")
    command = clone / ".venv" / "bin" / "tta-sync"
    command.write_text(f"#!{python}\nimport sys\nfrom tta_sync.cli import main\nsys.exit(main())\n")
    command.chmod(0o755)
    environment = environment_of(clone)
    environment.stamp("service").write_text(environment.fingerprint())
    return clone


@pytest.fixture
def make_run(installed, tmp_path, eventually):
    """``make_run(up=True)``: ``make run`` in the clone; ended afterwards if it still runs."""
    runs = []

    def start(*, up=True):
        env = {
            "TTA_DATA_DIR": str(tmp_path / "data"),
            "MAKEFLAGS": "",
            "MAKELEVEL": "0",
            "GUNICORN_CMD_ARGS": "--workers 1",
        }
        run = Run(installed, free_port(), tmp_path / "output", env, ["make", "--no-print-directory", "run"])
        runs.append(run)
        if up:
            eventually(lambda: run.is_up, within=60, what="the service")
        return run

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.stop()


def test_everything_ends_when_make_alone_gets_sigterm(make_run, processes, tmp_path):
    """`make run` serves; SIGTERM to the make process ends every child before make itself is gone."""
    run = make_run()
    assert run.post("/api/process", {"text": "Made by make."}).status == 200
    assert len(run.output.splitlines()) == 2
    run.stop()
    assert processes.of(tmp_path / "data") == {}


def test_everything_ends_when_the_group_gets_ctrl_c(make_run, processes, tmp_path):
    """Ctrl-C goes to make and its children alike: all end, in order, and nothing is left."""
    run = make_run()
    os.killpg(run.process.pid, signal.SIGINT)
    run.process.wait(60)
    assert processes.of(tmp_path / "data") == {}


def test_everything_ends_when_make_is_killed(make_run, processes, tmp_path, eventually):
    """SIGKILL to make takes the service with it (Linux), in order."""
    run = make_run()
    run.process.kill()
    run.process.wait()
    eventually(lambda: not processes.of(tmp_path / "data"), within=30)


def test_make_fails_when_the_service_refuses(installed, tmp_path):
    """A bad setting is one line of ours, and make's exit status is not 0."""
    env = {**os.environ, "TTA_PORT": "none", "TTA_DATA_DIR": str(tmp_path / "data")}
    result = subprocess.run(["make", "run"], cwd=installed, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert result.stderr.splitlines()[0] == "tta-sync: TTA_PORT: must be a port from 0 to 65535, not 'none'"


def test_need_of_python_is_said_when_there_is_none_that_fits(clone):
    """Without Python 3.11 or newer make says so in one line, and makes nothing."""
    tools = clone.parent / "bin"
    tools.mkdir()
    for name in ("make", "sh"):
        (tools / name).symlink_to(shutil.which(name))
    env = {"PATH": str(tools), "HOME": str(clone)}
    result = subprocess.run(["make", "run"], cwd=clone, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert result.stderr.splitlines()[0] == "no Python 3.11 or newer on PATH"
    assert not (clone / ".venv").exists()


class Recorded:
    """The environment script with pip and venv replaced by a record of what would have been run."""

    def __init__(self, clone, monkeypatch, statuses=()):
        self.module = environment_of(clone)
        self.commands = []
        statuses = list(statuses)

        def run(command, *, quiet=False):
            self.commands.append(command)
            if "venv" in command:
                venv.create(clone / ".venv", symlinks=True)
            return statuses.pop(0) if statuses else 0

        monkeypatch.setattr(self.module, "run", run)


def test_environment_is_made_once_when_it_is_missing(clone, monkeypatch, capsys):
    """A fresh clone gets its .venv and the extras that were asked for; the second time nothing is run."""
    first = Recorded(clone, monkeypatch)
    assert first.module.main("service") == 0
    assert first.commands[0][1:3] == ["-m", "venv"]
    assert first.commands[-1][-2:] == ["--editable", f"{clone}[service]"]
    assert "Setting up .venv" in capsys.readouterr().out
    second = Recorded(clone, monkeypatch)
    assert second.module.main("service") == 0
    assert second.commands == []
    assert second.module.main("service,dev") == 0
    assert second.commands[-1][-1] == f"{clone}[service,dev]"
    third = Recorded(clone, monkeypatch)
    assert third.module.main("dev") == 0  # is among them
    assert third.commands == []


def test_environment_is_brought_up_to_date_when_the_extras_change(clone, monkeypatch):
    """A change of setup.cfg is installed into the .venv that is there; the venv is not made again."""
    assert Recorded(clone, monkeypatch).module.main("service") == 0
    with open(clone / "setup.cfg", "a") as file:
        file.write("\n# changed\n")
    again = Recorded(clone, monkeypatch)
    assert again.module.main("service") == 0
    assert [command for command in again.commands if "venv" in command] == []
    assert "--editable" in again.commands[-1]


def test_environment_is_made_again_when_its_interpreter_is_gone(clone, monkeypatch):
    """A .venv whose Python was removed or is too old is made anew."""
    assert Recorded(clone, monkeypatch).module.main("service") == 0
    for name in ("python", "python3"):
        (clone / ".venv" / "bin" / name).unlink(missing_ok=True)
    again = Recorded(clone, monkeypatch)
    assert again.module.main("service") == 0
    assert "--clear" in again.commands[0]


def test_environment_is_not_current_when_pip_failed(clone, monkeypatch, capsys):
    """What pip did not finish is tried again the next time, and the failure is said."""
    failing = Recorded(clone, monkeypatch, statuses=[0, 0, 1])
    assert failing.module.main("service") == 1
    assert "pip could not install" in capsys.readouterr().err
    again = Recorded(clone, monkeypatch)
    assert again.module.main("service") == 0
    assert "--editable" in again.commands[-1]


def test_failure_is_said_when_there_is_no_venv_module(clone, monkeypatch, capsys):
    """A Python without venv, as Debian's is at first, is told from a failing pip."""
    assert Recorded(clone, monkeypatch, statuses=[1]).module.main("service") == 1
    assert "apt-get install python3-venv" in capsys.readouterr().err


def test_second_set_up_waits_when_one_is_under_way(clone, eventually):
    """Two makes at once: one sets up, the other waits for it instead of writing into the same .venv."""
    (clone / ".cache").mkdir()
    environment = environment_of(clone)
    with open(clone / ".cache" / "environment.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, clone / ".ci" / "environment.py", "service", "true"]
        with subprocess.Popen(command) as waiting:
            eventually(lambda: f"{clone}/.cache/environment.lock" in _open_files(waiting.pid))
            venv.create(clone / ".venv", symlinks=True)
            environment.stamp("service").write_text(environment.fingerprint())
            assert waiting.poll() is None
            fcntl.flock(lock, fcntl.LOCK_UN)
    assert waiting.returncode == 0


def _open_files(pid):
    names = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.append(os.readlink(entry))
        except OSError:
            continue  # closed while we looked
    return names


def test_set_up_ends_when_it_gets_sigterm(clone, tmp_path, eventually):
    """SIGTERM in the middle of the set-up ends what it runs, and it ends itself with make's usual status."""
    environment = clone / ".ci" / "environment.py"
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('environment', {str(environment)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        f"module.run(['sh', '-c', 'echo $$ > {tmp_path}/pid; exec sleep 300'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        pid = eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    assert not Path("/proc", pid).exists()
