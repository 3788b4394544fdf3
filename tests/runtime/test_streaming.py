"""An async generator as a synchronous iterator: order, credit, deadlines, an end for the generator in every case."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

from tta_sync import WorkflowContext, current_context, run_on_caller
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError, LoopUnavailableError, SaturatedError
from tta_sync.facade import SyncFacade
from tta_sync.primitives.streaming import StreamingPrimitive
from tta_sync.runtime.streaming import Stream


class Source:
    """A generator that tells how far it has run and whether it has ended."""

    def __init__(self, count: int | None = None, wait_after: int | None = None) -> None:
        self.count = count
        self.wait_after = wait_after
        self.made = 0
        self.ended = threading.Event()
        self.task: set[str] = set()

    async def __call__(self) -> AsyncIterator[int]:
        try:
            self._note_task()
            while self.count is None or self.made < self.count:
                if self.made == self.wait_after:
                    await asyncio.sleep(3600)
                self.made += 1
                yield self.made - 1
        finally:
            await asyncio.sleep(0)
            self._note_task()
            self.ended.set()

    def _note_task(self) -> None:
        task = asyncio.current_task()
        self.task.add("" if task is None else str(id(task)))


def until(condition: Callable[[], bool]) -> None:
    """Poll until *condition* holds; fail after 10 s."""
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up, "it did not come true"
        time.sleep(0.002)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Nothing but the last reference to an object frees it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("buffer", [1, 2, 16, 1000])
def test_items_come_in_order_and_all_when_iterated_to_the_end(facade: SyncFacade, buffer: int) -> None:
    """Every item comes once, in order, whatever the buffer; the generator has ended when the loop has."""
    source = Source(200)
    assert list(facade.iterate_sync(source, buffer=buffer)) == list(range(200))
    assert source.ended.is_set()
    assert facade.in_flight() == []


@pytest.mark.parametrize("buffer", [1, 4, 16])
def test_generator_runs_at_most_buffer_items_ahead_when_the_consumer_is_slow(facade: SyncFacade, buffer: int) -> None:
    """The generator stops as soon as it is *buffer* items ahead."""
    source = Source()
    stream = facade.iterate_sync(source, buffer=buffer)
    for taken in range(1, 40):
        next(stream)
        until(lambda taken=taken: source.made >= taken)
        facade.call_sync(asyncio.sleep, 0.001)  # every chance to run too far
        assert source.made <= taken + buffer
    stream.close()


def test_generator_lives_in_one_task_when_closed_early(facade: SyncFacade) -> None:
    """First step and clean-up happen in the same task, as anyio's cancel scopes demand."""
    source = Source()
    with facade.iterate_sync(source) as stream:
        next(stream)
    assert source.ended.is_set()
    assert len(source.task) == 1


@pytest.mark.parametrize("wait_after", [None, 3], ids=["paused for credit", "in the middle of a step"])
def test_generator_ends_when_the_iterator_is_closed(facade: SyncFacade, wait_after: int | None) -> None:
    """close() returns after the generator's clean-up, and closing again is harmless."""
    source = Source(wait_after=wait_after)
    stream = facade.iterate_sync(source, buffer=4)
    next(stream)
    until(lambda: source.made >= 3)
    stream.close()
    assert source.ended.is_set()
    stream.close()
    assert list(stream) == []
    assert facade.in_flight() == []


def test_generator_ends_when_the_iterator_is_dropped(facade: SyncFacade) -> None:
    """An iterator that nobody holds any more closes its generator, on whatever thread it is collected."""
    source = Source()
    stream = facade.iterate_sync(source)
    next(stream)
    del stream
    gc.collect()
    assert source.ended.wait(10)


