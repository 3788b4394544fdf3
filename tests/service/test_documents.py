"""Documents over HTTP: what is stored is what was answered, bad input stores nothing, pages never slip."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient

from blueprints.documents import local
from blueprints.documents.models import Document

MakeClient = Callable[..., FlaskClient]

TEXT = "The bridge carries async work. Callers stay synchronous."
FIELDS = {
    "id",
    "summary",
    "keywords",
    "language",
    "word_count",
    "provider",
    "degraded",
    "cached",
    "correlation_id",
    "created_at",
}


@pytest.fixture
def client(make_client: MakeClient) -> FlaskClient:
    """A service without a provider."""
    return make_client()


def process(client: FlaskClient, text: str = TEXT, **more: Any) -> dict[str, Any]:
    response = client.post("/api/process", json={"text": text, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json
    return answer


def stored(client: FlaskClient) -> int:
    with client.application.extensions["database"].engine.connect() as connection:
        count: int = connection.scalar(sa.select(sa.func.count()).select_from(Document))
    return count


# ---- one document


def test_process_answers_all_fields_when_all_tasks_are_done(client: FlaskClient) -> None:
    """The answer has exactly the promised fields, each of the promised kind, and is what is stored."""
    answer = process(client)
    assert set(answer) == FIELDS
    assert answer["summary"] == TEXT
    assert answer["keywords"][0] == "bridge"
    assert answer["language"] == "en"
    assert answer["word_count"] == 8
    assert (answer["provider"], answer["degraded"], answer["cached"]) == ("local", False, False)
    created_at = datetime.fromisoformat(answer["created_at"])
    assert created_at.utcoffset() == timedelta(0)
    assert client.get(f"/api/documents/{answer['id']}").json == answer


@pytest.mark.parametrize("task", ["summary", "keywords", "language"])
def test_process_leaves_the_others_out_when_one_task_is_asked_for(client: FlaskClient, task: str) -> None:
    """Tasks that were not asked for leave null, null and []."""
    answer = process(client, tasks=[task, task])
    empty = {"summary": None, "keywords": [], "language": None}
    assert answer[task] != empty[task]
    for other in set(empty) - {task}:
        assert answer[other] == empty[other]
    assert answer["provider"] == ("local" if task == "summary" else None)


def test_process_stores_two_documents_when_the_text_comes_twice(client: FlaskClient) -> None:
    """The same text twice is two documents."""
    assert process(client)["id"] != process(client)["id"]
    assert stored(client) == 2


def test_process_takes_the_longest_text_in_any_script(client: FlaskClient) -> None:
    """A text of exactly the most characters is taken, whatever it is made of."""
    for text in ("a" * 200_000, "😀" * 200_000, "字" * 200_000, "word " * 40_000, "é\u0301\r\n\t" * 40_000):
        answer = process(client, text)
        assert len(answer["summary"]) <= local.SUMMARY_LENGTH
        assert client.get(f"/api/documents/{answer['id']}").json == answer


def test_process_works_through_real_texts(client: FlaskClient) -> None:
    """The project's own documents, and the licences of this machine, are summarised by their own sentences."""
    root = Path(__file__).parents[2]
    paths = [*root.glob("*.md"), *Path("/usr/share/common-licenses").glob("*")]
    for path in paths:
        text = path.read_text(errors="replace")[:200_000]
        answer = process(client, text)
        assert answer["language"] == "en"
        assert answer["word_count"] == len(text.split())
        assert answer["summary"]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("order-17.a_B", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("two words", False),
        ("tab\tin", False),
        ("é", False),
        ("a/b", False),
    ],
)
def test_request_id_is_taken_over_when_it_is_harmless(client: FlaskClient, given: str, taken: bool) -> None:
    """A good X-Request-ID is the correlation id, in body and header; another is replaced by one of ours."""
    response = client.post("/api/process", json={"text": TEXT}, headers={"X-Request-ID": given})
    assert (response.json["correlation_id"] == given) is taken
    assert response.headers["X-Request-ID"] == response.json["correlation_id"]


def test_document_is_404_when_there_is_none(client: FlaskClient) -> None:
    """An id that is not there, or can be none, is a 404 problem."""
    for document_id in ("0" * 8 + "-0000" * 3 + "-" + "0" * 12, "nothing", "%00", "%F0%9F%98%80", "a" * 5000, "'--"):
        response = client.get(f"/api/documents/{document_id}")
        assert_problem(response, 404)


# ---- bad input


def assert_problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.content_type == "application/problem+json"
    body: dict[str, Any] = response.json
    assert body["status"] == status
    assert body["code"]
    assert body["title"]
    assert body["correlation_id"] == response.headers["X-Request-ID"]
    return body


