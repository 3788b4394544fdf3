"""``tta-sync dev``: the supervisor, with real gunicorn, RQ worker and Redis under it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
import rq

from tta_sync.cli import dev, keeper


def get(url):
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()


def queue(data_dir):
    port, password = keeper.read_address(data_dir / "redis")
    return rq.Queue(connection=redis.Redis(port=port, password=password))


def refusal(checkout, tmp_path, **settings):
    """Run it where it must refuse; return its exit status and what it said, which must be one line."""
    env = {**os.environ, "TTA_DATA_DIR": str(tmp_path / "data"), "TTA_PORT": "0", **settings}
    command = [sys.executable, "-m", "tta_sync.cli", "dev"]
    result = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=60)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.returncode, result.stderr


def test_everything_runs_and_everything_ends_when_sigterm_comes(start_run, processes, tmp_path, eventually):
    """Started from nothing it serves, with a worker and Redis; SIGTERM ends every process, exit status 0."""
    run = start_run()
    assert int(get(run.url)) in processes.of(tmp_path / "data", "gunicorn")
    eventually(lambda: len(processes.of(tmp_path / "data", "gunicorn")) == 3, what="two gunicorn workers")
    assert len(processes.of(tmp_path / "data", "rq.cli")) == 1
    port, _ = keeper.read_address(tmp_path / "data" / "redis")
    assert run.stop() == 0
    assert processes.of(tmp_path / "data") == {}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert run.output.splitlines()[0] == f"tta_sync serves {run.url} (Ctrl-C ends it); try:"
    assert run.output.splitlines()[1].startswith(f"curl -s {run.url}/api/process ")
    assert len(run.output.splitlines()) == 2


def test_running_job_ends_first_when_the_group_gets_ctrl_c(start_run, processes, tmp_path, eventually):
    """Ctrl-C to the whole group lets the worker finish its job and record it; what is queued waits for the next run."""
    run = start_run()
    first, second = (queue(tmp_path / "data").enqueue("jobs.tasks.work", str(tmp_path)) for _ in range(2))
    eventually((tmp_path / "begun").exists)
    os.killpg(run.process.pid, signal.SIGINT)
    eventually(lambda: not processes.of(tmp_path / "data", "gunicorn"), what="gunicorn's end")
    assert run.process.poll() is None
    assert not listens(run.url)  # nobody is taken in by a socket that will never be read
    (tmp_path / "go").touch()
    assert run.process.wait(60) == 0
    assert (tmp_path / "ended").exists()
    assert processes.of(tmp_path / "data") == {}
    (tmp_path / "begun").unlink()
    again = start_run()
    eventually(lambda: second.get_status(refresh=True) == "finished" if _reconnect(second, tmp_path) else False)
    assert _reconnect(first, tmp_path).get_status(refresh=True) == "finished"
    assert again.stop() == 0


def _reconnect(job, tmp_path):
    job.connection = queue(tmp_path / "data").connection
    return job


def test_work_in_flight_ends_when_the_group_gets_ctrl_c(start_run, checkout, processes, tmp_path, eventually):
    """Ctrl-C is for the supervisor, which tells each child once: a request is answered, then a job ends.

    The worker would take a second signal, a second after the first, as an order to kill its job.
    """
    (checkout / "wsgi.py").write_text(
        "import time\nfrom pathlib import Path\n"
        "def app(environ, start_response):\n"
        f"    if environ['PATH_INFO'] == '/slow':\n"
        f"        Path({str(tmp_path / 'asked')!r}).touch()\n"
        f"        while not Path({str(tmp_path / 'answer')!r}).exists():\n"
        "            time.sleep(0.01)\n"
        "    start_response('200 OK', [('Content-Type', 'text/plain')])\n"
        "    return [b'answered']\n"
    )
    run = start_run()
    queue(tmp_path / "data").enqueue("jobs.tasks.work", str(tmp_path))
    eventually((tmp_path / "begun").exists)
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(get, run.url + "/slow")
        eventually((tmp_path / "asked").exists)
        os.killpg(run.process.pid, signal.SIGINT)
        late = time.monotonic() + 1.2
        eventually(lambda: time.monotonic() > late)
        (tmp_path / "answer").touch()
        assert answer.result(30) == "answered"
    eventually(lambda: not processes.of(tmp_path / "data", "gunicorn"), what="gunicorn's end")
    (tmp_path / "go").touch()
    assert run.process.wait(60) == 0
    assert (tmp_path / "ended").exists()


def listens(url):
    try:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()
    except ConnectionRefusedError:
        return False
    return True


def test_second_signal_hurries_when_a_job_does_not_end(start_run, processes, tmp_path, eventually):
    """A second Ctrl-C, a second after the first, kills what had not ended; Redis still ends in order."""
    run = start_run()
    queue(tmp_path / "data").enqueue("jobs.tasks.work", str(tmp_path))
    eventually((tmp_path / "begun").exists)
    run.process.send_signal(signal.SIGINT)
    eventually(lambda: not processes.of(tmp_path / "data", "gunicorn"), what="gunicorn's end")

    def insist():
        run.process.send_signal(signal.SIGINT)
        return run.process.poll() is not None or "is killed" in run.output

    eventually(insist, within=30)
    assert run.process.wait(30) == 0
    assert "the RQ worker is killed" in run.output
    assert processes.of(tmp_path / "data") == {}
    assert not (tmp_path / "ended").exists()


@pytest.mark.parametrize(("words", "name"), [("gunicorn", "gunicorn"), ("rq.cli", "the RQ worker")])
def test_child_is_started_again_when_it_is_killed(start_run, processes, tmp_path, eventually, words, name):
    """A part that dies is started again, with a word about it, and the service goes on under the same address."""
    run = start_run()
    before = processes.of(tmp_path / "data", words)
    os.kill(min(before), signal.SIGKILL)
    eventually(lambda: f"{name} ended unexpectedly (SIGKILL); starting it again" in run.output)
    eventually(lambda: set(processes.of(tmp_path / "data", words)) - set(before))
    assert get(run.url).isdigit()
    job = queue(tmp_path / "data").enqueue("builtins.len", "four")
    eventually(lambda: job.get_status(refresh=True) == "finished")
    assert run.stop() == 0


def test_worker_waits_when_redis_does_not_answer(start_run, processes, tmp_path, own_redis_server, eventually):
    """A worker that cannot live without its Redis is started again once that answers; gunicorn serves all the while."""
    run = start_run(REDIS_URL=own_redis_server.url)
    own_redis_server.stop()
    os.kill(min(processes.of(tmp_path / "data", "rq.cli")), signal.SIGKILL)
    said = "the RQ worker ended (SIGKILL): Redis does not answer; it is started again when Redis does"
    eventually(lambda: said in run.output)
    assert get(run.url).isdigit()
    own_redis_server.start()
    with redis.Redis.from_url(own_redis_server.url) as client:
        job = rq.Queue(connection=client).enqueue("builtins.len", "four")
        eventually(lambda: job.get_status(refresh=True) == "finished", within=30)
    assert "giving up" not in run.output
    assert run.output.count(said) == 1
    assert run.stop() == 0


def test_service_ends_when_a_child_dies_again_and_again(start_run, checkout, processes, tmp_path, eventually):
    """A worker that cannot stay up takes the service down: said in words, exit status 1, nothing left."""
    run = start_run()
    (checkout / "jobs" / "worker.py").write_text("raise SystemExit(7)\n")
    os.kill(min(processes.of(tmp_path / "data", "rq.cli")), signal.SIGKILL)
    assert run.process.wait(60) == 1
    assert "the RQ worker ended again (exit status 7), 4 times in 60 s: giving up" in run.output
    assert processes.of(tmp_path / "data") == {}


def test_start_is_given_up_when_a_child_cannot_start(start_run, checkout, processes, tmp_path):
    """A service that cannot be loaded is not tried again and again: it ends at once, exit status 1."""
    (checkout / "wsgi.py").write_text("raise RuntimeError('no such luck')\n")
    run = start_run(up=False)
    assert run.process.wait(60) == 1
    assert "gunicorn did not start" in run.output
    assert processes.of(tmp_path / "data") == {}


def test_children_end_when_the_supervisor_is_killed(start_run, processes, tmp_path, eventually):
    """SIGKILL to the supervisor ends its children and the Redis that nobody else uses, by themselves."""
    run = start_run()
    run.process.kill()
    run.process.wait()
    eventually(lambda: not processes.of(tmp_path / "data"), within=30, what="the children's end")
    eventually(lambda: not keeper.is_locked(tmp_path / "data" / "redis" / "server.lock"), within=30)


def test_running_job_is_recorded_when_the_supervisor_is_killed(start_run, processes, tmp_path, eventually):
    """The worker of a killed supervisor finishes its job and records it, because Redis waits for it, too."""
    run = start_run()
    job = queue(tmp_path / "data").enqueue("jobs.tasks.work", str(tmp_path))
    eventually((tmp_path / "begun").exists)
    run.process.kill()
    run.process.wait()
    eventually(lambda: not processes.of(tmp_path / "data", "gunicorn"), what="gunicorn's end")
    (tmp_path / "go").touch()
    eventually(lambda: not processes.of(tmp_path / "data"), within=30, what="the children's end")
    again = start_run()
    assert _reconnect(job, tmp_path).get_status(refresh=True) == "finished"
    assert again.stop() == 0


def test_process_that_left_the_session_is_ended_when_the_service_stops(start_run, processes, tmp_path, eventually):
    """What a job started in a session of its own, and orphaned, is found by pid and ended with the rest."""
    run = start_run()
    left = tmp_path / "left"
    command = f"(setsid sh -c 'echo $$ > {left}; exec sleep 300' &) &"
    queue(tmp_path / "data").enqueue("os.system", command)
    eventually(lambda: left.exists() and left.read_text().strip())
    assert run.stop() == 0
    assert not Path("/proc", left.read_text().strip()).exists()


def test_two_runs_share_one_redis_when_they_share_the_data_directory(start_run, processes, tmp_path, eventually):
    """The second run joins the first's Redis; killing the first takes it from nobody; the last to end ends it."""
    first, second = start_run(), start_run()
    address = keeper.read_address(tmp_path / "data" / "redis")
    job = queue(tmp_path / "data").enqueue("builtins.len", "four")
    eventually(lambda: job.get_status(refresh=True) == "finished")
    first.process.kill()
    first.process.wait()
    # Its children end in order, told by the kernel; each holds on to the Redis until it has.
    eventually(lambda: len(processes.of(tmp_path / "data", "rq.cli")) == 1, within=60)
    eventually(lambda: len(processes.of(tmp_path / "data", "gunicorn")) == 3, within=60)
    assert keeper.answers(*address)
    assert get(second.url).isdigit()
    assert second.stop() == 0
    assert not keeper.answers(*address)
    assert processes.of(tmp_path / "data") == {}


