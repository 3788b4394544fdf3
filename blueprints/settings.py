"""Every setting of the service, read from the environment in one place."""

from __future__ import annotations

import math
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import environs
from marshmallow import ValidationError
from redis.connection import parse_url as parse_redis_url
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

LOCAL_RESERVE = 3.0
"""Seconds of TTA_DEADLINE that the provider never gets: in them the local summary answers and is saved."""

DEFAULT_MODEL = "gpt-4o-mini"


class SettingsError(Exception):
    """A setting is wrong or missing: one line that names it and says what to write instead."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What :func:`load_settings` read. Durations are seconds; secrets stay out of ``repr``."""

    env: str
    data_dir: Path
    database_url: URL
    redis_url: str | None = field(repr=False)  # may carry a password
    host: str
    port: int
    llm_base_url: str | None
    llm_api_key: str | None = field(repr=False)
    llm_model: str
    llm_timeout: float
    deadline: float
    max_text: int
    max_body: int
    secret_key: str | None = field(repr=False)

    @property
    def provider_timeout(self) -> float:
        """What the provider as a whole may take, retries included."""
        return self.deadline - LOCAL_RESERVE

    @property
    def database_setting(self) -> str:
        """The setting that says where the database is, for messages."""
        return "TTA_DATA_DIR" if self.database_url == _default_database(self.data_dir) else "DATABASE_URL"

    def require_redis_url(self) -> str:
        """Return REDIS_URL.

        Raises:
            SettingsError: it is not set.
        """
        if self.redis_url is None:
            raise SettingsError("REDIS_URL is not set: write redis://host:port/0, or start the service with `make run`")
        return self.redis_url

    def load_secret(self) -> str:
        """Return TTA_SECRET_KEY, else the one kept in TTA_DATA_DIR, made at first use (development only).

        Raises:
            SettingsError: TTA_DATA_DIR cannot be written.
        """
        return self.secret_key or _kept_secret(self.data_dir)


class _Environment(environs.Env):
    """environs over any mapping, so that a test's settings need not be the process's."""

    def __init__(self, source: Mapping[str, str]) -> None:
        super().__init__()
        # An empty variable is one that is not set: `TTA_LLM_BASE_URL= make run` switches the provider off.
        self._source = {name: value for name, value in source.items() if value.strip()}

    def _get_value(self, env_key: str, default: Any) -> Any:
        return self._source.get(env_key, default)


def load_settings(env: Mapping[str, str] | None = None) -> Settings:
    """Read and check every setting.

    Raises:
        SettingsError: the first one that is wrong, by name.
    """
    source = _Environment(os.environ if env is None else env)
    stage = _read(source, "str", "TTA_ENV", "development", _one_of("development", "production"))
    data_dir = Path(_read(source, "str", "TTA_DATA_DIR", "./data")).expanduser().absolute()
    deadline = _read(
        source,
        "float",
        "TTA_DEADLINE",
        15.0,
        _between(LOCAL_RESERVE, 86_400, f"more than {LOCAL_RESERVE:g} seconds, which belong to the local summary"),
    )
    settings = Settings(
        env=stage,
        data_dir=data_dir,
        database_url=_database_url(_read(source, "str", "DATABASE_URL", None), data_dir),
        redis_url=_redis_url(_read(source, "str", "REDIS_URL", None)),
        host=_read(source, "str", "TTA_HOST", "127.0.0.1"),
        port=_read(source, "int", "TTA_PORT", 8000, _between(-1, 65_535, "a port from 0 to 65535")),
        llm_base_url=_base_url(_read(source, "str", "TTA_LLM_BASE_URL", None)),
        llm_api_key=_header_value(_read(source, "str", "TTA_LLM_API_KEY", None)),
        llm_model=_read(source, "str", "TTA_LLM_MODEL", DEFAULT_MODEL, _at_most(200)),
        llm_timeout=_read(source, "float", "TTA_LLM_TIMEOUT", 5.0, _between(0, 86_400, "more than 0 seconds")),
        deadline=deadline,
        max_text=_read(source, "int", "TTA_MAX_TEXT", 200_000, _between(0, 10**8, "from 1 to 100000000 characters")),
        max_body=_read(source, "int", "TTA_MAX_BODY", 16 * 2**20, _between(0, 2**30, "from 1 to 1073741824 bytes")),
        secret_key=_read(source, "str", "TTA_SECRET_KEY", None, _at_least(16)),
    )
    if settings.env == "production" and settings.secret_key is None:
        raise SettingsError("TTA_SECRET_KEY is not set: TTA_ENV=production needs one, of 16 random characters or more")
    return settings


