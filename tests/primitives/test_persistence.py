"""Repositories and units of work."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.persistence import AbstractRepository, AbstractUnitOfWork, FakeUnitOfWork


@dataclass(frozen=True)
class Order:
    id: int
    text: str = ""


class AsyncUnitOfWork(AbstractUnitOfWork):
    """As one over an async driver would be."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def commit(self) -> None:
        self.log.append("commit")

    async def rollback(self) -> None:
        self.log.append("rollback")


def test_repository_gives_back_what_was_added() -> None:
    """By id, of objects and of dicts, and as a list."""
    repository = FakeUnitOfWork().repository
    repository.add(Order(1))
    repository.add({"id": "two"})
    repository.add(Order(1, "newer"))
    assert repository.get(1) == Order(1, "newer")
    assert repository.get("two") == {"id": "two"}
    assert repository.get(3) is None
    assert repository.list() == [Order(1, "newer"), {"id": "two"}]
    assert isinstance(repository, AbstractRepository)


def test_repository_refuses_an_item_without_an_id() -> None:
    """It could not be found again."""
    with pytest.raises(ConfigurationError, match="has no id"):
        FakeUnitOfWork().repository.add("text")


def test_uncommitted_changes_are_rolled_back() -> None:
    """Leaving the block without a commit, normally or by an error, forgets what was added in it."""
    uow = FakeUnitOfWork()
    with uow:
        uow.repository.add(Order(1))
    assert uow.repository.list() == []
    assert (uow.committed, uow.rolled_back) == (False, True)
    try:
        with uow:
            uow.repository.add(Order(2))
            raise KeyError
    except KeyError:
        pass
    assert uow.repository.list() == []


def test_committed_changes_stay() -> None:
    """What was committed stays; what came after it does not."""
    uow = FakeUnitOfWork()
    with uow as same:
        assert same is uow
        uow.repository.add(Order(1))
        uow.commit()
    assert (uow.committed, uow.rolled_back) == (True, False)
    with uow:
        uow.repository.add(Order(2))
    assert uow.repository.list() == [Order(1)]
    assert (uow.committed, uow.rolled_back) == (True, True)


def test_unit_of_work_serves_async_code() -> None:
    """``async with`` does the same, and awaits what is async."""

    async def main() -> list[str]:
        fake, real = FakeUnitOfWork(), AsyncUnitOfWork()
        async with fake as same, real:
            assert same is fake
            fake.repository.add(Order(1))
            await real.commit()
        assert fake.repository.list() == []
        return real.log

    assert asyncio.run(main()) == ["commit", "rollback"]


def test_async_unit_of_work_is_refused_in_a_plain_with() -> None:
    """Its rollback would never run: the error says how to write it."""
    with pytest.raises(ConfigurationError, match="use `async with`"), AsyncUnitOfWork():
        pass


def test_abstract_classes_cannot_be_made() -> None:
    """Their methods are the subclass's to write."""
    for kind in (AbstractRepository, AbstractUnitOfWork):
        abstract: Any = kind
        with pytest.raises(TypeError, match="abstract"):
            abstract()
