"""The examples of the README, as files of a project that is not ours: an application's blueprint, and an RQ job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BLUEPRINT = """
from flask import Blueprint
from marshmallow import Schema, fields

from tta_sync import step
from tta_sync.flask import TTASync
from tta_sync.primitives import RetryPrimitive, TimeoutPrimitive

bp = Blueprint("words", __name__)
tta = TTASync(bp)


class Text(Schema):
    text = fields.String(required=True)


class Count(Schema):
    words = fields.Integer()


@step
async def count(data, context):  # any async code
    return {"words": len(data["text"].split())}


@bp.post("/api/words")
@tta.workflow(TimeoutPrimitive(RetryPrimitive(count), timeout_seconds=5), load=Text, dump=Count)
def count_words(result):
    return result
"""

JOB = """
from tta_sync.rq import workflow_job
from words import Count, Text, count

count_later = workflow_job("default", load=Text, dump=Count, timeout=60)(count)
"""

SAVE = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from tta_sync.sqlalchemy import create_engine, session_step, unit_of_work
from words import Count, Text, count
from tta_sync.flask import TTASync
from flask import Blueprint


class Base(DeclarativeBase): ...


class Counted(Base):
    __tablename__ = "counted"
    id: Mapped[int] = mapped_column(primary_key=True)
    words: Mapped[int] = mapped_column(unique=True)


engine = create_engine("sqlite:///words.db")
Base.metadata.create_all(engine)

bp = Blueprint("saved", __name__)
tta = TTASync(bp, unit_of_work=unit_of_work(sessionmaker(engine)))


@session_step(integrity_retries=0)
def save(session, data, context):  # sync, in the request's thread and transaction
    counted = Counted(**data)
    session.add(counted)
    return counted


@bp.post("/api/saved")
@tta.workflow(count >> save, load=Text, dump=Count, status=201)
def saved(result):
    return result
"""

APPLICATION = """
from flask import Flask, abort

app = Flask("legacy")


@app.get("/old")
def old():
    return "as ever"


@app.get("/missing")
def missing():
    abort(404)


@app.errorhandler(404)
def page(error):
    return "<h1>their page</h1>", 404
"""


def run(project: Path, script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=project,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in {"words": BLUEPRINT, "jobs": JOB, "saved": SAVE, "application": APPLICATION}.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def test_blueprint_is_dropped_into_an_application_by_one_line(project: Path) -> None:
    """register_blueprint is all: the view works, its errors are problems, and the application's pages are its own."""
    run(
        project,
        """
from application import app
from words import bp
app.register_blueprint(bp)
client = app.test_client()
assert client.post("/api/words", json={"text": "one two"}).json == {"words": 2}
bad = client.post("/api/words", json={})
assert (bad.status_code, bad.mimetype) == (422, "application/problem+json")
assert bad.json["errors"] == {"text": ["Missing data for required field."]}
assert client.get("/api/words").mimetype == "application/problem+json"
assert client.get("/old").text == "as ever"
assert client.get("/missing").text == client.get("/nowhere").text == "<h1>their page</h1>"
""",
    )


def test_job_is_enqueued_and_run_by_a_stock_worker(project: Path, redis_url: str) -> None:
    """REDIS_URL, .enqueue and `rq worker --job-class tta_sync.rq.WorkflowJob` are all."""
    job_id = run(
        project,
        'from jobs import count_later; print(count_later.enqueue({"text": "one two three"}).id)',
        REDIS_URL=redis_url,
    ).strip()
    rq = Path(sys.executable).with_name("rq")
    command = [rq, "worker", "--url", redis_url, "--burst", "--path", ".", "--job-class", "tta_sync.rq.WorkflowJob"]
    subprocess.run([*command, "default"], cwd=project, check=True, capture_output=True, timeout=60)
    script = f"""
from redis import Redis
from tta_sync.rq import WorkflowJob
print(WorkflowJob.fetch({job_id!r}, connection=Redis.from_url({redis_url!r})).return_value())
"""
    assert run(project, script).strip() == "{'words': 3}"


def test_session_step_saves_in_the_requests_transaction(project: Path) -> None:
    """Committed before it is dumped; a conflict is a 409 and leaves nothing behind."""
    run(
        project,
        """
from application import app
from saved import Counted, bp, engine
from sqlalchemy import func, select
from sqlalchemy.orm import Session
app.register_blueprint(bp)
client = app.test_client()
first = client.post("/api/saved", json={"text": "one two"})
assert (first.status_code, first.json) == (201, {"words": 2})
second = client.post("/api/saved", json={"text": "three four"})
assert (second.status_code, second.json["code"]) == (409, "conflict"), second.json
with Session(engine) as session:
    assert session.scalars(select(Counted.words)).all() == [2]
""",
    )


def test_seams_load_no_library_of_another(project: Path) -> None:
    """Each seam imports its own library and no other's."""
    for module, foreign in {
        "flask": ("rq", "redis", "sqlalchemy", "marshmallow"),
        "marshmallow": ("flask", "rq", "redis", "sqlalchemy"),
        "sqlalchemy": ("flask", "rq", "redis", "marshmallow"),
        "rq": ("flask", "sqlalchemy", "marshmallow"),
    }.items():
        run(
            project,
            f"""
import sys, tta_sync.{module}
loaded = [name for name in {foreign!r} if name in sys.modules]
assert not loaded, loaded
""",
        )
