"""What the real service refuses to start with: one line that names the setting, and exit status 2."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"TTA_DEADLINE": "2"}, "TTA_DEADLINE"),
        ({"TTA_DEADLINE": "soon"}, "TTA_DEADLINE"),
        ({"TTA_LLM_TIMEOUT": "-1"}, "TTA_LLM_TIMEOUT"),
        ({"TTA_LLM_BASE_URL": "ftp://provider"}, "TTA_LLM_BASE_URL"),
        ({"TTA_MAX_TEXT": "many"}, "TTA_MAX_TEXT"),
        ({"TTA_ENV": "staging"}, "TTA_ENV"),
        ({"DATABASE_URL": "oracle://somewhere"}, "DATABASE_URL"),
        ({"DATABASE_URL": "postgresql://user:swordfish@127.0.0.1:1/none"}, "DATABASE_URL"),
        ({"DATABASE_URL": "sqlite:////proc/none/there.db"}, "DATABASE_URL"),
        ({"REDIS_URL": "redis://user:swordfish@127.0.0.1:1/0"}, "REDIS_URL"),
        ({"TTA_PORT": "eighty"}, "TTA_PORT"),
        ({"TTA_DATA_DIR": "/proc/none"}, "TTA_DATA_DIR"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_setting_is_named_in_one_line_when_it_cannot_work(start_service, processes, tmp_path, settings, name):
    """One line, with the setting's name and without its secrets; nothing is left running."""
    run = start_service(up=False, **settings)
    assert run.process.wait(60) == 2
    assert run.output.count("\n") == 1
    assert name in run.output
    assert "swordfish" not in run.output
    assert processes.of(tmp_path / "data") == {}


def test_data_directory_is_named_when_only_the_service_needs_it(start_service, redis_url):
    """With a Redis of one's own, the directory for SQLite is still checked, and named."""
    run = start_service(up=False, REDIS_URL=redis_url, TTA_DATA_DIR="/proc/none")
    assert run.process.wait(60) == 2
    assert run.output.count("\n") == 1
    assert "TTA_DATA_DIR" in run.output
