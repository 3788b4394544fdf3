"""Repositories and units of work: how workflow code speaks of storage without knowing which one.

Source: Percival and Gregory, *Architecture Patterns with Python*, under TTA.dev's names. For SQLAlchemy,
``tta_sync.sqlalchemy`` has a unit of work of its own.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from tta_sync.exceptions import ConfigurationError

Item = TypeVar("Item")


class AbstractRepository(ABC, Generic[Item]):
    """A collection of items of one kind, wherever they are kept. The methods of a subclass may be coroutines."""

    @abstractmethod
    def add(self, item: Item) -> Any:
        """Put *item* in."""

    @abstractmethod
    def get(self, key: Any) -> Any:
        """Return the item whose key this is, or None."""

    @abstractmethod
    def list(self) -> Any:
        """Return all items."""


class AbstractUnitOfWork(ABC):
    """Changes that are kept together or not at all.

    A context manager for ``with`` and ``async with``: what was not committed when the block ends, normally or by an
    error, is rolled back. ``commit`` and ``rollback`` of a subclass may be coroutines; then it is for ``async with``.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pending = self.rollback()
        if inspect.iscoroutine(pending):
            pending.close()
            raise ConfigurationError(f"{type(self).__name__}.rollback is async: use `async with`, not `with`")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pending = self.rollback()
        if inspect.isawaitable(pending):
            await pending

    @abstractmethod
    def commit(self) -> Any:
        """Keep the changes made so far."""

    @abstractmethod
    def rollback(self) -> Any:
        """Drop the changes since the last commit; without any, do nothing."""


class InMemoryRepository(AbstractRepository[Any]):
    """Items in a dict, by their ``id`` (attribute or mapping key). For tests."""

    def __init__(self) -> None:
        self._items: dict[Any, Any] = {}

    def add(self, item: Any) -> None:
        key = item.get("id") if isinstance(item, Mapping) else getattr(item, "id", None)
        if key is None:
            raise ConfigurationError(
                f"{item!r} has no id: give it an `id` attribute, or an 'id' key where it is a dict"
            )
        self._items[key] = item

    def get(self, key: Any) -> Any:
        return self._items.get(key)

    def list(self) -> list[Any]:
        return [*self._items.values()]

    def _snapshot(self) -> dict[Any, Any]:
        return self._items.copy()

    def _restore(self, items: dict[Any, Any]) -> None:
        self._items = items.copy()


class FakeUnitOfWork(AbstractUnitOfWork):
    """A unit of work over an in-memory ``repository``, for tests: it really forgets what was not committed.

    ``committed`` says whether there was a commit; ``rolled_back``, whether the end came without one, or after changes
    that followed it.
    """

    def __init__(self) -> None:
        self.repository = InMemoryRepository()
        self.committed = False
        self.rolled_back = False
        self._kept = self.repository._snapshot()

    def commit(self) -> None:
        self._kept = self.repository._snapshot()
        self.committed = True

    def rollback(self) -> None:
        if self.repository._snapshot() != self._kept or not self.committed:
            self.rolled_back = True
        self.repository._restore(self._kept)
