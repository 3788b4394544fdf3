"""``tta-sync batch``: have the running service process text files."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import ipaddress
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_DOCUMENTS = 1000  # in one batch: the service takes no more
MOST_BYTES = 8 * 2**20  # of JSON in one batch: half of the service's default limit for a body
POST_TIMEOUT, POLL_TIMEOUT = 60.0, 10.0
PATIENCE = 60.0  # seconds without an answer, in a restart of the service say, until we stop watching
FIRST_POLL, LAST_POLL = 0.1, 1.0


class Refused(Exception):
    """It cannot be done as asked; the message says why, one line for each thing wrong."""


class Unreachable(Exception):
    """Nobody answers there."""


@dataclass(slots=True)
class Batch:
    """One accepted batch: its address and its files, in the order of its documents."""

    url: str
    files: Sequence[str]
    state: dict[str, Any]

    @property
    def ended(self) -> bool:
        return self.state["status"] in ("done", "cancelled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Post text files (UTF-8; '-' is stdin) to the running service as documents of a batch, more than "
        f"{MOST_DOCUMENTS:,} as several, and wait until all are processed. Prints one line per document: its id, a "
        "tab, its file. The exit status is 1 if any failed and 2 if nothing could be posted. Ctrl-C ends the watching, "
        "not the batch."
    )
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.add_argument("--url", default=None, help="the service's address (default: http://TTA_HOST:TTA_PORT)")


def run(arguments: argparse.Namespace) -> int:
    """Post the files, watch, report; return the exit status."""
    batches: list[Batch] = []
    try:
        base = service_url(arguments.url, os.environ)
        texts = read_files(arguments.files)
        refused = post(base, arguments.files, texts, batches)
        with progress(len(texts)) as advance:
            watch(batches, advance)
    except Refused as error:
        complain(str(error))
        return 2
    except Unreachable as error:
        if not batches:
            complain(f"no service answers: {error}; start it with `make run`, or say where it is with --url")
            return 2
        complain(
            f"the service stopped answering: {error}; what it has taken goes on when it is back, see {_urls(batches)}"
        )
        return 1
    except KeyboardInterrupt:
        if batches:
            complain(f"not watching any more; the service goes on, see {_urls(batches)}")
        return 130
    if refused:
        complain(refused)
    return report(batches, refused=bool(refused))


def service_url(chosen: str | None, env: Mapping[str, str]) -> str:
    """Return the service's address, without a slash at the end.

    Raises:
        Refused: it is none.
    """
    if chosen is None:
        host = env.get("TTA_HOST", "").strip() or "127.0.0.1"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # compared, not bound
        port = env.get("TTA_PORT", "").strip() or "8000"
        chosen = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        parts = urllib.parse.urlsplit(chosen)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid:
        raise Refused(f"{chosen!r} is no address of a service; write --url http://host:port")
    return chosen.rstrip("/")


def read_files(files: Sequence[str]) -> list[str]:
    """Return the text of each file.

    Raises:
        Refused: naming every file that cannot be read, is not UTF-8 or holds nothing; then nothing is posted.
    """
    texts, wrong = [], []
    for name in files:
        try:
            text = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8-sig")
            if text.strip():
                texts.append(text)
            else:
                wrong.append(f"{name}: is empty")
        except UnicodeDecodeError as error:
            wrong.append(f"{name}: is not UTF-8 text (byte {error.start})")
        except (OSError, ValueError) as error:
            wrong.append(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})")
    if wrong:
        raise Refused("\n".join([*wrong, "nothing was posted"]))
    return texts


def split(texts: Sequence[str]) -> Iterator[range]:
    """Cut *texts* into batches that the service takes, as ranges of indexes."""
    start, size = 0, 0
    for index, text in enumerate(texts):
        length = len(json.dumps(text)) + 12  # {"text": ...},
        if index > start and (index - start == MOST_DOCUMENTS or size + length > MOST_BYTES):
            yield range(start, index)
            start, size = index, 0
        size += length
    yield range(start, len(texts))


def post(base: str, files: Sequence[str], texts: Sequence[str], batches: list[Batch]) -> str:
    """Post all batches, adding each to *batches* once it is accepted; return what was refused after the first.

    Raises:
        Refused: the first one was.
        Unreachable: there is no service.
    """
    for part in split(texts):
        body = {"documents": [{"text": texts[index]} for index in part]}
        status, location, answer = call("POST", f"{base}/api/batches", body, timeout=POST_TIMEOUT)
        names = [files[index] for index in part]
        if status == 202 and _is_state(answer) and location:
            batches.append(Batch(urllib.parse.urljoin(f"{base}/", location), names, answer))
            continue
        message = explain(status, answer, names)
        if not batches:
            raise Refused(f"{base} {message}")
        return f"{base} {message}\n{len(texts) - part.start} documents were not posted"
    return ""


def watch(batches: Sequence[Batch], advance: Callable[[int, int], None]) -> None:
    """Poll until every batch has ended.

    Raises:
        Unreachable: no answer for PATIENCE seconds.
        Refused: the service does not know the batch any more.
    """
    pause, heard = FIRST_POLL, time.monotonic()
    while True:
        for batch in batches:
            if batch.ended:
                continue
            try:
                status, _, answer = call("GET", batch.url, timeout=POLL_TIMEOUT)
                if status >= 500:
                    raise Unreachable(f"{batch.url} answered {status}")
            except Unreachable:
                if time.monotonic() > heard + PATIENCE:
                    raise
                continue
            if status != 200 or not _is_state(answer):
                raise Refused(f"{batch.url} {explain(status, answer, batch.files)}")
            batch.state, heard = answer, time.monotonic()
        advance(sum(batch.state["done"] for batch in batches), sum(batch.state["failed"] for batch in batches))
        if all(batch.ended for batch in batches):
            return
        time.sleep(pause)
        pause = min(pause * 1.3, LAST_POLL)


def report(batches: Sequence[Batch], *, refused: bool) -> int:
    """Print each document's id and file, what failed, and the sums; return the exit status."""
    done = failed = left = 0
    for batch in batches:
        for result in batch.state["results"]:
            name = batch.files[result["index"]]
            if result.get("error"):
                complain(f"{name}: {_words(result['error'])}")
            else:
                print(_printable(f"{result['document_id']}\t{name}"))
        done, failed = done + batch.state["done"], failed + batch.state["failed"]
        left += batch.state["total"] - batch.state["done"] - batch.state["failed"]
    complain(f"{done} done, {failed} failed" + (f", {left} cancelled" if left else ""))
    return 1 if failed or left or refused else 0


