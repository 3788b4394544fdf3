"""How gunicorn serves the service: ``gunicorn`` alone takes this file; ``tta-sync dev`` brings its own socket."""

from __future__ import annotations

import contextlib
import math
import os
import time
from typing import Any

wsgi_app = "wsgi:app"
bind = f"{os.environ.get('TTA_HOST') or '127.0.0.1'}:{os.environ.get('TTA_PORT') or 8000}"

# Callers wait for their workflows on a thread each; the one loop thread per worker waits for the outside world.
worker_class = "gthread"
workers = 2
threads = 16

with contextlib.suppress(ValueError, OverflowError):  # the service itself says what is wrong with it
    # A request in flight may take its whole deadline before the worker has to go.
    graceful_timeout = min(max(math.ceil(float(os.environ.get("TTA_DEADLINE") or 15.0)), 0), 600) + 5

loglevel = "warning"
control_socket_disable = True

STALL_SECONDS = 30.0
DRAIN_BYTES = 64 * 2**20
DRAIN_SECONDS = 5.0


def post_worker_init(worker: Any) -> None:
    """Let streams without an end of their own know when the worker has been told to stop: it waits for them."""
    extensions = getattr(worker.wsgi, "extensions", None)
    if extensions is not None:
        extensions["stopping"] = lambda: not worker.alive


def pre_request(_worker: Any, request: Any) -> None:
    """Give a sender that stalls in the middle of its body, or a reader of its answer, so long: they hold a thread."""
    request.unreader.sock.settimeout(STALL_SECONDS)


def post_request(_worker: Any, _request: Any, environ: dict[str, Any], response: Any) -> None:
    """Read the rest of a body that was refused (413), so that its sender gets to read why.

    A connection that is closed with unread data is reset, and the answer is lost with it; gunicorn itself reads no more
    than 64 KiB. Bounded in bytes and seconds: who sends more than that is cut off.
    """
    if response is None or response.status_code < 400:
        return
    body, sock = environ["wsgi.input"], environ["gunicorn.socket"]
    give_up, left = time.monotonic() + DRAIN_SECONDS, DRAIN_BYTES
    before = sock.gettimeout()
    try:
        while left > 0 and (remaining := give_up - time.monotonic()) > 0:
            sock.settimeout(remaining)
            chunk = body.read(65_536)
            if not chunk:
                break
            left -= len(chunk)
        sock.settimeout(before)
    except Exception:  # noqa: S110  # gone, too slow, or no HTTP: there is nobody left to tell
        pass


def worker_exit(_server: Any, _worker: Any) -> None:
    """End the worker's event loop in order: what is in flight is drained, resources are closed."""
    from tta_sync.facade import default_facade

    default_facade().shutdown()
