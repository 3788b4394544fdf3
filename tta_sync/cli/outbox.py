"""``tta-sync outbox``: enqueue what is left in the transactional outbox, and look after what cannot be enqueued."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tta_sync.exceptions import ConfigurationError

INTERVAL = 1.0  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "The outbox holds jobs that were written in a committed transaction (enqueue_on_commit). Their process "
        "enqueues them itself; the relay enqueues what it could not, because it died or Redis was down. Any number "
        "may run. The functions must be importable here: see --path."
    )
    parser.add_argument("--database", metavar="URL", default=None, help="SQLAlchemy's URL (default: DATABASE_URL)")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    relay = actions.add_parser("relay", help="enqueue what waits, until stopped by SIGTERM or Ctrl-C")
    relay.add_argument("--redis", metavar="URL", default=None, help="default: REDIS_URL")
    relay.add_argument("--path", default=".", help="where the functions' modules are (default: here)")
    relay.add_argument("--interval", type=float, default=INTERVAL, metavar="SECONDS", help="default: %(default)g")
    relay.add_argument(
        "--once", action="store_true", help="stop when nothing is due; exit status 1 if it cannot be done"
    )
    actions.add_parser("list", help="print what is in the outbox: id, state, attempts, job, function, error")
    retry = actions.add_parser("retry", help="try parked messages anew")
    retry.add_argument("ids", type=int, nargs="*", metavar="ID", help="default: all")
    drop = actions.add_parser("drop", help="delete parked messages for good")
    drop.add_argument("ids", type=int, nargs="+", metavar="ID")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked for; return the exit status."""
    try:
        from redis import Redis
        from sqlalchemy.exc import ArgumentError, SQLAlchemyError

        from tta_sync.rq import outbox_relay
        from tta_sync.rq.functions import default_connection
        from tta_sync.sqlalchemy import create_engine
    except ImportError as error:
        return _complain(f"{error}: pip install 'tta-sync[rq,sqlalchemy]'")
    url = arguments.database or os.environ.get("DATABASE_URL")
    if not url:
        return _complain("no database: give --database, or set DATABASE_URL")
    try:
        engine = create_engine(url)
        connection = None
        if arguments.action == "relay":
            sys.path.insert(0, os.path.abspath(arguments.path))
            connection = Redis.from_url(arguments.redis) if arguments.redis else default_connection()
        relay = outbox_relay(engine, connection=connection)
    except (ArgumentError, ConfigurationError, ImportError, ValueError) as error:  # a driver that is not installed, too
        return _complain(str(error))
    try:
        if arguments.action == "relay":
            return _relay(relay, arguments.interval, once=arguments.once)
        return _look_after(relay, arguments)
    except ConfigurationError as error:
        return _complain(str(error))
    except SQLAlchemyError as error:
        return _complain(f"the database cannot be used: {getattr(error, 'orig', None) or type(error).__name__}")
    finally:
        engine.dispose()


def _relay(relay: Any, interval: float, *, once: bool) -> int:
    relay.waiting()  # says at once that there is no such database, or no table
    with _stop_signal() as stop, _told():
        while not stop.is_set():
            while relay.run_once() and not stop.is_set():
                pass
            if once:
                return 1 if relay.pause else 0
            stop.wait(max(0.01, interval, relay.pause))
    return 0


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _told() -> Iterator[None]:
    """Have what our loggers say written to stderr."""
    logger, handler = logging.getLogger("tta_sync"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _look_after(relay: Any, arguments: argparse.Namespace) -> int:
    if arguments.action == "list":
        for message in relay.messages(limit=1000):
            state = "parked" if message.parked else "waiting"
            said = (message.id, state, message.attempts, message.job_id, message.name, message.error or "")
            print(*said, sep="\t")
        return 0
    if arguments.action == "retry":
        done, asked = relay.retry(arguments.ids or None), arguments.ids
        print(f"{done} to be tried anew")
    else:
        done, asked = relay.drop(arguments.ids), arguments.ids
        print(f"{done} dropped")
    return 0 if done >= len(set(asked)) else 1


def _complain(text: str) -> int:
    sys.stderr.write(f"tta-sync outbox: {' '.join(text.split())}\n")
    return 2
