"""The connection to Redis: replies whatever their packets, and never a long wait for a server that does not answer."""

from __future__ import annotations

import asyncio
import datetime
import gc
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, strategies as st

from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.performance.wire import (
    LIMIT,
    Bounds,
    Endpoint,
    Link,
    Listener,
    Oversized,
    RedisDown,
    Refused,
    Wire,
    pack,
)
from tta_sync.redis import endpoint


class Transport(asyncio.Transport):
    """The sending half of a connection, kept in memory."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.aborted = False

    def write(self, data: Any) -> None:
        self.sent.append(bytes(data))

    def abort(self) -> None:
        self.aborted = True


def wire(lost: list[Exception] | None = None, push: list[Any] | None = None, limit: float = 5.0) -> Wire:
    """A connected wire whose server is the test."""
    wire = Wire(
        Bounds(limit, 1000),
        lambda wire, error: lost.append(error) if lost is not None else None,
        push.append if push is not None else None,
    )
    wire.connection_made(Transport())
    return wire


REPLIES = [
    (b"+OK\r\n", b"OK"),
    (b":-42\r\n", -42),
    (b"$-1\r\n", None),
    (b"$0\r\n\r\n", b""),
    (b"$4\r\n\r\n\r\n\r\n", b"\r\n\r\n"),
    (b"$600\r\n" + b"x" * 600 + b"\r\n", b"x" * 600),
    (b"*-1\r\n", None),
    (b"*0\r\n", []),
    (b"*3\r\n$1\r\na\r\n$-1\r\n:7\r\n", [b"a", None, 7]),
    (b"*2\r\n*1\r\n+x\r\n$2\r\nyz\r\n", [[b"x"], b"yz"]),
]


@given(st.lists(st.sampled_from(REPLIES), min_size=1, max_size=6), st.lists(st.integers(1, 700), max_size=30))
def test_replies_are_read_when_they_come_in_any_packets(replies: list[tuple[bytes, Any]], sizes: list[int]) -> None:
    """However the bytes are cut, each command gets its own reply, in order."""

    async def main() -> None:
        connection = wire()
        futures = [connection.ask(("GET", str(index))) for index in range(len(replies))]
        stream = b"".join(reply for reply, _ in replies)
        for size in sizes:
            connection.data_received(stream[:size])
            stream = stream[size:]
        connection.data_received(stream)
        assert [future.result() for future in futures] == [value for _, value in replies]
        connection.close()

    asyncio.run(main())


def test_command_is_packed_as_redis_reads_it_when_sent() -> None:
    """Bytes, text and numbers are bulk strings, also with line ends and half surrogates inside."""
    assert pack(("SET", b"k\r\n", 12, "ü")) == b"*4\r\n$3\r\nSET\r\n$3\r\nk\r\n\r\n$2\r\n12\r\n$2\r\n\xc3\xbc\r\n"
    assert pack(("\ud800",)) == b"*1\r\n$3\r\n\xed\xa0\x80\r\n"


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"$x\r\n",
        b"*x\r\n",
        b":x\r\n",
        b"*999999999\r\n",
        b"*1\r\n" * 10,
        b"+" + b"x" * 70_000,
        b"+OK\r\n+OK\r\n",
    ],
)
def test_connection_is_dropped_when_what_answers_is_no_redis(garbage: bytes) -> None:
    """Bytes that are no reply, or one that nobody asked for, end the connection; who waits is told."""

    async def main() -> None:
        lost: list[Exception] = []
        connection = wire(lost)
        future = connection.ask(("PING",))
        connection.data_received(garbage)
        assert isinstance(connection._transport, Transport)
        assert connection._transport.aborted
        assert len(lost) == 1
        if garbage.startswith(b"+OK"):
            assert future.result() == b"OK"
        else:
            with pytest.raises(RedisDown):
                future.result()

    asyncio.run(main())


def test_connection_is_dropped_when_a_reply_is_larger_than_allowed() -> None:
    """The length alone is enough: nothing of a huge reply is kept."""

    async def main() -> None:
        connection = wire()
        future = connection.ask(("GET", "k"))
        connection.data_received(b"$1001\r\nx")
        with pytest.raises(Oversized, match="1001 bytes"):
            future.result()
        assert isinstance(connection._transport, Transport)
        assert connection._transport.aborted

    asyncio.run(main())


def test_errors_of_the_server_are_raised_when_it_refuses() -> None:
    """An error reply concerns its own command only."""

    async def main() -> None:
        connection = wire()
        first, second = connection.ask(("SET", "k", 1)), connection.ask(("GET", "k"))
        connection.data_received(b"-OOM command not allowed\r\n$1\r\n1\r\n")
        with pytest.raises(Refused, match="OOM command not allowed") as caught:
            first.result()
        assert caught.value.code == "OOM"
        assert second.result() == b"1"
        connection.close()

    asyncio.run(main())


def test_reply_is_dropped_when_its_caller_has_left() -> None:
    """A cancelled caller costs the others nothing: the replies stay in step."""

    async def main() -> None:
        connection = wire()
        first, second = connection.ask(("GET", "a")), connection.ask(("GET", "b"))
        first.cancel()
        connection.data_received(b"$1\r\na\r\n$1\r\nb\r\n")
        assert second.result() == b"b"
        connection.close()

    asyncio.run(main())


def test_published_messages_are_told_from_replies_when_they_come_between() -> None:
    """A message goes to the listener, also between a command and its reply."""

    async def main() -> None:
        pushed: list[Any] = []
        connection = wire(push=pushed)
        future = connection.ask(("SUBSCRIBE", "c"))
        message = b"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$2\r\nhi\r\n"
        connection.data_received(message + b"*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n" + message)
        assert future.result() == [b"subscribe", b"c", 1]
        assert pushed == [[b"message", b"c", b"hi"]] * 2
        connection.close()

    asyncio.run(main())


class MovableLoop(asyncio.SelectorEventLoop):
    """A loop whose time the test can put forward."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