def test_redis_is_untouched_when_ctrl_c_ends_the_run_that_started_it(start_run, tmp_path):
    """Ctrl-C to the first run's process group is not for the Redis that the second one uses."""
    first, second = start_run(), start_run()
    pid = queue(tmp_path / "data").connection.info("server")["process_id"]
    os.killpg(first.process.pid, signal.SIGINT)
    assert first.process.wait(60) == 0
    assert queue(tmp_path / "data").connection.info("server")["process_id"] == pid
    assert second.stop() == 0


def test_redis_is_back_when_it_and_its_keeper_are_killed(start_run, processes, tmp_path, eventually):
    """The run starts its Redis again at the same address, and what was acknowledged is still there."""
    run = start_run()
    address = keeper.read_address(tmp_path / "data" / "redis")
    queue(tmp_path / "data").connection.set("kept", 1)
    os.kill(min(processes.of(tmp_path / "data", "keeper.py")), signal.SIGKILL)
    eventually(lambda: not keeper.answers(*address))
    eventually(lambda: keeper.answers(*address))
    assert queue(tmp_path / "data").connection.get("kept") == b"1"
    assert run.stop() == 0
    assert processes.of(tmp_path / "data") == {}


def test_migration_is_ended_when_sigterm_comes_in_its_middle(start_run, checkout, processes, tmp_path, eventually):
    """A stop during the start ends what has been started, and nothing more is started."""
    (checkout / "migrations" / "__main__.py").write_text("import time\ntime.sleep(300)\n")
    run = start_run(up=False)
    eventually(lambda: processes.of(tmp_path / "data", "migrations"))
    assert run.stop() == 0
    assert processes.of(tmp_path / "data") == {}
    assert run.output == ""


