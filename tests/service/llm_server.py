"""A loopback LLM provider that answers well, or misbehaves in the ways that real ones do."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import select
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

    Asked for a stream, good sends ``tokens`` one by one, and there are more modes: paced (a token, or the end, per
    ``go()``), trickle (one every 100 ms, without end), stalled, cut, ended and spoiled (after two tokens it says
    nothing more, hangs up, ends the answer, sends what is no JSON), raw (the parts in ``raw``, each sent by itself),
    open (the same, then comments without an end), ignored (a plain answer). ``left`` counts the clients that hung up in
    the middle.
    """

    def __init__(self, port: int = 0) -> None:
        self.mode = "good"
        self.script: list[str] = []  # guarded by _lock
        self.retry_after = "1"
        self.summary = SUMMARY
        self.requests: list[dict[str, Any]] = []  # guarded by _lock
        self.release = threading.Event()
        self.arrived = threading.Semaphore(0)
        self.tokens = re.findall(r" ?[^ ]+", SUMMARY)
        self.raw: list[bytes] = []
        self.left = threading.Semaphore(0)
        self._turns = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []  # guarded by _lock
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="llm-server")

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def calls(self) -> int:
        with self._lock:
            return len(self.requests)

    def go(self, tokens: int = 1) -> None:
        """Let paced streams go on by as many tokens."""
        for _ in range(tokens):
            self._turns.release()

    def take_back(self) -> bool:
        """Take back one such permission that nobody has used; say whether there was one."""
        return self._turns.acquire(blocking=False)

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

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # a client that hangs up with something left to read
                    super().handle()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked = json.loads(body or b"null")
                mode = owner._next_mode(
                    {
                        "path": self.path,
                        "port": self.client_address[1],
                        "headers": dict(self.headers),
                        "body": asked,
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
                        "ignored": lambda: self._json(200, completion(owner.summary)),
                    }
                    if isinstance(asked, dict) and asked.get("stream"):
                        streams = ("good", "paced", "trickle", "stalled", "cut", "ended", "spoiled")
                        answers.update(dict.fromkeys(streams, self._stream))
                        answers.update(raw=self._stream_raw, open=self._stream_raw)
                    self._mode = mode
                    answers[mode]()
                except OSError:
                    self.close_connection = True  # the client has left, which is what some modes are about
                    owner.left.release()

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

            def _stream(self) -> None:
                def take_turn() -> bool:
                    return owner._turns.acquire(timeout=0.01)

                self._begin_stream()
                self._chunk(event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
                tokens = itertools.cycle(owner.tokens) if self._mode == "trickle" else owner.tokens
                for number, token in enumerate(tokens):
                    if self._mode == "paced":
                        self._wait(take_turn)
                    elif self._mode == "trickle":
                        self._wait(lambda: owner.release.wait(0.1), most=1)
                    elif number == 2 and self._mode != "good":
                        break
                    self._chunk(event(delta(token)))
                if self._mode == "paced":
                    self._wait(take_turn)
                if self._mode == "stalled":
                    self._wait(lambda: owner.release.wait(0.01))
                elif self._mode == "spoiled":
                    self._chunk(b"data: {oops\n\n")
                elif self._mode == "cut":
                    self._hang_up()
                    return
                elif self._mode != "ended":
                    self._chunk(event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
                    self._chunk(event({"choices": [], "usage": {"total_tokens": 9}}))
                    self._chunk(b"data: [DONE]\n\n")
                self._chunk(b"")

            def _stream_raw(self) -> None:
                self._begin_stream()
                for part in owner.raw:
                    self._chunk(part)
                if self._mode == "open":
                    while not owner.release.wait(0.02):
                        self._chunk(b": still here\n\n")
                self._chunk(b"")

            def _begin_stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream; charset=utf-8")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()

            def _chunk(self, part: bytes) -> None:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))

            def _wait(self, turn: Callable[[], bool], most: int = 2000) -> None:
                """Wait for a turn, *most* times at most, or until the client has left."""
                for _ in range(most):
                    if turn():
                        return
                    if self._has_left():
                        raise ConnectionResetError("the client has left")

            def _has_left(self) -> bool:
                if not select.select([self.connection], [], [], 0)[0]:
                    return False
                try:
                    return not self.connection.recv(1, socket.MSG_PEEK)
                except ConnectionResetError:
                    return True

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


def delta(content: Any) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": content}}]}


def event(data: Any) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