@pytest.mark.usefixtures("no_collector")
def test_places_are_free_at_once_when_iterators_that_waited_are_dropped(make_facade: Callable[..., SyncFacade]) -> None:
    """Streams that are dropped one after another never fill max_in_flight, and every generator ends."""
    ended = []

    async def source() -> AsyncIterator[int]:
        try:
            await asyncio.sleep(0.001)  # so that next() waits, and drives: the stream before is cancelled meanwhile
            yield 1
            await asyncio.sleep(3600)
        finally:
            ended.append(1)

    facade = make_facade(max_in_flight=2)
    for _ in range(20):
        stream = facade.iterate_sync(source)
        assert next(stream) == 1
        del stream
    until(lambda: len(ended) == 20)
    assert facade.in_flight() == []


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("how", ["in the middle of a step", "paused for credit", "at its end", "by an error"])
def test_dropped_stream_leaves_nothing_to_the_collector_when_its_generator_stopped(
    facade: SyncFacade, how: str
) -> None:
    """Neither a generator that must be closed nor one that has ended, unseen, leaves a cycle behind."""

    async def fails() -> AsyncIterator[int]:
        yield 0
        raise LookupError("nobody sees it")

    source: Any = {
        "in the middle of a step": Source(wait_after=1),
        "paused for credit": Source(),
        "at its end": Source(1),
        "by an error": fails,
    }[how]
    stream = facade.iterate_sync(source, buffer=2)
    assert next(stream) == 0
    if how in ("at its end", "by an error"):
        until(partial(getattr, stream._call, "done"))
    pipe = weakref.ref(stream._pipe)  # the call holds it, by its function
    del stream
    until(lambda: pipe() is None)


def test_generator_ends_when_the_iterator_is_collected_on_the_loop_thread(facade: SyncFacade) -> None:
    """A collection on the loop thread closes the generator without waiting for itself."""
    source = Source()
    held = [facade.iterate_sync(source)]
    next(held[0])

    async def drop() -> None:
        held.clear()
        gc.collect()

    facade.call_sync(drop, timeout=10)
    assert source.ended.wait(10)


def test_stream_that_was_struck_before_it_was_made_is_dropped_in_silence() -> None:
    """A signal's exception in the first line of ``__init__`` leaves an object that has nothing to close."""
    Stream.__new__(Stream)
    gc.collect()  # pytest hears of what ``__del__`` raises


