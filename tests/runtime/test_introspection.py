"""What is under way can be seen: by the program, and by an operator who sends a signal."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from tta_sync.facade import SyncFacade


async def fetch_everything() -> None:
    await asyncio.sleep(3600)


def until_in_flight(facade: SyncFacade) -> None:
    give_up = time.monotonic() + 10
    while not any(record.state == "running" for record in facade.in_flight()):
        assert time.monotonic() < give_up
        time.sleep(0.002)


def test_dump_names_calls_and_where_they_stand(facade: SyncFacade, in_thread: Callable[..., Future[Any]]) -> None:
    """Each call is named with its age, state, caller and the user's line it waits at; tasks left over are listed."""

    async def leave_a_task() -> None:
        task = asyncio.get_running_loop().create_task(asyncio.sleep(3600), name="left behind")
        facade.__dict__["_kept_by_the_test"] = task

    facade.call_sync(leave_a_task)
    in_thread(facade.call_sync, fetch_everything)
    until_in_flight(facade)
    text = facade.dump()
    facade.shutdown(0)
    line = fetch_everything.__code__.co_firstlineno + 1
    assert re.search(rf"fetch_everything: running for \d\.\d+ s, called by caller-0, at {__file__}:{line}", text)
    assert "left over: left behind" in text
    assert "FacadeStats(calls=2" in text


def test_dump_is_written_when_the_signal_arrives(facade: SyncFacade, in_thread: Callable[..., Future[Any]]) -> None:
    """The signal of the user's choice writes the dump, and calls the handler that was there before."""
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    out, into = os.pipe()
    try:
        facade.dump_on_signal(signal.SIGUSR2, into)
        in_thread(facade.call_sync, fetch_everything)
        until_in_flight(facade)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert b"fetch_everything: running" in os.read(out, 65_536)
        assert seen == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)
        os.close(out)
        os.close(into)
        facade.shutdown(0)


def test_stats_can_be_read_by_name_or_by_key(facade: SyncFacade) -> None:
    """Attributes for programs, keys for those who make JSON of it."""
    facade.call_sync(asyncio.sleep, 0)
    stats = facade.stats()
    assert stats.calls == stats["calls"] == 1
    assert stats.generation == stats["generation"]


def test_dump_says_where_a_stream_stands(facade: SyncFacade) -> None:
    """The line in the generator, or in what it awaits; not that of the runtime which drives it."""

    async def pause() -> None:
        await asyncio.sleep(3600)

    async def numbers() -> AsyncIterator[int]:
        yield 1
        await pause()

    stream = facade.iterate_sync(numbers)
    assert next(stream) == 1
    give_up = time.monotonic() + 10
    line = pause.__code__.co_firstlineno + 1
    while f"{__file__}:{line} in " not in facade.dump():
        assert time.monotonic() < give_up, facade.dump()
        time.sleep(0.002)
    stream.close()