def test_everyone_is_told_when_the_oldest_command_has_waited_its_limit() -> None:
    """A server that is silent for the limit has lost the connection, with all that waits on it."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, MovableLoop)

        async def pass_by(seconds: float) -> None:
            loop.ahead += seconds
            for _ in range(3):
                await asyncio.sleep(0)

        lost: list[Exception] = []
        connection = wire(lost, limit=1000.0)
        first = connection.ask(("GET", "a"))
        await pass_by(600)
        connection.data_received(b"$1\r\na\r\n")
        second, third = connection.ask(("GET", "b")), connection.ask(("GET", "c"))
        await pass_by(600)
        assert first.result() == b"a"
        assert not second.done()  # the limit counts from its own beginning
        await pass_by(600)
        for silent in (second, third):
            with pytest.raises(RedisDown, match="did not answer in time"):
                silent.result()
        assert isinstance(lost[0], TimeoutError)

    with asyncio.Runner(loop_factory=MovableLoop) as runner:
        runner.run(main())


# ---- real servers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def black_hole() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def link_to(url: str, limit: float | None = None) -> Link:
    place = endpoint(url)
    if limit is not None:
        place.bounds.limit = limit
    return place.link


@pytest.fixture
def patient_url(redis_url: str) -> Iterator[str]:
    """The session's Redis, with which tests that are not about time have patience."""
    place = endpoint(redis_url)
    place.bounds.limit = 10.0
    yield redis_url
    place.bounds.limit = LIMIT


def test_commands_of_many_share_one_connection_when_they_ask_at_once(own_redis_server: Any) -> None:
    """A thousand concurrent commands need one connection, and each gets its own answer."""

    async def main() -> None:
        place = endpoint(own_redis_server.url)
        place.bounds.limit = 10.0  # this is not about time
        link = place.link
        await asyncio.gather(*(link.ask("SET", f"k{index}", index) for index in range(1000)))
        values = await asyncio.gather(*(link.ask("GET", f"k{index}") for index in range(1000)))
        assert values == [b"%d" % index for index in range(1000)]
        clients = await link.ask("CLIENT", "LIST")
        assert clients.count(b"name=") == 1
        assert await link.ask("GET", "k" * 100_000) is None
        await link.ask("SET", "big", b"x" * 3_000_000)
        assert len(await link.ask("GET", "big")) == 3_000_000

    asyncio.run(main())


