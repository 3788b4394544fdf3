"""Resources: opened once, in one task each, closed in reverse order, whoever uses them."""

import asyncio
import contextvars
import os
import threading
import time
from contextlib import asynccontextmanager

import anyio
import pytest

from tta_sync.exceptions import LoopUnavailableError

variable = contextvars.ContextVar("variable", default="outside")


class Log(list):
    """What resources did, in order; ``log.client(name)`` is a factory whose opening and closing it records."""

    def client(self, name, opening=0.0, closing=0.0):
        @asynccontextmanager
        async def client():
            task = asyncio.current_task()
            await asyncio.sleep(opening)
            self.append(f"open {name}")
            try:
                yield f"{name} #{self.count(f'open {name}')}"
            finally:
                await asyncio.sleep(closing)
                assert asyncio.current_task() is task  # opened and closed in one task
                self.append(f"close {name}")

        return client


@pytest.fixture
def log():
    return Log()


def use(resource):
    async def use():
        return await resource

    return use


def test_resource_is_opened_once_when_used_from_64_threads(facade, in_thread, log):
    """64 threads that come at once, and again, share one opened object."""
    shared = facade.resource(log.client("a", opening=0.02))
    start = threading.Barrier(64)

    def caller():
        start.wait()
        return [facade.call_sync(use(shared)) for _ in range(3)]

    assert {name for future in [in_thread(caller) for _ in range(64)] for name in future.result(30)} == {"a #1"}
    assert log == ["open a"]
    facade.shutdown()
    assert log == ["open a", "close a"]


def test_nothing_is_opened_when_a_resource_is_only_declared(facade, log):
    """Declaring a resource, at import time say, opens nothing and needs no loop; its repr names the factory."""
    declared = facade.resource(log.client("a"))
    assert "client" in repr(declared)
    facade.shutdown()
    assert log == []


def test_resource_is_refused_when_it_is_no_factory(facade):
    """An object in place of a factory is refused with the remedy, where it is written."""
    with pytest.raises(TypeError, match="lambda"):
        facade.resource(object())


def test_anyio_scope_inside_a_resource_works_when_opened_and_closed(facade, in_thread):
    """A context manager with an anyio cancel scope and task group, which must be left in the task that entered it."""
    log = []

    @asynccontextmanager
    async def client():
        async with anyio.create_task_group() as group:
            with anyio.CancelScope():
                group.start_soon(anyio.sleep_forever)
                log.append("open")
                yield "client"
                log.append("close")
                group.cancel_scope.cancel()
        log.append("closed")

    shared = facade.resource(client)
    for future in [in_thread(facade.call_sync, use(shared)) for _ in range(8)]:
        assert future.result(20) == "client"
    facade.shutdown()
    assert log == ["open", "close", "closed"]


def test_background_task_of_a_resource_works_until_it_is_closed_when_shut_down(facade):
    """A resource's own tasks are no left-overs: they work until the resource itself ends them, at its close."""
    log = []

    @asynccontextmanager
    async def client():
        async def worker():
            while (item := await queue.get()) is not None:
                log.append(f"sent {item}")

        queue = asyncio.Queue()
        async with asyncio.TaskGroup() as group:
            group.create_task(worker())
            yield queue
            queue.put_nowait("goodbye")
            queue.put_nowait(None)
        log.append("closed")

    shared = facade.resource(client)

    async def sends():
        (await shared).put_nowait("hello")

    facade.call_sync(sends)
    facade.shutdown()
    assert log == ["sent hello", "sent goodbye", "closed"]


def test_resources_are_closed_in_reverse_order_when_shut_down(facade, log):
    """The last opened is closed first."""
    resources = [facade.resource(log.client(name)) for name in "abc"]
    for resource in resources:
        facade.call_sync(use(resource))
    facade.shutdown()
    assert log == ["open a", "open b", "open c", "close c", "close b", "close a"]


def test_resource_is_closed_before_what_it_uses_when_one_opens_another(facade, log):
    """A resource whose factory awaits another one is closed before that other."""
    inner = facade.resource(log.client("inner"))

    @asynccontextmanager
    async def outer():
        await inner
        async with log.client("outer")() as opened:
            yield opened

    assert facade.call_sync(use(facade.resource(outer))) == "outer #1"
    facade.shutdown()
    assert log == ["open inner", "open outer", "close outer", "close inner"]


