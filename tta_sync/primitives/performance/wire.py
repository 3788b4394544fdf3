"""Asking a Redis server without ever waiting long for it.

One connection per loop carries the commands of all callers, in the order in which they were sent: a caller who leaves
costs nothing, and concurrent commands share packets. Every command has a limit of a tenth of a second, connecting
included. The first timeout or refusal opens the circuit: from then on callers are told at once, and only a task in the
background knocks until the server answers again.

How to reach the server (address, credentials, TLS) comes from outside: see :func:`tta_sync.redis.dialler`.
"""

from __future__ import annotations

import asyncio
import re
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from random import Random
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

LIMIT = 0.1  # seconds for connecting and asking together
_LATE = 0.005  # seconds by which a timer may be late on a healthy loop
_MAX_EXTRA = 2.0  # seconds that a question may get on a loop that is not
_PROBE_LIMIT = 1.0
_PROBE_PAUSE = (0.05, 1.0)  # seconds between knocks: first, and at most
_MAX_LINE = 65_536
_MAX_ITEMS = 100_000


class RedisDown(Exception):
    """The server did not answer, or is known not to; ``reason`` says which."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Refused(Exception):
    """The server answered with an error: out of memory, read-only, no such script ..."""

    @property
    def code(self) -> str:
        """The word by which Redis names the error, also where a script met it."""
        text = str(self)
        inside = re.search(r"running script.*?: -?([A-Z]{3,}) ", text)
        return text.partition(" ")[0] if inside is None else inside[1]


class Oversized(Exception):
    """A reply is larger than anybody here would store; the connection was dropped rather than the memory filled."""


class _Incomplete(Exception):
    """More bytes are needed."""


def pack(parts: tuple[bytes | str | int, ...]) -> bytes:
    """Return one command as the bytes to send."""
    out = [b"*%d\r\n" % len(parts)]
    for part in parts:
        text = part if type(part) is bytes else str(part).encode(errors="surrogatepass")
        out.append(b"$%d\r\n%b\r\n" % (len(text), text))
    return b"".join(out)


class _Patience:
    """Call *expire* at *due*, unless it was this loop that was late, and not the server.

    A loop that is held up (by blocking code, by threads that fight for the interpreter, by a crowded machine) sees its
    own timers late, and answers that have long been here later still. It gets more time, within reason.
    """

    __slots__ = ("_due", "_expire", "_extra", "_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, due: float, expire: Callable[[], None]) -> None:
        self._loop = loop
        self._due = due
        self._expire = expire
        self._extra = _MAX_EXTRA
        self._handle = loop.call_at(due, self._fire)

    def _fire(self) -> None:
        now = self._loop.time()
        late = now - self._due
        if late <= _LATE or self._extra <= 0:
            self._expire()
            return
        more = min(2 * late + _LATE, self._extra)
        self._extra -= more
        self._due = now + more
        self._handle = self._loop.call_at(self._due, self._fire)

    def cancel(self) -> None:
        self._handle.cancel()


class Bounds:
    """What a server may take: seconds for an answer, and bytes of one."""

    def __init__(self, limit: float, max_bytes: int) -> None:
        self.limit = limit
        self.max_bytes = max_bytes


class Wire(asyncio.Protocol):
    """A connection: commands out, RESP2 replies in, matched by their order (loop thread only)."""

    def __init__(
        self, bounds: Bounds, lost: Callable[[Wire, Exception], None], on_push: Callable[[list[Any]], None] | None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._buffer = b""
        self._chunks: list[bytes] = []  # what arrived since, while a long reply is not complete
        self._missing = 0
        self._bounds = bounds
        self._watch: _Patience | None = None
        self._lost: Callable[[Wire, Exception], None] | None = lost
        self._on_push = on_push
        self.answered = False
        self.failed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.fail(ConnectionError("the server closed the connection") if error is None else error)

    def ask(self, parts: tuple[bytes | str | int, ...]) -> asyncio.Future[Any]:
        """Send a command; return the future of its reply."""
        assert self._transport is not None
        future: asyncio.Future[Any] = self._loop.create_future()
        if self.failed:
            future.set_exception(RedisDown("the connection was lost"))
            return future
        now = self._loop.time()
        self._waiting.append((future, now))
        self._transport.write(pack(parts))
        if self._watch is None:
            self._watch = _Patience(self._loop, now + self._bounds.limit, self._check)
        return future

    def _check(self) -> None:
        """Give the connection up where the oldest command has waited its limit."""
        self._watch = None
        if self._waiting:
            due = self._waiting[0][1] + self._bounds.limit
            if self._loop.time() >= due - 0.001:
                self.fail(TimeoutError("the server did not answer in time"))
            else:
                self._watch = _Patience(self._loop, due, self._check)

    def fail(self, error: Exception) -> None:
        """Drop the connection and tell all who wait on it."""
        lost, self._lost = self._lost, None
        self.failed = True
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._transport is not None:
            self._transport.abort()
        waiting, self._waiting = self._waiting, deque()
        for future, _ in waiting:
            if not future.done():
                future.set_exception(error if isinstance(error, Oversized) else RedisDown(str(error)))
        if lost is not None:
            lost(self, error)

    def close(self) -> None:
        """End the connection; nobody is told but those who still wait on it."""
        self._lost = None
        self.fail(ConnectionError("closed"))

    # ---- replies ----------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._missing > len(data):
            self._missing -= len(data)
            self._chunks.append(data)
            return
        if self._chunks:
            data = b"".join((*self._chunks, data))
            self._chunks.clear()
        buffer = self._buffer + data if self._buffer else data
        self._missing = 0
        position = 0
        try:
            while position < len(buffer):
                reply, position = self._parse(buffer, position)
                self._deliver(reply)
        except _Incomplete:
            self._buffer = buffer[position:]
            # _parse counted from the beginning of the buffer
            self._missing = max(0, self._missing - len(buffer))
        except (Oversized, ValueError) as error:
            self._buffer = b""
            self.answered = self.answered or isinstance(error, Oversized)
            self.fail(error)
        else:
            self._buffer = b""

    def _deliver(self, reply: Any) -> None:
        if self._on_push is not None and type(reply) is list and reply and reply[0] == b"message":
            self._on_push(reply)
            return
        if not self._waiting:
            raise ValueError("a reply that nobody asked for")
        future, _ = self._waiting.popleft()
        self.answered = True
        if future.done():
            return  # the caller has left
        if isinstance(reply, Refused):
            future.set_exception(reply)
        else:
            future.set_result(reply)

    def _parse(self, buffer: bytes, position: int, depth: int = 0) -> tuple[Any, int]:
        end = buffer.find(b"\r\n", position)
        if end < 0:
            if len(buffer) - position > _MAX_LINE:
                raise ValueError("a line without an end")
            raise _Incomplete
        kind, line = buffer[position : position + 1], buffer[position + 1 : end]
        after = end + 2
        if kind == b"$":
            size = int(line)
            if size < 0:
                return None, after
            if size > self._bounds.max_bytes:
                raise Oversized(f"a reply of {size} bytes")
            stop = after + size
            if len(buffer) < stop + 2:
                self._missing = stop + 2
                raise _Incomplete
            return buffer[after:stop], stop + 2
        if kind == b"*":
            count = int(line)
            if count > _MAX_ITEMS or depth > 4:
                raise ValueError("a reply of too many parts")
            items = []
            for _ in range(count):
                item, after = self._parse(buffer, after, depth + 1)
                items.append(item)
            return (None if count < 0 else items), after
        if kind == b":":
            return int(line), after
        if kind == b"+":
            return line, after
        if kind == b"-":
            return Refused(line.decode(errors="replace")), after
        raise ValueError("this is not a Redis server")


Dial = Callable[[Callable[[], Wire]], Awaitable[Wire]]
"""Open a connection that uses a fresh wire, authenticate, select the database; return the wire."""


class Link:
    """The way from one loop to one server, open, being opened, or known to be down (loop thread only)."""

    def __init__(self, dial: Dial, bounds: Bounds, on_push: Callable[[list[Any]], None] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self._dial = dial
        self._bounds = bounds
        self._on_push = on_push
        self._wire: Wire | None = None
        self._opening: asyncio.Task[Wire] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._closer: AsyncIterator[None] | None = None
        self.closed = False
        self.reason = ""  # why it is down
        self.on_change: Callable[[], None] = _nothing  # told when a connection is lost, and when the server is back

    @property
    def down(self) -> bool:
        return self._probing is not None

    async def ask(self, *parts: bytes | str | int, limit: float | None = None, force: bool = False) -> Any:
        """Return the server's reply, within *limit* seconds.

        With *force*, ask also a server that is thought to be down.

        Raises:
            RedisDown: there was none, or will be none.
            Refused: the reply is an error.
            Oversized: the reply is too large.
        """
        common = self._bounds.limit
        wire = self._wire
        if wire is None:
            if self._probing is not None and not force:
                raise RedisDown(self.reason)
            began = self.loop.time()
            wire = await self._open(limit)
            left = common if limit is None else limit
            limit = max(left - (self.loop.time() - began), left / 2)
        future = wire.ask(parts)
        if limit is None or limit >= common:
            return await future  # the wire itself keeps the common limit
        return await self._within(limit, future)

    async def _within(self, limit: float, future: asyncio.Future[T]) -> T:
        """Wait for *future* no longer than *limit*; whether the server is down, the wire will know by its own limit."""

        def give_up() -> None:
            if not future.done():
                future.set_exception(RedisDown("no answer in the time that this call has left"))

        timer = _Patience(self.loop, self.loop.time() + limit, give_up)
        try:
            return await future
        finally:
            timer.cancel()

    def post(self, *parts: bytes | str | int) -> None:
        """Send a command whose answer nobody needs; nothing is sent where no connection is open."""
        if self._wire is not None:
            self._wire.ask(parts).add_done_callback(_ignore)

    @property
    def connected(self) -> Wire | None:
        """The open connection, if there is one."""
        return self._wire

    async def _open(self, limit: float | None = None) -> Wire:
        opening = self._opening
        if opening is None:
            opening = self._opening = self.loop.create_task(self._connect(), name="tta_sync redis connection")
            opening.add_done_callback(self._opened)
        try:
            if limit is None or limit >= self._bounds.limit:
                return await asyncio.shield(opening)
            return await self._within(limit, asyncio.shield(opening))
        except (OSError, EOFError, ValueError, RedisDown, Refused, Oversized) as error:
            raise RedisDown(str(error) or type(error).__name__) from None

    async def _connect(self) -> Wire:
        if self._closer is None:
            self._closer = self._close_with_loop()
            await anext(self._closer)
        task = asyncio.current_task()
        assert task is not None
        expired: list[bool] = []

        def give_up() -> None:
            expired.append(True)
            task.cancel()

        limit = self._bounds.limit if self._probing is None else _PROBE_LIMIT
        timer = _Patience(self.loop, self.loop.time() + limit, give_up)
        try:
            return await self._dial(lambda: Wire(self._bounds, self._lost, self._on_push))
        except asyncio.CancelledError:
            if expired:
                raise TimeoutError("the server did not answer in time") from None
            raise
        finally:
            timer.cancel()

    def _opened(self, task: asyncio.Task[Wire]) -> None:
        self._opening = None
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self.go_down(error)
        elif self.closed:
            task.result().close()
        elif task.result().failed:  # between its last reply and now
            self.go_down(ConnectionError("the connection was lost"))
        else:
            self._wire = task.result()

    def _lost(self, wire: Wire, error: Exception) -> None:
        """Hear from a wire that it is gone: the next caller dials again, unless it timed out or never said a word."""
        if wire is not self._wire:
            return
        self._wire = None
        if isinstance(error, TimeoutError) or not wire.answered:
            self.go_down(error)
        else:
            self.on_change()

    def go_down(self, error: BaseException) -> None:
        self.reason = str(error) or type(error).__name__
        if self._probing is None and not self.closed and not self.loop.is_closed():
            self._probing = self.loop.create_task(self._probe(), name="tta_sync redis probe")

    async def _probe(self) -> None:
        """Knock until the server answers; callers pass by meanwhile."""
        pause, longest = _PROBE_PAUSE
        chance = Random()  # noqa: S311  # spreads the knocks of many processes
        while True:
            await asyncio.sleep(pause * (0.5 + chance.random()))
            pause = min(pause * 2, longest)
            try:
                async with asyncio.timeout(_PROBE_LIMIT):
                    wire = self._wire or await self._open()
                    await wire.ask(("PING",))
            except (TimeoutError, RedisDown, Refused, Oversized) as error:
                self.reason = str(error) or "no answer"
                continue
            break
        self._probing = None
        self.on_change()

    async def _close_with_loop(self) -> AsyncIterator[None]:
        """Be closed when the loop closes its asynchronous generators, which every orderly end of a loop does."""
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """End the connection and the knocking, for good."""
        self.closed = True
        for task in (self._probing, self._opening):
            if task is not None:
                task.cancel()
        if self._wire is not None:
            self._wire.close()
            self._wire = None


class Listener:
    """Hear what is published on channels of one server, on a connection for this alone (loop thread only).

    A connection that is lost is opened again, and *catch_up* is called for each channel after the subscription stands:
    whatever was published in between was not heard.
    """

    _KEEP_ALIVE = 15.0  # seconds between pings, which find out that a silent connection is dead

    def __init__(self, dial: Dial, bounds: Bounds) -> None:
        self._link = Link(dial, bounds, self._heard)
        self._link.on_change = self._changed
        # Weak: who listens must not live on for it.
        self._channels: dict[bytes, weakref.WeakSet[Hearer]] = {}
        self._heard_on: Wire | None = None  # the connection on which all channels are subscribed
        self._again: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def hears(self, channel: bytes, hearer: Hearer) -> bool:
        """Say whether *hearer* hears *channel* right now."""
        return self._heard_on is self._link.connected is not None and hearer in self._channels.get(channel, ())

    @property
    def down(self) -> bool:
        return self._link.down

    async def listen(self, channel: bytes, hearer: Hearer) -> None:
        """Let *hearer* hear *channel* from now on; on return the subscription stands, and it has caught up.

        Raises:
            RedisDown: it does not stand; it will once the server is back.
        """
        self._channels.setdefault(channel, weakref.WeakSet()).add(hearer)
        if self._timer is None:
            self._keep_alive()
        await self._subscribe_all()

    async def _subscribe_all(self) -> None:
        """Subscribe to every channel on the present connection, and let everybody catch up."""
        channels = [channel for channel, hearers in self._channels.items() if hearers]
        try:
            for channel in channels:  # one by one: each channel of a SUBSCRIBE is answered by a reply of its own
                await self._link.ask("SUBSCRIBE", channel)
            wire = self._link.connected
            for channel in channels:
                for hearer in list(self._channels[channel]):
                    await hearer.catch_up()
        except (Refused, Oversized) as error:
            raise RedisDown(str(error)) from None
        self._heard_on = wire

    def _changed(self) -> None:
        self._heard_on = None
        if self._again is None and self._channels and not self._link.closed:
            self._again = self._link.loop.create_task(self._return(), name="tta_sync redis subscriptions")

    async def _return(self) -> None:
        """Subscribe again until it stands, or until the link is down: then it will tell of a change."""
        pause, longest = _PROBE_PAUSE
        try:
            while self._heard_on is None or self._heard_on is not self._link.connected:
                self._channels = {channel: hearers for channel, hearers in self._channels.items() if hearers}
                if not self._channels:
                    return
                try:
                    await self._subscribe_all()
                except RedisDown:
                    if self._link.down:
                        return
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, longest)
        finally:
            self._again = None

    def _heard(self, reply: list[Any]) -> None:
        for hearer in list(self._channels.get(reply[1], ())):
            hearer.hear(reply[2])

    def _keep_alive(self) -> None:
        if not self._link.closed:
            self._link.post("PING")
            self._timer = self._link.loop.call_later(self._KEEP_ALIVE, self._keep_alive)


class Hearer(Protocol):
    """Who listens on a channel."""

    def hear(self, message: bytes) -> None:
        """Take a message; must not block."""

    async def catch_up(self) -> None:
        """Find out what was missed before this moment."""


class Endpoint:
    """One server as this process sees it: a link and a listener per loop, made when the loop first asks."""

    def __init__(self, dial: Dial, name: str, limit: float = LIMIT, max_bytes: int = 16 * 2**20) -> None:
        self._dial = dial
        self.name = name  # for messages; never with credentials
        self.bounds = Bounds(limit, max_bytes)
        # Strong references on purpose: in a forked child the parent's loops must not be collected, only forgotten.
        self._links: dict[asyncio.AbstractEventLoop, Link] = {}
        self._listeners: dict[asyncio.AbstractEventLoop, Listener] = {}
        self.claims: dict[Hashable, Any] = {}

    @property
    def link(self) -> Link:
        """The running loop's link."""
        loop = asyncio.get_running_loop()
        link = self._links.get(loop)
        if link is None:
            for old in [old for old in self._links if old.is_closed()]:
                self._links.pop(old, None)
                self._listeners.pop(old, None)
            link = self._links[loop] = Link(self._dial, self.bounds)
        return link

    @property
    def listener(self) -> Listener:
        """The running loop's listener."""
        loop = asyncio.get_running_loop()
        listener = self._listeners.get(loop)
        if listener is None:
            listener = self._listeners[loop] = Listener(self._dial, self.bounds)
        return listener


def _nothing() -> None:
    return


def _ignore(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
