"""A Flask application's own ``async def`` functions run on the managed loop once TTASync is there."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import flask
import pytest
from asgiref.sync import sync_to_async
from flask.views import MethodView

from tta_sync import call_sync, run_on_caller
from tta_sync.flask import TTASync


class Refused(Exception):
    """What the application's own handler knows."""


def where(place: str) -> None:
    """Note on which loop and thread *place* runs, in the application and in flask.g."""
    flask.current_app.config["SEEN"][place] = asyncio.get_running_loop()
    flask.g.setdefault("places", []).append(place)


@pytest.fixture
def site() -> flask.Flask:
    """An application that is asynchronous wherever Flask allows it."""
    app = flask.Flask(__name__)
    app.config.update(TESTING=True, SEEN={})

    @app.before_request
    async def before() -> None:
        where("before_request")

    @app.after_request
    async def after(response: flask.Response) -> flask.Response:
        where("after_request")
        response.headers["Places"] = " ".join(flask.g.places)
        return response

    @app.teardown_request
    async def teardown(_error: BaseException | None) -> None:
        where("teardown_request")

    @app.teardown_appcontext
    async def teardown_app(_error: BaseException | None) -> None:
        where("teardown_appcontext")

    @app.errorhandler(Refused)
    async def refused(error: Refused) -> Any:
        where("errorhandler")
        return {"error": str(error)}, 418

    @app.get("/view")
    async def view() -> Any:
        where("view")
        mine = await sync_to_async(threading.get_ident)()
        tasks = await asyncio.gather(sync_to_async(threading.get_ident)(), run_on_caller(threading.get_ident))
        flask.g.from_the_view = await sync_to_async(lambda: flask.request.path)()
        return {"threads": [mine, *tasks], "path": flask.g.from_the_view}

    @app.get("/refused")
    async def fail() -> Any:
        raise Refused("as it should")

    class View(MethodView):
        async def get(self) -> str:
            where("method view")
            return "from a class"

    app.add_url_rule("/class", view_func=View.as_view("class"))
    TTASync(app)
    return app


async def running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_every_async_function_of_an_application_runs_on_the_managed_loop_when_requests_come(site: flask.Flask) -> None:
    """Views, hooks before and after, teardowns and error handlers share the loop that call_sync uses, and flask.g."""
    client = site.test_client()
    assert client.get("/view").headers["Places"] == "before_request view after_request"
    assert client.get("/class").text == "from a class"
    answer = client.get("/refused")
    assert (answer.status_code, answer.get_json()) == (418, {"error": "as it should"})
    assert answer.headers["Places"] == "before_request errorhandler after_request"
    assert set(site.config["SEEN"]) == {
        "before_request",
        "view",
        "method view",
        "errorhandler",
        "after_request",
        "teardown_request",
        "teardown_appcontext",
    }
    assert set(site.config["SEEN"].values()) == {call_sync(running_loop)}


def test_synchronous_code_of_an_async_view_runs_on_the_requests_thread_when_awaited(site: flask.Flask) -> None:
    """sync_to_async and run_on_caller inside an async view see the request, on the thread that serves it."""
    answer = site.test_client().get("/view").get_json()
    assert answer == {"threads": [threading.get_ident()] * 3, "path": "/view"}
