"""``POST /api/process/stream``: a document whose summary is heard while it is made, as server-sent events.

========= =================================== ==========================================================================
event     data                                meaning
========= =================================== ==========================================================================
``token`` ``{"text": ...}``                   the next piece of the summary: one of the provider's, or a sentence
``reset`` ``{}``                              the provider failed: discard the pieces so far, others follow
``done``  the document, as from /api/process  it is stored; the pieces since the last reset are its ``summary``
``error`` a problem, as from every route      nothing is stored
========= =================================== ==========================================================================

``done`` or ``error`` is the last event. A client that goes away ends the work, and nothing is stored.

Source: WHATWG HTML, *Server-sent events*.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from flask import Response, current_app, stream_with_context

from blueprints.documents.store import Results
from blueprints.documents.workflow import Listener
from tta_sync import WorkflowContext
from tta_sync.primitives import StreamingPrimitive, WorkflowPrimitive

if TYPE_CHECKING:
    from tta_sync.runtime.streaming import Stream

logger = logging.getLogger(__name__)

KEEP_ALIVE = 15.0
"""Seconds of silence after which a comment is sent, as the standard recommends: it keeps proxies from hanging up, and
finds out about clients that have. Only where TTA_LLM_TIMEOUT allows for such a silence."""

_RESULTS = "results"  # the one event that is not for the client


class Event(NamedTuple):
    """What happened; one without a kind says only that the stream is alive."""

    kind: str
    data: Any


class DocumentStream(StreamingPrimitive[dict[str, Any], Event]):
    """Run the branches of the document workflow, and yield the pieces of the summary while they come.

    The last event has what the branches found.
    """

    def __init__(self, branches: WorkflowPrimitive[Any, Any]) -> None:
        super().__init__("document stream")
        self.branches = branches

    async def stream(self, data: dict[str, Any], context: WorkflowContext) -> AsyncIterator[Event]:
        # Not bounded by a slow client, but by what a summary may be.
        heard: asyncio.Queue[Event | None] = asyncio.Queue()
        Listener(
            lambda piece: heard.put_nowait(Event("token", {"text": piece})),
            lambda: heard.put_nowait(Event("reset", {})),
        ).attach(context)
        work = asyncio.create_task(self.branches.execute(data, context), name="document stream")
        work.add_done_callback(lambda _: heard.put_nowait(None))
        try:
            while True:
                try:
                    async with asyncio.timeout(KEEP_ALIVE):
                        event = await heard.get()
                except TimeoutError:
                    event = Event("", None)
                if event is None:
                    break
                yield event
            yield Event(_RESULTS, await work)
        finally:
            work.cancel()
            await asyncio.wait((work,))
            if not work.cancelled():
                work.exception()  # has come out above, or concerns nobody any more


def respond(events: Stream[Event], save: Callable[[Results], dict[str, Any]]) -> Response:
    """Make the response of *events*; *save* gets the results, on the request's own thread, and returns the document."""
    return Response(
        stream_with_context(_encoded(events, save)),
        mimetype="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def _encoded(events: Stream[Event], save: Callable[[Results], dict[str, Any]]) -> Iterator[bytes]:
    """Yield each event as the bytes to send: the server sends each at once. Closed early, it closes *events*."""
    try:
        results: Any = None
        for kind, data in events:
            if kind == _RESULTS:
                results = data
            else:
                yield _encode(kind, data)
        yield _encode("done", save(results))
    except Exception as error:
        yield _encode("error", _problem(error))
    finally:
        try:
            events.close()
        except Exception as error:  # nobody is left to be told
            logger.warning("a stream that its client had left ended with %s", type(error).__name__)


def _encode(kind: str, data: Any) -> bytes:
    # ASCII, and every line break in it escaped: whoever reads byte by byte never meets half a character.
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode("ascii") if kind else b": keep-alive\n\n"


def _problem(error: Exception) -> Any:
    """Return *error* as the application answers it; one that nobody foresaw is logged."""
    try:
        answer = current_app.handle_user_exception(error)
    except Exception as unforeseen:
        answer = current_app.handle_exception(unforeseen)
    return current_app.make_response(answer).get_json()
