"""Repositories and units of work."""

from __future__ import annotations

import asyncio
import threading
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


class Account:
    """An entity as people write them: equal to nothing but itself, and changed in place."""

    def __init__(self, number: int, balance: int) -> None:
        self.id = number
        self.balance = balance
        self.history: list[dict[str, int]] = [{"balance": balance}]
        self.oneself = self


class Slotted:
    __slots__ = ("id", "text")

    def __init__(self, number: int, text: str) -> None:
        self.id = number
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and other.id == self.id

    __hash__ = None  # type: ignore[assignment]


def change_dict(item: Any) -> None:
    item["v"] = 2


def change_type(item: Any) -> None:
    item["v"] = [1]


def change_inside(item: Any) -> None:
    item["deep"][0][1].add("more")


def change_attribute(item: Any) -> None:
    item.balance = 2


def change_inside_attribute(item: Any) -> None:
    item.history[0]["balance"] = 2


def change_slot(item: Any) -> None:
    item.text = "newer"


@pytest.mark.parametrize(
    ("item", "change", "look"),
    [
        ({"id": 1, "v": 1}, change_dict, lambda item: item["v"]),
        ({"id": 1, "v": 1}, change_type, lambda item: item["v"]),
        ({"id": 1, "deep": [(0, {"one"})]}, change_inside, lambda item: str(item["deep"])),
        (Account(1, 1), change_attribute, lambda item: item.balance),
        (Account(1, 1), change_inside_attribute, lambda item: str(item.history)),
        (Slotted(1, "text"), change_slot, lambda item: item.text),
    ],
)
def test_changes_made_in_an_item_are_rolled_back_unless_committed(item: Any, change: Any, look: Any) -> None:
    """A committed item that was changed in place is as it was; a change that is committed stays."""
    uow = FakeUnitOfWork()
    with uow:
        uow.repository.add(item)
        uow.commit()
    before = look(item)
    assert not uow.rolled_back
    for _ in range(2):  # the copy that comes back is forgotten as well
        with uow:
            change(uow.repository.get(1))
        assert look(uow.repository.get(1)) == before
        assert uow.rolled_back
    with uow:
        change(uow.repository.get(1))
        uow.commit()
        after = look(uow.repository.get(1))
    assert look(uow.repository.get(1)) == after != before


def test_item_that_was_not_changed_stays_the_same_object() -> None:
    """Tests hold on to what they have added; another item's change does not take it from them."""
    uow = FakeUnitOfWork()
    mine, other = Account(1, 1), Account(2, 1)
    with uow:
        uow.repository.add(mine)
        uow.repository.add(other)
        uow.commit()
    assert (uow.repository.get(1), uow.rolled_back) == (mine, False)
    with uow:
        other.balance = 5
        uow.repository.add(Account(3, 1))
    assert [item.balance for item in uow.repository.list()] == [1, 1]
    assert uow.repository.get(1) is mine
    assert uow.repository.get(2) is not other


def test_item_that_cannot_be_copied_is_refused_at_the_commit() -> None:
    """What was done to it could not be forgotten, and the error says so."""
    uow = FakeUnitOfWork()
    uow.repository.add({"id": 1, "lock": threading.Lock()})
    with pytest.raises(ConfigurationError, match=r"an item cannot be copied .*give its class a __deepcopy__"):
        uow.commit()
    assert not uow.committed


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
