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
        """Return deep copies of all items: what is changed in place later on does not reach them."""
        from copy import deepcopy

        try:
            return deepcopy(self._items)
        except TypeError as error:
            raise ConfigurationError(
                f"an item cannot be copied ({error}), and so what is done to it could not be undone: "
                "give its class a __deepcopy__, or keep what cannot be copied out of it"
            ) from error

    def _restore(self, kept: dict[Any, Any]) -> bool:
        """Go back to a snapshot, and say whether anything was changed since. What was not stays the same object."""
        unchanged = {key for key, item in kept.items() if key in self._items and _alike(self._items[key], item, {})}
        if len(unchanged) == len(kept) == len(self._items):
            return False
        from copy import deepcopy

        fresh = deepcopy(kept)
        self._items = {key: self._items[key] if key in unchanged else fresh[key] for key in kept}
        return True


def _alike(item: Any, kept: Any, seen: dict[int, Any]) -> bool:
    """Say whether *item* still is as it was when *kept* was copied from it, as far as can be seen.

    Not by ``==``: entities are mostly equal by their id, or to nothing but themselves.
    """
    if item is kept or id(item) in seen:
        return True
    if type(item) is not type(kept):
        return False
    seen[id(item)] = item  # held: else its id might become another object's
    if isinstance(item, Mapping):
        return len(item) == len(kept) and all(key in kept and _alike(item[key], kept[key], seen) for key in item)
    if isinstance(item, (list, tuple)):
        return len(item) == len(kept) and all(_alike(one, other, seen) for one, other in zip(item, kept, strict=True))
    state = item.__getstate__()
    return _alike(state, kept.__getstate__(), seen) if state is not None else bool(item == kept)


class FakeUnitOfWork(AbstractUnitOfWork):
    """A unit of work over an in-memory ``repository``, for tests: it really forgets what was not committed.

    That goes for items added and for changes made in items: those that were changed are replaced by copies of what was
    committed. ``committed`` says whether there was a commit; ``rolled_back``, whether the end came without one, or
    after changes that followed it.

    Raises:
        ConfigurationError: at the commit, an item cannot be copied.
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
        if self.repository._restore(self._kept) or not self.committed:
            self.rolled_back = True
