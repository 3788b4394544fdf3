"""State that processes share through Redis: rate limits, idempotency keys, hints of open circuits."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
from hypothesis import given, settings, strategies as st

from tta_sync import run_sync, step
from tta_sync.context import Deadline, WorkflowContext
from tta_sync.exceptions import (
    CircuitOpenError,
    ConfigurationError,
    IdempotencyConflictError,
    IdempotencyMismatchError,
    LoopUnavailableError,
    RateLimitedError,
)
from tta_sync.primitives import CachePrimitive, CircuitBreakerPrimitive, RateLimitPrimitive, TimeoutPrimitive
from tta_sync.primitives.performance import RedisBackend
from tta_sync.primitives.recovery.rate_limit import decide
from tta_sync.redis import IdempotencyStore, RedisCircuitHints, RedisRateStore, endpoint
from tta_sync.testing.clock import FakeClock


async def answer(data: Any) -> Any:
    return data


# ---- rate limits -----------------------------------------------------------------------------------------------------


class At:
    """A clock that says what it was told."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.7e9 + self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def call_at(self, when: float, callback: Any, *args: Any) -> Any:
        return asyncio.get_running_loop().call_later(3600, callback, *args)


def test_verdicts_are_those_of_the_local_limit_when_a_trace_is_replayed(url: str) -> None:
    """On a recorded trace of 500 calls, bursts and pauses, Redis and this process decide alike."""
    chance = random.Random(5)
    gaps = [round(chance.choice([0.0, 0.0, 0.01, 0.1, 0.3, 1.0, 5.0]) * chance.random(), 3) for _ in range(500)]

    async def replay(rate: float, burst: int) -> None:
        store, clock, arrival = RedisRateStore(url), At(), 0.0
        context = WorkflowContext(clock=clock)
        refused = 0
        for gap in gaps:
            clock.now += gap
            wait, after = decide(arrival, clock.monotonic(), 1 / rate, (burst - 1) / rate)
            shared = await store.take("trace", f"{rate} {burst}", rate, burst, context)
            assert (shared > 0) == (wait > 0)
            assert shared == pytest.approx(wait, abs=1e-5)
            if not wait:
                arrival = after
            refused += wait > 0
        assert 0 < refused < len(gaps)

    for rate, burst in ((10.0, 1), (3.0, 5), (0.7, 2)):
        asyncio.run(replay(rate, burst))


@pytest.mark.parametrize("keyed", [False, True])
def test_primitives_decide_alike_when_one_is_local_and_one_is_shared(url: str, keyed: bool) -> None:
    """The same recorded trace, retry_after included, through both whole primitives."""
    chance = random.Random(6)
    trace = [(chance.choice([0.0, 0.0, 0.02, 0.2, 1.0]) * chance.random(), chance.choice("ab")) for _ in range(300)]
    key = (lambda data: data) if keyed else None
    local = RateLimitPrimitive(answer, rate=4.0, burst=3, key=key)
    shared = RateLimitPrimitive(answer, rate=4.0, burst=3, key=key, store=url, name=f"trace {keyed}")

    async def main() -> None:
        clock, refused = At(), 0
        for gap, data in trace:
            clock.now += gap
            waits = []
            for limit in (local, shared):
                try:
                    await limit.execute(data, WorkflowContext(clock=clock))
                    waits.append(0.0)
                except RateLimitedError as error:
                    waits.append(error.retry_after)
            assert waits[0] == pytest.approx(waits[1], abs=1e-5)
            assert (waits[0] > 0) == (waits[1] > 0)
            refused += waits[0] > 0
        assert 50 < refused < 250

    asyncio.run(main())