def _read(
    source: _Environment, kind: str, name: str, default: Any, validate: Callable[[Any], None] | None = None
) -> Any:
    try:
        return getattr(source, kind)(name, default, validate=validate)
    except environs.EnvValidationError as error:
        messages = error.error_messages
        text = " ".join(messages) if isinstance(messages, list) else str(messages)
        raise SettingsError(f"{name}: {text}") from None


def _between(low: float, high: float, words: str) -> Callable[[float], None]:
    def check(value: float) -> None:
        if not (math.isfinite(value) and low < value <= high):
            raise ValidationError(f"must be {words}, not {value:g}.")

    return check


def _one_of(*choices: str) -> Callable[[str], None]:
    def check(value: str) -> None:
        if value not in choices:
            raise ValidationError(f"must be {' or '.join(choices)}, not {value[:40]!r}.")

    return check


def _at_least(length: int) -> Callable[[str], None]:
    def check(value: str) -> None:
        if len(value) < length:
            raise ValidationError(f"must have {length} characters or more.")

    return check


def _at_most(length: int) -> Callable[[str], None]:
    def check(value: str) -> None:
        if len(value) > length:
            raise ValidationError(f"must have {length} characters or fewer.")

    return check


def _default_database(data_dir: Path) -> URL:
    return URL.create("sqlite", database=str(data_dir / "tta.db"))


def _database_url(text: str | None, data_dir: Path) -> URL:
    """Parse DATABASE_URL; the spellings that hosting services hand out get the driver that is installed."""
    if text is None:
        return _default_database(data_dir)
    try:
        url = make_url(text)
        backend = url.get_backend_name()
    except (ArgumentError, ValueError):
        raise SettingsError(
            "DATABASE_URL: not a database URL; write sqlite:////path/to/file.db or postgresql://user@host/name"
        ) from None
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise SettingsError(f"DATABASE_URL: {backend} is not supported; use sqlite:/// or postgresql://")
    if not url.database or url.database == ":memory:":
        raise SettingsError(
            "DATABASE_URL: an SQLite database must be a file, since several processes share it; write sqlite:////path"
        )
    return url.set(drivername="sqlite")


def _redis_url(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        parse_redis_url(text)  # type: ignore[no-untyped-call]
    except ValueError:
        raise SettingsError("REDIS_URL: not a Redis URL; write redis://host:port/0, rediss:// or unix://") from None
    return text


def _base_url(text: str | None) -> str | None:
    if text is None:
        return None
    import httpx

    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise SettingsError("TTA_LLM_BASE_URL: not an http(s) address; write https://host/v1")
    if url.userinfo:
        raise SettingsError("TTA_LLM_BASE_URL: must not carry a user or password; the key goes into TTA_LLM_API_KEY")
    return text.rstrip("/")


def _header_value(text: str | None) -> str | None:
    if text is not None and not (text.isascii() and text.isprintable()):
        raise SettingsError("TTA_LLM_API_KEY: must be printable ASCII, on one line")
    return text


def _kept_secret(data_dir: Path) -> str:
    """Read the data directory's own secret, or make it; processes that start at once all get the same one."""
    path = data_dir / "secret_key"
    try:
        if not path.exists():
            data_dir.mkdir(parents=True, exist_ok=True)
            # Written whole under another name (mkstemp makes it 0600), then linked: link() fails if one is there.
            handle, draft = tempfile.mkstemp(prefix=".secret_key.", dir=data_dir)
            try:
                with os.fdopen(handle, "w", encoding="ascii") as file:
                    file.write(secrets.token_urlsafe(32))
                try:
                    os.link(draft, path)
                except FileExistsError:
                    pass  # another process was first: its secret is ours
            finally:
                os.unlink(draft)
        secret = path.read_text(encoding="ascii").strip()
        if len(secret) < 16:
            raise SettingsError(f"TTA_DATA_DIR: {path} holds no usable secret: remove that file, and a new one is made")
        return secret
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"TTA_DATA_DIR: cannot keep the secret key in {data_dir}: {getattr(error, 'strerror', None) or error}"
        ) from None
