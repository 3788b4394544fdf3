"""Rate limits on views: verdicts, headers, keys, and what holds while Redis is away."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from flask import Blueprint, Flask, request
from flask.views import MethodView

from tta_sync import events
from tta_sync.context import current_context
from tta_sync.exceptions import ConfigurationError, RateLimitedError
from tta_sync.facade import run_sync
from tta_sync.flask import TTASync, remote_address
from tta_sync.primitives.core.base import step
from tta_sync.primitives.performance.stores import RedisBackend
from tta_sync.testing import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(start=1000.0, autojump_threshold=None)


@pytest.fixture(params=["memory", "redis"])
def site(request: pytest.FixtureRequest, clock: FakeClock) -> Flask:
    """An application on the test's clock, without Redis and with one."""
    return make_site(clock, request.getfixturevalue("url") if request.param == "redis" else None)


def make_site(clock: FakeClock | None, url: str | None = None) -> Flask:
    site = Flask("legacy")
    site.config["TTA_DEADLINE"] = None
    if url is not None:
        site.config["TTA_REDIS_URL"] = url
    if clock is not None:

        @site.before_request
        def on_the_tests_clock() -> None:
            context = current_context()
            assert context is not None
            context.clock = clock

    return site


def get(site: Flask, path: str = "/", address: str = "192.0.2.1", **headers: str) -> Any:
    return site.test_client().get(path, environ_base={"REMOTE_ADDR": address}, headers=headers)


def refused(response: Any, code: str = "rate_limited", status: int = 429) -> dict[str, Any]:
    assert response.status_code == status
    assert response.content_type == "application/problem+json"
    body: dict[str, Any] = json.loads(response.data)
    assert (body["status"], body["code"]) == (status, code)
    assert body["correlation_id"] == response.headers["X-Request-ID"]
    assert int(response.headers["Retry-After"]) >= 1
    return body


async def slow_answer() -> str:
    return "async"


# ---- verdicts --------------------------------------------------------------------------------------------------------


def test_burst_goes_through_and_then_the_rate_when_a_client_hurries(site: Flask, clock: FakeClock) -> None:
    """Two at once, then one every ten seconds; a refusal takes no token and says when to come back."""
    tta = TTASync(site)

    @site.get("/")
    @tta.rate_limit(0.1, burst=2)
    def view() -> str:
        return "done"

    assert [get(site).status_code for _ in range(4)] == [200, 200, 429, 429]
    assert get(site).headers["Retry-After"] == "10"
    clock.jump(9.5)
    assert get(site).headers["Retry-After"] == "1"
    clock.jump(0.5)
    assert get(site).data == b"done"
    refused(get(site))


def test_headers_tell_what_is_left_when_a_request_goes_through(site: Flask, clock: FakeClock) -> None:
    """RateLimit and RateLimit-Policy as the draft has them, and the two older spellings."""
    tta = TTASync(site)

    @site.get("/")
    @tta.rate_limit(0.5, burst=3)
    def view() -> str:
        return "done"

    response = get(site)
    now = int(clock.time() + 0.999)
    assert response.headers["RateLimit-Policy"] == '"view";q=3;w=6'
    assert response.headers["RateLimit"] == '"view";r=2;t=2'
    assert "Retry-After" not in response.headers
    for style, reset in (("RateLimit", 2), ("X-RateLimit", now + 2)):
        told = [int(response.headers[f"{style}-{part}"]) for part in ("Limit", "Remaining", "Reset")]
        assert told == [3, 2, reset]
    clock.jump(1.0)
    assert get(site).headers["RateLimit"] == '"view";r=1;t=1'
    assert get(site).headers["RateLimit"] == '"view";r=0;t=1'
    last = get(site)
    refused(last)
    assert last.headers["RateLimit"] == f'"view";r=0;t={last.headers["Retry-After"]}'
    assert last.headers["RateLimit-Policy"] == '"view";q=3;w=6'
    assert (last.headers["RateLimit-Remaining"], last.headers["X-RateLimit-Remaining"]) == ("0", "0")