def test_server_s_time_decides_when_the_clocks_of_machines_differ(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock is an hour ahead or behind gets no token more, and none less."""
    limit = RateLimitPrimitive(answer, rate=0.01, burst=3, store=url)
    real = time.time
    for ahead in (0.0, 3600.0, -3600.0):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: real() + ahead)
        assert run_sync(limit, 1) == 1
    for ahead in (7200.0, -7200.0):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: real() + ahead)
        with pytest.raises(RateLimitedError) as caught:
            run_sync(limit, 1)
        assert 90 < caught.value.retry_after <= 100


@settings(max_examples=20, deadline=None, database=None)
@given(st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.5]), min_size=1, max_size=30), st.integers(1, 4))
def test_no_window_lets_more_calls_through_than_it_may(gaps: list[float], burst: int) -> None:
    """In any t seconds at most burst + t * rate calls."""
    rate = 10.0
    asyncio.run(_count(gaps, rate, burst))


async def _count(gaps: list[float], rate: float, burst: int) -> None:
    store, clock, passed = RedisRateStore(SESSION.url), At(), []
    for gap in gaps:
        clock.now += gap
        if not await store.take("window", f"{id(gaps)}", rate, burst, WorkflowContext(clock=clock)):
            passed.append(clock.now)
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            assert last - first + 1 <= burst + (passed[last] - passed[first]) * rate + 0.001


class SESSION:
    """Where hypothesis finds the server: its tests cannot ask for fixtures of a function."""

    url = ""


@pytest.fixture(autouse=True)
def _session(redis_server: Any) -> None:
    SESSION.url = redis_server.url


def test_limit_is_shared_when_two_processes_have_one(url: str) -> None:
    """Two primitives with one store and name are one limit; on the server's own clock."""
    one, other = (
        RateLimitPrimitive(answer, rate=0.01, burst=3, store=RedisRateStore(url), name="shared") for _ in range(2)
    )
    assert [run_sync(limit, 1) for limit in (one, other, one)] == [1, 1, 1]
    for limit in (one, other):
        with pytest.raises(RateLimitedError) as caught:
            run_sync(limit, 1)
        assert 90 < caught.value.retry_after <= 100
    separate = RateLimitPrimitive(answer, rate=0.01, store=RedisRateStore(url), name="separate")
    assert run_sync(separate, 1) == 1
    prefixed = RateLimitPrimitive(answer, rate=0.01, store=RedisRateStore(url, prefix="x:"), name="shared")
    assert run_sync(prefixed, 1) == 1


def test_each_key_has_a_limit_of_its_own_when_a_key_is_given(url: str) -> None:
    """Names and keys cannot reach into each other's limits, however they are spelt."""
    limit = RateLimitPrimitive(answer, rate=0.01, key=lambda data: data, store=RedisRateStore(url), name="a")
    other = RateLimitPrimitive(answer, rate=0.01, key=lambda data: data, store=RedisRateStore(url), name="a:'b'")
    for key in ("b", "b:", ":b", "c", ("b", 1)):
        assert run_sync(limit, key) == key
        assert run_sync(other, key) == key
        with pytest.raises(RateLimitedError):
            run_sync(limit, key)


def test_memory_of_a_limit_is_freed_when_its_burst_is_whole_again(url: str) -> None:
    """A limit that nobody uses takes no room in Redis."""
    limit = RateLimitPrimitive(answer, rate=10.0, burst=5, store=RedisRateStore(url), name="a")
    run_sync(limit, 1)
    with redis.Redis.from_url(url) as client:
        (name,) = client.keys("*:limit:*")
        assert 1000 <= client.pttl(name) <= 1200


def test_waiting_calls_are_served_when_the_time_comes(url: str) -> None:
    """mode="wait" works on a shared limit, on the call's clock."""
    clock = FakeClock(start=50.0)
    limit = RateLimitPrimitive(answer, rate=0.5, store=RedisRateStore(url), name="a", mode="wait")

    async def main() -> None:
        for expected in (50.0, 52.0, 54.0):
            await limit.execute(1, WorkflowContext(clock=clock))
            assert clock.monotonic() == pytest.approx(expected, abs=1e-4)

    asyncio.run(main())


@pytest.mark.parametrize(("fail", "passed"), [("open", 5), ("closed", 0), ("local", 2)])
def test_calls_are_judged_as_configured_when_redis_is_gone(free_port: Any, fail: Any, passed: int) -> None:
    """Without Redis: no limit, no call, or this process's own limit."""
    store = RedisRateStore(f"redis://127.0.0.1:{free_port()}")
    limit = RateLimitPrimitive(answer, rate=0.01, burst=2, store=store, fail=fail, name="a")
    results = []
    for _ in range(5):
        try:
            results.append(run_sync(limit, 1))
        except RateLimitedError:
            pass
    assert len(results) == passed


def test_hurried_call_leaves_a_silent_redis_early(own_redis_server: Any) -> None:
    """Redis has a tenth of what a call has left."""
    place = endpoint(own_redis_server.url)
    place.bounds.limit = 60.0
    store = RedisRateStore(own_redis_server.url)
    os.kill(own_redis_server.pid, signal.SIGSTOP)
    try:

        async def main() -> None:
            began = time.monotonic()
            with pytest.raises(ConnectionError):
                await store.take("a", "", 1.0, 1, WorkflowContext(deadline=Deadline.after(2.0)))
            assert time.monotonic() - began < 20

        asyncio.run(main())
    finally:
        os.kill(own_redis_server.pid, signal.SIGCONT)


# ---- idempotency keys ------------------------------------------------------------------------------------------------


class Work:
    """Something that must be done once."""

    def __init__(self, result: Any = None) -> None:
        self.done = 0
        self.result = result
        self.error: BaseException | None = None

    def __call__(self) -> Any:
        self.done += 1
        if self.error is not None:
            raise self.error
        return self.result if self.result is not None else {"number": self.done}

    async def later(self) -> Any:
        return self()


@pytest.fixture
def store(url: str) -> IdempotencyStore:
    return IdempotencyStore(url)


def test_first_result_is_replayed_when_a_key_comes_again(store: IdempotencyStore, url: str) -> None:
    """The work is done once, from sync code and on the loop, by whichever process comes first."""
    work = Work()
    assert store.run("k", work) == ({"number": 1}, False)
    assert store.run("k", work) == ({"number": 1}, True)
    other = IdempotencyStore(redis.asyncio.Redis.from_url(url))
    assert asyncio.run(other.arun("k", work.later)) == ({"number": 1}, True)
    assert store.run("other", work) == ({"number": 2}, False)
    assert IdempotencyStore(url, prefix="x:").run("k", work).replayed is False
    assert work.done == 3


@pytest.mark.parametrize("result", [(1, None), "", b"\x00", [{"a": 1.5}], False])
def test_result_comes_back_as_it_was_when_it_is_replayed(store: IdempotencyStore, result: Any) -> None:
    """Also what is empty or no JSON by itself."""
    for replayed in (False, True):
        outcome = store.run("k", lambda: result)
        assert (outcome.result, type(outcome.result), outcome.replayed) == (result, type(result), replayed)


def test_key_is_refused_when_it_was_used_for_something_else(store: IdempotencyStore) -> None:
    """The same key with another fingerprint is an error, also while the first one is being worked on."""
    work = Work()
    store.run("k", work, {"amount": 5, "to": "x"})
    assert store.run("k", work, {"to": "x", "amount": 5}).replayed
    with pytest.raises(IdempotencyMismatchError, match="'k' was used for something else"):
        store.run("k", work, {"amount": 6, "to": "x"})
    with pytest.raises(IdempotencyMismatchError):
        store.run("k", work)

    async def main() -> None:
        claim = await store.begin("busy", 1)
        with pytest.raises(IdempotencyMismatchError):
            await store.begin("busy", 2, wait=True)
        await claim.finish("done")  # type: ignore[union-attr]  # it is a claim

    asyncio.run(main())
    assert work.done == 1


def test_concurrent_call_is_refused_when_it_does_not_want_to_wait(store: IdempotencyStore) -> None:
    """While the work is being done, another call with the key is told so."""

    async def main() -> None:
        claim = await store.begin("k")
        with pytest.raises(IdempotencyConflictError) as caught:
            await store.arun("k", Work().later)
        assert (caught.value.key, caught.value.retry_after) == ("k", 1.0)
        await claim.finish(7)  # type: ignore[union-attr]  # it is a claim
        assert await store.arun("k", Work().later) == (7, True)

    asyncio.run(main())


def test_concurrent_calls_get_the_one_result_when_they_wait(store: IdempotencyStore) -> None:
    """Twenty threads with one key: the work is done once, and all get its result."""
    done: list[int] = []
    release = threading.Event()

    def work() -> int:
        done.append(1)
        assert release.wait(20)
        return len(done)

    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(store.run("k", work, wait=True))) for _ in range(20)]
    for thread in threads:
        thread.start()
    give_up = time.monotonic() + 20
    while not done and time.monotonic() < give_up:
        time.sleep(0.005)
    release.set()
    for thread in threads:
        thread.join()
    assert sorted(outcome.replayed for outcome in results) == [False] + [True] * 19
    assert {outcome.result for outcome in results} == {1}