DEEP = 10_000
BAD = {
    "empty body": (b"", 400),
    "not JSON": (b"text=hello", 400),
    "half of it": (b'{"text": "a', 400),
    "not UTF-8": (b'{"text": "\xff"}', 400),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), 400),
    "deep and open": (b"[" * DEEP, 400),
    "deep": (b'{"text":' + b"[" * DEEP + b"]" * DEEP + b"}", 400),
    "deep objects": (b'{"text":' * DEEP + b"1" + b"}" * DEEP, 400),
    "raw NUL": (b'{"text": "a\x00b"}', 400),
    "endless number": (b'{"text": ' + b"9" * 10_000 + b"}", 400),
    "NaN": (b'{"text": NaN}', 400),
    "a list": (b"[]", 422),
    "null": (b"null", 422),
    "a text": (b'"text"', 422),
    "no text": (b"{}", 422),
    "text null": (b'{"text": null}', 422),
    "text a number": (b'{"text": 5}', 422),
    "text a list": (b'{"text": ["a"]}', 422),
    "text empty": (b'{"text": ""}', 422),
    "text blank": (b'{"text": " \\n\\t "}', 422),
    "text too long": (json.dumps({"text": "a" * 200_001}).encode(), 422),
    "text with NUL": (b'{"text": "a\\u0000b"}', 422),
    "text with a lone surrogate": (b'{"text": "a\\ud800b"}', 422),
    "unknown field": (b'{"text": "a", "colour": 1}', 422),
    "unknown field with NUL": (b'{"text": "a", "\\u0000": 1}', 422),
    "unknown task": (b'{"text": "a", "tasks": ["translate"]}', 422),
    "tasks empty": (b'{"text": "a", "tasks": []}', 422),
    "tasks null": (b'{"text": "a", "tasks": null}', 422),
    "tasks a text": (b'{"text": "a", "tasks": "summary"}', 422),
    "task a number": (b'{"text": "a", "tasks": [1]}', 422),
    "task a list": (b'{"text": "a", "tasks": [["summary"]]}', 422),
}


@pytest.mark.parametrize("name", BAD)
def test_process_refuses_and_stores_nothing_when_the_body_is_bad(client: FlaskClient, name: str) -> None:
    """Every bad body is a 4xx problem with a code, field errors where there are fields, and nothing is stored."""
    body, status = BAD[name]
    problem = assert_problem(client.post("/api/process", data=body, content_type="application/json"), status)
    if status == 422:
        assert problem["errors"]
        for field, messages in problem["errors"].items():
            assert isinstance(field, str)
            assert messages
            assert all(isinstance(message, str) for message in messages)
    assert len(json.dumps(problem)) < 2_000
    assert stored(client) == 0


def test_field_errors_are_under_the_fields_name(client: FlaskClient) -> None:
    """errors is {field: [messages]}, for every field that is wrong."""
    response = client.post("/api/process", json={"text": 5, "tasks": ["x"], "colour": 1})
    assert set(assert_problem(response, 422)["errors"]) == {"text", "tasks", "colour"}


def test_process_refuses_when_the_content_type_is_another(client: FlaskClient) -> None:
    """A body that is not declared as JSON is 415."""
    assert_problem(client.post("/api/process", data="text=a"), 415)
    assert_problem(client.post("/api/process", data={"text": "a"}), 415)
    assert_problem(client.post("/api/process"), 415)


def test_process_refuses_when_the_method_is_wrong(client: FlaskClient) -> None:
    """A wrong method is 405 and says which are right."""
    response = client.get("/api/process")
    assert_problem(response, 405)
    assert "POST" in response.headers["Allow"]


def test_process_refuses_when_the_body_is_over_the_limit(make_client: MakeClient) -> None:
    """One byte over TTA_MAX_BODY is 413, the limit itself is not."""
    client = make_client(TTA_MAX_BODY=1000)
    body = json.dumps({"text": "a" * 500}).encode()
    fits = body + b" " * (1000 - len(body))
    assert client.post("/api/process", data=fits, content_type="application/json").status_code == 200
    assert_problem(client.post("/api/process", data=fits + b" ", content_type="application/json"), 413)
    assert stored(client) == 1


def test_process_keeps_to_the_text_limit_when_it_is_set(make_client: MakeClient) -> None:
    """TTA_MAX_TEXT counts characters, not bytes."""
    client = make_client(TTA_MAX_TEXT=3)
    assert process(client, "日本語")["word_count"] == 3
    assert_problem(client.post("/api/process", json={"text": "four"}), 422)


# ---- the listing


def test_listing_turns_every_page_once_whatever_the_page_size(client: FlaskClient) -> None:
    """Any page size gives the same order, newest first, each document once, and ends with null."""
    ids = [process(client, tasks=["language"])["id"] for _ in range(7)]
    for limit in (1, 2, 3, 7, 100):
        found: list[str] = []
        cursor: str | None = None
        while True:
            page = client.get("/api/documents", query_string={"limit": limit, **({"cursor": cursor} if cursor else {})})
            assert page.status_code == 200
            assert set(page.json) == {"items", "next_cursor"}
            assert len(page.json["items"]) <= limit
            found += [document["id"] for document in page.json["items"]]
            cursor = page.json["next_cursor"]
            if cursor is None:
                break
        assert found == ids[::-1]