def test_memory_and_redis_say_the_same_when_a_trace_is_replayed(url: str, clock: FakeClock) -> None:
    """Status and headers of 200 requests at odd moments are equal on both."""
    sites = [make_site(clock), make_site(clock, url)]
    for site in sites:
        tta = TTASync(site)

        @site.get("/")
        @tta.rate_limit(3.0, burst=4)
        def view() -> str:
            return "done"

    told = set()
    for number in range(200):
        clock.jump(((number * 7919) % 13) / 20)
        one, other = (get(site) for site in sites)
        for field in ("RateLimit", "RateLimit-Policy", "Retry-After", "X-RateLimit-Reset"):
            assert one.headers.get(field) == other.headers.get(field)
        assert one.status_code == other.status_code
        told.add((one.status_code, one.headers["RateLimit"]))
    assert len(told) > 4


@pytest.mark.parametrize(
    ("rate", "burst", "policy"),
    [(10.0, 1, "q=1;w=1"), (1 / 3600, 1, "q=1;w=3600"), (100, 50, "q=50;w=1"), (1e-300, 2, "q=2;w=999999999999999")],
)
def test_policy_is_in_whole_numbers_when_the_rate_is_not(rate: float, burst: int, policy: str) -> None:
    """Whoever keeps to the policy is never refused; what the header cannot say is left at its largest number."""
    site = make_site(None)

    @site.get("/")
    @TTASync(site).rate_limit(rate, burst)
    def view() -> str:
        return "done"

    assert get(site).headers["RateLimit-Policy"] == f'"view";{policy}'


def test_name_is_a_structured_string_when_it_holds_anything(clock: FakeClock) -> None:
    """Quotes are escaped and what is not printable ASCII is replaced: no name breaks the header, or makes another."""
    site = make_site(clock)

    @site.get("/")
    @TTASync(site).rate_limit(1, name='a"b\\c\r\nSet-Cookie: ü')
    def view() -> str:
        return "done"

    assert get(site).headers["RateLimit"] == '"a\\"b\\\\c__Set-Cookie: _";r=0;t=1'


# ---- whose limit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "same", "other"),
    [
        ("192.0.2.1", "192.0.2.1", "192.0.2.2"),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:2::1"),
        ("::ffff:192.0.2.1", "192.0.2.1", "::ffff:192.0.2.2"),
        ("fe80::1%eth0", "fe80::2%eth1", "fe80:0:0:1::1"),
        ("no:address", "no:address", "none"),
    ],
)
def test_each_address_has_a_limit_when_no_key_is_given(site: Flask, address: str, same: str, other: str) -> None:
    """By default clients are told apart by their address; a subscriber's IPv6 network is one client."""
    tta = TTASync(site)

    @site.get("/")
    @tta.rate_limit(0.01)
    def view() -> str:
        return "done"

    assert get(site, address=address).status_code == 200
    assert get(site, address=same).status_code == 429
    assert get(site, address=other).status_code == 200


def test_limit_works_when_the_client_has_no_address(site: Flask) -> None:
    """On a unix socket there is none: all are one client."""
    tta = TTASync(site)

    @site.get("/")
    @tta.rate_limit(0.01)
    def view() -> str:
        return "done"

    statuses = [site.test_client().get("/", environ_overrides={"REMOTE_ADDR": None}).status_code for _ in range(2)]
    assert statuses == [200, 429]


class Signed:
    """A callable that has no signature, as some builtins."""

    __signature__ = "none"

    def __call__(self) -> str:
        return request.headers["X-User"]


