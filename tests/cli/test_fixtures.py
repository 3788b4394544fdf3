"""The fixtures that the whole suite stands on."""

import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
import redis


@pytest.mark.parametrize("turn", [1, 2])
def test_redis_is_empty_when_a_test_starts(redis_url, turn):
    """Each test that asks for Redis finds it empty, whatever the one before left there."""
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left", turn)


def test_own_redis_server_comes_back_empty_on_its_port_when_killed_and_started(own_redis_server):
    """A test may kill its own server and start it again at the same address."""
    with redis.Redis.from_url(own_redis_server.url, retry=None) as client:
        client.set("a", 1)
        own_redis_server.stop(9)
        with pytest.raises(redis.ConnectionError):
            client.ping()
        own_redis_server.start()
        assert client.dbsize() == 0


@pytest.mark.parametrize("turn", [1, 2])
def test_postgres_database_is_fresh_when_a_test_starts(postgres_url, turn):
    """Each test that asks for PostgreSQL gets a database of its own, on a real server."""
    with psycopg.connect(postgres_url.replace("+psycopg", "")) as connection:
        connection.execute("CREATE TABLE only_here (turn int)")
        assert "PostgreSQL" in connection.execute("SELECT version()").fetchone()[0]


def test_leak_check_fails_a_test_when_it_leaves_a_process_or_thread(tmp_path):
    """The autouse check fails the test that left a process or a thread running, and names both."""
    ours = Path(__file__).parents[1].joinpath("conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(ours.replace("GRACE = 5.0", "GRACE = 0.1"))
    (tmp_path / "test_leaky.py").write_text(
        "import subprocess, threading\n"
        "def test_leaks():\n"
        "    globals()['child'] = subprocess.Popen(['sleep', '8'])\n"
        "    threading.Thread(target=child.wait, name='left-over').start()\n"
        "def test_is_innocent():\n"
        "    child.kill()\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:tta_sync", "-q", "test_leaky.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "1 error" in result.stdout
    assert "2 passed" in result.stdout
    assert ": sleep 8; thread left-over" in result.stdout
