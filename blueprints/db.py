"""The database: the declarative base, and what a process holds of it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import DateTime, Dialect, MetaData, event
from sqlalchemy.orm import DeclarativeBase, sessionmaker
from sqlalchemy.types import TypeDecorator

from blueprints.settings import Settings, SettingsError
from tta_sync.sqlalchemy import create_engine, unit_of_work


class Base(DeclarativeBase):
    """Names every constraint, so that a migration can drop it again on either database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class UTCDateTime(TypeDecorator[datetime]):
    """A moment with microseconds, always in UTC; SQLite, which keeps no zone, gets it back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value} has no zone: use datetime.now(UTC)")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment: datetime = value if value.tzinfo else value.replace(tzinfo=UTC)
        return moment.astimezone(UTC)


class Database:
    """One engine, and the units of work over it; connections are opened at first use, anew in a forked child.

    Args:
        settings: the service's.
        statement_timeout: seconds that one statement may take on PostgreSQL, where no session step says less.
        engine_options: those of ``sqlalchemy.create_engine``.
    """

    def __init__(self, settings: Settings, *, statement_timeout: float | None = None, **engine_options: Any) -> None:
        self.engine = create_engine(settings.database_url, **engine_options)
        if statement_timeout is not None and self.engine.dialect.name == "postgresql":
            milliseconds = max(1, int(statement_timeout * 1000))

            @event.listens_for(self.engine, "connect")
            def bound(connection: Any, _record: Any) -> None:
                connection.execute(f"SET statement_timeout = {milliseconds}")
                connection.commit()

        session = sessionmaker(self.engine, expire_on_commit=False)
        self.units = unit_of_work(session)
        """One transaction per request."""
        self.reads = unit_of_work(session, read_only=True)
        """The same, for requests that write nothing."""
        self.steps = unit_of_work(session, commit="step")
        """One transaction per session step, for jobs: nothing is held while the provider thinks."""

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def prepare_directory(settings: Settings) -> None:
    """Make the directory of an SQLite file.

    Raises:
        SettingsError: it cannot be made.
    """
    if settings.database_url.get_backend_name() == "sqlite" and settings.database_url.database:
        directory = Path(settings.database_url.database).parent
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"{settings.database_setting}: cannot make the directory {directory}: {error.strerror}"
            ) from None
