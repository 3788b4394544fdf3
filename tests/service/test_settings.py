"""Settings: read once, checked, and named where they are wrong."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blueprints.settings import Settings, SettingsError, load_settings

Make = Callable[..., Settings]


def test_settings_have_the_promised_defaults_without_an_environment() -> None:
    """Without any variable, the service stands on loopback, in ./data, with no provider."""
    settings = load_settings({})
    assert (settings.env, settings.host, settings.port) == ("development", "127.0.0.1", 8000)
    assert settings.data_dir == Path("data").absolute()
    assert settings.database_url.database == str(settings.data_dir / "tta.db")
    assert settings.redis_url is None
    assert settings.llm_base_url is None
    assert (settings.llm_timeout, settings.deadline, settings.provider_timeout) == (5.0, 15.0, 12.0)
    assert (settings.max_text, settings.max_body) == (200_000, 16 * 1024 * 1024)


def test_settings_come_from_the_process_environment_when_no_mapping_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_settings()` reads os.environ."""
    monkeypatch.setenv("TTA_PORT", "9123")
    assert load_settings().port == 9123


def test_settings_count_an_empty_variable_as_not_set(make_settings: Make) -> None:
    """`TTA_LLM_BASE_URL=` switches the provider off, and an empty number is its default."""
    settings = make_settings(TTA_LLM_BASE_URL="", TTA_PORT=" ", REDIS_URL="")
    assert (settings.llm_base_url, settings.port, settings.redis_url) == (None, 8000, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TTA_ENV", "staging"),
        ("TTA_PORT", "http"),
        ("TTA_PORT", "70000"),
        ("TTA_PORT", "-1"),
        ("TTA_DEADLINE", "3"),
        ("TTA_DEADLINE", "nan"),
        ("TTA_DEADLINE", "inf"),
        ("TTA_LLM_TIMEOUT", "0"),
        ("TTA_LLM_TIMEOUT", "soon"),
        ("TTA_LLM_BASE_URL", "ftp://host/v1"),
        ("TTA_LLM_BASE_URL", "host/v1"),
        ("TTA_LLM_BASE_URL", "http://user:password@host/v1"),
        ("TTA_LLM_BASE_URL", "http://host:port/v1"),
        ("TTA_LLM_API_KEY", "a\nb"),
        ("TTA_LLM_API_KEY", "schlüssel"),
        ("TTA_LLM_MODEL", "m" * 201),
        ("TTA_MAX_TEXT", "0"),
        ("TTA_MAX_BODY", "1.5"),
        ("TTA_SECRET_KEY", "short"),
        ("DATABASE_URL", "nonsense"),
        ("DATABASE_URL", "mysql://host/name"),
        ("DATABASE_URL", "sqlite://"),
        ("DATABASE_URL", "sqlite:///:memory:"),
        ("DATABASE_URL", "postgresql://host:port/name"),
        ("REDIS_URL", "http://host"),
        ("REDIS_URL", "redis://host:port"),
    ],
)
def test_settings_name_the_bad_one_in_one_line_when_a_value_is_wrong(name: str, value: str) -> None:
    """A bad value is one SettingsError line that begins with the setting's name."""
    with pytest.raises(SettingsError) as caught:
        load_settings({name: value})
    text = str(caught.value)
    assert text.startswith(name)
    assert "\n" not in text


@pytest.mark.parametrize(
    "url", ["postgres://u:pw@host/db", "postgresql://u:pw@host/db", "postgresql+psycopg://u:pw@host/db"]
)
def test_settings_give_postgresql_the_installed_driver_when_the_url_names_another_or_none(url: str) -> None:
    """Every spelling of a PostgreSQL URL ends with psycopg 3."""
    assert load_settings({"DATABASE_URL": url}).database_url.drivername == "postgresql+psycopg"


def test_settings_hide_secrets_when_printed() -> None:
    """Neither repr nor an error shows a key or a password."""
    settings = load_settings(
        {
            "DATABASE_URL": "postgresql://u:hidden1@host/db",
            "REDIS_URL": "redis://:hidden2@host/0",
            "TTA_LLM_API_KEY": "hidden3",
            "TTA_SECRET_KEY": "hidden4-hidden4-hidden4",
        }
    )
    assert "hidden" not in repr(settings)
    with pytest.raises(SettingsError) as caught:
        load_settings({"REDIS_URL": "redis://:hidden@host:port/0"})
    assert "hidden" not in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        load_settings({"DATABASE_URL": "postgresql://u:hidden@host:port/0"})
    assert "hidden" not in str(caught.value)


def test_settings_demand_a_secret_key_when_in_production() -> None:
    """Production does not sign with a key that it made up."""
    with pytest.raises(SettingsError, match="TTA_SECRET_KEY"):
        load_settings({"TTA_ENV": "production"})
    assert load_settings({"TTA_ENV": "production", "TTA_SECRET_KEY": "x" * 16}).load_secret() == "x" * 16


def test_redis_url_is_asked_for_by_name_when_it_is_needed_and_not_set(make_settings: Make) -> None:
    """What needs Redis says REDIS_URL."""
    with pytest.raises(SettingsError, match="REDIS_URL"):
        make_settings().require_redis_url()
    assert make_settings(REDIS_URL="redis://h/0").require_redis_url() == "redis://h/0"


def test_secret_is_kept_and_private_when_development_made_it(make_settings: Make, tmp_path: Path) -> None:
    """The secret made up in development survives a restart, and only its owner reads it."""
    first = make_settings().load_secret()
    assert len(first) >= 32
    assert make_settings().load_secret() == first
    assert stat.S_IMODE((tmp_path / "secret_key").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret_key"]


def test_secret_is_one_when_processes_start_at_once(tmp_path: Path) -> None:
    """Processes that all find no secret end up with the same one, whole."""
    program = "from blueprints.settings import load_settings; print(load_settings().load_secret())"
    env = {**os.environ, "TTA_DATA_DIR": str(tmp_path / "new"), "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    secrets = {process.communicate(timeout=60)[0] for process in processes}
    assert len(secrets) == 1
    assert len(secrets.pop().strip()) >= 32


def test_secret_names_the_data_directory_when_it_cannot_be_kept(tmp_path: Path) -> None:
    """A data directory that is no directory is one line that names TTA_DATA_DIR."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="TTA_DATA_DIR"):
        load_settings({"TTA_DATA_DIR": str(tmp_path / "file")}).load_secret()


def test_secret_is_refused_when_its_file_was_emptied(make_settings: Make, tmp_path: Path) -> None:
    """An empty secret file never becomes an empty key."""
    (tmp_path / "secret_key").write_text("\n")
    with pytest.raises(SettingsError, match="secret_key"):
        make_settings().load_secret()