def test_waiting_call_gives_up_when_the_work_takes_too_long(url: str) -> None:
    """max_wait bounds the wait."""
    store = IdempotencyStore(url, max_wait=0.1)

    async def main() -> None:
        claim = await store.begin("k")
        with pytest.raises(IdempotencyConflictError):
            await store.begin("k", wait=True)
        await claim.abandon()  # type: ignore[union-attr]  # it is a claim

    asyncio.run(main())


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_key_is_free_again_when_the_work_fails(store: IdempotencyStore, error: BaseException) -> None:
    """What failed was not done: the next call with the key does it."""
    work = Work()
    work.error = error
    with pytest.raises(type(error)):
        store.run("k", work)
    work.error = None
    assert store.run("k", work) == ({"number": 2}, False)


def test_key_is_free_again_when_the_call_is_cancelled(store: IdempotencyStore) -> None:
    """At whatever moment: before the claim is known, and during the work."""

    async def hang() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        for ticks in (1, 2, 3, 4, 50):
            call = asyncio.ensure_future(store.arun("k", hang))
            for _ in range(ticks):
                await asyncio.sleep(0 if ticks < 50 else 0.002)
            call.cancel()
            await asyncio.wait([call])
            async with asyncio.timeout(3):  # an abandoned claim would live for 5 s
                while True:
                    try:
                        await store.arun("k", Work().later)
                        break
                    except IdempotencyConflictError:
                        await asyncio.sleep(0.01)
            with redis.Redis.from_url(SESSION.url) as client:
                client.flushall()

    asyncio.run(main())