def test_connection_is_closed_when_its_loop_ends(own_redis_server: Any) -> None:
    """The end of asyncio.run closes the connection; the next loop opens its own."""
    place = endpoint(own_redis_server.url)
    for _ in range(3):
        assert asyncio.run(_ask(place, "PING")) == b"PONG"
    with redis.Redis.from_url(own_redis_server.url) as client:
        give_up = time.monotonic() + 10
        while len(client.client_list()) > 1 and time.monotonic() < give_up:
            time.sleep(0.005)
        assert len(client.client_list()) == 1
    gc.collect()  # an unclosed transport would warn
    assert len(place._links) <= 1


async def _ask(place: Endpoint, *parts: Any) -> Any:
    return await place.link.ask(*parts)


def test_callers_are_told_at_once_when_the_server_is_known_to_be_down(black_hole: int) -> None:
    """The first question to a black hole takes the limit; the next ones take nothing."""

    async def main() -> None:
        link = link_to(f"redis://127.0.0.1:{black_hole}")
        began = time.perf_counter()
        with pytest.raises(RedisDown):
            await link.ask("GET", "k")
        first = time.perf_counter() - began
        assert 0.09 <= first < 1
        for _ in range(100):
            with pytest.raises(RedisDown):
                link.ask("GET", "k").send(None)  # in its first step: it waits for nothing, whatever the machine does
        assert link.down

    asyncio.run(main())


def test_callers_are_told_at_once_when_the_server_refuses_connections(free_port: Any) -> None:
    """Nobody listening is known immediately."""

    async def main() -> None:
        link = link_to(f"redis://127.0.0.1:{free_port()}")
        for _ in range(2):
            with pytest.raises(RedisDown):
                await link.ask("GET", "k")
        assert link.down

    asyncio.run(main())


def test_server_counts_as_down_when_it_closes_every_connection_at_once() -> None:
    """A proxy without a server behind it accepts and hangs up: that is a refusal."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        accepted: list[int] = []

        def hang_up() -> None:
            while not stop.is_set():
                try:
                    server.accept()[0].close()
                    accepted.append(1)
                except TimeoutError:
                    continue

        thread = threading.Thread(target=hang_up)
        thread.start()

        async def main() -> None:
            link = link_to(f"redis://127.0.0.1:{server.getsockname()[1]}")
            with pytest.raises(RedisDown):
                await link.ask("PING")
            assert link.down

        try:
            asyncio.run(main())
        finally:
            stop.set()
            thread.join()
    assert accepted


def test_caller_with_little_time_leaves_early_and_harms_nobody(patient_url: str) -> None:
    """A limit below the common one ends one caller's wait, not the connection."""

    async def main() -> None:
        link = link_to(patient_url)
        await link.ask("PING")
        slow = asyncio.ensure_future(link.ask("DEBUG", "SLEEP", "0.6"))
        await asyncio.sleep(0)
        with pytest.raises(RedisDown, match="the time that this call has left"):
            await link.ask("PING", limit=0.005)
        assert await slow == b"OK"
        assert await link.ask("PING") == b"PONG"
        assert not link.down

    asyncio.run(main())


