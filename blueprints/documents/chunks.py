"""Read the stream of a chat completion: bytes in, pieces of the summary out. No I/O in here.

What arrives is not trusted: it is bounded, and a piece is checked before anybody hears it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_SUMMARY = 20_000  # characters; what is longer is no summary
MAX_LINE = 2**18  # bytes of one line: a summary of MAX_SUMMARY characters fits, each written as an escaped pair
MAX_STREAM = 2**23  # bytes of the whole, in which a token may cost some hundred

_HIGH_SURROGATE = re.compile("[\ud800-\udbff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class MalformedAnswerError(Exception):
    """The provider answered 200 with something that is not a chat completion."""


class ChunkReader:
    """Take server-sent events apart: feed it what arrives, cut anywhere, and get the chunks that are complete.

    A data line that is JSON by itself is a chunk at once; else the lines up to the next empty one are one. ``done``
    turns True at ``[DONE]``; what follows is not read.

    Raises (from feed and end):
        MalformedAnswerError: a chunk is not JSON, or there is more than MAX_LINE or MAX_STREAM allows.

    Source: WHATWG HTML, *Server-sent events*.
    """

    def __init__(self) -> None:
        self.done = False
        self._line: list[bytes] = []  # the pieces of a line that has not ended
        self._length = 0  # of them
        self._size = 0  # of all
        self._data: list[bytes] = []
        self._first = True
        self._after_return = False

    def feed(self, raw: bytes) -> Iterator[Any]:
        """Yield each chunk that *raw* completes."""
        self._size += len(raw)
        if self._size > MAX_STREAM:
            raise MalformedAnswerError(f"the provider's stream is longer than {MAX_STREAM} bytes")
        for piece in raw.splitlines(keepends=True):
            after_return, self._after_return = self._after_return, piece.endswith(b"\r")
            if after_return and piece == b"\n":
                continue  # a CRLF that was cut in two
            self._line.append(piece)
            self._length += len(piece)
            if self._length > MAX_LINE:
                raise MalformedAnswerError(f"a line of the provider's stream is longer than {MAX_LINE} bytes")
            if piece.endswith((b"\r", b"\n")):
                yield from self._end_line()

    def end(self) -> Iterator[Any]:
        """Yield the chunk that was complete but for the line's end, if there is one."""
        yield from self._end_line()
        yield from self._dispatch()

    def _end_line(self) -> Iterator[Any]:
        line = b"".join(self._line).rstrip(b"\r\n")
        self._line.clear()
        self._length = 0
        if self._first:
            self._first = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if self.done:
            return
        if not line:
            yield from self._dispatch()
            return
        field, _, value = line.partition(b":")
        if field != b"data":
            return  # a comment, or a field that says nothing to us
        self._data.append(value.removeprefix(b" "))
        if len(self._data) == 1:
            try:
                yield from self._dispatch()
            except MalformedAnswerError:
                self._data.append(value.removeprefix(b" "))  # the rest may follow on further lines

    def _dispatch(self) -> Iterator[Any]:
        if not self._data:
            return
        data = b"\n".join(self._data)
        self._data.clear()
        if data.strip() == b"[DONE]":
            self.done = True
            return
        try:
            chunk = json.loads(data.decode())
        except (ValueError, RecursionError):
            raise MalformedAnswerError("a chunk of the provider's stream is not JSON") from None
        yield chunk


class StreamedSummary:
    """Put a summary together, and say with each chunk what is certain of it by then.

    The pieces together are the summary without the white space around it. ``finished`` turns True once the provider has
    said that it has.
    """

    def __init__(self) -> None:
        self.finished = False
        self._said: list[str] = []
        self._length = 0  # of what was said
        self._held = ""  # white space that may turn out to be the end's, or the first half of a character

    def add(self, chunk: Any) -> str:
        """Return the next piece, "" where the chunk brings none.

        Raises:
            MalformedAnswerError: it is no chunk of a chat completion, or the summary is none that could be stored.
        """
        text = self._held + self._content_of(chunk)
        piece = (text[:-1] if _HIGH_SURROGATE.match(text[-1:]) else text).rstrip()
        self._held = text[len(piece) :]
        if not self._said:
            piece = piece.lstrip()
        if self._length + len(piece) + len(self._held) > MAX_SUMMARY:
            raise MalformedAnswerError(f"the provider's summary is longer than {MAX_SUMMARY} characters")
        if not piece:
            return ""
        piece = check_text(piece)
        self._said.append(piece)
        self._length += len(piece)
        return piece

    def _content_of(self, chunk: Any) -> str:
        try:
            choices = chunk["choices"]
            if not choices:
                return ""  # what the request has cost, say
            choice = choices[0]
            content = (choice.get("delta") or {}).get("content")
            self.finished = self.finished or choice.get("finish_reason") is not None
        except (LookupError, TypeError, AttributeError):
            raise MalformedAnswerError("a chunk of the provider's stream has no choices[0].delta") from None
        if content is not None and not isinstance(content, str):
            raise MalformedAnswerError(f"the provider's content is a {type(content).__name__}, not a text")
        return content or ""

    def end(self) -> str:
        """Return the whole summary.

        Raises:
            MalformedAnswerError: it is empty, or ends within a character.
        """
        check_text(self._held)
        if not self._said:
            raise MalformedAnswerError("the provider's summary is empty")
        return "".join(self._said)


def check_text(text: str) -> str:
    """Return *text*, the halves of its characters joined.

    Raises:
        MalformedAnswerError: a half has no other, or there is a NUL: no database stores either.
    """
    if "\x00" in text:
        raise MalformedAnswerError("the provider's summary holds a NUL, which no database stores")
    if not _SURROGATE.search(text):
        return text
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise MalformedAnswerError("the provider's summary holds a lone surrogate") from None