def test_key_is_free_again_when_the_process_is_killed(store: IdempotencyStore, url: str) -> None:
    """kill -9 during the work: the claim is not renewed any more, and runs out."""
    program = (
        "import sys, time\n"
        "from tta_sync.redis import IdempotencyStore\n"
        "def work():\n"
        "    print('working', flush=True)\n"
        "    time.sleep(60)\n"
        "IdempotencyStore(sys.argv[1]).run('k', work)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        with pytest.raises(IdempotencyConflictError):
            store.run("k", Work())
        process.kill()
    killed = time.monotonic()
    assert store.run("k", Work(), wait=True) == ({"number": 1}, False)
    assert time.monotonic() - killed < 20  # 5 s are promised


def test_claim_lives_on_when_the_work_takes_longer_than_a_claim(store: IdempotencyStore) -> None:
    """The claim is renewed while the work is being done, also on a caller's thread."""
    with redis.Redis.from_url(SESSION.url) as client:

        def work() -> int:
            (name,) = client.keys("*:idempotency:*")
            left = client.pttl(name)
            give_up = time.monotonic() + 20
            while client.pttl(name) <= left:
                left = client.pttl(name)
                assert time.monotonic() < give_up
                time.sleep(0.01)
            return 1

        assert store.run("k", work) == (1, False)


def test_late_result_is_not_kept_when_its_claim_had_expired(store: IdempotencyStore) -> None:
    """Whoever took over is the one whose result counts."""

    async def main() -> None:
        late = await store.begin("k")
        with redis.Redis.from_url(SESSION.url) as client:
            client.flushall()  # as the end of its life does
        claim = await store.begin("k")
        await late.finish("late")  # type: ignore[union-attr]  # it is a claim
        await late.abandon()  # type: ignore[union-attr]
        await claim.finish("first")  # type: ignore[union-attr]
        assert await store.begin("k") == ("first", True)

    asyncio.run(main())


def test_result_is_forgotten_when_its_ttl_is_over(url: str) -> None:
    """A result is kept for ttl seconds, a day by default."""
    with redis.Redis.from_url(url) as client:
        IdempotencyStore(url).run("day", Work())
        (name,) = client.keys("*:idempotency:*")
        assert 86_300_000 < client.pttl(name) <= 86_400_000
        IdempotencyStore(url, ttl=0.05).run("short", Work())
        give_up = time.monotonic() + 20
        while len(client.keys("*:idempotency:*")) > 1:
            assert time.monotonic() < give_up
            time.sleep(0.01)


@pytest.mark.parametrize("ttl", [0, -1, True, "x", float("nan"), float("inf")])
def test_store_is_refused_when_its_ttl_is_senseless(url: str, ttl: Any) -> None:
    """ttl is a number of seconds."""
    with pytest.raises(ConfigurationError, match="ttl="):
        IdempotencyStore(url, ttl=ttl)


def test_result_is_refused_when_json_cannot_carry_it(store: IdempotencyStore) -> None:
    """What could not be replayed is an error now, and not at the second call; the key is free again."""
    for result, text in ((object(), "JSON cannot carry this object"), ("x" * 2_000_000, "too large")):
        with pytest.raises(ConfigurationError, match=text):
            store.run("k", lambda result=result: result)
    assert not store.run("k", Work()).replayed
    with pytest.raises(ConfigurationError, match="fingerprint is a builtins"):
        store.run("k", Work(), object())


def test_work_is_not_done_when_redis_cannot_be_asked(free_port: Any) -> None:
    """Whoever cannot know whether it was done must not do it again."""
    work = Work()
    store = IdempotencyStore(f"redis://:hidden@127.0.0.1:{free_port()}")
    for _ in range(2):
        with pytest.raises(ConnectionError, match="did not answer") as caught:
            store.run("k", work)
        assert "hidden" not in str(caught.value)
    assert work.done == 0


def test_work_is_not_done_when_the_stored_result_cannot_be_read(store: IdempotencyStore) -> None:
    """A result that somebody altered is neither believed nor computed again."""
    work = Work()
    store.run("k", work)
    with redis.Redis.from_url(SESSION.url) as client:
        (name,) = client.keys("*:idempotency:*")
        client.hset(name, "result", b"junk")
    with pytest.raises(ConnectionError, match="cannot be used: holds a result that is foreign"):
        store.run("k", work)
    assert work.done == 1


def test_plain_call_names_its_twin_when_it_is_made_on_a_loop(store: IdempotencyStore) -> None:
    """On the loop, arun is awaited."""

    async def main() -> None:
        with pytest.raises(LoopUnavailableError, match=r"await store\.arun"):
            store.run("k", Work())

    asyncio.run(main())


@pytest.mark.parametrize("key", ["", "a:b", "x" * 5000, "ü\n\x00", "_"])
def test_any_text_is_a_key_when_a_client_chose_it(store: IdempotencyStore, key: str) -> None:
    """Keys are the clients': whatever they hold, they are told apart."""
    assert store.run(key, lambda: "this").result == "this"
    assert store.run(key + "!", lambda: "that").result == "that"
    assert store.run(key, lambda: "never") == ("this", True)


# ---- hints of open circuits ------------------------------------------------------------------------------------------


async def fail(data: Any) -> Any:
    raise OSError("down")


async def hinted(condition: Any) -> None:
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.005)