def test_server_is_found_again_when_it_was_stopped_for_a_while(own_redis_server: Any, eventually: Any) -> None:
    """A frozen server is down after one limit; when it thaws, it is used again without a restart."""

    async def main() -> None:
        link = link_to(own_redis_server.url)
        await link.ask("SET", "k", 1)
        os.kill(own_redis_server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(RedisDown):
                await link.ask("GET", "k")
            assert link.down
        finally:
            os.kill(own_redis_server.pid, signal.SIGCONT)
        assert await _until_up(link, "GET", "k") == b"1"

    asyncio.run(main())


def test_server_is_found_again_when_it_was_killed_and_restarted(own_redis_server: Any) -> None:
    """A crash loses the connection, not the cache: a new server at the same address is used."""

    async def main() -> None:
        link = link_to(own_redis_server.url)
        await link.ask("SET", "k", 1)
        await asyncio.to_thread(own_redis_server.stop, signal.SIGKILL)
        while not link.down:
            with pytest.raises(RedisDown):
                await link.ask("GET", "k")
        changes: list[int] = []
        link.on_change = lambda: changes.append(1)
        await asyncio.to_thread(own_redis_server.start)
        assert await _until_up(link, "GET", "k") is None
        assert changes

    asyncio.run(main())


async def _until_up(link: Link, *parts: Any) -> Any:
    give_up = time.monotonic() + 20
    while True:
        try:
            return await link.ask(*parts)
        except RedisDown:
            assert time.monotonic() < give_up, "the server was not found again"
            await asyncio.sleep(0.01)


def test_closed_connection_is_opened_again_when_the_server_is_up(patient_url: str) -> None:
    """A connection that the server ended (CLIENT KILL, a time-out) is replaced without anybody noticing."""

    async def main() -> None:
        link = link_to(patient_url)
        number = await link.ask("CLIENT", "ID")
        with redis.Redis.from_url(patient_url) as client:
            client.client_kill_filter(_id=str(number))
        while link.connected is not None:
            await asyncio.sleep(0.001)
        assert await link.ask("CLIENT", "ID") != number
        assert not link.down

    asyncio.run(main())


def test_stalled_loop_is_not_taken_for_a_silent_server_when_it_goes_on(patient_url: str) -> None:
    """Code that blocks the loop for longer than the limit does not make Redis look dead."""

    async def main() -> None:
        link = link_to(patient_url)
        await link.ask("PING")
        endpoint(patient_url).bounds.limit = LIMIT
        question = asyncio.ensure_future(link.ask("PING"))
        await asyncio.sleep(0)
        time.sleep(0.5)  # the user's fault, on purpose
        assert await question == b"PONG"
        assert not link.down

    asyncio.run(main())


def test_busy_loop_is_not_taken_for_a_silent_server_when_it_connects(redis_url: str) -> None:
    """A loop that is held up again and again reaches Redis all the same: its own delays do not count."""

    async def main() -> None:
        async def hold_up() -> None:
            while True:
                time.sleep(0.08)  # the user's fault, on purpose
                await asyncio.sleep(0)

        hog = asyncio.ensure_future(hold_up())
        link = link_to(redis_url)
        try:
            for _ in range(5):
                assert await link.ask("PING") == b"PONG"
        finally:
            hog.cancel()

    asyncio.run(main())


def test_question_is_refused_at_once_when_its_connection_was_just_lost() -> None:
    """Nobody waits on a connection that has failed."""

    async def main() -> None:
        connection = wire()
        connection.close()
        with pytest.raises(RedisDown, match="lost"):
            await connection.ask(("PING",))

    asyncio.run(main())


def test_nothing_is_sent_when_a_message_is_posted_without_a_connection(free_port: Any) -> None:
    """post() never opens a connection, nor raises."""

    async def main() -> None:
        link = link_to(f"redis://127.0.0.1:{free_port()}")
        link.post("PING")
        await asyncio.sleep(0)
        assert link.connected is None
        assert not link.down

    asyncio.run(main())


def test_refusal_of_a_posted_message_is_nobodys_error(patient_url: str) -> None:
    """The answer to a post is dropped, whatever it is."""

    async def main() -> None:
        link = link_to(patient_url)
        await link.ask("PING")
        link.post("NONSENSE")
        assert await link.ask("PING") == b"PONG"
        link.post("PING")
        link.close()
        link.post("PING")

    asyncio.run(main())


def test_probing_ends_when_the_loop_does(free_port: Any) -> None:
    """A link that knows its server to be down leaves nothing behind when the loop is closed."""

    async def main() -> Link:
        link = link_to(f"redis://127.0.0.1:{free_port()}")
        with pytest.raises(RedisDown):
            await link.ask("PING")
        assert link.down
        return link

    link = asyncio.run(main())
    assert link.closed
    assert not [task for task in asyncio.all_tasks(link.loop) if not task.done()]


def test_connecting_is_shared_when_many_ask_first(patient_url: str) -> None:
    """However many callers find no connection, one is opened."""

    async def main() -> None:
        link = link_to(patient_url)
        numbers = await asyncio.gather(*(link.ask("CLIENT", "ID") for _ in range(50)))
        assert len(set(numbers)) == 1

    asyncio.run(main())


def test_loops_on_two_threads_have_connections_of_their_own_when_they_ask_at_once(patient_url: str) -> None:
    """A connection belongs to the loop that opened it."""
    place = endpoint(patient_url)
    numbers: list[int] = []
    both = threading.Barrier(2)

    def run() -> None:
        async def main() -> None:
            numbers.append(await place.link.ask("CLIENT", "ID"))
            await asyncio.to_thread(both.wait, 10)

        asyncio.run(main())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(numbers)) == 2


