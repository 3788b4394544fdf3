"""``tta-sync cache`` against a real redis-server: what operators see, and what they can make caches forget."""

from __future__ import annotations

import asyncio
import json
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import redis

from tta_sync.cli import cache as command, main
from tta_sync.cli.embedded_redis import EmbeddedRedis
from tta_sync.context import WorkflowContext
from tta_sync.facade import run_sync
from tta_sync.primitives.performance import CachePrimitive, RedisBackend


@pytest.fixture
def url(patient_redis_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The session's Redis, which REDIS_URL names."""
    monkeypatch.setenv("REDIS_URL", patient_redis_url)
    return patient_redis_url


class Step:
    """Counts its calls."""

    def __init__(self, answer: Callable[[Any], Any] = lambda data: {"for": data}) -> None:
        self.calls, self.answer = 0, answer

    async def __call__(self, data: Any) -> Any:
        self.calls += 1
        return self.answer(data)


def cached(url: str, namespace: str = "weather", **options: Any) -> tuple[CachePrimitive[Any, Any], Step]:
    step = options.pop("step", None) or Step()
    return CachePrimitive(step, storage=RedisBackend(url), namespace=namespace, **{"ttl": 60, **options}), step


Run = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def tta(capsys: pytest.CaptureFixture[str]) -> Run:
    """``tta("stats", ...)``: exit status, stdout (JSON with --json), stderr."""

    def run(*arguments: str) -> tuple[int, Any, str]:
        status = main(["cache", *arguments])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out and "--json" in arguments else out, err

    return run


# ---- stats -----------------------------------------------------------------------------------------------------------


def test_stats_count_what_is_there_when_several_caches_share_a_redis(url: str, tta: Run) -> None:
    """Results, bytes, tenants, tags and versions by namespace; what is no cache's is not counted."""
    weather, _ = cached(url, tags=["a", "b"])
    for data in ("Paris", {"x": 1}):
        run_sync(weather, data)
    for tenant in ("acme", "umbrella"):
        run_sync(weather, "Paris", WorkflowContext(tenant=tenant))
    run_sync(cached(url, "weather", version="2:0")[0], 1)
    run_sync(cached(url, "ns: ü\n#")[0], 1)
    with redis.Redis.from_url(url) as client:
        client.set("tta:1:#:limit:weather:1:", 1)
        client.set("tta:1:other", 1)
        client.set("tta:1:_:weather:1:" + "0" * 32 + ":lock", "token")
        client.lpush("tta:1:_:weather:1:" + "1" * 32, 1)
        status, told, err = tta("stats", "--json")
        sizes = [client.strlen(name) for name in client.keys("tta:1:*:weather:1:*") if client.type(name) == b"string"]
    assert (status, err) == (0, "")
    rows = {(row["namespace"], row["version"]): row for row in told["namespaces"]}
    assert set(rows) == {("weather", "1"), ("weather", "2:0"), ("ns: ü\n#", "1")}
    row = rows["weather", "1"]
    assert (row["results"], row["tenants"], row["tags"], row["computing"]) == (5, 2, 2, 1)
    assert 0 < row["bytes"] < sum(sizes)
    assert told["redis"]["role"] == "master"
    _, only, _ = tta("stats", "--json", "--namespace", "weather")
    assert {row["version"] for row in only["namespaces"]} == {"1", "2:0"}
    _, text, _ = tta("stats")
    assert text.splitlines()[0].split() == ["namespace", "version", "results", "bytes", "tenants", "tags", "computing"]
    assert r"ns: ü\n#" in text
    assert len(text.splitlines()) == 5


def test_stats_say_so_when_there_is_nothing(url: str, tta: Run) -> None:
    """An empty Redis is no error; an unknown namespace is one, in one line."""
    status, text, err = tta("stats")
    assert (status, text.splitlines()[0], err) == (0, "no cache keeps anything here", "")
    status, text, err = tta("stats", "--namespace", "weather")
    assert (status, text) == (1, "")
    assert err == "tta-sync: no cache has the namespace 'weather' here: there is none at all\n"


def test_stats_see_every_key_when_there_are_many(url: str, tta: Run) -> None:
    """More keys than one SCAN returns are all counted, once."""
    with redis.Redis.from_url(url) as client, client.pipeline() as pipe:
        for number in range(3000):
            pipe.set(f"tta:1:_:many:1:{number:032x}", "x" * 10)
            pipe.set(f"other:{number}", 1)
        pipe.execute()
    _, told, _ = tta("stats", "--json")
    assert [(row["results"], row["bytes"]) for row in told["namespaces"]] == [(3000, 30_000)]


# ---- get -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ("Paris", '"Paris"'),
        ("Paris", "Paris"),
        ({"b": [1, 2.5], "a": None}, '{"a": null, "b": [1, 2.5]}'),
        (5, "5"),
        (("a", 1), '{"$tuple": ["a", 1]}'),
        (Decimal("1.50"), '{"$Decimal": "1.50"}'),
        (None, "null"),
        ("", ""),
    ],
)
def test_result_is_shown_when_its_key_is_given(url: str, tta: Run, data: Any, key: str) -> None:
    """KEY is the call's data as JSON, with tags for what JSON does not know, else plain text; nothing is computed."""
    weather, step = cached(url, step=Step(lambda data: {"degrees": 21, "at": (1, b"x")}), tags=["t"])
    run_sync(weather, data)
    status, told, err = tta("get", "weather", key, "--json")
    assert (status, err, step.calls) == (0, "", 1)
    assert told["value"] == {"degrees": 21, "at": {"$tuple": [1, {"$bytes": "78"}]}}
    assert (told["state"], told["tags"], told["error"], told["tenant"]) == ("fresh", 1, False, None)
    assert 0 <= told["age"] < 60
    assert 0 < told["expires_in"] <= 60
    with redis.Redis.from_url(url) as client:
        assert client.strlen(told["name"]) == told["bytes"]
    assert weather.get_stats()["hits"] == 0
    _, text, _ = tta("get", "weather", key)
    assert 'value: {"degrees": 21, "at": {"$tuple": [1, {"$bytes": "78"}]}}' in text.splitlines()