def test_circuit_opens_everywhere_when_it_opens_in_one_process(url: str) -> None:
    """What one process found out the hard way, the others need not."""
    one = CircuitBreakerPrimitive(fail, name="llm", failure_threshold=2, hints=RedisCircuitHints(url))
    hints = RedisCircuitHints(url)
    other = CircuitBreakerPrimitive(answer, name="llm", hints=hints)
    third = CircuitBreakerPrimitive(answer, name="db", hints=hints)

    async def main() -> None:
        assert await other.execute(1, WorkflowContext()) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="down"):
                await one.execute(1, WorkflowContext())
        await hinted(lambda: hints.open_until("llm") is not None)
        with pytest.raises(CircuitOpenError) as caught:
            await other.execute(1, WorkflowContext())
        assert 0 < caught.value.retry_after <= 60
        assert await third.execute(1, WorkflowContext()) == 1

        late = RedisCircuitHints(url)  # one that comes later reads what was said before
        await hinted(lambda: late.open_until("llm") is not None)

    asyncio.run(main())


def test_hints_do_no_harm_when_they_make_no_sense(url: str) -> None:
    """Junk is no hint, and no hint is believed for more than an hour."""
    hints = RedisCircuitHints(url)
    channel = "tta:1:#:circuits"

    async def main() -> None:
        with redis.Redis.from_url(url) as client:
            client.hset(channel, mapping={"junk": "soon", "nan": "nan", "ever": "1e300"})
            await hinted(lambda: hints.open_until("ever") is not None)
            assert hints.open_until("ever") <= time.time() + 3600.1  # type: ignore[operator]  # it is there
            for message in (b"", b"x", b"\xff\xff", b"nan y", b"-1 z"):
                client.publish(channel, message)
            client.publish(channel, f"{time.time() + 5} last")
            await hinted(lambda: hints.open_until("last") is not None)
        assert [hints.open_until(name) for name in ("junk", "nan", "y", "z", "")] == [None] * 5

    asyncio.run(main())


