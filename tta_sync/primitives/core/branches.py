"""Several branches at once, with one end: the engine under Parallel and Map.

Lighter than TaskGroup and, on the success path, than gather: a branch reports its own end, so no task needs a callback.
After the first failure the siblings are cancelled and awaited, so that no side effect of theirs lands later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import was_called
from tta_sync.primitives.core.base import note, shown

Run = Callable[[Any, WorkflowContext], Any]
Call = tuple[str, Run, Any, WorkflowContext]
"""A task name, what to run, and with what."""


class _Branches:
    """The state of one execution (loop thread only)."""

    __slots__ = ("collect", "errors", "failed", "left", "loop", "progress", "results", "started", "stopping", "waiter")

    def __init__(self, total: int, collect: bool, progress: Callable[[int, int], None] | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.waiter: asyncio.Future[None] = self.loop.create_future()
        self.results: list[Any] = [None] * total
        self.left = total
        self.started = 0
        self.failed = 0
        self.collect = collect
        self.errors: list[tuple[int, BaseException]] = []
        self.stopping = False
        self.progress = progress

    async def branch(self, index: int, run: Run, data: Any, context: WorkflowContext) -> None:
        """Run one branch; whatever it raises is kept here, so that no exit of the interpreter starts inside a task."""
        self.started += 1
        try:
            self.results[index] = await run(data, context)
        except BaseException as error:
            self._failed(index, error)
        self.left -= 1
        if self.progress is not None:
            self.progress(self.left, self.failed)
        if not self.left:
            self.wake()

    def _failed(self, index: int, error: BaseException) -> None:
        self.failed += 1
        if self.left < len(self.results):  # another branch has ended
            was_called(error)
        if self.collect and isinstance(error, Exception):
            self.results[index] = error
        elif not (self.stopping and isinstance(error, asyncio.CancelledError)):
            self.errors.append((index, error))
            self.wake()

    def wake(self) -> None:
        # A loop that is closed with the branch still suspended throws GeneratorExit in: nobody is left to be woken.
        if not self.waiter.done() and not self.loop.is_closed():
            self.waiter.set_result(None)

    def check_started(self, tasks: list[asyncio.Task[None]]) -> None:
        """Notice branches that somebody cancelled before their first step: they never reach `branch`, nor report."""
        for index, task in enumerate(tasks):
            if task.cancelled() and not self.stopping:
                self.errors.append((index, asyncio.CancelledError()))
                self.wake()
                return
        if self.started < len(tasks) and not self.waiter.done():
            self.loop.call_soon(self.check_started, tasks)

    async def settle(self, tasks: Iterable[asyncio.Task[None]]) -> asyncio.CancelledError | None:
        """Cancel what still runs and await it; return the cancellation that hit the caller meanwhile, if any."""
        self.stopping = True
        hit = None
        pending = [task for task in tasks if not task.done()]
        for task in pending:
            task.cancel()
        while pending:
            try:
                await asyncio.wait(pending)
            except asyncio.CancelledError as cancelled:
                hit = cancelled
                for task in pending:
                    task.cancel()
            pending = [task for task in pending if not task.done()]
        return hit

    def verdict(self, label: Callable[[int], str], hit: BaseException | None) -> BaseException:
        """Choose what comes out: an interrupt before a cancellation before the first error, the others as its notes."""
        errors, self.errors, self.results = self.errors, [], []  # else each error's frames would lead back to it
        for _, error in errors:
            if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
                return error
        if hit is not None:
            return hit
        index, first = errors[0]
        if isinstance(first, Exception):
            note(first, f"in {label(index)}")
            for index, error in errors[1:]:
                if error is not first:
                    note(first, f"{label(index)} failed as well: {shown(error)}")
        return first


async def run_all(calls: list[Call], label: Callable[[int], str], collect: bool = False) -> list[Any]:
    """Run all *calls* at once and return their results in order."""
    branches = _Branches(len(calls), collect, None)
    create_task = branches.loop.create_task
    tasks = [
        create_task(branches.branch(index, run, data, context), name=name)
        for index, (name, run, data, context) in enumerate(calls)
    ]
    branches.loop.call_soon(branches.check_started, tasks)
    return await _end(branches, tasks, label)


async def run_windowed(
    calls: Iterator[Call],
    total: int,
    limit: int,
    label: Callable[[int], str],
    collect: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Any]:
    """Run *calls*, at most *limit* of them at a time, and return their results in order.

    *progress* is told (calls left, calls failed) after each.
    """
    if not total:
        return []
    window = _Window(calls, total, collect, progress)
    for _ in range(min(limit, total)):
        window.launch()
    return await _end(window, window.tasks, label)


class _Window(_Branches):
    """Branches that begin when an earlier one has ended."""

    __slots__ = ("calls", "tasks")

    def __init__(
        self, calls: Iterator[Call], total: int, collect: bool, progress: Callable[[int, int], None] | None
    ) -> None:
        super().__init__(total, collect, progress)
        self.calls = enumerate(calls)
        self.tasks: dict[asyncio.Task[None], int] = {}

    def launch(self) -> None:
        following = next(self.calls, None)
        if following is not None:
            index, (name, run, data, context) = following
            coroutine = self.branch(index, run, data, context)
            task = self.loop.create_task(coroutine, name=name)
            self.tasks[task] = index
            task.add_done_callback(self.ended)

    def ended(self, task: asyncio.Task[None]) -> None:
        # A callback runs with the variables of whoever added it, not with those of the task that has ended: what one
        # branch sets, the next one does not see.
        index = self.tasks.pop(task)
        if self.stopping:
            return
        if task.cancelled():  # before its first step: it could not report
            self.errors.append((index, asyncio.CancelledError()))
            self.wake()
        else:
            self.launch()


async def _end(branches: _Branches, tasks: Iterable[asyncio.Task[None]], label: Callable[[int], str]) -> list[Any]:
    hit: BaseException | None = None
    try:
        await branches.waiter
    except GeneratorExit:
        raise  # dropped with its loop: there is nothing left to wait with
    except BaseException as error:
        hit = error
    if hit is None and not branches.errors:
        results, branches.results = branches.results, []
        return results
    hit = await branches.settle(tasks) or hit
    verdict = branches.verdict(label, hit)
    try:
        raise verdict
    finally:
        del verdict, hit  # else the error's frames would lead back to it