@pytest.mark.parametrize(
    "key",
    [Signed(), lambda: request.headers["X-User"], lambda asked: asked.headers["X-User"], lambda *, of=None: user_id()],
)
def test_each_key_has_a_limit_when_a_function_gives_it(site: Flask, key: Callable[..., Any]) -> None:
    """The function asks flask.request, or takes the request; what it returns is the client."""
    tta = TTASync(site)

    @site.get("/")
    @tta.rate_limit(0.01, key=key)
    def view() -> str:
        return "done"

    for user in ("ann", "bob", "x" * 5000):
        assert get(site, **{"X-User": user}).status_code == 200
        assert get(site, **{"X-User": user}).status_code == 429
    assert get(site, **{"X-User": "x" * 5000 + "y"}).status_code == 200


def user_id() -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_DNS, request.headers["X-User"])


def test_all_share_one_limit_when_the_key_is_none(site: Flask) -> None:
    """key=None is one limit for everybody."""
    tta = TTASync(site)

    @site.get("/")
    @tta.rate_limit(0.01, key=None)
    def view() -> str:
        return "done"

    assert [get(site, address=f"192.0.2.{n}").status_code for n in (1, 2)] == [200, 429]


def test_remote_address_is_part_of_a_key_when_it_is_wanted(clock: FakeClock) -> None:
    """The default is a function like any other, and may be used in one's own."""
    site = make_site(clock)
    tta = TTASync(site)
    assert inspect.signature(tta.rate_limit).parameters["key"].default is remote_address
    both = tta.rate_limit(0.01, key=lambda: (remote_address(), request.args["q"]))
    site.add_url_rule("/", "view", both(lambda: "done"))
    asked = [("/?q=1", "192.0.2.1"), ("/?q=1", "192.0.2.1"), ("/?q=2", "192.0.2.1"), ("/?q=1", "192.0.2.2")]
    assert [get(site, path, address).status_code for path, address in asked] == [200, 429, 200, 200]


def test_views_have_limits_of_their_own_unless_they_share_a_name(site: Flask) -> None:
    """The endpoint is the limit's name; a given name is one limit, also for decorated functions used twice."""
    tta = TTASync(site)
    shared = tta.rate_limit(0.01, name="api")
    for path in ("/a", "/b"):
        site.add_url_rule(path, path, tta.rate_limit(0.01)(lambda: "done"))
        site.add_url_rule(f"/shared{path}", f"shared{path}", shared(lambda: "done"))
    assert [get(site, path).status_code for path in ("/a", "/b", "/a")] == [200, 200, 429]
    assert [get(site, path).status_code for path in ("/shared/a", "/shared/b")] == [200, 429]


def test_every_limit_holds_when_several_stand_on_one_view(site: Flask, clock: FakeClock) -> None:
    """A burst and a long-term limit: both are told, the older headers tell the one that is reached first."""
    tta = TTASync(site)

    @site.get("/")
    @tta.rate_limit(1.0, burst=2)
    @tta.rate_limit(0.01, burst=3)
    def view() -> str:
        return "done"

    first = get(site)
    assert first.headers.getlist("RateLimit-Policy") == ['"view-2";q=2;w=2, "view";q=3;w=300']
    assert first.headers["RateLimit"] == '"view-2";r=1;t=1, "view";r=2;t=100'
    assert first.headers["X-RateLimit-Remaining"] == "1"
    assert [get(site).status_code for _ in range(2)] == [200, 429]
    clock.jump(10.0)
    assert get(site).headers["X-RateLimit-Remaining"] == "0"
    inner = get(site)
    refused(inner)
    assert inner.headers["RateLimit"].startswith('"view-2";r=0;t=1, "view";r=0;t=')
    assert int(inner.headers["Retry-After"]) > 80


# ---- on every kind of view -------------------------------------------------------------------------------------------