def test_error_of_the_generator_comes_after_its_items(facade: SyncFacade) -> None:
    """What was made before the error is delivered, then the error as itself."""

    async def source() -> AsyncIterator[int]:
        yield 1
        yield 2
        raise LookupError("third")

    stream = facade.iterate_sync(source)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(LookupError, match="third"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_error_of_the_clean_up_comes_out_of_close(facade: SyncFacade) -> None:
    """close() does not swallow what the generator's `finally` raises."""

    async def source() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            raise LookupError("in the clean-up")

    stream = facade.iterate_sync(source)
    next(stream)
    with pytest.raises(LookupError, match="in the clean-up"):
        stream.close()


@pytest.fixture
def no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits sees what it is woken for, and nothing else."""
    monkeypatch.setattr("tta_sync.runtime.loop.LOOK_AGAIN", 3600.0)
    monkeypatch.setattr("tta_sync.runtime.driven.LOOK_AGAIN", 3600.0)


@pytest.mark.usefixtures("no_second_look")
@pytest.mark.parametrize("fails", [False, True], ids=["clean-up works", "clean-up fails"])
def test_next_ends_the_iteration_when_another_thread_closes_the_stream(
    facade: SyncFacade, in_thread: Callable[..., Future[Any]], fails: bool
) -> None:
    """A next() that waits says that there is no more; what the clean-up raises is for the one who closes."""
    ended = []

    async def source() -> AsyncIterator[int]:
        try:
            yield 0
            await asyncio.sleep(3600)
        finally:
            ended.append(1)
            if fails:
                raise LookupError("in the clean-up")

    stream = facade.iterate_sync(source)
    assert next(stream) == 0
    waits = in_thread(next, stream, "no more")
    until(lambda: stream._pipe.hungry)
    if fails:
        with pytest.raises(LookupError, match="in the clean-up"):
            stream.close()
    else:
        stream.close()
    assert waits.result(20) == "no more"
    assert ended == [1]
    assert list(stream) == []
    assert facade.in_flight() == []


@pytest.mark.usefixtures("no_second_look")
def test_next_ends_with_close_when_it_looks_while_another_thread_closes_the_stream(
    make_facade: Callable[..., SyncFacade],
    in_thread: Callable[..., Future[Any]],
    callers_drive: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Woken in the middle of it, next() goes on to wait where it is woken when it is over."""
    facade = make_facade(grace=20.0)
    cleaning, release = threading.Event(), threading.Event()

    async def source() -> AsyncIterator[int]:
        try:
            yield 0
            await asyncio.sleep(3600)
        finally:
            cleaning.set()
            while not release.is_set():
                await asyncio.sleep(0.001)

    stream = facade.iterate_sync(source)
    assert next(stream) == 0
    waits = in_thread(next, stream, "no more")
    until(lambda: stream._pipe.hungry)
    closes = in_thread(stream.close)
    assert cleaning.wait(10)
    if not callers_drive:  # else it looks all the time
        looks: list[int] = []
        look = stream._loop.look
        monkeypatch.setattr(stream._loop, "look", lambda call: looks.append(1) or look(call))
        stream._waiter.release()
        until(lambda: bool(looks))
    release.set()
    assert waits.result(20) == "no more"
    assert closes.result(20) is None


@pytest.mark.usefixtures("no_second_look")
def test_next_ends_when_another_thread_closes_a_stream_that_does_not_end(
    make_facade: Callable[..., SyncFacade], in_thread: Callable[..., Future[Any]]
) -> None:
    """A generator that ignores its cancellation holds next() no longer than close(): until the grace is over."""
    facade = make_facade(grace=0.05)
    release = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        yield 0
        try:
            await asyncio.sleep(3600)
        finally:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    pass

    async def let_go() -> None:
        release.set()

    stream = facade.iterate_sync(source)
    assert next(stream) == 0
    waits = in_thread(next, stream, "no more")
    until(lambda: stream._pipe.hungry)
    stream.close()
    assert waits.result(20) == "no more"
    facade.call_sync(let_go)
    until(lambda: facade.in_flight() == [])
    assert facade.stats().orphans == 1


def test_stream_ends_when_its_own_caller_step_closes_it(facade: SyncFacade) -> None:
    """close() may come in the middle of next() on the same thread, too: from a step, or from a signal's handler."""
    held: list[Any] = []

    async def source() -> AsyncIterator[int]:
        yield 0
        await run_on_caller(held[0].close)
        yield 1

    held.append(facade.iterate_sync(source))
    assert list(held[0]) == [0]
    assert facade.in_flight() == []


def test_item_timeout_ends_the_stream_when_one_item_takes_too_long(facade: SyncFacade) -> None:
    """The limit is one item's: items that came are kept, the late one raises, the generator ends."""
    source = Source(wait_after=2)
    stream = facade.iterate_sync(source, item_timeout=0.5)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(DeadlineExceededError):
        next(stream)
    assert source.ended.is_set()


def test_item_timeout_counts_the_wait_only_when_the_consumer_is_slow(facade: SyncFacade) -> None:
    """A consumer that takes its time does not use up the next item's limit."""
    stream = facade.iterate_sync(Source(3), buffer=1, item_timeout=0.5)
    taken = []
    for item in stream:
        facade.call_sync(asyncio.sleep, 0.6)
        taken.append(item)
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("busy", [False, True], ids=["waiting in next()", "busy elsewhere"])
def test_timeout_ends_the_whole_stream(facade: SyncFacade, busy: bool) -> None:
    """The stream's deadline passes also while the consumer is busy: the generator ends then, next() raises later."""
    source = Source(wait_after=1)
    stream = facade.iterate_sync(source, timeout=0.5)
    assert next(stream) == 0
    if busy:
        assert source.ended.wait(10)
    with pytest.raises(DeadlineExceededError):
        next(stream)
    assert source.ended.is_set()


def test_interrupt_of_next_comes_out_after_the_generator_has_ended(
    facade: SyncFacade, interrupt: Callable[[BaseException], None], in_thread: Callable[..., Future[Any]]
) -> None:
    """A signal's exception in next() closes the generator first and is not replaced."""
    source = Source(wait_after=1)
    stream = facade.iterate_sync(source)
    next(stream)
    in_thread(lambda: (until(lambda: stream._pipe.hungry), interrupt(KeyError("now"))))  # hungry: it waits in next()
    with pytest.raises(KeyError, match="now"):
        next(stream)
    assert source.ended.is_set()


def test_caller_steps_run_on_the_consumer_when_it_waits(facade: SyncFacade) -> None:
    """run_on_caller inside the generator runs on the thread that calls next()."""

    async def source() -> AsyncIterator[int]:
        for _ in range(3):
            yield await run_on_caller(threading.get_ident)

    assert list(facade.iterate_sync(source)) == [threading.get_ident()] * 3


def test_iterator_can_move_to_another_thread(facade: SyncFacade, in_thread: Callable[..., Future[Any]]) -> None:
    """An iterator begun by one thread is finished by another, as WSGI servers may do."""
    stream = facade.iterate_sync(Source(100), buffer=2)
    first = [next(stream) for _ in range(10)]
    rest = in_thread(list, stream).result(10)
    assert first + rest == list(range(100))


def test_streaming_primitive_gets_data_and_context(facade: SyncFacade) -> None:
    """A StreamingPrimitive is called with (data, context): the given one, else a fresh one, with the deadline in it."""

    class Letters(StreamingPrimitive[str, str]):
        async def stream(self, data: str, context: WorkflowContext) -> AsyncIterator[str]:
            assert current_context() is context
            assert context.deadline is not None
            for letter in data:
                yield letter + (context.tenant or "-")

    assert list(facade.iterate_sync(Letters(), "ab", timeout=10)) == ["a-", "b-"]
    assert list(facade.iterate_sync(Letters(), "ab", WorkflowContext(tenant="t"), timeout=10)) == ["at", "bt"]


def test_stream_counts_as_a_call_in_flight(make_facade: Callable[..., SyncFacade]) -> None:
    """A stream takes one place of max_in_flight until it ends."""
    facade = make_facade(max_in_flight=1)
    stream = facade.iterate_sync(Source())
    next(stream)
    assert [record.name for record in facade.in_flight()] == ["Source"]
    with pytest.raises(SaturatedError):
        facade.iterate_sync(Source())
    stream.close()
    assert list(facade.iterate_sync(Source(2))) == [0, 1]


def test_streams_end_when_the_facade_is_shut_down(make_facade: Callable[..., SyncFacade]) -> None:
    """shutdown() ends the generator; the consumer is told."""
    facade = make_facade()
    source = Source()
    stream = facade.iterate_sync(source)
    next(stream)
    facade.shutdown(0.0)
    assert source.ended.is_set()
    with pytest.raises(LoopUnavailableError):
        list(stream)


def test_wrong_arguments_are_refused_with_the_remedy(facade: SyncFacade) -> None:
    """What cannot work is refused where it is written."""
    with pytest.raises(ConfigurationError, match="at least 1"):
        facade.iterate_sync(Source(), buffer=0)
    for item_timeout in (0, math.nan):
        with pytest.raises(ConfigurationError, match="item_timeout"):
            facade.iterate_sync(Source(), item_timeout=item_timeout)
    with pytest.raises(TypeError, match="async generator function"):
        facade.iterate_sync([1, 2, 3])
    with pytest.raises(TypeError, match="async iterable"):
        list(facade.iterate_sync(lambda: 1))


def test_async_generator_that_was_called_already_is_taken_too(facade: SyncFacade) -> None:
    """iterate_sync(source()) works as iterate_sync(source) does."""
    assert list(facade.iterate_sync(Source(3)())) == [0, 1, 2]


def test_stream_inside_a_running_loop_is_refused(facade: SyncFacade) -> None:
    """It would stop the loop it is called in."""

    async def inside() -> None:
        facade.iterate_sync(Source())

    with pytest.raises(LoopUnavailableError, match="await"):
        asyncio.run(inside())


def test_memory_stays_flat_over_many_items(facade: SyncFacade, repeats: Callable[[int, int], int]) -> None:
    """Many items of 1 KB pass through without being kept."""
    import tracemalloc

    async def source() -> AsyncIterator[bytes]:
        for _ in range(repeats(200_000, 50_000)):
            yield bytes(1024)

    tracemalloc.start()
    try:
        peak = 0
        for number, _ in enumerate(facade.iterate_sync(source, buffer=64)):
            if number % 5_000 == 0:
                peak = max(peak, tracemalloc.get_traced_memory()[0])
        assert peak < 2_000_000
    finally:
        tracemalloc.stop()