# ---- links and listeners in odd moments ------------------------------------------------------------------------------


def test_server_counts_as_down_when_connecting_never_ends() -> None:
    """A dial that hangs, as one into a firewall does, is given up at the limit."""

    async def dial(make: Any) -> Wire:
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> None:
        link = Link(dial, Bounds(0.05, 1000))
        with pytest.raises(RedisDown, match="did not answer in time"):
            await link.ask("PING")
        assert link.down
        link.close()

    asyncio.run(main())


def test_hurried_caller_leaves_when_connecting_takes_longer_than_he_has() -> None:
    """A caller's own limit holds while a connection is being opened, too."""

    async def dial(make: Any) -> Wire:
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> None:
        link = Link(dial, Bounds(1000.0, 1000))
        with pytest.raises(RedisDown, match="the time that this call has left"):
            await link.ask("PING", limit=0.01)
        assert not link.down
        link.close()

    asyncio.run(main())


def test_server_counts_as_down_when_the_connection_is_lost_as_it_opens() -> None:
    """A wire that failed before anybody could use it is not used."""

    async def dial(make: Any) -> Wire:
        wire: Wire = make()
        wire.connection_made(Transport())
        wire.connection_lost(None)
        return wire

    async def main() -> None:
        link = Link(dial, Bounds(1.0, 1000))
        with pytest.raises(RedisDown):
            await link.ask("PING")
        assert link.down
        assert link.connected is None
        link.close()

    asyncio.run(main())


def test_connection_is_closed_when_its_link_was_closed_while_it_opened() -> None:
    """Nobody is left to use it."""
    transport = Transport()

    async def main() -> None:
        opened = asyncio.Event()

        async def dial(make: Any) -> Wire:
            wire: Wire = make()
            wire.connection_made(transport)
            opened.set()
            return wire

        link = Link(dial, Bounds(1.0, 1000))
        call = asyncio.ensure_future(link.ask("PING"))
        await opened.wait()
        link.closed = True
        with pytest.raises(RedisDown):
            await call
        assert transport.aborted

    asyncio.run(main())


class Ear:
    """Somebody who listens."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.caught_up = 0

    def hear(self, message: bytes) -> None:
        self.heard.append(message)

    async def catch_up(self) -> None:
        self.caught_up += 1


def test_listener_hears_again_when_the_server_was_silent_and_comes_back(
    own_redis_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection on which nothing is said is tried now and then, and replaced when it is dead."""
    monkeypatch.setattr(Listener, "_KEEP_ALIVE", 0.02)
    place = endpoint(own_redis_server.url)

    async def main() -> None:
        ear, other = Ear(), Ear()
        listener = place.listener
        assert place.listener is listener
        await listener.listen(b"news", ear)
        await listener.listen(b"gossip", other)
        assert listener.hears(b"news", ear)
        assert not listener.hears(b"gossip", ear)
        os.kill(own_redis_server.pid, signal.SIGSTOP)
        try:
            while listener.hears(b"news", ear):
                await asyncio.sleep(0.005)
        finally:
            os.kill(own_redis_server.pid, signal.SIGCONT)
        del other
        gc.collect()
        before = ear.caught_up
        while not listener.hears(b"news", ear):
            await asyncio.sleep(0.005)
        assert ear.caught_up > before
        with redis.Redis.from_url(own_redis_server.url) as client:
            client.publish("news", "hello")
            client.publish("gossip", "nobody hears")
        while not ear.heard:
            await asyncio.sleep(0.005)
        assert ear.heard == [b"hello"]

    asyncio.run(main())