def test_every_kind_of_view_is_limited_when_it_is_decorated(site: Flask) -> None:
    """Plain and async views, class-based ones, workflows, a blueprint's, and a function before each request."""
    tta = TTASync(site)
    one = tta.rate_limit(0.01)

    @step
    async def double(data: Any, context: Any) -> Any:
        return {"value": int(data["n"]) * 2}

    @site.route("/plain")
    @one
    def plain() -> Any:
        return run_sync(double, {"n": 1})

    @site.route("/async")
    @one
    async def asynchronous() -> Any:
        return {"value": await slow_answer(), "path": request.path}

    @site.get("/flow/<n>")
    @one
    @tta.workflow(double)
    def flow(result: Any, n: str) -> Any:
        return result

    @site.get("/within/<n>")
    @tta.workflow(double)
    @one
    async def within(result: Any, n: str) -> Any:
        return result

    class Thing(MethodView):
        decorators = [one]  # as Flask has it

        def get(self) -> str:
            return "thing"

    site.add_url_rule("/thing", view_func=Thing.as_view("thing"))
    blueprint = Blueprint("part", __name__)

    @blueprint.get("/part")
    @one
    def part() -> str:
        return "part"

    site.register_blueprint(blueprint)
    before = Blueprint("before", __name__)
    before.before_request(tta.rate_limit(0.01, name="before")(lambda: None))
    before.add_url_rule("/before", "view", lambda: "before")
    site.register_blueprint(before)
    for path in ("/plain", "/async", "/flow/2", "/within/3", "/thing", "/part", "/before"):
        first = get(site, path)
        assert first.status_code == 200, path
        assert "RateLimit" in first.headers
        refused(get(site, path))
    assert get(site, "/plain", "192.0.2.9").json == {"value": 2}
    assert get(site, "/async", "192.0.2.9").json == {"value": "async", "path": "/async"}
    assert get(site, "/part", "192.0.2.9").headers["RateLimit"].startswith('"part.part";')


def test_view_s_own_errors_are_its_own_when_it_is_limited(site: Flask) -> None:
    """What the view raises goes where it went before, with the limit's headers on the answer."""
    tta = TTASync(site, problems="blueprint")

    @site.get("/")
    @tta.rate_limit(1.0, burst=9)
    def view() -> str:
        raise LookupError("theirs")

    @site.errorhandler(LookupError)
    def page(error: LookupError) -> Any:
        return f"<h1>{error}</h1>", 418

    response = get(site)
    assert (response.status_code, response.data) == (418, b"<h1>theirs</h1>")
    assert response.headers["RateLimit"] == '"view";r=8;t=1'


def test_application_answers_itself_when_it_has_a_handler_for_the_error(site: Flask) -> None:
    """A handler for RateLimitedError makes the page; the headers come along."""
    tta = TTASync(site)

    @site.get("/")
    @tta.rate_limit(0.01)
    def view() -> str:
        return "done"

    @site.errorhandler(RateLimitedError)
    def page(error: RateLimitedError) -> Any:
        return f"slow down, {error.retry_after:.0f} s", 429

    get(site)
    response = get(site)
    assert (response.status_code, response.data) == (429, b"slow down, 100 s")
    assert response.headers["RateLimit"] == '"view";r=0;t=100'


def test_event_tells_of_each_refusal_when_somebody_listens(site: Flask) -> None:
    """CallRejected, as from the primitive."""
    tta = TTASync(site)
    heard: list[Any] = []

    @site.get("/")
    @tta.rate_limit(0.01)
    def view() -> str:
        return "done"

    stop = events.bus.subscribe(heard.append)
    try:
        get(site)
        last = get(site)
    finally:
        stop()
    rejected = [event for event in heard if isinstance(event, events.CallRejected)]
    assert [(event.step, event.by, event.correlation_id) for event in rejected] == [
        ("legacy.view", "rate limit", last.headers["X-Request-ID"])
    ]


def test_threads_share_one_limit_when_they_ask_at_once(site: Flask) -> None:
    """Sixteen threads get no more through than one would."""
    tta = TTASync(site)

    @site.get("/")
    @tta.rate_limit(0.001, burst=10)
    def view() -> str:
        return "done"

    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda _: get(site).status_code, range(64)))
    assert sorted(statuses) == [200] * 10 + [429] * 54