@pytest.mark.parametrize("opens", ["at once", "after a while", "never"])
def test_resource_is_opened_when_tasks_begin_at_once(facade, eager_task_factory, opens):
    """An eager task may have opened it, or failed to, before the one who asked has seen the task."""
    log = []

    @asynccontextmanager
    async def client():
        log.append("open")
        if opens == "after a while":
            await asyncio.sleep(0)
        if opens == "never" and len(log) == 1:
            raise ConnectionError("down")
        yield f"#{len(log)}"
        log.append("close")

    shared = facade.resource(client)

    async def uses():
        loop = asyncio.get_running_loop()
        loop.set_task_factory(eager_task_factory)
        try:
            return await shared
        finally:
            loop.set_task_factory(None)

    if opens == "never":
        with pytest.raises(ConnectionError, match="down"):
            facade.call_sync(uses)
        log.append("again")
    opened = facade.call_sync(uses)
    assert facade.call_sync(uses) == opened
    facade.shutdown()
    assert log[-2:] == ["open", "close"]
    assert log.count("open") == (2 if opens == "never" else 1)


def test_factory_is_tried_again_when_it_failed(facade):
    """A factory that fails fails that use only: the next one tries again."""
    tries = []

    @asynccontextmanager
    async def client():
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError(f"try {len(tries)}")
        yield "open"

    shared = facade.resource(client)
    for number in (1, 2):
        with pytest.raises(ConnectionError, match=f"try {number}"):
            facade.call_sync(use(shared))
    assert facade.call_sync(use(shared)) == "open"
    facade.shutdown()


def test_waiters_are_told_when_the_factory_raises_what_a_future_refuses(facade, expires):
    """``resource(lambda: next(endpoints))`` without endpoints: a RuntimeError, caused by the StopIteration."""
    endpoints = iter([])
    shared = facade.resource(lambda: next(endpoints))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="factory raised StopIteration") as caught:
            facade.call_sync(use(shared), timeout=20)
        assert isinstance(caught.value.__cause__, StopIteration)


def test_one_error_object_does_not_grow_when_the_factory_raises_it_again_and_again(facade):
    """Its traceback is as long at the hundredth use as at the first."""
    down = ConnectionError("down")

    @asynccontextmanager
    async def client():
        raise down
        yield

    shared = facade.resource(client)
    lengths = set()
    for _ in range(100):
        with pytest.raises(ConnectionError) as caught:
            facade.call_sync(use(shared))
        frames, entry = 0, caught.value.__traceback__
        while entry is not None:
            frames, entry = frames + 1, entry.tb_next
        lengths.add(frames)
        del caught
    assert len(lengths) == 1


def test_every_waiter_gets_its_own_error_when_the_factory_fails(facade, in_thread, eventually):
    """Waiters of a factory that fails get the failure each as an object of their own, with a short traceback."""
    waiting, release = [], threading.Event()

    @asynccontextmanager
    async def client():
        while not release.is_set():
            await asyncio.sleep(0.001)
        raise ConnectionError("down")
        yield

    shared = facade.resource(client)

    async def uses():
        waiting.append(1)
        return await shared

    calls = [in_thread(facade.call_sync, uses) for _ in range(8)]
    eventually(lambda: len(waiting) == 8)
    release.set()
    errors = [call.exception(20) for call in calls]
    assert {str(error) for error in errors} == {"down"}
    assert {type(error) for error in errors} == {ConnectionError}
    assert len({id(error) for error in errors}) == 8
    for error in errors:
        frames, entry = 0, error.__traceback__
        while entry is not None:
            frames, entry = frames + 1, entry.tb_next
        assert frames <= 12


