"""The Redis of a data directory: who starts it, who shares it, and that it ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import redis

from tta_sync.cli import embedded_redis, keeper, processes
from tta_sync.cli.embedded_redis import EmbeddedRedis, RedisUnavailableError


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "data" / "redis"


@pytest.fixture
def join(directory):
    """``join()``: one more run on the directory; all leave at the end."""
    runs = []

    def join():
        run = EmbeddedRedis(directory)
        runs.append(run)
        run.join()
        return run

    yield join
    for run in runs:
        run.leave()


def client(run):
    return redis.Redis.from_url(run.url, retry=None)


def server_pid(run):
    with client(run) as connection:
        return connection.info("server")["process_id"]


def is_gone(pid):
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True


def test_what_is_stored_is_there_when_the_server_comes_back(join):
    """What was written survives the end of the last run; the next one finds it at the same address."""
    run = join()
    with client(run) as connection:
        connection.set("kept", 1)
    run.leave()
    again = join()
    assert again.url == run.url
    with client(again) as connection:
        assert connection.get("kept") == b"1"


def test_server_listens_on_loopback_with_a_password_when_started(join, directory):
    """Nobody from outside and nobody without the password gets in; the password is in no command line and no log."""
    run = join()
    port, password = keeper.read_address(directory)
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=port, retry=None).ping()
    with client(run) as connection:
        assert connection.config_get("bind") == {"bind": "127.0.0.1"}
    assert stat.S_IMODE((directory / "address").stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for pid in [os.getpid(), *processes.family(os.getpid())]:
        assert password not in Path(f"/proc/{pid}/cmdline").read_text()
    assert not any(password in (directory / name).read_text() for name in ("redis.log", "keeper.log"))


def test_server_stays_when_one_of_two_runs_leaves(join):
    """The server belongs to both: it stays when the one that started it leaves, and ends with the other."""
    first, second = join(), join()
    assert first.url == second.url
    pid = server_pid(first)
    first.leave()
    assert server_pid(second) == pid
    second.leave()
    assert is_gone(pid)


def test_one_server_runs_when_many_runs_start_at_once(directory):
    """Eight processes that join at once share one server; it ends when they have all left."""
    code = (
        "import sys; from pathlib import Path; from tta_sync.cli.embedded_redis import EmbeddedRedis\n"
        "run = EmbeddedRedis(Path(sys.argv[1])); run.join(); print(run.url, flush=True)\n"
        "sys.stdin.read(); run.leave()"
    )
    command = [sys.executable, "-c", code, str(directory)]
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(8)
        ]
        urls = {run.stdout.readline() for run in runs}
        assert len(urls) == 1
        for run in runs:
            run.stdin.close()
    assert [run.returncode for run in runs] == [0] * 8
    assert not keeper.answers(*keeper.read_address(directory))


def test_server_ends_when_its_only_run_is_killed(directory, eventually):
    """A killed run counts as gone: its server flushes and ends, and the next run finds all in order."""
    code = (
        "import sys, redis; from pathlib import Path; from tta_sync.cli.embedded_redis import EmbeddedRedis\n"
        "run = EmbeddedRedis(Path(sys.argv[1])); run.join(); redis.Redis.from_url(run.url).set('kept', 1)\n"
        "print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        run.stdout.readline()
        address = keeper.read_address(directory)
        assert keeper.answers(*address)
        run.kill()
    eventually(lambda: not keeper.is_locked(directory / "server.lock"))
    assert not keeper.answers(*address)
    with keeper.locked(directory / "lock", 10):
        assert keeper.living_runs(directory) == []


def test_server_stays_when_a_killed_run_s_child_still_works(directory, eventually):
    """A run lives as long as one of its children: the worker of a killed supervisor can still record its last job."""
    code = (
        "import sys, subprocess; from pathlib import Path; from tta_sync.cli.embedded_redis import EmbeddedRedis\n"
        "run = EmbeddedRedis(Path(sys.argv[1])); run.join()\n"
        "print(subprocess.Popen(['sleep', '300'], pass_fds=[run.run_lock]).pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        child = int(run.stdout.readline())
        run.kill()
    with keeper.locked(directory / "lock", 10):
        assert len(keeper.living_runs(directory)) == 1
    assert keeper.answers(*keeper.read_address(directory))
    os.kill(child, signal.SIGKILL)
    eventually(lambda: not keeper.is_locked(directory / "server.lock"))


def test_server_is_started_again_when_it_is_killed(join, eventually):
    """A killed server comes back at the same address with all that it had acknowledged."""
    run = join()
    pid = server_pid(run)
    with client(run) as connection:
        connection.set("kept", 1)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: is_gone(pid))

    def value():
        with contextlib.suppress(redis.ConnectionError), client(run) as connection:
            return connection.get("kept")

    assert eventually(value) == b"1"
    run.ensure()


def test_server_is_started_again_when_its_keeper_is_killed(join, eventually):
    """Keeper and server gone, the run that looks starts both again at the same address."""
    run = join()
    first = run.keeper_pid
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not keeper.answers(*keeper.read_address(run._directory)))
    eventually(lambda: (run.ensure(), run.keeper_pid != first)[1])
    assert server_pid(run)


def test_failure_is_said_when_the_port_was_taken_meanwhile(join, directory, eventually):
    """A server that can only come back elsewhere is of no use to children that know its address."""
    run = join()
    port, _ = keeper.read_address(directory)
    os.kill(run.keeper_pid, signal.SIGKILL)
    eventually(lambda: not keeper.is_locked(directory / "server.lock"))
    with socket.create_server(("127.0.0.1", port)), pytest.raises(RedisUnavailableError, match="its port was taken"):
        run.ensure()


def test_another_port_is_taken_when_the_last_one_is_in_use(join, directory):
    """The address is kept if it can be; a stranger that listens there is left alone."""
    run = join()
    run.leave()
    port, password = keeper.read_address(directory)
    with socket.create_server(("127.0.0.1", port)):
        again = join()
        assert again.url != run.url
        assert keeper.read_address(directory)[1] == password
        assert server_pid(again)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"port": "x", "password": 1}', "\xff"])
def test_server_is_started_when_the_address_file_is_broken(join, directory, text):
    """A file that somebody spoilt is as good as none."""
    join().leave()
    (directory / "address").write_text(text, encoding="latin-1")
    assert server_pid(join())


def test_failure_is_said_when_the_server_cannot_start(directory, tmp_path, monkeypatch):
    """A server that ends at once is an error in one line which says where to look; nothing is left of the run."""
    monkeypatch.setattr(embedded_redis, "find_redis_server", lambda: Path(shutil.which("false")))
    run = EmbeddedRedis(directory)
    with pytest.raises(RedisUnavailableError, match=r"redis-server does not start; .*redis\.log says why"):
        run.join()
    run.leave()
    assert list((directory / "runs").iterdir()) == []
    assert not keeper.is_locked(directory / "server.lock")


def test_failure_is_said_when_the_keeper_dies_at_once(directory, monkeypatch):
    """A keeper that dies without a word is an error which says where its traceback is."""
    monkeypatch.setattr(embedded_redis.keeper, "__file__", os.devnull)
    with pytest.raises(RedisUnavailableError, match=r"keeper died; .*keeper\.log says why"):
        EmbeddedRedis(directory).join()


def test_keeper_gives_up_when_the_server_dies_again_and_again(join, directory, eventually):
    """A server that dies again and again is given up by its keeper; every run sees that, and may start another."""
    run = join()

    def killed_until_given_up():
        with contextlib.suppress(redis.ConnectionError, ProcessLookupError):
            os.kill(server_pid(run), signal.SIGKILL)
        return not keeper.is_locked(directory / "server.lock")

    eventually(killed_until_given_up, within=30)
    run.ensure()
    assert server_pid(run)


def test_failure_is_said_when_a_server_hangs_without_an_address(join, directory, monkeypatch):
    """A server whose address file was removed cannot be joined, and is not doubled: two would spoil the file."""
    run = join()
    monkeypatch.setattr(embedded_redis, "ADDRESS_BUDGET", 0.1)
    address = (directory / "address").rename(directory / "kept")
    with pytest.raises(RedisUnavailableError, match=r"TTA_DATA_DIR: a redis-server holds .* does not answer"):
        join()
    address.rename(directory / "address")
    assert server_pid(join()) == server_pid(run)


def test_failure_is_said_when_the_lock_is_held_for_too_long(directory, monkeypatch):
    """A lock that nobody lets go is an error that names it, not an endless wait."""
    monkeypatch.setattr(embedded_redis, "LOCK_BUDGET", 0.05)
    run = EmbeddedRedis(directory)
    with keeper.locked(directory / "lock", 1), pytest.raises(RedisUnavailableError, match=r"lock has been locked for"):
        run.join()
    run.join()
    with keeper.locked(directory / "lock", 1):
        monkeypatch.setattr(keeper, "STOP_BUDGET", -4.9)  # nobody can end the server while the lock is held
        run.leave()
    assert run.run_lock == -1


def test_server_ends_when_its_directory_is_removed(join, directory, eventually):
    """With the data gone there is nothing to keep: the server ends by itself, and leaving is no error."""
    run = join()
    pid = server_pid(run)
    shutil.rmtree(directory.parent)
    eventually(lambda: is_gone(pid))
    run.leave()


def test_server_ends_when_its_keeper_is_told_to(join, directory, eventually):
    """SIGTERM to the keeper ends the server in order; Ctrl-C and a closed terminal are not for it."""
    run = join()
    pid = server_pid(run)
    os.kill(run.keeper_pid, signal.SIGINT)
    os.kill(run.keeper_pid, signal.SIGHUP)
    assert server_pid(run) == pid
    os.kill(run.keeper_pid, signal.SIGTERM)
    eventually(lambda: is_gone(pid))


def test_server_is_killed_when_it_does_not_end(tmp_path, monkeypatch):
    """A server that ignores SIGTERM is killed after its budget."""
    monkeypatch.setattr(keeper, "STOP_BUDGET", 0.1)
    with open(tmp_path / "lock", "w") as lock:
        kept = keeper.Keeper(tmp_path, "", lock.fileno())
        code = "import signal, sys; signal.signal(15, signal.SIG_IGN); print(flush=True); sys.stdin.read()"
        kept.server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        server = kept.server
        with server.stdin, server.stdout:
            server.stdout.readline()
            kept.stop()
    assert server.returncode == -signal.SIGKILL


def test_joining_waits_when_the_server_only_restarts(join, directory):
    """A run that comes while the server is being started again waits for it instead of failing."""
    run = join()
    pid = server_pid(run)
    os.kill(pid, signal.SIGSTOP)  # as if it were loading its file
    timer = threading.Timer(0.3, os.kill, (pid, signal.SIGCONT))
    timer.start()
    assert server_pid(join()) == pid
    timer.join()


def test_family_is_found_when_it_left_the_session(eventually, tmp_path):
    """Descendants are found whatever session they moved to, but for those to be spared and what is under them."""
    with subprocess.Popen(["sh", "-c", "setsid sleep 300 & sleep 300 & wait"]) as shell:
        eventually(lambda: len(processes.family(shell.pid)) == 2)
        first, second = processes.family(shell.pid)
        assert processes.family(shell.pid, [first]) == [second]
        assert shell.pid in processes.family(os.getpid())
        assert first not in processes.family(os.getpid(), [shell.pid])
        processes.kill_family(shell.pid)
        assert shell.wait(10) in (0, 137)


def test_family_is_found_when_there_is_no_proc(monkeypatch):
    """Where there is no /proc, ps is asked."""
    monkeypatch.setattr(processes, "Path", lambda name: Path("/nonexistent"))
    with subprocess.Popen(["sleep", "300"]) as child:
        assert child.pid in processes.family(os.getpid())
        child.kill()