def test_listener_rests_when_nobody_listens_any_more(patient_url: str) -> None:
    """Once all who listened are gone, a lost connection is not replaced."""

    async def main() -> None:
        ear = Ear()
        listener = endpoint(patient_url).listener
        await listener.listen(b"news", ear)
        del ear
        gc.collect()
        assert listener._link.connected is not None
        listener._link.connected.fail(ConnectionError("lost"))
        await asyncio.sleep(0.05)
        assert listener._link.connected is None
        assert listener._again is None

    asyncio.run(main())


def test_listener_goes_on_trying_when_the_server_refuses_it(own_redis_server: Any) -> None:
    """A user who may not subscribe hears nothing, and everything once he may."""
    with redis.Redis.from_url(own_redis_server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "app", "on", ">p", "~*", "+@all", "resetchannels", "&other")
        place = endpoint(f"redis://app:p@127.0.0.1:{own_redis_server.port}")

        async def main() -> None:
            ear = Ear()
            listener = place.listener
            with pytest.raises(RedisDown, match="NOPERM"):
                await listener.listen(b"news", ear)
            assert not listener.hears(b"news", ear)
            assert listener._link.connected is not None
            listener._link.connected.fail(ConnectionError("lost"))
            await asyncio.sleep(0.1)
            assert not listener.hears(b"news", ear)
            admin.execute_command("ACL", "SETUSER", "app", "&news")
            while not listener.hears(b"news", ear):
                await asyncio.sleep(0.005)

        asyncio.run(main())


# ---- addresses -------------------------------------------------------------------------------------------------------


def test_server_is_the_same_when_its_address_is_spelt_otherwise(patient_url: str) -> None:
    """A sync client, an asynchronous one and a URL of one server share its connections."""
    port = int(patient_url.rpartition(":")[2].partition("/")[0])
    kept = endpoint(redis.Redis(host="127.0.0.1", port=port, socket_timeout=1, decode_responses=True))
    assert endpoint(redis.asyncio.Redis(host="127.0.0.1", port=port)) is kept
    assert endpoint(redis.Redis(host="127.0.0.1", port=port, db=1)) is not kept
    assert endpoint(patient_url) is kept
    assert kept.name == f"Redis at 127.0.0.1:{port}"


def test_database_name_and_password_are_used_when_the_client_has_them(own_redis_server: Any) -> None:
    """Address, database and credentials come from the client; a wrong password is no answer."""
    with redis.Redis.from_url(own_redis_server.url) as admin:
        admin.acl_setuser("app", enabled=True, passwords=["+pässword"], keys="*", commands=["+@all"])
        admin.config_set("requirepass", "default-secret")
    port = own_redis_server.port

    async def who(**options: Any) -> Any:
        link = endpoint(redis.asyncio.Redis(host="127.0.0.1", port=port, **options)).link
        await link.ask("SET", "k", 1)
        return await link.ask("ACL", "WHOAMI"), await link.ask("CLIENT", "LIST"), await link.ask("DBSIZE")

    user, clients, size = asyncio.run(who(username="app", password="pässword", db=3, client_name="cache"))
    assert user == b"app"
    assert b"name=cache" in clients
    assert b"db=3" in clients
    assert size == 1
    assert asyncio.run(who(password="default-secret"))[0] == b"default"
    for wrong in ({"password": "no"}, {"username": "app", "password": "no"}, {}):
        with pytest.raises((RedisDown, Refused)):
            asyncio.run(who(**wrong))


def test_credential_provider_is_asked_when_the_client_has_one(own_redis_server: Any) -> None:
    """Credentials that change are read at each connection."""
    with redis.Redis.from_url(own_redis_server.url) as admin:
        admin.config_set("requirepass", "s3")
    provider = redis.UsernamePasswordCredentialProvider("default", "s3")
    client = redis.Redis(host="127.0.0.1", port=own_redis_server.port, credential_provider=provider)
    assert asyncio.run(_ask(endpoint(client), "PING")) == b"PONG"


