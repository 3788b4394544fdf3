"""The outbox against a model: any sequence of writes, savepoints, ends, deaths and outages, and two relays at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from sqlalchemy.orm import Session

from tta_sync.context import Message, ports
from tta_sync.sqlalchemy import OutboxRelay, create_engine, create_outbox
from tta_sync.testing import FakeClock


class Dies(BaseException):
    """The process ends here."""


class Place:
    """Where messages go: it remembers what it has had, and fails as the example says."""

    def __init__(self) -> None:
        self.had: list[str] = []  # bodies in the order of their arrival
        self.keys: set[str] = set()
        self.trouble: list[str] = []  # one for each message to come
        self.poison: set[str] = set()

    def deliver(self, messages: Sequence[Message], fresh: Callable[[], bool]) -> Mapping[str, Exception | None]:
        outcome: dict[str, Exception | None] = {}
        failed = set()
        for message in messages:
            if message.unit in failed:
                continue
            trouble = self.trouble.pop() if self.trouble else ""
            if trouble == "down":
                raise ConnectionError("down")
            if trouble == "dies before":
                raise Dies
            assert fresh()
            if message.body in self.poison:
                outcome[message.key] = ValueError("poison")
                failed.add(message.unit)
                continue
            if message.key not in self.keys:
                self.keys.add(message.key)
                self.had.append(message.body)
            if trouble == "dies after":
                raise Dies
            if trouble == "down after":
                raise ConnectionError("down")
            outcome[message.key] = None
        return outcome

    def forget(self, keys: Sequence[str]) -> None:
        if self.trouble and self.trouble.pop() == "dies before":
            raise Dies


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    path: Path = tmp_path_factory.mktemp("model") / "outbox.db"
    engine = create_engine(f"sqlite:///{path}")
    create_outbox(engine)
    yield engine
    engine.dispose()


class Silent:
    """A delivery for the courier that has died before it could begin."""

    def deliver(self, messages: Any, fresh: Any) -> Any:
        raise ConnectionError("dead")

    def forget(self, keys: Any) -> None: ...


message = st.sampled_from(["good", "good", "good", "poison"])
savepoint = st.tuples(st.booleans(), st.lists(message, max_size=3))
transaction = st.tuples(st.just("transaction"), st.booleans(), st.lists(savepoint, max_size=4))
run = st.tuples(
    st.just("run"),
    st.integers(0, 1),
    st.integers(1, 7),
    st.lists(st.sampled_from(["", "", "", "down", "down after", "dies before", "dies after"]), max_size=6),
)


@settings(
    max_examples=120,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.one_of(transaction, transaction, run), max_size=12))
def test_what_arrives_is_what_was_committed_each_once_and_in_order(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, steps: list[Any]
) -> None:
    """Whatever fails or dies in between: in the end what was committed has arrived or is parked, and nothing else."""
    monkeypatch.setattr("tta_sync.sqlalchemy.courier.hand_over", lambda *arguments: None)
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM tta_sync_outbox")
    clock = FakeClock(epoch=4e9)  # later than anything that is written here
    place = Place()
    relays = [OutboxRelay(engine, place, attempts=2, clock=clock) for _ in range(2)]
    committed: list[list[str]] = []
    number = 0
    for step in steps:
        if step[0] == "run":
            _, which, limit, trouble = step
            place.trouble = list(trouble)
            clock.jump(relays[which].pause)
            try:
                relays[which].run_once(limit)
            except Dies:
                relays[which] = OutboxRelay(engine, place, attempts=2, clock=clock)
            place.trouble = []
            clock.jump(1.0)
            continue
        _, commits, savepoints = step
        written = []
        with Session(engine) as session:
            for stands, messages in savepoints:
                nested = session.begin_nested()
                for kind in messages:
                    number += 1
                    body = f"{kind}-{number}"
                    if kind == "poison":
                        place.poison.add(body)
                    ports.outbox.write(session, "name", body, body, Silent())
                    if stands:
                        written.append(body)
                (nested.commit if stands else nested.rollback)()
            if commits:
                session.commit()
                committed.append(written)
            else:
                session.rollback()
    relay = OutboxRelay(engine, place, attempts=2, clock=clock)
    for _ in range(4 * number + 4):
        relay.run_once(3)
        clock.jump(5.0)
    wanted = [[body for body in unit if body not in place.poison] for unit in committed]
    assert sorted(place.had) == sorted(body for unit in wanted for body in unit)
    for unit in wanted:
        assert [body for body in place.had if body in set(unit)] == unit
    parked = [message.job_id for message in relay.parked(1000)]
    assert sorted(parked) == sorted(body for unit in committed for body in unit if body in place.poison)
    assert relay.waiting() == 0
