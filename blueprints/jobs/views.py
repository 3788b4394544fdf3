"""Jobs: how they stand, how they go on, and their end by request."""

from __future__ import annotations

import json
from typing import Any

from flask import Blueprint, Response, current_app, request
from redis import Redis
from redis.exceptions import RedisError
from rq.exceptions import NoSuchJobError

from blueprints.batches.queue import connect
from blueprints.jobs.schemas import CancelSchema, JobSchema
from blueprints.jobs.store import JobState, is_job_id, read_job
from blueprints.jobs.stream import MAX_STREAMS, JobEvents, Places, has_left
from blueprints.settings import Settings, SettingsError
from tta_sync.flask import Problem
from tta_sync.rq.control import Cancel, request_cancel


def create_blueprint(settings: Settings, *, max_streams: int = MAX_STREAMS) -> Blueprint:
    """Make the job routes."""
    bp = Blueprint("jobs", __name__, url_prefix="/api")
    job_schema, cancel_schema = JobSchema(), CancelSchema()
    places = Places(max_streams)
    made: list[Redis] = []

    def client() -> Redis:
        if not made:
            made.append(connect(settings.require_redis_url()))
        return made[0]

    def look(job_id: str) -> JobState:
        if not is_job_id(job_id):
            raise _no_such_job()
        try:
            state = read_job(client(), job_id)
        except (RedisError, SettingsError) as error:
            raise _unavailable() from error
        if state is None:
            raise _no_such_job()
        return state

    @bp.get("/jobs/<job_id>")
    def show(job_id: str) -> Any:
        return job_schema.dump(look(job_id))

    @bp.get("/jobs/<job_id>/events")
    def events(job_id: str) -> Response:
        look(job_id)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        if request.method == "HEAD":
            return Response(mimetype="text/event-stream", headers=headers)
        give_back = places.take()
        if give_back is None:
            raise Problem(
                503, "too_many_streams", "Too many jobs are being followed; try again.", headers={"Retry-After": "5"}
            )
        sock = request.environ.get("gunicorn.socket")
        stream = JobEvents(
            client(),
            job_id,
            read=lambda: read_job(client(), job_id),
            encode=job_schema.dump,
            gone=lambda: has_left(sock),
            stopping=current_app.extensions.get("stopping", lambda: False),
            unavailable=json.loads(_unavailable().get_body()),
            give_back=give_back,
        )
        return Response(stream, mimetype="text/event-stream", headers=headers)

    @bp.post("/jobs/<job_id>/cancel")
    def cancel(job_id: str) -> Any:
        if not is_job_id(job_id):
            raise _no_such_job()
        try:
            outcome = request_cancel(job_id, client())
        except NoSuchJobError:
            raise _no_such_job() from None
        except (RedisError, SettingsError) as error:
            raise _unavailable() from error
        if outcome is Cancel.ENDED:
            raise Problem(409, "already_ended", "The job has ended already.")
        answer = cancel_schema.dump({"id": job_id, "cancel": outcome.value})
        return answer, 200 if outcome is Cancel.CANCELLED else 202

    return bp


def _unavailable() -> Problem:
    return Problem(
        503, "redis_unavailable", "The queue does not answer; try again later.", headers={"Retry-After": "5"}
    )


def _no_such_job() -> Problem:
    return Problem(404, "no_such_job", "There is no job with this id.")