def test_nothing_is_started_when_the_migration_refuses(checkout, tmp_path):
    """What `python -m migrations` finds wrong is said in its words and with its exit status, once."""
    (checkout / "migrations" / "__main__.py").write_text("raise SystemExit('DATABASE_URL: no')\n")
    assert refusal(checkout, tmp_path) == (1, "DATABASE_URL: no\n")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"TTA_PORT": "http"}, "TTA_PORT: must be a port from 0 to 65535, not 'http'"),
        ({"TTA_PORT": "65536"}, "TTA_PORT: must be a port from 0 to 65535, not '65536'"),
        ({"TTA_HOST": "not an address"}, "TTA_HOST: 'not an address' is no address of this machine"),
        ({"TTA_HOST": "192.0.2.1"}, "TTA_HOST: cannot listen on '192.0.2.1'"),
        ({"REDIS_URL": "redis://:swordfish@127.0.0.1:1/0"}, "REDIS_URL: no Redis answers there"),
        ({"REDIS_URL": "swordfish://x@y"}, "REDIS_URL: no Redis answers there"),
        ({"TTA_DATA_DIR": "/dev/null"}, "TTA_DATA_DIR: cannot keep data in /dev/null"),
    ],
)
def test_setting_is_named_in_one_line_when_it_cannot_work(checkout, tmp_path, settings, words):
    """One line that names the setting, without its secret, exit status 2, before anything is left running."""
    status, said = refusal(checkout, tmp_path, **settings)
    assert status == 2
    assert said.startswith(f"tta-sync: {words}")
    assert "swordfish@" not in said