def test_result_of_a_tenant_and_version_is_shown_when_they_are_given(url: str, tta: Run) -> None:
    """Without --version the one that has it; where several have, they are named."""
    for version in ("1", "2"):
        run_sync(cached(url, step=Step(lambda data, v=version: v), version=version)[0], 5, WorkflowContext(tenant="a"))
    run_sync(cached(url, step=Step(lambda data: "two"), version="2")[0], 5)
    assert tta("get", "weather", "5", "--json")[1]["value"] == "two"
    status, _, err = tta("get", "weather", "5", "--tenant", "a")
    assert (status, err) == (2, "tta-sync: there is one in the versions 1, 2: add --version\n")
    assert tta("get", "weather", "5", "--tenant", "a", "--version", "1", "--json")[1]["value"] == "1"
    status, told, _ = tta("get", "weather", "6", "--json")
    assert (status, told["state"]) == (1, "absent")
    assert "value" not in told
    status, _, err = tta("get", "weather", "5", "--version", "3")
    assert (status, err.count("\n")) == (1, 1)
    assert "'weather' in version '3'" in err


def test_state_is_told_when_a_result_does_not_count_any_more(url: str, tta: Run) -> None:
    """Stale, expired, invalidated: it is shown, with what it is; remembered errors are shown as such."""
    clock = 0.0
    soft, _ = cached(url, "soft", soft_ttl=0.05, jitter=0)
    short, _ = cached(url, "short", ttl=0.05, stale_if_error=600.0, jitter=0)
    for each in (soft, short):
        run_sync(each, 1)
    give_up = time.monotonic() + 20
    while clock < give_up and (tta("get", "soft", "1", "--json")[1]["state"]) == "fresh":
        clock = time.monotonic()
    assert tta("get", "soft", "1", "--json")[1]["state"] == "stale"
    status, told, _ = tta("get", "short", "1", "--json")
    assert (status, told["state"]) == (0, "expired")
    assert told["expires_in"] <= 0
    with redis.Redis.from_url(url) as client:
        client.incr("tta:1:#:soft:1:epoch")
    assert tta("get", "soft", "1", "--json")[1]["state"] == "invalidated"

    async def fail(data: Any) -> Any:
        raise LookupError("no such city")

    failing = CachePrimitive(
        fail, storage=RedisBackend(url), namespace="errors", ttl=60, negative_ttl=30, negative_for=LookupError
    )
    with pytest.raises(LookupError):
        run_sync(failing, 1)
    status, told, _ = tta("get", "errors", "1", "--json")
    assert (status, told["error"], told["value"]) == (0, True, ["builtins.LookupError", ["no such city"]])


class Bomb:
    """Unpickling it would leave a trace."""

    def __reduce__(self) -> Any:
        return (exec, ("import builtins; builtins.exploded = True",))


