"""``tta-sync jobs``: follow a background job of the running service with a progress bar, or cancel it."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator
from typing import Any

from tta_sync.cli.batch import Refused, Unreachable, call, complain, explain, service_url

SILENCE = 30.0  # seconds without a byte, keep-alives included, after which a connection is dead
PATIENCE = 60.0  # seconds without an event, in a restart of the service say, until we stop watching
PAUSE = 0.5  # seconds until we connect again
CALL_TIMEOUT = 10.0
MAX_LINE = 2**20  # bytes of one event

ENDS = {"finished": 0, "failed": 1, "stopped": 1, "canceled": 1, "gone": 2}

Event = tuple[str, Any]


class Busy(Exception):
    """The service follows as many jobs as it can; there will be room again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Follow a background job of the running service, or cancel it."
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    watch = actions.add_parser(
        "watch",
        help="show its progress until it ends",
        description="Show a job's progress until it ends: a bar on a terminal, lines elsewhere. The exit status is 0 "
        "if it finished, 1 if it failed or was cancelled, 2 if there is no such job or no service. Ctrl-C ends the "
        "watching, not the job.",
    )
    cancel = actions.add_parser(
        "cancel",
        help="end it: it will not begin, or is stopped",
        description="End a job: one that waits will not begin, one that runs is asked to stop. The exit status is 1 if "
        "it has ended already, 2 if there is no such job or no service.",
    )
    for action in watch, cancel:
        action.add_argument("job_id", metavar="ID")
        action.add_argument("--url", default=None, help="the service's address (default: http://TTA_HOST:TTA_PORT)")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked for; return the exit status."""
    job_id: str = arguments.job_id
    try:
        address = f"{service_url(arguments.url, os.environ)}/api/jobs/{urllib.parse.quote(job_id, safe='')}"
        return cancel(address, job_id) if arguments.action == "cancel" else watch(address, job_id)
    except Refused as error:
        complain(str(error))
    except Unreachable as error:
        complain(f"no service answers: {error}; start it with `make run`, or say where it is with --url")
    return 2


def cancel(address: str, job_id: str) -> int:
    """Ask for the job's end, and say what came of it.

    Raises:
        Refused: there is no such job.
        Unreachable: there is no service.
    """
    status, _, answer = call("POST", f"{address}/cancel", timeout=CALL_TIMEOUT)
    if status == 200:
        say(f"{job_id}: cancelled before it began")
    elif status == 202:
        say(f"{job_id}: asked to stop")
    elif status == 409:
        say(f"{job_id}: has ended already")
        return 1
    else:
        raise Refused(f"{job_id}: {explain(status, answer, ())}")
    return 0


def watch(address: str, job_id: str) -> int:
    """Show how the job goes on until it ends.

    Raises:
        Refused: there is no such job.
        Unreachable: there is no service, or there is none any more.
    """
    last: dict[str, Any] = {}
    try:
        with display(job_id) as show:
            for kind, data in follow(f"{address}/events"):
                show(kind, data)
                if kind == "status":
                    last = data
    except KeyboardInterrupt:
        complain(f"not watching any more; the job goes on (`tta-sync jobs cancel {job_id}` ends it)")
        return 130
    status = str(last.get("status"))
    if status == "gone":
        complain(f"{job_id} is not kept any more; how it ended is not known")
    elif last.get("error"):
        complain(f"{job_id} {status}: {last['error']}")
    else:
        say(f"{job_id}: {status}")
    return ENDS[status]


def follow(url: str) -> Iterator[Event]:
    """Yield the job's events until it has ended, over as many connections as that takes.

    Raises:
        Refused: there is no such job.
        Unreachable: there was no event for PATIENCE seconds, or there is no service to begin with.
    """
    heard, known = time.monotonic(), False
    while True:
        try:
            with contextlib.closing(listen(url)) as events:
                for kind, data in events:
                    heard, known = time.monotonic(), True
                    if kind in ("status", "progress") and isinstance(data, dict):
                        yield kind, data
                        if kind == "status" and data.get("status") in ENDS:
                            return
        except Busy as error:
            if time.monotonic() > heard + PATIENCE:
                raise Refused(str(error)) from None
        except Unreachable:
            if not known or time.monotonic() > heard + PATIENCE:
                raise
        time.sleep(PAUSE)


def listen(url: str) -> Generator[Event]:
    """Yield the events of one connection; a keep-alive is an event without a kind.

    Raises:
        Refused: the service will not.
        Busy: it cannot just now.
        Unreachable: nobody answers, or not any more.
    """
    request = urllib.request.Request(url, headers={"Accept": "text/event-stream"})  # noqa: S310  # checked
    host = urllib.parse.urlsplit(url).hostname or ""
    local = host in ("localhost", "::1") or host.startswith("127.")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if local else None))
    try:
        with opener.open(request, timeout=SILENCE) as response:
            if response.headers.get_content_type() != "text/event-stream":
                raise Refused(f"{url} answered with no events: is that the service?")
            yield from parse(response)
    except urllib.error.HTTPError as error:
        with error:
            try:
                answer = json.loads(error.read(MAX_LINE))
            except ValueError:
                answer = None
        message = f"{url} {explain(error.code, answer, ())}"
        raise (Busy if error.code in (429, 502, 503, 504) else Refused)(message) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        words = " ".join(str(getattr(reason, "strerror", None) or reason).split())
        raise Unreachable(f"{url}: {words[:200]}") from None


def parse(response: Any) -> Iterator[Event]:
    """Take a stream of server-sent events apart; what makes no sense is passed over, as the standard has it."""
    kind, data = "", b""
    while line := response.readline(MAX_LINE):
        field, _, value = line.rstrip(b"\r\n").partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            kind = value.decode(errors="replace")
        elif field == b"data":
            data += value
        elif line in (b"\n", b"\r\n"):
            try:
                event = kind, json.loads(data) if data else None
            except ValueError:
                event = "", None
            kind, data = "", b""
            yield event


# -------------------------------------------------------------------------------------------------------- terminal


@contextlib.contextmanager
def display(job_id: str) -> Iterator[Callable[[str, Any], None]]:
    """Show a bar on stderr if that is a terminal, else lines on stdout; yield ``show(kind, data)``."""
    if not sys.stderr.isatty():
        yield lambda kind, data: None if data.get("status") in ENDS else say(describe(job_id, kind, data))
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[message]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(printable(job_id), total=None, message="")

        def show(kind: str, data: Any) -> None:
            if kind == "status":
                status = printable(data.get("status"))
                bar.update(task, description=f"{printable(job_id)} {status}")
                if status == "finished":
                    whole = bar.tasks[0].total or 1
                    bar.update(task, total=whole, completed=whole)
            else:
                done, total = number(data.get("done")), number(data.get("total"))
                bar.update(task, completed=done or 0, total=total, message=printable(data.get("message") or ""))

        yield show


def describe(job_id: str, kind: str, data: Any) -> str:
    """Say in a line what has happened."""
    if kind == "status":
        return f"{job_id}: {data.get('status')}"
    done, total = number(data.get("done")), number(data.get("total"))
    amount = f"{done or 0:g}" + ("" if total is None else f"/{total:g}")
    return f"{job_id}: {amount} {data.get('message') or ''}".rstrip()


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def say(line: str) -> None:
    print(printable(line), flush=True)


def printable(text: Any) -> str:
    """What a job says may be anything, and must not drive the terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))