def test_listing_neither_repeats_nor_skips_when_documents_arrive_between_pages(client: FlaskClient) -> None:
    """What is stored while somebody turns pages shifts nothing."""
    ids = [process(client, tasks=["language"])["id"] for _ in range(4)]
    first = client.get("/api/documents?limit=2").json
    process(client)
    second = client.get("/api/documents", query_string={"limit": 2, "cursor": first["next_cursor"]}).json
    assert [document["id"] for document in first["items"] + second["items"]] == ids[::-1]


def test_listing_orders_by_id_when_the_moments_are_equal(client: FlaskClient) -> None:
    """Documents of one moment have one order, too."""
    ids = [process(client, tasks=["language"])["id"] for _ in range(5)]
    with client.application.extensions["database"].engine.begin() as connection:
        moment = connection.scalar(sa.select(Document.created_at).limit(1))
        connection.execute(sa.update(Document).values(created_at=moment))
    first = client.get("/api/documents?limit=3").json
    second = client.get("/api/documents", query_string={"limit": 3, "cursor": first["next_cursor"]}).json
    assert [document["id"] for document in first["items"] + second["items"]] == sorted(ids, reverse=True)


def test_listing_is_empty_and_has_its_default_size_when_nothing_is_said(client: FlaskClient) -> None:
    """No documents is an empty page; without a limit a page has 20."""
    assert client.get("/api/documents").json == {"items": [], "next_cursor": None}
    for _ in range(21):
        process(client, tasks=["language"])
    page = client.get("/api/documents").json
    assert len(page["items"]) == 20
    assert page["next_cursor"]


@pytest.mark.parametrize("limit", ["0", "101", "-1", "ten", "1.5", "", "9" * 100, "1_0", "+5"])
def test_listing_refuses_when_the_limit_is_bad(client: FlaskClient, limit: str) -> None:
    """limit is 1 to 100, else 422."""
    assert "limit" in assert_problem(client.get("/api/documents", query_string={"limit": limit}), 422)["errors"]


def test_listing_refuses_when_the_cursor_is_not_ours(client: FlaskClient) -> None:
    """A cursor that was made up, altered, or signed for something else is 400."""
    for _ in range(2):
        process(client, tasks=["language"])
    cursor = client.get("/api/documents?limit=1").json["next_cursor"]
    flipped = ("B" if cursor[0] == "A" else "A") + cursor[1:]
    for bad in ("", "x", flipped, cursor[:-1], cursor + "A", "é", "\x00", "WyJhIiwiYiJd.abc"):
        assert client.get("/api/documents", query_string={"cursor": bad}).status_code in (400, 422), bad
    assert client.get("/api/documents", query_string={"cursor": cursor}).status_code == 200


def test_cursor_is_good_after_a_restart_when_the_data_directory_is_the_same(make_client: MakeClient) -> None:
    """The key that signs cursors is kept."""
    client = make_client()
    for _ in range(2):
        process(client, tasks=["language"])
    cursor = client.get("/api/documents?limit=1").json["next_cursor"]
    again = make_client().get("/api/documents", query_string={"cursor": cursor})
    assert len(again.json["items"]) == 1


def test_service_is_the_same_on_postgresql(make_client: MakeClient, postgres_url: str) -> None:
    """On PostgreSQL documents are stored, read and paged as on SQLite, and statements are bounded."""
    client = make_client(DATABASE_URL=postgres_url, TTA_DEADLINE=7)
    answers = [process(client, f"{TEXT} Number {n} 😀.") for n in range(5)]
    assert client.get(f"/api/documents/{answers[0]['id']}").json == answers[0]
    first = client.get("/api/documents?limit=2").json
    second = client.get("/api/documents", query_string={"limit": 3, "cursor": first["next_cursor"]}).json
    assert first["items"] + second["items"] == answers[::-1]
    assert second["next_cursor"] is None
    assert client.get("/api/documents/%00").status_code == 404
    with client.application.extensions["database"].engine.connect() as connection:
        assert connection.scalar(sa.text("SHOW statement_timeout")) == "7s"


# ---- trouble


def test_process_is_503_when_the_database_is_gone(client: FlaskClient) -> None:
    """A database that does not answer is a 503 problem that says nothing of it, and no 500."""
    with client.application.extensions["database"].engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE documents"))
    response = client.post("/api/process", json={"text": TEXT})
    problem = assert_problem(response, 503)
    assert problem["code"] == "database_unavailable"
    assert "documents" not in response.text
    assert response.headers["Retry-After"]


def test_unknown_url_is_a_problem_too(client: FlaskClient) -> None:
    """Whatever goes wrong leaves as problem+json."""
    assert_problem(client.get("/api/nothing"), 404)
    assert re.fullmatch(r"[0-9a-f-]{36}", client.get("/x").json["correlation_id"])