def test_taken_port_is_named_when_somebody_listens_there(checkout, tmp_path):
    """A taken port is found before anything is started, and TTA_PORT is named."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, said = refusal(checkout, tmp_path, TTA_PORT=str(port))
    assert (status, said) == (2, f"tta-sync: TTA_PORT: port {port} on 127.0.0.1 is taken; set TTA_PORT to a free one\n")
    assert not (tmp_path / "data").exists()


def test_redis_url_is_used_when_it_is_set(start_run, tmp_path, redis_url, eventually, monkeypatch):
    """With REDIS_URL no server is started, and the worker listens there."""
    run = start_run(REDIS_URL=redis_url)
    with redis.Redis.from_url(redis_url) as client:
        job = rq.Queue(connection=client).enqueue("builtins.len", "four")
        eventually(lambda: job.get_status(refresh=True) == "finished")
    assert not (tmp_path / "data" / "redis").exists()
    assert run.stop() == 0


def test_need_of_redis_is_said_in_one_line_when_there_is_no_server(checkout, tmp_path):
    """Without a redis-server for this Python and platform, one line says what would do."""
    code = (
        "import sys, tta_sync.redis as seam\n"
        "seam.shutil.which = seam.find_spec = lambda name: None\n"
        "from tta_sync.cli import main\n"
        "sys.exit(main(['dev']))\n"
    )
    env = {**os.environ, "TTA_PORT": "0", "TTA_DATA_DIR": str(tmp_path / "data")}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("tta-sync: no Redis: set REDIS_URL to a running one, or put redis-server on PATH")
    assert result.stderr.count("\n") == 1


def test_checkout_is_asked_for_when_there_is_none(tmp_path):
    """Outside a checkout one line says that it needs one."""
    status, said = refusal(tmp_path, tmp_path)
    assert status == 2
    assert said.startswith("tta-sync: dev needs a checkout of tta_sync")


def test_checkout_is_found_when_started_below_it(checkout):
    """It works from anywhere in the checkout; the data stays at its top, a path that was given is the user's own."""
    below = checkout / "jobs"
    settings = dev.Settings.load({}, below)
    assert settings.checkout == checkout
    assert settings.data_dir == checkout / "data"
    assert dev.Settings.load({"TTA_DATA_DIR": "mine"}, below).data_dir == below / "mine"