def test_unix_socket_is_used_when_the_url_names_one(tmp_path: Any) -> None:
    """unix:// works as redis:// does."""
    from tta_sync.redis import find_redis_server

    path = f"/tmp/tta-{os.getpid()}.sock"
    server = subprocess.Popen(
        [find_redis_server(), "--port", "0", "--unixsocket", path, "--save", "", "--dir", tmp_path],
        stdout=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + 20
        while not os.path.exists(path):
            assert time.monotonic() < give_up
            time.sleep(0.005)
        assert asyncio.run(_ask(endpoint(f"unix://{path}"), "PING")) == b"PONG"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def tls(tmp_path: Any, patient_url: str) -> Iterator[tuple[int, str]]:
    """A TLS server before the session's Redis: its port, and the certificate that vouches for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    text = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "both.pem").write_bytes(secret + text)
    (tmp_path / "trusted.pem").write_bytes(text)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    redis_port = int(patient_url.rpartition(":")[2].partition("/")[0])
    ready: queue.Queue[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = queue.Queue()

    async def serve() -> None:
        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65_536):
                sink.write(data)
            sink.close()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", redis_port)
            await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)

        server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
        stop = asyncio.Event()
        ready.put((asyncio.get_running_loop(), stop, server.sockets[0].getsockname()[1]))
        await stop.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    loop, stop, port = ready.get(timeout=20)
    yield port, str(tmp_path / "trusted.pem")
    loop.call_soon_threadsafe(stop.set)
    thread.join()


def test_server_is_trusted_over_tls_when_its_certificate_is(tls: tuple[int, str]) -> None:
    """rediss:// checks the certificate as the client would; an unknown one is no Redis."""
    port, trusted = tls
    options: dict[str, Any] = {"host": "localhost", "port": port, "ssl": True}
    good = endpoint(redis.Redis(**options, ssl_ca_certs=trusted))
    stranger = endpoint(redis.asyncio.Redis(**options))
    careless = endpoint(f"rediss://127.0.0.1:{port}?ssl_cert_reqs=none&ssl_check_hostname=false")
    for place in (good, stranger, careless):
        place.bounds.limit = 10.0
    assert asyncio.run(_ask(good, "PING")) == b"PONG"
    assert asyncio.run(_ask(careless, "PING")) == b"PONG"
    with pytest.raises(RedisDown, match="CERTIFICATE_VERIFY_FAILED"):
        asyncio.run(_ask(stranger, "PING"))


def test_client_is_refused_when_it_demands_a_check_that_is_not_made() -> None:
    """A stricter client is not silently taken for a laxer one."""
    with pytest.raises(ConfigurationError, match="ssl_validate_ocsp is not supported"):
        endpoint("rediss://localhost?ssl_validate_ocsp=true")


def test_extra_is_named_when_the_redis_library_is_missing() -> None:
    """Without redis-py the error says what to install; finding a server needs no library."""
    program = (
        "import sys; sys.modules['redis'] = None\n"
        "import tta_sync.redis as seam\n"
        "from tta_sync.exceptions import ConfigurationError\n"
        "seam.find_redis_server()\n"
        "from tta_sync.primitives import CachePrimitive, RedisBackend\n"
        "try: CachePrimitive(print, backend=RedisBackend('redis://x'), namespace='n')\n"
        "except ConfigurationError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'tta-sync[redis]'" in done.stdout


@pytest.mark.parametrize("source", [object(), "http://example.com", 5, None])
def test_source_is_refused_when_it_is_no_redis(source: Any) -> None:
    """What names no Redis server is a ConfigurationError."""
    with pytest.raises(ConfigurationError, match=r"no Redis URL|no client of one Redis server"):
        endpoint(source)


def test_client_is_refused_when_it_brings_connections_of_its_own_kind() -> None:
    """A stand-in for Redis that is not reached over the network cannot be shared by processes."""

    class Stand:
        class connection_pool:
            connection_kwargs: dict[str, Any] = {}

            class connection_class: ...

    with pytest.raises(ConfigurationError, match="Stand is no client of one Redis server"):
        endpoint(Stand())
