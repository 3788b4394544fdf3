"""The thread that delivers what a process has just committed, so that no request waits for those who do not answer.

Whoever commits waits for the courier, but not long: usually the message has arrived when the commit returns; while
nobody answers, commits do not wait at all, and the courier tries again for as long as the process lives. The thread
starts at the first message and ends when there is nothing to do. A forked child has none of its parent's messages.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

logger = logging.getLogger(__name__)

PATIENCE = 0.25
"""Seconds that a commit waits for its messages to arrive."""

IDLE = 10.0
"""Seconds without messages after which the thread ends."""

MOST_UNITS = 10_000
"""Transactions whose messages the courier keeps in mind while nobody answers; the rest is left to a relay."""

_AT_ONCE = 100  # transactions


class Relay(Protocol):
    """What is asked of a relay: :class:`tta_sync.sqlalchemy.outbox.OutboxRelay` is one."""

    @property
    def pause(self) -> float: ...

    def deliver(self, units: Sequence[str], arrived: Callable[[], object], /) -> bool: ...


class _Desk:
    """What is to be delivered by one relay. Guarded by the courier's lock, but for the relay, which is the thread's."""

    __slots__ = ("arrived", "relay", "resumes_at", "stuck_since", "units")

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.units: deque[str] = deque(maxlen=MOST_UNITS)
        self.arrived = threading.Event()  # set when what waits now has been seen to
        self.stuck_since: float | None = None  # since when something waits, or is being delivered
        self.resumes_at = 0.0


class Courier:
    """The messages of one process, and the thread that delivers them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._desks: dict[Hashable, _Desk] = {}  # guarded by _changed: those with something to do
        self._thread: threading.Thread | None = None  # guarded by _changed

    def hand_over(self, key: Hashable, make: Callable[[], Relay], unit: str) -> None:
        """Have the messages of *unit* delivered, by the relay that *key* stands for."""
        now = time.monotonic()
        with self._changed:
            desk = self._desks.get(key)
            if desk is None:
                desk = self._desks[key] = _Desk(make())
            if len(desk.units) == MOST_UNITS - 1:
                logger.warning("messages of %d transactions wait: further ones are left to a relay", MOST_UNITS)
            desk.units.append(unit)
            arrived = desk.arrived
            if desk.stuck_since is None:
                desk.stuck_since = now
            patience = 0.0 if desk.resumes_at > now else PATIENCE - (now - desk.stuck_since)
            if not self._has_thread():
                return
            self._changed.notify()
        if patience > 0 and not _on_a_loop():
            arrived.wait(patience)

    def _has_thread(self) -> bool:
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name="tta_sync-outbox", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads, or the interpreter ends; the commit has succeeded
                logger.warning("no thread to deliver the outbox (%s): what was written is left to a relay", error)
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                found = self._next()
                if found is None:
                    if not self._changed.wait(self._wait()) and not self._desks:
                        self._thread = None
                        return
                    continue
                key, desk = found
                units = [desk.units.popleft() for _ in range(min(_AT_ONCE, len(desk.units)))]
                arrived = desk.arrived
                told: Callable[[], object] = _nobody
                if not desk.units:
                    desk.arrived = threading.Event()
                    told = arrived.set
                desk.stuck_since = time.monotonic()
            try:
                clear = desk.relay.deliver(units, told)
            except Exception:
                logger.exception(
                    "messages of %d transactions could not be delivered and are left to a relay", len(units)
                )
                clear = True
            with self._changed:
                desk.stuck_since = time.monotonic() if desk.units else None
                if not clear:
                    desk.units.extendleft(reversed(units[: MOST_UNITS - len(desk.units)]))
                    desk.resumes_at = time.monotonic() + desk.relay.pause
                elif not desk.units:
                    self._desks.pop(key, None)  # with the relay, which must not keep an engine alive
                elif key in self._desks:
                    self._desks[key] = self._desks.pop(key)  # behind the others
                if not clear or arrived is not desk.arrived:
                    arrived.set()
            del desk, found

    def _next(self) -> tuple[Hashable, _Desk] | None:
        now = time.monotonic()
        for key, desk in self._desks.items():
            if desk.resumes_at <= now:
                return key, desk
        return None

    def _wait(self) -> float:
        now = time.monotonic()
        return min((max(0.001, desk.resumes_at - now) for desk in self._desks.values()), default=IDLE)


def _nobody() -> None: ...


def _on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


_courier = Courier()


def hand_over(key: Hashable, make: Callable[[], Relay], unit: str) -> None:
    """See :meth:`Courier.hand_over`; this process's courier."""
    _courier.hand_over(key, make, unit)


def _forget_parent() -> None:
    global _courier
    _courier = Courier()


os.register_at_fork(after_in_child=_forget_parent)
