"""Health: each part is asked, named, and never waited for longer than a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient

from blueprints.health.checks import Check, ask_all
from blueprints.settings import SettingsError
from tests.conftest import RedisServer

MakeClient = Callable[..., FlaskClient]


def test_health_is_the_seeds_when_all_parts_answer(make_client: MakeClient, redis_url: str) -> None:
    """With Redis, database and loop at work, all three routes say so with 200."""
    client = make_client(REDIS_URL=redis_url)
    health = client.get("/health")
    assert (health.status_code, health.json) == (200, {"status": "healthy"})
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json["checks"] == {"loop": "ok", "redis": "ok", "database": "ok"}
    assert client.get("/livez").status_code == 200


def test_readyz_names_redis_when_it_is_down(make_client: MakeClient, own_redis_server: RedisServer) -> None:
    """A Redis that has gone is named, the others stay ok, and it is ready again as soon as Redis is back."""
    client = make_client(REDIS_URL=own_redis_server.url)
    own_redis_server.stop()
    ready = client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json["checks"]["redis"] != "ok"
    assert (ready.json["checks"]["loop"], ready.json["checks"]["database"]) == ("ok", "ok")
    health = client.get("/health")
    assert health.status_code == 503
    assert health.json["status"] == "unhealthy"
    assert "redis" in health.json["error"]
    assert client.get("/livez").status_code == 200
    own_redis_server.start()
    assert client.get("/readyz").status_code == 200


def test_readyz_names_the_database_when_it_is_down(make_client: MakeClient, redis_url: str) -> None:
    """A database without our tables, or none at all, is named."""
    client = make_client(REDIS_URL=redis_url)
    with client.application.extensions["database"].engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE documents"))
    ready = client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json["checks"] == {"loop": "ok", "redis": "ok", "database": "unavailable (OperationalError)"}


@pytest.mark.parametrize("replace", [lambda file: None, lambda file: file.write_bytes(b"no database" * 100)])
def test_readyz_names_the_database_when_its_file_has_gone(
    make_client: MakeClient, redis_url: str, replace: Callable[[Path], object]
) -> None:
    """An SQLite file that was moved away or replaced is found out, although open connections go on with the old one."""
    client = make_client(REDIS_URL=redis_url)
    assert client.get("/readyz").status_code == 200
    assert client.post("/api/process", json={"text": "A connection stays in the pool."}).status_code == 200
    file = Path(client.application.extensions["database"].engine.url.database)
    for part in file.parent.glob(f"{file.name}*"):
        part.rename(part.with_name(f"moved-{part.name}"))
    replace(file)
    there = file.exists()
    ready = client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json["checks"]["database"].startswith("unavailable (")
    assert file.exists() == there


def test_readyz_names_the_loop_when_it_does_not_run(
    make_client: MakeClient, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that takes no calls is named."""
    from blueprints import app
    from tta_sync.exceptions import LoopUnavailableError

    def refuse(*_: object, **__: object) -> None:
        raise LoopUnavailableError("shut down")

    monkeypatch.setattr(app, "call_sync", refuse)
    ready = make_client(REDIS_URL=redis_url).get("/readyz")
    assert ready.status_code == 503
    assert ready.json["checks"] == {"loop": "unavailable (LoopUnavailableError)", "redis": "ok", "database": "ok"}


def test_health_says_which_setting_is_missing_and_no_secret(
    make_client: MakeClient, free_port: Callable[[], int]
) -> None:
    """The error names REDIS_URL where that is not set, and never quotes a password."""
    assert "REDIS_URL" in make_client().get("/health").json["error"]
    client = make_client(REDIS_URL=f"redis://:hidden@127.0.0.1:{free_port()}/0")
    response = client.get("/health")
    assert response.status_code == 503
    assert "hidden" not in response.text


def test_check_is_bounded_when_a_part_hangs() -> None:
    """A part that hangs costs its budget, is named, and is not asked again before it has answered."""
    release, asked = threading.Event(), []

    def hang() -> None:
        asked.append(1)
        release.wait(20)

    checks = [Check("hangs", hang), Check("works", lambda: None)]
    try:
        began = time.monotonic()
        for _ in range(3):
            answers = ask_all(checks, budget=0.1)
            assert answers == {"hangs": "no answer within 0.1 s", "works": "ok"}
        assert time.monotonic() - began < 5
        assert asked == [1]
    finally:
        release.set()


def test_check_is_asked_anew_when_the_hanging_question_was_answered(eventually: Callable[..., object]) -> None:
    """As soon as the part answers again, so does the check."""
    release = threading.Event()
    check = Check("slow", lambda: release.wait(20))
    assert ask_all([check], budget=0.05)["slow"] != "ok"
    release.set()
    eventually(lambda: ask_all([check], budget=0.5)["slow"] == "ok")


def test_check_says_what_a_setting_error_says_and_only_the_class_of_others() -> None:
    """Our own words are shown; a driver's words might hold an address or a password."""

    def unset() -> None:
        raise SettingsError("REDIS_URL is not set")

    def broken() -> None:
        raise OSError("password=hidden")

    answers = ask_all([Check("a", unset), Check("b", broken)])
    assert answers == {"a": "REDIS_URL is not set", "b": "unavailable (OSError)"}
