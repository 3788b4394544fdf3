"""What processes tell each other of open circuits."""

from __future__ import annotations

import asyncio
from typing import Any

from tta_sync.clock import SYSTEM_CLOCK
from tta_sync.primitives.performance.keys import SCHEMA
from tta_sync.primitives.performance.wire import Oversized, RedisDown, Refused
from tta_sync.redis.address import address

_MAX_CIRCUITS = 10_000
_LONGEST = 3600.0  # seconds; a hint that claims more is cut


class RedisCircuitHints:
    """Let the processes that use one Redis tell each other which circuits are open: ``CircuitBreakerPrimitive(...,
    hints=...)``.

    A hint can open a closed circuit, never close an open one, and nobody waits for it: it is heard while the process
    does something else, and while Redis is away there are none.

    Args:
        source: a URL, a ``redis.Redis`` or ``redis.asyncio.Redis`` client, of which address and credentials count, or
            a ``RedisBackend``.
        prefix: what every key begins with; the back end's, or ``tta:``.
    """

    def __init__(self, source: Any, prefix: str | None = None) -> None:
        self._endpoint, prefix = address(source, prefix)
        self._channel = f"{prefix}{SCHEMA}:#:circuits".encode()
        self._until: dict[str, float] = {}  # moments on the wall clock; replaced entry by entry
        self._tasks: set[asyncio.Task[None]] = set()

    def open_until(self, circuit: str) -> float | None:
        """Return the wall-clock moment until which some process keeps *circuit* open, as far as it was heard."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            pass  # a peek, on a thread without a loop: what was heard so far will do
        else:
            listener = self._endpoint.listener
            # Tasks of other loops, a forked child's parent's among them, listen for those.
            ours = self._tasks and any(task.get_loop() is loop for task in tuple(self._tasks))
            if not (ours or listener.hears(self._channel, self) or listener.down):
                self._start(self._listen())
        return self._until.get(circuit)

    def opened(self, circuit: str, until: float) -> None:
        """Tell the others that *circuit* is open here until the wall-clock moment *until*."""
        self._note(circuit, until)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return  # nobody may wait here, and there is no loop to do it
        self._start(self._tell(circuit, until))

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work, name="tta_sync circuit hints")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self) -> None:
        try:
            await self._endpoint.listener.listen(self._channel, self)
        except RedisDown:
            pass  # the listener comes back by itself

    async def _tell(self, circuit: str, until: float) -> None:
        link = self._endpoint.link
        try:
            await link.ask("HSET", self._channel, circuit, repr(until))
            await link.ask("PEXPIRE", self._channel, int(2 * _LONGEST * 1000))
            await link.ask("PUBLISH", self._channel, f"{until!r} {circuit}")
        except (RedisDown, Refused, Oversized):
            pass  # only a hint

    # ---- being told --------------------------------------------------------------------------------------------------

    def hear(self, message: bytes) -> None:
        until, _, circuit = message.decode(errors="replace").partition(" ")
        self._take(circuit, until)

    async def catch_up(self) -> None:
        """Read what was said before."""
        found = await self._endpoint.link.ask("HGETALL", self._channel)
        for circuit, until in zip(found[::2], found[1::2], strict=True):
            self._take(circuit.decode(errors="replace"), until.decode(errors="replace"))

    def _take(self, circuit: str, until: str) -> None:
        try:
            moment = float(until)
        except ValueError:
            return  # not ours
        self._note(circuit, min(moment, SYSTEM_CLOCK.time() + _LONGEST))

    def _note(self, circuit: str, until: float) -> None:
        if len(self._until) >= _MAX_CIRCUITS and circuit not in self._until:
            self._until.clear()
        if until > self._until.get(circuit, 0.0):  # also false for NaN
            self._until[circuit] = until
