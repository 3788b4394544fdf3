"""``GET /api/jobs/<id>/events``: a job, followed to its end, as server-sent events.

============ ==================================== ======================================================================
event        data                                 meaning
============ ==================================== ======================================================================
``status``   the job, as from ``/api/jobs/<id>``  how it stands now; sent first, and at each change of its status
``progress`` ``{done, total, message, at}``       the newest progress report
``error``    a problem, as from every route       it cannot be followed any further just now
============ ==================================== ======================================================================

After a status that is an end (``finished``, ``failed``, ``stopped``, ``canceled``, or ``gone``: RQ keeps the job no
longer) the stream ends. It also ends, without such a status, after LIFETIME and when the service stops; a browser's
EventSource then connects again by itself, and so does ``tta-sync jobs watch``.

Source: WHATWG HTML, *Server-sent events*.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from blueprints.jobs.store import JobState
from tta_sync.rq.progress import events_channel

POLL = 0.5
"""Seconds between two looks at the job; a report of progress is seen at once."""

KEEP_ALIVE = 10.0
"""Seconds of silence after which a comment is sent: it keeps proxies from hanging up."""

LIFETIME = 600.0
"""Seconds after which a stream ends."""

MAX_STREAMS = 8
"""Streams at once in one process, each of which holds one of its threads."""

GONE = "gone"


class Places:
    """So many streams at once, and no more."""

    def __init__(self, number: int) -> None:
        self._free = threading.BoundedSemaphore(number)

    def take(self) -> Callable[[], None] | None:
        """Return how to give the place back, however often that is called; None where none is free."""
        if not self._free.acquire(blocking=False):
            return None
        held = [True]

        def give_back() -> None:
            if held:
                held.clear()
                self._free.release()

        return give_back


class JobEvents(Iterator[bytes]):
    """The events of one job as bytes to send; to be closed.

    Args:
        client: of the Redis that holds the job.
        read: returns how the job stands now, None where it is gone.
        encode: returns the job, and its progress, as plain JSON types.
        gone: says whether the one who listens has left.
        stopping: says whether the service has been told to stop.
        unavailable: the problem to send when Redis stops answering.
        give_back: called once, at the end.
    """

    def __init__(
        self,
        client: Redis,
        job_id: str,
        *,
        read: Callable[[], JobState | None],
        encode: Callable[[JobState], dict[str, Any]],
        gone: Callable[[], bool],
        stopping: Callable[[], bool],
        unavailable: dict[str, Any],
        give_back: Callable[[], None],
    ) -> None:
        self._client = client
        self._job_id = job_id
        self._read = read
        self._encode = encode
        self._gone = gone
        self._stopping = stopping
        self._unavailable = unavailable
        self._give_back = give_back
        self._events: Generator[bytes] | None = None  # made when asked for: it holds this object

    def __next__(self) -> bytes:
        if self._events is None:
            self._events = self._follow()
        return next(self._events)

    def close(self) -> None:
        """Give back the connection and the place; also where no event was ever asked for."""
        try:
            if self._events is not None:
                self._events.close()
        finally:
            self._give_back()

    def __del__(self) -> None:
        self._give_back()

    def _follow(self) -> Generator[bytes]:
        try:
            with self._client.pubsub(ignore_subscribe_messages=True) as heard:
                heard.subscribe(events_channel(self._job_id))
                yield from self._watch(lambda: heard.get_message(timeout=POLL))
        except RedisError:
            yield encode_event("error", self._unavailable)

    def _watch(self, wait: Callable[[], Any]) -> Iterator[bytes]:
        end = time.monotonic() + LIFETIME
        said = time.monotonic()
        status, progress = "", None
        while True:
            state = self._read()
            if state is None:
                yield encode_event("status", {"id": self._job_id, "status": GONE})
                return
            shown = self._encode(state)
            # Progress first: whoever has seen the end has seen all of it.
            if state.progress is not None and state.progress != progress:
                progress = state.progress
                yield encode_event("progress", shown["progress"])
                said = time.monotonic()
            if state.status != status:
                status = state.status
                yield encode_event("status", shown)
                said = time.monotonic()
            if state.ended:
                return
            wait()
            now = time.monotonic()
            if now > end or self._stopping() or self._gone():
                return
            if now - said > KEEP_ALIVE:
                yield b": keep-alive\n\n"
                said = now


def encode_event(kind: str, data: Any) -> bytes:
    # ASCII, and every line break in it escaped: whoever reads byte by byte never meets half a character.
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode("ascii")


def has_left(sock: Any) -> bool:
    """Say whether the other end of the connection has closed it, as far as that can be told without waiting."""
    if sock is None:
        return False
    if sock.fileno() < 0:
        return True
    try:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0)) and sock.recv(1, socket.MSG_PEEK) == b""
    except ValueError:  # TLS has no such look; a keep-alive that cannot be sent will tell
        return False
    except OSError:
        return True