@pytest.mark.parametrize("deadline", ["soon", "nan", "inf", ""])
def test_deadline_that_is_wrong_is_left_to_the_service(checkout, deadline):
    """The supervisor only takes its patience from TTA_DEADLINE; that it is wrong is for the service to say."""
    assert dev.Settings.load({"TTA_DEADLINE": deadline}, checkout).deadline == 15.0


def test_service_extra_is_asked_for_when_it_is_missing(checkout, monkeypatch, capfd):
    """Without the service's packages one line says how to install them."""
    monkeypatch.setattr(dev, "find_spec", lambda name: None if name == "rq" else object())
    monkeypatch.chdir(checkout)
    assert dev.run(None) == 2
    assert capfd.readouterr().err == "tta-sync: rq is not installed: pip install -e '.[service]'\n"


def test_port_is_not_allowed_when_it_is_privileged(monkeypatch):
    """A port that only root may use is refused with TTA_PORT and what to write instead."""

    class Privileged(socket.socket):
        def bind(self, address):
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(dev.socket, "socket", Privileged)
    with pytest.raises(dev.Refused, match="TTA_PORT: not allowed to listen on port 80; set TTA_PORT to one above 1023"):
        dev.listen("127.0.0.1", 80)


def test_start_is_given_up_when_gunicorn_does_not_answer(checkout, tmp_path, processes):
    """A service that starts but never answers is ended, with a word about it and exit status 1."""
    (checkout / "wsgi.py").write_text("import time\ntime.sleep(300)\n")
    with open(checkout / "gunicorn.conf.py", "a") as conf:
        conf.write("graceful_timeout = 1\n")
    code = "import sys; from tta_sync.cli import dev, main; dev.START_BUDGET = 1.0; sys.exit(main(['dev']))"
    env = {**os.environ, "TTA_PORT": "0", "TTA_DATA_DIR": str(tmp_path / "data")}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.splitlines()[0] == "tta-sync: gunicorn did not answer within 1 s"
    assert processes.of(tmp_path / "data") == {}


def test_start_is_stopped_when_sigterm_comes_before_the_first_answer(
    start_run, checkout, processes, tmp_path, eventually
):
    """A stop while gunicorn still loads the application is a stop like any other."""
    (checkout / "wsgi.py").write_text(f"import time\nopen({str(tmp_path / 'loading')!r}, 'w')\ntime.sleep(300)\n")
    with open(checkout / "gunicorn.conf.py", "a") as conf:
        conf.write("graceful_timeout = 1\n")
    run = start_run(up=False)
    eventually((tmp_path / "loading").exists)
    run.process.send_signal(signal.SIGTERM)
    eventually(lambda: run.process.poll() is not None, within=60)
    assert run.process.returncode == 0
    assert processes.of(tmp_path / "data") == {}


def test_service_ends_when_its_redis_cannot_come_back(start_run, processes, tmp_path, eventually):
    """Redis and its keeper killed and the port taken by another: said in words, exit status 1, nothing left."""
    run = start_run()
    port, _ = keeper.read_address(tmp_path / "data" / "redis")
    run.process.send_signal(signal.SIGSTOP)  # so that we are the quicker one
    os.kill(min(processes.of(tmp_path / "data", "keeper.py")), signal.SIGKILL)

    def taken():
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            return None

    with eventually(taken, what="the end of the Redis"):
        run.process.send_signal(signal.SIGCONT)
        assert run.process.wait(60) == 1
    assert "Redis is gone: redis-server ended and its port was taken meanwhile" in run.output
    assert processes.of(tmp_path / "data") == {}


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("0.0.0.0", "http://127.0.0.1:{}"),
        ("localhost", "http://{}:{}"),
        ("::1", "http://[::1]:{}"),
        ("::", "http://[::1]:{}"),
    ],
)
def test_address_can_be_used_when_it_is_printed(start_run, host, shown):
    """The address in the banner is one that a client on this machine can use, wherever the service listens."""
    try:
        dev.listen(host, 0).close()
    except dev.Refused:
        pytest.skip(f"this machine has no {host}")
    run = start_run(TTA_HOST=host)
    url = run.output.split()[2]
    port = run.url.rpartition(":")[2]
    assert url == (shown.format(port) if host != "localhost" else url)
    assert get(url).isdigit()
    assert run.stop() == 0
