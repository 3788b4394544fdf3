"""An async generator as a synchronous iterator, with a window of credit between the two.

A pump on the loop fills a buffer and pauses when the consumer has not taken ``window`` items; the consumer lets it go
on once half of them are gone. So the threads change places once per half window, not once per item.

Who owns what: ``buffer`` is appended by the loop and taken by the consumer (atomic); ``hungry`` is set by the consumer
before it waits and cleared by the pump before it wakes it; ``paused`` the other way round. Each side looks again after
setting its flag, so no wake-up is lost. The pump holds the pipe, not the iterator: an iterator that nobody holds any
more is collected, and closes the generator.

One thread at a time is in ``next()``, but another may close the stream meanwhile. ``_waiter`` is what the first waits
on: set before it looks whether the stream has ended, read by ``close()`` after it has said so. What the generator ends
with is then told by ``close()``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tta_sync.context import current_caller
from tta_sync.exceptions import DeadlineExceededError
from tta_sync.runtime.call import DEADLINE, Call

if TYPE_CHECKING:
    from tta_sync.runtime.loop import ManagedLoop

T = TypeVar("T")

logger = logging.getLogger("tta_sync")

CLOSED = "closed"


class Pipe(Generic[T]):
    """What the pump and the consumer share."""

    def __init__(self, source: Callable[..., AsyncIterable[T]], window: int) -> None:
        self.source = source
        self.window = window
        self.resume_at = window // 2
        self.buffer: deque[T] = deque()
        self.hungry = False
        self.paused = False
        self._credit: asyncio.Future[None] | None = None  # loop thread only
        self.iterator: Any = None  # for whoever asks where it stands

    async def pump(self, *args: Any, **keywords: Any) -> None:
        """Run the generator: in one task from its first step to its ``aclose``. Loop thread only."""
        call = current_caller.get()  # the pipe must not keep it: the call has the pump for its function
        assert isinstance(call, Call)
        if call.deadline is not None:
            # The consumer may be busy elsewhere when the deadline passes: the loop watches the clock.
            call.timer = asyncio.get_running_loop().call_later(call.deadline - time.monotonic(), call.expire)
        iterator = self.iterator = aiter(self.source(*args, **keywords))
        buffer = self.buffer
        window = self.window
        dropped = False
        try:
            async for item in iterator:
                buffer.append(item)
                del item  # the pump must not keep what the consumer has let go
                if self.hungry:
                    self.hungry = False
                    call.wake()
                if len(buffer) >= window:
                    await self._pause()
        except GeneratorExit:
            dropped = True  # the task was, at the interpreter's end for example: nothing can be awaited any more
            raise
        finally:
            self.iterator = None
            aclose = getattr(iterator, "aclose", None)
            if aclose is not None and not dropped:
                await aclose()

    async def _pause(self) -> None:
        self._credit = asyncio.get_running_loop().create_future()
        self.paused = True
        if len(self.buffer) <= self.resume_at:  # taken while we were about to pause
            self.paused = False
            return
        await self._credit

    def resume(self) -> None:
        """Let the pump go on. Loop thread only."""
        if self._credit is not None and not self._credit.done():
            self._credit.set_result(None)


class Stream(Iterator[T]):
    """The consumer's end: iterate it, close it, or use it in a ``with`` block."""

    _ended = True  # so far: a signal's exception may strike in the first line below

    def __init__(
        self,
        owner: object,
        loop: ManagedLoop,
        pipe: Pipe[T],
        call: Call,
        item_timeout: float | None,
        max_in_flight: int | None,
    ) -> None:
        self._owner = owner  # the facade: its loop ends when nobody holds it any more
        self._loop = loop
        self._pipe = pipe
        self._call = call
        self._item_timeout = item_timeout
        self._waiter: Any = None
        try:
            loop.calls[call] = None
            if max_in_flight is not None or loop.refusing:
                loop.admit(call, max_in_flight)
            loop.submit(call)
        except BaseException:
            self._leave()
            raise
        self._ended = False

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> T:
        pipe = self._pipe
        while True:
            try:
                item = pipe.buffer.popleft()
                break
            except IndexError:
                pass
            # Not in there: a driver turns the loop in here, and what is raised then, in whichever call, would remember
            # the error that this thread handles, and with it this frame and the iterator.
            self._wait()
        if pipe.paused and len(pipe.buffer) <= pipe.resume_at:
            pipe.paused = False
            self._loop.post(pipe.resume)
        call = self._call
        if call.why is DEADLINE and not self._ended:  # it passed while items lay ready: they came too late
            self._finish()
        return item

    def _wait(self) -> None:
        """Wait until there is an item; raise StopIteration, or what ended the stream, where none comes."""
        call, pipe, loop = self._call, self._pipe, self._loop
        buffer = pipe.buffer
        lock = self._waiter = loop.thread_lock()  # the iterator may have been handed to another thread
        if self._ended:
            raise StopIteration
        call.lock = lock
        limit = None if self._item_timeout is None else time.monotonic() + self._item_timeout
        wait = 0.0
        try:
            while True:
                pipe.hungry = True
                if buffer or call.done or call.left:  # another thread closes it, or has
                    break
                wait = loop.look(call)
                if call.done or wait == 0.0:
                    break
                if limit is not None:
                    remaining = limit - time.monotonic()
                    if remaining <= 0:
                        raise DeadlineExceededError(self._item_timeout)
                    wait = min(wait, remaining)
                if buffer:
                    break
                loop.wait_at_most(call, wait, lock)
        except BaseException:
            pipe.hungry = False
            self._ended = True
            loop.abandon(call)
            self._leave()
            raise
        pipe.hungry = False
        self._waiter = None
        if self._ended or not buffer:
            self._finish()
            raise StopIteration

    def _finish(self) -> None:
        """End the stream: raise what ended it, if anything did, unless it was closed meanwhile."""
        if self._ended:
            return
        self._ended = True
        call = self._call
        error = call.error
        self._leave()
        if error is not None or call.why is not None:
            try:
                raise self._loop.failure(call, error)
            finally:
                call.error = error = None

    def close(self) -> None:
        """Run the generator's ``aclose`` on the loop and wait for it, up to the facade's grace; harmless when repeated.

        What the generator's clean-up raises comes out. A ``next()`` that waits on another thread ends as the iteration
        does, once this is over.
        """
        if self._ended:
            return
        self._ended = True
        call = self._call
        waiter = self._waiter
        error: BaseException | None = None
        try:
            if not call.done:
                call.lock = self._loop.thread_lock()
                error = self._loop.abandon(call, CLOSED)
        finally:
            self._leave()
            if waiter is not None:
                call.lock = waiter
                call.wake()
                if not call.done:  # and the waiter may turn the loop
                    self._loop.post(call.wake)
        if error is not None and not isinstance(error, asyncio.CancelledError):
            try:
                raise error
            finally:
                del error

    def _leave(self) -> None:
        self._pipe.buffer.clear()
        if not self._call.left:  # by close(), while next() was interrupted on another thread
            self._loop.leave(self._call)

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._ended:
            return
        # Collected without close(), on whatever thread: the generator is closed, but nobody waits for it.
        self._ended = True
        loop, call = self._loop, self._call
        if call.why is None:
            call.why = CLOSED
        call.left = True
        loop.calls.pop(call, None)
        if call.done:
            call.forget()
        else:
            loop.post(loop.cancel, call)
