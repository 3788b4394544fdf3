"""Bring the database up to date: ``python -m migrations``.

Also ``python -m migrations downgrade [REVISION]`` (to nothing, by default), ``upgrade [REVISION]``, and ``revision
MESSAGE``, which drafts the next migration from what the models have that the database has not.

Two that start at once wait for each other. On a bad setting, or a database that cannot be used: one line on stderr that
names the setting, and exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from blueprints.db import Database, prepare_directory
from blueprints.settings import Settings, SettingsError, load_settings

_LOCK = 0x7474615F73796E63  # "tta_sync", as the advisory lock's number
_PATIENCE = 30  # seconds to wait for another who migrates, or for a table that is in use


def config_for(connection: sa.Connection) -> Config:
    """Return alembic's configuration for the migrations beside this file, over *connection*."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def with_database(settings: Settings, work: Callable[[Config], Any]) -> None:
    """Do *work* in one transaction that no other migration shares.

    Raises:
        SettingsError: the database cannot be used.
    """
    prepare_directory(settings)
    options: dict[str, Any] = {"poolclass": sa.NullPool}
    if settings.database_url.get_backend_name() == "postgresql":
        options["connect_args"] = {"connect_timeout": 3}
    database = Database(settings, **options)

    def locked() -> None:
        # On SQLite the transaction begins with the write lock, which is lock enough.
        with database.units as unit:
            connection = unit.session.connection()
            if connection.dialect.name == "postgresql":
                connection.execute(sa.text(f"SET LOCAL lock_timeout = '{_PATIENCE}s'"))
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            work(config_for(connection))

    try:
        database.units.run(locked)
    except CommandError as error:
        raise SettingsError(f"{settings.database_setting}: {_one_line(error)}") from error
    except SQLAlchemyError as error:
        # The driver's own words: SQLAlchemy's would add the statement and its parameters.
        reason = error.orig if isinstance(error, DBAPIError) and error.orig is not None else type(error).__name__
        raise SettingsError(
            f"{settings.database_setting}: this database cannot be used: {_one_line(reason)}"
        ) from error
    finally:
        database.close()


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that *arguments* ask for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m migrations", description="Bring the database up to date.")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("upgrade", help="to the newest revision, or the one named").add_argument(
        "revision", nargs="?", default="head"
    )
    commands.add_parser("downgrade", help="to the revision named, or to an empty database").add_argument(
        "revision", nargs="?", default="base"
    )
    commands.add_parser("revision", help="draft the next migration from the models").add_argument("message")
    asked = parser.parse_args(arguments)

    def work(config: Config) -> None:
        if asked.command == "revision":
            command.revision(config, asked.message, autogenerate=True)
        elif asked.command == "downgrade":
            command.downgrade(config, asked.revision)
        else:
            command.upgrade(config, "head" if asked.command is None else asked.revision)

    try:
        with_database(load_settings(), work)
    except SettingsError as error:
        sys.stderr.write(f"tta_sync: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