# ------------------------------------------------------------------------------------------------------------ HTTP


def call(method: str, url: str, body: object = None, *, timeout: float) -> tuple[int, str | None, Any]:
    """Send one request; return status, Location and the JSON answer (None if it is none).

    Raises:
        Unreachable: there was no answer.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Accept": "application/json"}, method=method)  # noqa: S310  # checked
    if data is not None:
        request.add_header("Content-Type", "application/json")
    host = urllib.parse.urlsplit(url).hostname or ""
    proxies = urllib.request.ProxyHandler({} if _is_loopback(host) else None)
    try:
        with urllib.request.build_opener(proxies).open(request, timeout=timeout) as response:
            return response.status, response.headers.get("Location"), _json(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None, _json(error.read())
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise Unreachable(f"{url}: {_words(getattr(reason, 'strerror', None) or reason)[:200]}") from None


def explain(status: int, answer: Any, files: Sequence[str]) -> str:
    """Say in words what the service answered; field errors name the file."""
    if not isinstance(answer, dict) or "title" not in answer:
        return f"answered {status}: is that the service?"
    lines = [f"refused: {answer['title']} ({status})" + (f": {answer['detail']}" if answer.get("detail") else "")]
    for path, message in _flat(answer.get("errors")):
        keys = path[1:] if path[:1] == ["documents"] else path
        if keys and keys[0].isdigit() and int(keys[0]) < len(files):
            keys = [files[int(keys[0])], *keys[1:]]
        lines.append(f"{': '.join([*keys, message])}")
    return "\n".join(lines)


def _flat(errors: Any, path: Sequence[str] = ()) -> Iterator[tuple[list[str], str]]:
    if isinstance(errors, dict):
        for key, value in errors.items():
            yield from _flat(value, [*path, *str(key).split(".")])
    elif isinstance(errors, list):
        for value in errors:
            yield from _flat(value, path)
    elif errors is not None:
        yield list(path), str(errors)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _is_state(answer: Any) -> bool:
    fields = {"status": str, "total": int, "done": int, "failed": int, "results": list}
    return isinstance(answer, dict) and all(isinstance(answer.get(name), kind) for name, kind in fields.items())


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _words(error: Any) -> str:
    if isinstance(error, dict):
        error = error.get("detail") or error.get("title") or error.get("message") or json.dumps(error)
    return " ".join(str(error).split())


def _urls(batches: Sequence[Batch]) -> str:
    return " ".join(batch.url for batch in batches)


# -------------------------------------------------------------------------------------------------------- terminal


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr if that is a terminal; yield ``advance(done, failed)``."""
    if not sys.stderr.isatty():
        yield lambda done, failed: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("documents", total=total)

        def advance(done: int, failed: int) -> None:
            bar.update(task, completed=done + failed, description=f"{failed} failed" if failed else "documents")

        yield advance


def complain(message: str) -> None:
    for line in message.splitlines():
        print(_printable(f"tta-sync: {line}"), file=sys.stderr)


def _printable(line: str) -> str:
    """A file's name may hold bytes that no terminal takes."""
    return line.encode(errors="backslashreplace").decode()
