"""A loopback LLM provider that answers well, or misbehaves in the ways that real ones do."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SUMMARY = "A summary from the provider."


class LLMServer:
    """An OpenAI-compatible server on 127.0.0.1; set ``mode`` at any time, read ``requests`` afterwards.

    Modes: good, slow and held (hold the answer until ``release``), limited (429 with ``retry_after``), unavailable
    (503), refused (401), redirect (302), garbage, empty, wrong (JSON of another shape), nul, huge, gzip, closed (hangs
    up), truncated (hangs up inside the answer), drip (a byte at a time). ``script`` is a list of modes for the next
    requests, before ``mode``.
    """

    def __init__(self) -> None:
        self.mode = "good"
        self.script: list[str] = []  # guarded by _lock
        self.retry_after = "1"
        self.summary = SUMMARY
        self.requests: list[dict[str, Any]] = []  # guarded by _lock
        self.release = threading.Event()
        self.arrived = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []  # guarded by _lock
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="llm-server")

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def calls(self) -> int:
        with self._lock:
            return len(self.requests)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._connections:  # kept alive by clients that outlive the test
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def _next_mode(self, request: dict[str, Any]) -> str:
        with self._lock:
            self.requests.append(request)
            return self.script.pop(0) if self.script else self.mode

    def _handler(owner) -> type[BaseHTTPRequestHandler]:  # `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 20

            def setup(self) -> None:
                super().setup()
                with owner._lock:
                    owner._connections.append(self.connection)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                mode = owner._next_mode(
                    {
                        "path": self.path,
                        "port": self.client_address[1],
                        "headers": dict(self.headers),
                        "body": json.loads(body or b"null"),
                    }
                )
                owner.arrived.release()
                try:
                    answers: dict[str, Callable[[], None]] = {
                        "good": lambda: self._json(200, completion(owner.summary)),
                        "slow": lambda: self._hold("too late"),
                        "held": lambda: self._hold(owner.summary),
                        "limited": lambda: self._json(429, {"error": "slow down"}, {"Retry-After": owner.retry_after}),
                        "unavailable": lambda: self._json(503, {"error": "overloaded"}),
                        "refused": lambda: self._json(401, {"error": "no such key"}),
                        "redirect": lambda: self._json(302, {}, {"Location": "http://127.0.0.1:1/elsewhere"}),
                        "garbage": lambda: self._raw(b"<html>Welcome to nginx!</html>"),
                        "empty": lambda: self._json(200, completion("  \n ")),
                        "wrong": lambda: self._json(200, {"choices": []}),
                        "number": lambda: self._json(200, completion(42)),
                        "list": lambda: self._json(200, [1, 2]),
                        "deep": lambda: self._raw(b"[" * 100_000),
                        "nul": lambda: self._json(200, completion("a\x00b")),
                        "surrogate": lambda: self._json(200, completion("a\ud800b")),
                        "long": lambda: self._json(200, completion("word " * 10_000)),
                        "huge": lambda: self._raw(b" " * 2_000_000 + json.dumps(completion("x")).encode()),
                        "gzip": lambda: self._json(200, completion("x"), {"Content-Encoding": "gzip"}),
                        "closed": self._hang_up,
                        "truncated": self._truncated,
                        "drip": self._drip,
                    }
                    answers[mode]()
                except OSError:
                    self.close_connection = True  # the client has left, which is what some modes are about

            def _hold(self, summary: str) -> None:
                owner.release.wait(20)
                self._json(200, completion(summary))

            def _hang_up(self) -> None:
                self.close_connection = True
                self.connection.close()

            def _drip(self) -> None:
                """Keep the connection busy, a byte at a time, for longer than anybody waits."""
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                while not owner.release.wait(0.02):
                    self.wfile.write(b" ")
                self.close_connection = True

            def _truncated(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.close_connection = True

            def _json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
                self._raw(json.dumps(body).encode(), status, headers)

            def _raw(self, raw: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def completion(content: Any) -> dict[str, Any]:
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}}],
    }
