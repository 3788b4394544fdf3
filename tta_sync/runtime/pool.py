"""Threads for steps that block: an executor whose threads never keep the process alive."""

from __future__ import annotations

from _queue import Empty, SimpleQueue  # not queue's: gevent replaces those
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from tta_sync.runtime import native

P = ParamSpec("P")
R = TypeVar("R")


class DaemonPool(ThreadPoolExecutor):
    """A bounded pool of daemon threads.

    The standard executor's threads are joined at exit, so one step that blocks for good would hold the process for
    good. It is a ThreadPoolExecutor by type only because ``loop.set_default_executor`` asks for one;
    ``asyncio.to_thread`` then runs here too.
    """

    def __init__(
        self, max_workers: int, thread_name_prefix: str, spawn: Callable[[Callable[[], object], str], object]
    ) -> None:
        super().__init__(max_workers, thread_name_prefix)
        self._limit = max_workers
        self._spawn = spawn
        self._prefix = thread_name_prefix
        self._items: SimpleQueue[tuple[Future[Any], Callable[..., Any], Any, Any] | None] = SimpleQueue()
        self._mutex = native.allocate_lock()  # guards _count, _waiting, _closed
        self._count = 0
        self._waiting = 0  # threads with nothing to do, less the items that are on their way to one
        self._closed = False

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Queue *fn*; start a thread if none is idle and the limit allows.

        Where the system has no thread to give, *fn* waits for those that there are, and where there is none, it is
        refused with the system's error and never runs. The next to come tries again, for all that wait.
        """
        future: Future[R] = Future()
        with self._mutex:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            while self._waiting < 1 and self._count < self._limit:
                try:
                    self._spawn(self.work, f"{self._prefix}_{self._count + 1}")
                except Exception:
                    if self._count == 0:
                        raise
                    break
                self._count += 1
                self._waiting += 1
            self._items.put((future, fn, args, kwargs))  # only now: what is refused must not run
            self._waiting -= 1
        return future

    def work(self) -> None:
        """Serve the queue: the body of each thread."""
        while (item := self._items.get()) is not None:
            future, fn, args, kwargs = item
            if future.set_running_or_notify_cancel():
                try:
                    result = fn(*args, **kwargs)
                except StopIteration as error:  # an asyncio future refuses it, and its waiter would wait for ever
                    refused = RuntimeError("a function on a thread raised StopIteration")
                    refused.__cause__ = error
                    future.set_exception(refused)
                    del refused
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            del item, future, fn, args, kwargs
            with self._mutex:
                self._waiting += 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; end the threads once they are idle. Waits for nobody: the threads are daemons."""
        with self._mutex:
            self._closed = True
        if cancel_futures:
            try:
                while (item := self._items.get_nowait()) is not None:
                    item[0].cancel()
            except Empty:
                pass
        for _ in range(self._count):
            self._items.put(None)