def test_breaker_works_alone_when_redis_is_gone(free_port: Any) -> None:
    """Without Redis there are no hints, and nothing else changes."""
    hints = RedisCircuitHints(f"redis://127.0.0.1:{free_port()}")
    breaker = CircuitBreakerPrimitive(fail, name="llm", failure_threshold=2, hints=hints)
    for _ in range(2):
        with pytest.raises(OSError, match="down"):
            run_sync(breaker, 1)
    with pytest.raises(CircuitOpenError):
        run_sync(breaker, 1)
    assert hints.open_until("other") is None
    hints.opened("here", time.time() + 5)  # on a thread without a loop
    assert hints.open_until("here") is not None


def test_memory_of_hints_is_bounded_when_circuits_are_many(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process keeps of circuits has an end."""
    from tta_sync.redis import hints as module

    monkeypatch.setattr(module, "_MAX_CIRCUITS", 3)
    hints = RedisCircuitHints(url)
    for number in range(10):
        hints.opened(str(number), time.time() + 5)
    assert len(hints._until) <= 3
    assert hints.open_until("9") is not None


# ---- one argument ----------------------------------------------------------------------------------------------------


def spellings(url: str) -> list[Any]:
    """Everything that means one server."""
    return [url, redis.Redis.from_url(url), redis.asyncio.Redis.from_url(url), RedisBackend(url), RedisRateStore(url)]


def test_limit_is_shared_when_its_store_is_spelled_in_any_way(url: str) -> None:
    """store= takes a URL, a client of either kind, a back end, or a store; they are one limit, from sync code too."""
    limits = [RateLimitPrimitive(answer, rate=0.01, burst=5, store=store) for store in spellings(url)]
    assert [run_sync(limit, 1) for limit in limits] == [1] * 5
    for limit in limits:
        with pytest.raises(RateLimitedError):
            asyncio.run(limit.execute(1, WorkflowContext()))
    with redis.Redis.from_url(url) as client:
        assert client.keys("*:limit:*") == [f"tta:1:#:limit:{__name__}.answer:%:".encode()]


def test_hints_are_shared_when_they_are_spelled_in_any_way(url: str) -> None:
    """hints= takes a URL, a client of either kind, a back end, or hints."""
    hints = [*spellings(url)[:4], RedisCircuitHints(url)]
    breakers = [CircuitBreakerPrimitive(answer, hints=each) for each in hints]
    trip = CircuitBreakerPrimitive(fail, name=f"{__name__}.answer", failure_threshold=1, hints=url)

    async def main() -> None:
        with pytest.raises(OSError, match="down"):
            await trip.execute(1, WorkflowContext())
        for breaker in breakers:
            await hinted(lambda breaker=breaker: breaker._hints.open_until(f"{__name__}.answer") is not None)
            with pytest.raises(CircuitOpenError):
                await breaker.execute(1, WorkflowContext())

    asyncio.run(main())


@pytest.mark.parametrize("make", [RateLimitPrimitive, CircuitBreakerPrimitive])
def test_step_needs_a_lasting_name_when_processes_share_something(make: Any, url: str) -> None:
    """A lambda or a local function has no name that other processes know; a step's own name, or name=, is one."""

    async def local(data: Any) -> Any:
        return data

    options: dict[str, Any] = {"rate": 1.0, "store": url} if make is RateLimitPrimitive else {"hints": url}
    for nameless in (local, lambda data: data, CachePrimitive(local), functools.partial(answer)):
        with pytest.raises(ConfigurationError, match="name="):
            make(nameless, **options)
    make(local, **options, name="given")
    assert make(step(local, name="own"), **options)._shared_name == "own"
    assert make(TimeoutPrimitive(answer, 1.0), **options)._shared_name == f"TimeoutPrimitive({__name__}.answer)"


@pytest.mark.parametrize("make", [RateLimitPrimitive, CircuitBreakerPrimitive])
@pytest.mark.parametrize("source", [5, "http://x", object()])
def test_source_is_refused_when_it_is_no_redis(make: Any, source: Any) -> None:
    """What cannot be shared is refused at construction, with what could be."""
    options: dict[str, Any] = {"rate": 1.0, "store": source} if make is RateLimitPrimitive else {"hints": source}
    with pytest.raises(ConfigurationError, match=r"no client of one Redis server|no Redis URL"):
        make(answer, **options)


SHARING = """
import asyncio, sys, time
from tta_sync import run_sync
from tta_sync.context import WorkflowContext
from tta_sync.exceptions import CircuitOpenError, RateLimitedError
from tta_sync.primitives import CircuitBreakerPrimitive, RateLimitPrimitive

url, role = sys.argv[1:]


async def call(data):
    if data == "break":
        raise OSError("down")
    return data


limit = RateLimitPrimitive(call, rate=0.001, burst=50, store=url)
breaker = CircuitBreakerPrimitive(call, failure_threshold=1, hints=url)


def ask(flow, data):
    if role == "sync":
        return run_sync(flow, data)
    return asyncio.run(flow.execute(data, WorkflowContext()))


run_sync(breaker, 1)  # the managed loop listens from now on
print("ready", flush=True)
for line in sys.stdin:
    if line.strip() == "limit":
        passed = 0
        for _ in range(40):
            try:
                ask(limit, 1)
                passed += 1
            except RateLimitedError:
                pass
        print(passed, flush=True)
    elif line.strip() == "break":
        try:
            run_sync(breaker, "break")
        except OSError:
            print("broken", flush=True)
    else:
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up:
            try:
                run_sync(breaker, 1)
                time.sleep(0.01)
            except CircuitOpenError:
                print("open", flush=True)
                break
"""


def test_limit_and_hints_are_shared_when_processes_run_the_same_code(url: str, tmp_path: Path) -> None:
    """Three processes, of sync code and of loops, keep to one limit; one tells all of a failure."""
    program = tmp_path / "sharing.py"
    program.write_text(SHARING)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(program), url, role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for role in ("sync", "sync", "loop")
    ]

    def tell(process: subprocess.Popen[str], word: str) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{word}\n")

    def hear(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    try:
        assert [hear(process) for process in processes] == ["ready"] * 3
        for process in processes:
            tell(process, "limit")
        assert sum(int(hear(process)) for process in processes) == 50
        tell(processes[0], "break")
        assert hear(processes[0]) == "broken"
        for process in processes[1:]:
            tell(process, "try")
        assert [hear(process) for process in processes[1:]] == ["open", "open"]
    finally:
        for process in processes:
            process.communicate(timeout=30)
            assert process.returncode == 0


# ---- Redis in trouble ------------------------------------------------------------------------------------------------


def full(admin: redis.Redis) -> None:
    admin.config_set("maxmemory", 1)
    admin.config_set("maxmemory-policy", "noeviction")


@pytest.mark.parametrize("trouble", [full, lambda admin: admin.replicaof("127.0.0.1", 1)])
def test_shared_state_does_without_redis_when_it_takes_nothing(own_redis_server: Any, trouble: Any) -> None:
    """Out of memory, or a replica: limits are this process's, work with a key is not done, hints are none."""
    url = own_redis_server.url
    limit = RateLimitPrimitive(answer, rate=0.01, burst=2, store=url, workers=2)
    breaker = CircuitBreakerPrimitive(fail, failure_threshold=1, hints=url)
    store, work = IdempotencyStore(url), Work()
    assert store.run("before", work).result == {"number": 1}
    with redis.Redis.from_url(url) as admin:
        trouble(admin)
        assert [run_sync(limit, 1) for _ in range(2)] == [1, 1]
        with pytest.raises(RateLimitedError) as caught:
            run_sync(limit, 1)
        assert 190 < caught.value.retry_after <= 200
        with pytest.raises(OSError, match="down"):
            run_sync(breaker, 1)
        with pytest.raises(CircuitOpenError):
            run_sync(breaker, 1)
        with pytest.raises(ConnectionError, match=r"OOM|READONLY"):
            store.run("k", work)
        assert work.done == 1
        admin.config_set("maxmemory", 0)
        admin.replicaof("NO", "ONE")
        assert store.run("k", work).result == {"number": 2}
        assert store.run("before", work).replayed


def test_shared_state_is_shared_again_when_redis_comes_back(own_redis_server: Any, eventually: Any) -> None:
    """After a restart, empty, limits and keys work as before; nobody restarts us."""
    url = own_redis_server.url
    limit = RateLimitPrimitive(answer, rate=0.01, burst=1000, store=url)
    store, work = IdempotencyStore(url), Work()
    run_sync(limit, 1)
    own_redis_server.stop(signal.SIGKILL)
    run_sync(limit, 1)
    with pytest.raises(ConnectionError):
        store.run("k", work)
    own_redis_server.start()
    assert store.run("k", work).result == {"number": 1}  # the first to ask finds it

    def shared() -> bool:
        run_sync(limit, 1)
        with redis.Redis.from_url(url) as client:
            return bool(client.keys("*:limit:*"))

    eventually(shared, what="the shared limit's return")


def test_forked_child_listens_for_itself_when_its_parent_was_about_to(url: str) -> None:
    """What another loop has begun, which in a forked child never ends, keeps nobody from listening."""
    hints, other = RedisCircuitHints(url), asyncio.new_event_loop()

    async def for_ever() -> None:
        await asyncio.Event().wait()

    begun = other.create_task(for_ever())
    hints._tasks.add(begun)

    async def main() -> None:
        with redis.Redis.from_url(url) as client:
            hints.open_until("a")
            await hinted(lambda: client.pubsub_numsub("tta:1:#:circuits")[0][1] == 1)
            client.publish("tta:1:#:circuits", f"{time.time() + 5} a")
            await hinted(lambda: hints.open_until("a") is not None)

    asyncio.run(main())
    begun.cancel()
    other.run_until_complete(asyncio.gather(begun, return_exceptions=True))
    other.close()


def test_stores_fit_their_ports_when_a_type_checker_or_a_reader_asks(url: str) -> None:
    """What users may supply themselves has a public name, and ours have its methods."""
    from tta_sync.primitives.recovery import CircuitHints, RateStore

    for port, ours in ((RateStore, RedisRateStore(url)), (CircuitHints, RedisCircuitHints(url))):
        methods = [name for name in vars(port) if not name.startswith("_")]
        assert methods
        for name in methods:
            assert inspect.signature(getattr(port, name)).parameters.keys() - {"self"} == set(
                inspect.signature(getattr(ours, name)).parameters
            )
