"""Loop-bound things that live as long as the loop: an HTTP client, a connection pool.

Each is opened and closed in one task of its own, because anyio's cancel scopes and many clients demand it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Generator
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

from tta_sync.exceptions import LoopUnavailableError, copy_error

T = TypeVar("T")

logger = logging.getLogger("tta_sync")


_in_a_resource: contextvars.ContextVar[bool] = contextvars.ContextVar("tta_sync_in_a_resource")


def belongs_to_a_resource(context: contextvars.Context | None) -> bool:
    """Say whether a task with this *context* opened a resource, or was started by what a resource opened."""
    return context is not None and _in_a_resource in context


class _Opened:
    """One opened resource. Loop thread only."""

    def __init__(self, resource: Resource[Any], on_ready: Callable[[], object]) -> None:
        self.closing = asyncio.Event()
        self.ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._on_ready = on_ready
        # An empty context: what is opened for the first caller must not carry that caller's variables to all others.
        context = contextvars.Context()
        context.run(_in_a_resource.set, True)
        # Not by create_task(), whose task may be an eager one (3.12): opened before anybody knows of it.
        self.task = asyncio.Task(
            self._hold(resource.factory),
            loop=asyncio.get_running_loop(),
            name=f"resource {resource.name}",
            context=context,
        )

    async def _hold(self, factory: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        try:
            async with factory() as opened:
                self._on_ready()
                self.ready.set_result(opened)
                await self.closing.wait()
        except BaseException as error:
            if self.ready.done():
                raise  # closing failed
            self.ready.set_exception(_kept(error))
            self.ready.exception()  # read here too: the first caller may have gone


def _kept(error: BaseException) -> BaseException:
    """Return *error* as those who wait for the resource are to get it."""
    if isinstance(error, StopIteration):  # a future refuses it, and they would wait for ever
        refused = RuntimeError("a resource's factory raised StopIteration")
        refused.__cause__ = error
        return refused
    twin = copy_error(error)
    if twin is not error:
        error.__traceback__ = None  # one object that is raised at each opening must not grow with them
    return twin


class OpenResources:
    """The resources that one loop has opened, in the order in which they became ready. Loop thread only."""

    def __init__(self) -> None:
        self._opened: dict[Resource[Any], _Opened] = {}

    async def get(self, resource: Resource[T]) -> T:
        """Return the opened object, opening it first where nobody has."""
        opened = self._opened.get(resource)
        if opened is None:

            def to_the_end() -> None:
                # What it awaited while opening became ready before it, and must be closed after it.
                self._opened[resource] = self._opened.pop(resource)

            opened = self._opened[resource] = _Opened(resource, to_the_end)
        # Awaited through wait(): the first caller's cancellation must not take the opening from those who wait beside
        # it.
        await asyncio.wait([opened.ready])
        error = opened.ready.exception()
        if error is None:
            result: T = opened.ready.result()
            return result
        if self._opened.get(resource) is opened:
            del self._opened[resource]  # the next use tries again
        raise copy_error(error)

    def tasks(self) -> list[asyncio.Task[None]]:
        return [opened.task for opened in self._opened.values()]

    async def close(self, grace: float) -> None:
        """Close all, the last opened first; one that does not close within *grace* seconds is cancelled and left."""
        while self._opened:
            resource, opened = self._opened.popitem()
            opened.closing.set()
            if not opened.ready.done():
                opened.task.cancel()
            done, _ = await asyncio.wait([opened.task], timeout=grace)
            if not done:
                opened.task.cancel()
                logger.warning("resource %s did not close within %g s", resource.name, grace)
            elif not opened.task.cancelled() and (error := opened.task.exception()) is not None:
                logger.warning("resource %s failed to close: %r", resource.name, error)


class Resource(Generic[T]):
    """A promise of an opened object: ``await`` it inside a coroutine on the managed loop.

    Made at import time without a loop; opened at first use, once per process, and again in a forked child.
    """

    def __init__(
        self,
        factory: Callable[[], AbstractAsyncContextManager[T]],
        opened_here: Callable[[], OpenResources | None],
    ) -> None:
        if not callable(factory):
            raise TypeError(
                f"resource() takes a function that returns an async context manager, not {factory!r}: "
                "write resource(lambda: Client(...))"
            )
        self.factory = factory
        self.name = getattr(factory, "__qualname__", None) or type(factory).__qualname__
        self._opened_here = opened_here

    def __await__(self) -> Generator[Any, None, T]:
        opened = self._opened_here()
        if opened is None:
            raise LoopUnavailableError(
                f"resource {self.name} lives on its facade's loop: await it in a workflow that runs through that facade"
            )
        return opened.get(self).__await__()

    def __repr__(self) -> str:
        return f"resource({self.name})"