def test_memory_is_bounded_when_keys_are_many(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    """Beyond the bound the longest unused limit is forgotten."""
    monkeypatch.setattr("tta_sync.flask.limits.MAX_KEYS", 3)
    site = make_site(clock)

    @site.get("/")
    @TTASync(site).rate_limit(0.01)
    def view() -> str:
        return "done"

    addresses = [f"192.0.2.{number}" for number in range(1, 5)]
    assert [get(site, address=address).status_code for address in addresses] == [200] * 4
    assert [get(site, address=address).status_code for address in reversed(addresses)] == [429] * 3 + [200]


# ---- which Redis -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["config", "config, other name", "environment", "argument", "client", "back end"])
def test_processes_share_the_limit_when_redis_is_named(url: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two applications, as in two processes, with one Redis are one limit; an empty setting means none."""
    storage: Any = None
    sites = [Flask("same"), Flask("same")]
    for site in sites:
        if where == "config":
            site.config["TTA_REDIS_URL"] = url
        elif where == "config, other name":
            site.config["REDIS_URL"] = url
        elif where == "environment":
            monkeypatch.setenv("REDIS_URL", url)
        elif where == "argument":
            storage = url
        else:
            storage = RedisBackend(url, "x:") if where == "back end" else redis.Redis.from_url(url)
        tta = TTASync(site)
        site.add_url_rule("/", "view", tta.rate_limit(0.01, burst=2, storage=storage)(lambda: "done"))
    assert [get(site).status_code for site in (*sites, *sites)] == [200, 200, 429, 429]
    with redis.Redis.from_url(url) as client:
        (name,) = client.keys("*:limit:*")
        assert name.startswith(b"x:1:" if where == "back end" else b"tta:1:")
    sites[0].config["TTA_REDIS_URL"] = ""
    if storage is None:
        assert [get(sites[0]).status_code for _ in range(3)] == [200, 200, 429]
        assert get(sites[0]).status_code == 429


@pytest.mark.parametrize(("fail", "passed"), [("local", 2), ("open", 6), ("closed", 0)])
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_requests_are_judged_as_configured_when_redis_is_gone(
    free_port: Any, fail: Any, passed: int, kind: str
) -> None:
    """This process's share of the rate, or no limit, or 503: never a 500."""
    site = make_site(None, f"redis://:hidden@127.0.0.1:{free_port()}")
    tta = TTASync(site)
    limited = tta.rate_limit(0.01, burst=2, fail=fail, workers=3)
    site.add_url_rule("/", "view", limited(slow_answer if kind == "async" else lambda: "done"))
    responses = [get(site) for _ in range(6)]
    assert [response.status_code for response in responses].count(200) == passed
    for response in responses:
        if response.status_code != 200:
            refused(response, *(("redis_unavailable", 503) if fail == "closed" else ()))
        assert b"hidden" not in response.data
        assert ("RateLimit" in response.headers) == (fail == "local")
    if fail == "local":
        assert 290 <= int(responses[-1].headers["Retry-After"]) <= 300  # a third of the rate is this worker's


@pytest.mark.parametrize(("said", "seconds"), [("4", 400), ("", 100), ("many", 100), ("²", 100), ("0", 100)])
def test_share_of_the_rate_follows_gunicorn_s_workers_when_redis_is_gone(
    free_port: Any, monkeypatch: pytest.MonkeyPatch, said: str, seconds: int
) -> None:
    """WEB_CONCURRENCY says how many processes share the rate; nonsense is one."""
    monkeypatch.setenv("WEB_CONCURRENCY", said)
    site = make_site(None, f"redis://127.0.0.1:{free_port()}")
    site.add_url_rule("/", "view", TTASync(site).rate_limit(0.01)(lambda: "done"))
    get(site)
    assert seconds - 10 <= int(get(site).headers["Retry-After"]) <= seconds


def test_requests_lose_little_time_when_redis_swallows_everything(own_redis_server: Any) -> None:
    """A black hole costs the first request a tenth of a second, the next ones nothing; and it comes back by itself."""
    site = make_site(None, own_redis_server.url)
    site.add_url_rule("/", "view", TTASync(site).rate_limit(1000, burst=1000)(lambda: "done"))
    assert get(site).status_code == 200
    os.kill(own_redis_server.pid, signal.SIGSTOP)
    try:
        took = []
        for _ in range(21):
            began = time.monotonic()
            assert get(site).status_code == 200
            took.append(time.monotonic() - began)
        assert took[0] < 5
        assert sorted(took[1:])[10] < 0.05
    finally:
        os.kill(own_redis_server.pid, signal.SIGCONT)
    name = "tta:1:#:limit:*"
    with redis.Redis.from_url(own_redis_server.url) as client:
        client.flushall()
        give_up = time.monotonic() + 20
        while not client.keys(name):
            assert get(site).status_code == 200
            assert time.monotonic() < give_up
            time.sleep(0.02)


def test_limit_of_this_process_holds_when_what_lies_in_redis_is_no_limit(url: str) -> None:
    """A value of another type, or no number, under our key is not tripped over."""
    site = make_site(None, url)
    site.add_url_rule("/", "view", TTASync(site).rate_limit(0.01, burst=2)(lambda: "done"))
    get(site)
    with redis.Redis.from_url(url) as client:
        (name,) = client.keys("*:limit:*")
        for junk in (lambda: client.set(name, "soon"), lambda: (client.delete(name), client.lpush(name, 1))):
            junk()
            statuses = [get(site, address="192.0.2.1").status_code for _ in range(2)]
            assert set(statuses) <= {200, 429}
    assert get(site).status_code == 429


def test_limit_of_this_process_holds_when_the_loop_cannot_be_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saturated facade, or one that is shutting down, is no reason for another error."""
    from tta_sync.exceptions import LoopUnavailableError, SaturatedError

    site = make_site(None, url)
    site.add_url_rule("/", "view", TTASync(site).rate_limit(0.01)(lambda: "done"))
    for error in (SaturatedError(1, 1.0), LoopUnavailableError("ended")):

        def unable(*arguments: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("tta_sync.flask.limits.call_sync", unable)
        assert get(site, address=f"192.0.2.{len(str(error))}").status_code == 200
        assert get(site, address=f"192.0.2.{len(str(error))}").status_code == 429


def test_deadline_is_told_as_one_when_it_has_passed(url: str) -> None:
    """A request whose time is over is a 504, not a limit and not a failure of Redis."""
    site = Flask("legacy")
    site.config.update(TTA_REDIS_URL=url, TTA_DEADLINE=1e-9)
    site.add_url_rule("/", "view", TTASync(site).rate_limit(1.0)(lambda: "done"))
    assert get(site).status_code == 504


def test_limit_is_one_when_gunicorn_serves_with_several_workers(url: str, tmp_path: Path, free_port: Any) -> None:
    """Four real workers let through what one limit lets through, to the request."""
    (tmp_path / "serving.py").write_text(
        "import os\n"
        "from flask import Flask\n"
        "from tta_sync.flask import TTASync\n"
        "app = Flask('served')\n"
        "tta = TTASync(app)\n"
        "@app.get('/')\n"
        "@tta.rate_limit(0.001, burst=25)\n"
        "def view():\n"
        "    return 'done'\n"
        "@app.after_request\n"
        "def say_who(response):\n"
        "    response.headers['X-Worker'] = str(os.getpid())\n"
        "    return response\n"
    )
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "-k",
        "gthread",
        "-w",
        "4",
        "--threads",
        "4",
        "-b",
        f"127.0.0.1:{port}",
    ]
    served = subprocess.Popen(
        [*command, "--no-control-socket", "--log-level", "critical", "serving:app"],
        cwd=tmp_path,
        env={**os.environ, "REDIS_URL": url, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str) -> tuple[int, str]:
        try:
            with opener.open(f"http://127.0.0.1:{port}{path}", timeout=30) as response:
                return response.status, response.headers["X-Worker"]
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["X-Worker"]

    try:
        give_up = time.monotonic() + 60
        while True:
            try:
                if ask("/up")[0] == 404:
                    break
            except OSError:
                assert time.monotonic() < give_up
                assert served.poll() is None
                time.sleep(0.05)
        answers: list[tuple[int, str]] = []
        with ThreadPoolExecutor(16) as pool:
            while len(answers) < 100 or len({worker for _, worker in answers}) < 2:
                answers += pool.map(lambda _: ask("/"), range(50))
                assert time.monotonic() < give_up
    finally:
        served.terminate()
        served.wait(30)
    assert [status for status, _ in answers].count(200) == 25
    assert {status for status, _ in answers} == {200, 429}


# ---- built wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rate": 0}, "rate"),
        ({"rate": -1}, "rate"),
        ({"rate": True}, "rate"),
        ({"rate": "10/m"}, "rate"),
        ({"rate": float("inf")}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": 1, "burst": 0}, "burst"),
        ({"rate": 1, "burst": 1.5}, "burst"),
        ({"rate": 1, "burst": 10**16}, "burst"),
        ({"rate": 1, "workers": 0}, "workers"),
        ({"rate": 1, "fail": "never"}, "fail"),
        ({"rate": 1, "key": "user"}, "key"),
        ({"rate": 1, "key": slow_answer}, "key"),
    ],
)
def test_option_is_refused_when_it_makes_no_sense(options: dict[str, Any], named: str) -> None:
    """At the line that writes it, before there is a view."""
    with pytest.raises(ConfigurationError, match=f"^{named} is "):
        TTASync().rate_limit(**options)


def test_key_is_refused_when_processes_would_spell_it_differently(clock: FakeClock) -> None:
    """An object is no key: the error says what to return instead."""
    site = make_site(clock)
    site.testing = True
    site.add_url_rule("/", "view", TTASync(site).rate_limit(1, key=object)(lambda: "done"))
    with pytest.raises(TypeError, match="return its id"):
        get(site)


def test_remedy_is_told_when_the_application_was_forgotten() -> None:
    """A TTASync that no application knows says how to join it."""
    site = Flask("legacy")
    site.testing = True
    site.add_url_rule("/", "view", TTASync().rate_limit(1)(lambda: "done"))
    with pytest.raises(ConfigurationError, match="init_app"):
        get(site)


def test_view_keeps_its_face_when_it_is_limited() -> None:
    """Name, docstring and what it wraps stay; an async view stays async."""
    tta = TTASync()

    def view() -> str:
        """What it does."""
        return ""

    limited = tta.rate_limit(1)(view)
    assert (limited.__name__, limited.__doc__, limited.__wrapped__) == ("view", "What it does.", view)  # type: ignore[attr-defined]
    assert inspect.iscoroutinefunction(tta.rate_limit(1)(slow_answer))


def test_views_are_limited_when_redis_is_not_installed() -> None:
    """In this process's memory both decorators need nothing but Flask; a Redis that is named needs its extra."""
    code = (
        "import sys; sys.modules['redis'] = None\n"
        "from flask import Flask\n"
        "from tta_sync.flask import TTASync\n"
        "site = Flask('bare'); tta = TTASync(site)\n"
        "site.add_url_rule('/', 'view', tta.rate_limit(0.01)(tta.idempotent()(lambda: 'done')))\n"
        "answers = [site.test_client().get('/', headers={'Idempotency-Key': 'k'}) for _ in range(2)]\n"
        "assert [answer.status_code for answer in answers] == [200, 429]\n"
        "site.config['TTA_REDIS_URL'] = 'redis://127.0.0.1:1'\n"
        "site.testing = True\n"
        "try: site.test_client().get('/')\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tta-sync[redis]" in done.stdout