@pytest.mark.parametrize(
    ("junk", "state"),
    [(pickle.dumps(Bomb()), "foreign"), (b"", "foreign"), (b"TC1", "corrupt"), (b"\x1b[2Jgone", "foreign")],
)
def test_hostile_bytes_are_named_and_not_read_when_they_lie_there(url: str, tta: Run, junk: bytes, state: str) -> None:
    """Nothing is unpickled or shown that no cache has written."""
    run_sync(cached(url)[0], 5)
    name = tta("get", "weather", "5", "--json")[1]["name"]
    with redis.Redis.from_url(url) as client:
        client.set(name, junk)
    status, told, _ = tta("get", "weather", "5", "--json")
    assert (status, told["state"], told["bytes"]) == (1, state, len(junk))
    assert "value" not in told
    assert not hasattr(__builtins__, "exploded")
    assert "\x1b" not in tta("get", "weather", "5")[1]


def test_sealed_result_is_shown_when_the_secret_is_set(url: str, tta: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """TTA_CACHE_SECRET opens what was sealed with it; without it, or with another, the result is corrupt to us."""
    run_sync(cached(url, secret="hidden")[0], 5)
    for secret, status in (("hidden", 0), ("wrong", 1), ("", 1), (None, 1)):
        if secret is None:
            monkeypatch.delenv("TTA_CACHE_SECRET")
        else:
            monkeypatch.setenv("TTA_CACHE_SECRET", secret)
        found, told, err = tta("get", "weather", "5", "--json")
        assert (found, err) == (status, "")
        assert told["state"] == ("fresh" if status == 0 else "corrupt")
        assert "hidden" not in json.dumps(told)


def test_terminal_is_safe_when_names_and_values_are_a_stranger_s(url: str, tta: Run) -> None:
    """What would move a cursor is written as an escape."""
    evil = "\x1b]0;owned\x07\u202e\x9b31m"
    run_sync(cached(url, evil, step=Step(lambda data: evil))[0], evil)
    for arguments in (["stats"], ["get", evil, evil], ["bump", evil], ["get", "none" + evil, "1"]):
        _, out, err = tta(*arguments)
        assert (out + err).strip()
        assert not any(not c.isprintable() and c != "\n" for c in out + err)


# ---- invalidate and bump ---------------------------------------------------------------------------------------------


def test_result_is_computed_again_when_its_key_is_invalidated(url: str, tta: Run) -> None:
    """One key, of one tenant, in every version; in effect on return."""
    weather, step = cached(url)
    newer, newer_step = cached(url, version="2")
    for each in (weather, newer):
        for data in (5, 6):
            run_sync(each, data)
    run_sync(weather, 5, WorkflowContext(tenant="a"))
    status, out, err = tta("invalidate", "weather", "--key", "5")
    assert (status, out, err) == (0, "weather, version 1, 2: key 5 invalidated\n", "")
    for each in (weather, newer):
        for data in (5, 6):
            run_sync(each, data)
    run_sync(weather, 5, WorkflowContext(tenant="a"))
    assert (step.calls, newer_step.calls) == (4, 3)
    tta("invalidate", "weather", "--key", "5", "--tenant", "a", "--version", "1")
    run_sync(weather, 5, WorkflowContext(tenant="a"))
    run_sync(newer, 5)
    assert (step.calls, newer_step.calls) == (5, 3)


def test_tagged_results_are_computed_again_when_their_tag_is_invalidated(url: str, tta: Run) -> None:
    """--tag may be given more than once, and beside --key."""
    weather, step = cached(url, tags=lambda data: [f"city:{data}", "all"])
    for data in ("a", "b", "c"):
        run_sync(weather, data)
    status, told, _ = tta("invalidate", "weather", "--tag", "city:a", "--tag", "city:b", "--key", '"c"', "--json")
    assert (status, told["invalidated"]) == (0, ['key "c"', "tag city:a", "tag city:b"])
    for data in ("a", "b", "c"):
        run_sync(weather, data)
    assert step.calls == 6
    assert tta("invalidate", "weather", "--tag", "nobody")[0] == 0
    run_sync(weather, "a")
    assert step.calls == 6


def test_everything_is_computed_again_when_a_namespace_is_bumped(url: str, tta: Run) -> None:
    """All results of all tenants, in every version or in one; other namespaces stay."""
    weather, step = cached(url)
    newer, newer_step = cached(url, version="2")
    other, other_step = cached(url, "weather2")
    everything = [(each, tenant) for each in (weather, newer, other) for tenant in (None, "a")]

    def ask_all() -> tuple[int, int, int]:
        for each, tenant in everything:
            run_sync(each, 5, WorkflowContext(tenant=tenant))
        return step.calls, newer_step.calls, other_step.calls

    assert ask_all() == (2, 2, 2)
    status, out, _ = tta("bump", "weather")
    assert (status, out) == (0, "weather, version 1, 2: all results are forgotten\n")
    assert ask_all() == (4, 4, 2)
    _, told, _ = tta("bump", "weather", "--version", "2", "--json")
    assert told == {"namespace": "weather", "versions": ["2"], "bumped": True}
    assert ask_all() == (4, 6, 2)


def test_memory_of_other_processes_forgets_when_an_operator_invalidates(url: str, tta: Run, tmp_path: Path) -> None:
    """The news reaches the memory above Redis in a running process, by key, by tag and by namespace."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time, redis\n"
        "from tta_sync import run_sync\n"
        "from tta_sync.primitives import CachePrimitive\n"
        "client = redis.Redis.from_url(sys.argv[1])\n"
        "async def step(data): return data\n"
        "memory = CachePrimitive(ttl=600)\n"
        "shared = CachePrimitive(ttl=600, storage=client, namespace='layers', tags=['t'])\n"
        "flow = memory >> step >> shared\n"
        "for _ in range(3):\n"
        "    run_sync(flow, 5)\n"
        "    print('filled', flush=True)\n"
        "    while memory.get_stats()['size']: time.sleep(0.005)\n"
        "    print('forgotten', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, str(program), url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for arguments in (
            ["invalidate", "layers", "--key", "5"],
            ["invalidate", "layers", "--tag", "t"],
            ["bump", "layers"],
        ):
            assert process.stdout.readline() == "filled\n"
            assert tta(*arguments)[0] == 0
            assert process.stdout.readline() == "forgotten\n"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


# ---- what cannot be done ---------------------------------------------------------------------------------------------


def test_one_line_says_so_when_there_is_no_redis(
    tta: Run, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing set, nobody there, no URL: one line, no traceback, no password, exit status 2."""
    monkeypatch.chdir(tmp_path)
    for action in (["stats"], ["get", "n", "1"], ["invalidate", "n", "--key", "1"], ["bump", "n"]):
        status, out, err = tta(*action)
        assert (status, out, err) == (2, "", "tta-sync: no Redis: set REDIS_URL, or write --url redis://host:port/0\n")
        port = free_port()
        status, out, err = tta(*action, "--url", f"redis://:hidden@127.0.0.1:{port}/0")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"Redis at 127.0.0.1:{port} cannot be asked" in err
        assert "hidden" not in err
        status, out, err = tta(*action, "--url", "http://127.0.0.1")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "no Redis URL" in err


def test_url_is_taken_from_the_nearest_place_when_several_say_one(
    url: str, tta: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--url, then TTA_REDIS_URL, then REDIS_URL."""
    monkeypatch.setenv("TTA_REDIS_URL", "redis://127.0.0.1:1/0")
    assert tta("stats")[0] == 2
    assert tta("stats", "--url", url)[0] == 0
    monkeypatch.delenv("TTA_REDIS_URL")
    assert tta("stats")[0] == 0


def test_embedded_redis_is_found_when_the_service_runs_here(
    tta: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside `make run` the command needs no setting; once that has stopped, one line says what it needs."""
    embedded = EmbeddedRedis(tmp_path / "data" / "redis")
    embedded.join()
    try:
        run_sync(cached(embedded.url)[0], 5)
        monkeypatch.setenv("TTA_DATA_DIR", str(tmp_path / "data"))
        assert tta("get", "weather", "5", "--json")[1]["value"] == {"for": 5}
        monkeypatch.delenv("TTA_DATA_DIR")
        monkeypatch.chdir(tmp_path)
        status, told, err = tta("stats", "--json")
        assert (status, err, [row["results"] for row in told["namespaces"]]) == (0, "", [1])
    finally:
        embedded.leave()
    status, _, err = tta("stats")
    assert (status, err) == (2, "tta-sync: no Redis: set REDIS_URL, or write --url redis://host:port/0\n")


def test_redis_that_goes_away_is_told_when_it_does(own_redis_server: Any, tta: Run, monkeypatch: Any) -> None:
    """Between looking and acting as well."""
    url = own_redis_server.url
    run_sync(cached(url)[0], 5)
    real = command.Store.meant

    def meant(self: Any, arguments: Any) -> Any:
        found = real(self, arguments)
        own_redis_server.stop(signal.SIGKILL)
        return found

    monkeypatch.setattr(command.Store, "meant", meant)
    for action in (["get", "weather", "5"], ["invalidate", "weather", "--key", "5"], ["bump", "weather"]):
        status, out, err = tta(*action, "--url", url)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        own_redis_server.start()
        asyncio.run(cached(url)[0].execute(5, WorkflowContext()))


def test_remedy_is_told_when_the_library_is_missing() -> None:
    """Without the redis extra one line names it."""
    code = (
        "import sys; sys.modules['redis'] = None\n"
        "from tta_sync.cli import main; sys.exit(main(['cache', 'stats', '--url', 'redis://127.0.0.1:1']))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "tta-sync[redis]" in done.stderr


def test_usage_is_told_when_nothing_is_named_to_forget(url: str, tta: Run) -> None:
    """invalidate needs a key or a tag, and points to bump."""
    run_sync(cached(url)[0], 5)
    status, _, err = tta("invalidate", "weather")
    assert (status, err) == (
        2,
        "tta-sync: say what to forget: --key KEY or --tag TAG; all of a namespace: tta-sync cache bump\n",
    )
    for arguments in ([], ["get"], ["bump"], ["unknown"]):
        with pytest.raises(SystemExit) as ended:
            main(["cache", *arguments])
        assert ended.value.code == 2


def test_keys_of_another_prefix_are_seen_when_it_is_given(url: str, tta: Run) -> None:
    """--prefix is RedisBackend's; what looks like a pattern in it is taken as it is written."""
    step = Step()
    run_sync(CachePrimitive(step, storage=RedisBackend(url, prefix="my*[app]:"), namespace="n"), 5)
    assert tta("stats", "--json")[1]["namespaces"] == []
    _, told, _ = tta("stats", "--json", "--prefix", "my*[app]:")
    assert [row["results"] for row in told["namespaces"]] == [1]
    assert tta("get", "n", "5", "--prefix", "my*[app]:")[0] == 0


def test_key_in_redis_is_taken_when_it_is_given_in_the_place_of_a_namespace(url: str, tta: Run) -> None:
    """What redis-cli shows can be shown and forgotten, whatever data it was made of."""
    weather, _ = cached(url, "ns: ü", version="2:0")
    for tenant in (None, "acme: 1"):
        run_sync(weather, object.__name__, WorkflowContext(tenant=tenant))
        name = tta("get", "ns: ü", "object", *(["--tenant", tenant] if tenant else []), "--json")[1]["name"]
        status, told, _ = tta("get", name, "--json")
        assert (status, told["name"], told["value"]) == (0, name, {"for": "object"})
        assert (told["namespace"], told["version"], told["tenant"]) == ("ns: ü", "2:0", tenant)
        status, told, _ = tta("invalidate", name, "--json")
        assert (status, told["invalidated"]) == (0, [name])
        assert tta("get", name)[0] == 1
    status, _, err = tta("get", "ns: ü")
    assert (status, err) == (2, "tta-sync: say which: tta-sync cache get NAMESPACE KEY\n")


def test_options_are_taken_when_they_stand_before_the_action(url: str, tta: Run, monkeypatch: Any) -> None:
    """--url, --prefix and --json may stand on either side."""
    monkeypatch.delenv("REDIS_URL")
    run_sync(CachePrimitive(Step(), storage=RedisBackend(url, prefix="x:"), namespace="n"), 5)
    for before, after in ((True, False), (False, True), (True, True)):
        options = ["--url", url, "--prefix", "x:", "--json"]
        status, told, err = tta(*options * before, "stats", *options * after)
        assert (status, err, [row["results"] for row in told["namespaces"]]) == (0, "", [1])


def test_long_namespace_is_found_when_it_is_given_whole_or_as_it_is_shown(url: str, tta: Run) -> None:
    """The names of a long chain are shortened in Redis; both forms mean it."""
    name = ">".join(f"package.module.step_{number}" for number in range(40))
    weather, step = cached(url, name)
    _, told, _ = (run_sync(weather, 5), *tta("stats", "--json"))[1:]
    shown = told["namespaces"][0]["namespace"]
    assert len(shown) < 150 < len(name)
    for number, form in enumerate((name, shown)):
        assert tta("get", form, "5", "--json")[1]["value"] == {"for": 5}
        assert tta("invalidate", form, "--key", "5")[0] == 0
        run_sync(weather, 5)
        assert tta("bump", form)[0] == 0
        run_sync(weather, 5)
        assert step.calls == 1 + 2 * (number + 1)