def test_opening_goes_on_for_the_others_when_the_first_caller_is_cancelled(facade, in_thread, log, expires, eventually):
    """The opening belongs to all who wait: the first caller's deadline does not take it from the second one."""
    gate = threading.Event()

    @asynccontextmanager
    async def client():
        while not gate.is_set():
            await asyncio.sleep(0.001)
        async with log.client("a")() as opened:
            yield opened

    shared = facade.resource(client)
    expires(facade.call_sync, use(shared), timeout=0.05)
    second = in_thread(facade.call_sync, use(shared))
    eventually(facade.in_flight)
    gate.set()
    assert second.result(20) == "a #1"
    assert log == ["open a"]


def test_resource_is_kept_when_its_first_caller_is_cancelled_as_it_becomes_ready(facade, log):
    """A cancellation in the very tick in which the resource becomes ready neither loses it nor opens another."""
    first = []

    @asynccontextmanager
    async def client():
        if first and not log:
            first[0].cancel()
        async with log.client("a")() as opened:
            yield opened

    shared = facade.resource(client)

    async def main():
        first.append(asyncio.ensure_future(use(shared)()))
        await asyncio.wait(first)
        return first[0].cancelled()

    assert facade.call_sync(main) is True
    assert facade.call_sync(use(shared)) == "a #1"
    facade.shutdown()
    assert log == ["open a", "close a"]


def test_resource_does_not_carry_the_first_callers_context_when_opened(facade):
    """What is opened for the first caller must not show that caller's context variables to all others."""

    @asynccontextmanager
    async def client():
        yield variable.get()

    shared = facade.resource(client)
    token = variable.set("the first caller's secret")
    try:
        assert facade.call_sync(use(shared)) == "outside"
    finally:
        variable.reset(token)


def test_resource_is_opened_again_when_forked(facade, in_child, log):
    """A child opens its own; the parent's stays open, and is closed once, by the parent."""
    shared = facade.resource(lambda: stamped())

    @asynccontextmanager
    async def stamped():
        async with log.client("a")():
            yield os.getpid()

    assert facade.call_sync(use(shared)) == os.getpid()

    def child():
        pid = facade.call_sync(use(shared))
        facade.shutdown()
        return pid == os.getpid(), log.count("open a"), log.count("close a")

    assert in_child(child) == str((True, 2, 1))
    assert facade.call_sync(use(shared)) == os.getpid()
    assert log == ["open a"]
    facade.shutdown()
    assert log == ["open a", "close a"]


def test_resource_belongs_to_the_loop_that_opens_it_when_two_facades_use_it(make_facade, log):
    """Each facade's loop opens its own; outside a managed loop the promise is refused with the remedy."""
    one, other = make_facade(), make_facade()
    shared = one.resource(log.client("a"))
    assert one.call_sync(use(shared)) == "a #1"
    assert other.call_sync(use(shared)) == "a #2"
    assert one.call_sync(use(shared)) == "a #1"
    with pytest.raises(LoopUnavailableError, match="facade"):
        asyncio.run(use(shared)())
    one.shutdown()
    assert log == ["open a", "open a", "close a"]
    assert other.call_sync(use(shared)) == "a #2"


def test_others_are_closed_all_the_same_when_one_fails_or_hangs_at_closing(make_facade, log, caplog):
    """A resource that raises at closing, and one that hangs, are named in the log; all others are closed."""
    facade = make_facade(grace=0.2)

    @asynccontextmanager
    async def fails():
        yield "fails"
        raise OSError("no way to close")

    @asynccontextmanager
    async def hangs():
        yield "hangs"
        await asyncio.sleep(3600)

    for factory in (log.client("a"), fails, hangs, log.client("b")):
        facade.call_sync(use(facade.resource(factory)))
    begun = time.monotonic()
    facade.shutdown(0.0)
    assert time.monotonic() - begun < 0.2 + 1.0 + 2.0
    assert log == ["open a", "open b", "close b", "close a"]
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "fails" in said
    assert "hangs" in said


def test_resource_that_is_still_opening_is_given_up_when_shut_down(make_facade, expires):
    """A factory that never finishes does not hold the shutdown."""
    facade = make_facade(grace=0.2)
    cancelled = []

    @asynccontextmanager
    async def never():
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(1)
            raise
        yield

    expires(facade.call_sync, use(facade.resource(never)), timeout=0.05)
    begun = time.monotonic()
    facade.shutdown(0.0)
    assert time.monotonic() - begun < 3
    assert cancelled == [1]
