"""The bulkhead: never more inside than allowed, first come first served, and no permit lost to a cancellation."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tta_sync import events
from tta_sync.context import Deadline, WorkflowContext
from tta_sync.exceptions import BulkheadFullError, ConfigurationError, DeadlineExceededError, StepTimeoutError
from tta_sync.primitives.core.base import MISS, step
from tta_sync.primitives.recovery import BulkheadPrimitive, TimeoutPrimitive
from tta_sync.primitives.recovery.line import Place, call_next
from tta_sync.testing import FakeClock

EXAMPLES = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def check_fails(machine: type[RuleBasedStateMachine]) -> None:
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(
            machine, settings=settings(EXAMPLES, max_examples=500, phases=[Phase.generate], report_multiple_bugs=False)
        )


class Room:
    """A step that knows how many are inside it, and how many there ever were at a time."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds
        self.inside = 0
        self.most = 0
        self.order: list[Any] = []

    async def __call__(self, data: Any, context: WorkflowContext) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.order.append(data)
        try:
            await context.clock.sleep(self.seconds)
            return data
        finally:
            self.inside -= 1


def bulkhead(room: Any, *args: Any, **options: Any) -> BulkheadPrimitive[Any, Any]:
    return BulkheadPrimitive(step(room, name="room"), *args, **options)


def test_calls_beyond_the_limit_are_refused_at_once_without_a_queue() -> None:
    """Two get in, the third is told that it is full; places freed are taken again."""
    room = Room()
    full = bulkhead(room, 2)

    async def main() -> None:
        context = WorkflowContext(clock=FakeClock())
        results = await asyncio.gather(*(full.execute(n, context) for n in range(3)), return_exceptions=True)
        assert results[:2] == [0, 1]
        assert isinstance(results[2], BulkheadFullError)
        assert (results[2].bulkhead, results[2].retry_after) == ("room", 0.0)
        assert await full.execute("again", context) == "again"
        assert full.in_use == 0

    asyncio.run(main())


def test_line_is_first_come_first_served(run_shuffled: Callable[..., Any]) -> None:
    """Whoever came first goes in first, whatever order the loop wakes them in."""

    async def main() -> None:
        room = Room()
        limited = bulkhead(room, 1, 20)
        context = WorkflowContext(clock=FakeClock())
        tasks = []
        for number in range(12):
            tasks.append(asyncio.ensure_future(limited.execute(number, context)))
            for _ in range(3):
                await asyncio.sleep(0)
        assert limited.waiting == 11
        await asyncio.gather(*tasks)
        assert (room.order, room.most) == (list(range(12)), 1)
        assert (limited.in_use, limited.waiting) == (0, 0)

    for seed in range(5):
        run_shuffled(main(), seed)


def test_call_is_refused_when_the_line_is_full_or_the_wait_too_long() -> None:
    """max_queue bounds the line, max_wait the time in it."""
    limited = bulkhead(Room(10.0), 1, 1, 2.5)
    clock = FakeClock()

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        first = asyncio.ensure_future(limited.execute(1, context))
        await asyncio.sleep(0)
        waiting = asyncio.ensure_future(limited.execute(2, context))
        await asyncio.sleep(0)
        with pytest.raises(BulkheadFullError):
            await limited.execute(3, context)
        with pytest.raises(BulkheadFullError):
            await waiting
        assert clock.monotonic() == 2.5
        assert limited.waiting == 0
        assert await first == 1

    asyncio.run(main())


def test_wait_ends_at_the_deadline_and_at_a_limit_around() -> None:
    """In line the deadline holds as everywhere; a timeout around cuts it as what it is."""
    limited = bulkhead(Room(100.0), 1, 5, 50.0)

    async def main() -> None:
        clock = FakeClock()
        context = WorkflowContext(clock=clock)
        first = asyncio.ensure_future(limited.execute(1, context))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceededError):
            await limited.execute(2, WorkflowContext(clock=clock, deadline=Deadline.after(3.0, clock)))
        assert clock.monotonic() == 3.0
        with pytest.raises(StepTimeoutError):
            await TimeoutPrimitive(limited, 4.0).execute(3, context)
        assert clock.monotonic() == 7.0
        assert limited.waiting == 0
        first.cancel()
        await asyncio.wait([first])

    asyncio.run(main())


def test_failure_and_timeout_inside_give_the_permit_back() -> None:
    """However the step ends."""

    async def fail(data: Any, context: WorkflowContext) -> None:
        if data == "fail":
            raise BlockingIOError
        await context.clock.sleep(100)

    limited = bulkhead(fail, 1)

    async def main() -> None:
        context = WorkflowContext(clock=FakeClock())
        with pytest.raises(BlockingIOError):
            await limited.execute("fail", context)
        with pytest.raises(StepTimeoutError):
            await TimeoutPrimitive(limited, 1.0).execute("hang", context)
        assert limited.in_use == 0

    asyncio.run(main())


def test_permits_are_back_to_zero_after_a_cancel_at_every_await_point(run_shuffled: Callable[..., Any]) -> None:
    """Whichever call is cancelled in whichever moment, everybody else gets in and nothing stays taken."""

    async def main(victim: int, tick: int) -> bool:
        room = Room()
        limited = bulkhead(room, 2, 9, 30.0)
        clock = FakeClock(autojump_threshold=None)
        context = WorkflowContext(clock=clock)
        tasks = [asyncio.ensure_future(limited.execute(n, context)) for n in range(6)]
        for _ in range(tick):
            await asyncio.sleep(0)
            clock.jump(0.25)
        ended = tasks[victim].done()
        tasks[victim].cancel()
        for _ in range(120):
            await asyncio.sleep(0)
            clock.jump(0.25)
        assert all(task.done() for task in tasks)
        assert room.most <= 2
        assert (limited.in_use, limited.waiting, room.inside) == (0, 0, 0)
        served = [n for n, task in enumerate(tasks) if not task.cancelled()]
        assert len(served) >= 5
        return ended

    for seed in range(3):
        for victim in (0, 2, 5):
            for tick in itertools.count():
                if run_shuffled(main(victim, tick), seed):
                    break


def test_permit_given_to_a_call_that_was_just_cancelled_goes_to_the_next() -> None:
    """Called and cancelled in one moment leaves no gap in the line."""

    async def main() -> None:
        limited = bulkhead(Room(), 1, 5)
        context = WorkflowContext(clock=FakeClock())
        first, second, third = (asyncio.ensure_future(limited.execute(n, context)) for n in range(3))
        await asyncio.sleep(0)
        assert limited.waiting == 2
        first.cancel()
        second.cancel()
        assert await third == 2
        assert limited.in_use == 0

        with limited._lock:  # called, but the wake-up not delivered yet
            limited._in_use = 1
        place_holder = asyncio.ensure_future(limited.execute("a", context))
        behind = asyncio.ensure_future(limited.execute("b", context))
        await asyncio.sleep(0)
        limited._leave()
        place_holder.cancel()
        assert await behind == "b"
        assert limited.in_use == 0

    asyncio.run(main())


def test_permit_given_back_between_two_looks_is_taken_at_once() -> None:
    """A call that was about to queue looks again under the lock."""
    limited = bulkhead(Room(), 1, 0)
    asyncio.run(limited._queue(WorkflowContext()))
    assert limited.in_use == 1


def test_threads_with_loops_of_their_own_share_one_bulkhead() -> None:
    """Six loops, two permits: never more than two inside, all served, nothing left taken."""
    lock = threading.Lock()
    counts = {"inside": 0, "most": 0, "served": 0}

    async def work(data: Any) -> None:
        with lock:
            counts["inside"] += 1
            counts["most"] = max(counts["most"], counts["inside"])
        await asyncio.sleep(0)
        with lock:
            counts["inside"] -= 1
            counts["served"] += 1

    limited = bulkhead(work, 2, 100)

    def thread() -> None:
        async def main() -> None:
            await asyncio.gather(*(limited.execute(n) for n in range(10)))

        for _ in range(5):
            asyncio.run(main())

    threads = [threading.Thread(target=thread) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert counts == {"inside": 0, "most": counts["most"], "served": 300}
    assert counts["most"] <= 2
    assert (limited.in_use, limited.waiting) == (0, 0)


def test_place_of_a_loop_that_was_closed_is_passed_over() -> None:
    """A loop that ended under its calls does not keep the line waiting."""
    dead = asyncio.new_event_loop()

    async def place() -> Place:
        return Place()

    gone = dead.run_until_complete(place())
    dead.close()

    async def main() -> None:
        alive = Place()
        line = bulkhead(Room(), 1)._line
        line.extend([gone, alive])
        assert call_next(line)
        await alive.wait(FakeClock(), None)
        assert alive.called
        line.append(gone)
        assert not call_next(line)
        assert not gone.called  # it has no permit to give back when it is collected

    asyncio.run(main())


class Loops:
    """Two loops, of which one turns at a time, as on threads that run theirs for one call after the other."""

    def __init__(self, limited: Callable[..., BulkheadPrimitive[Any, Any]], *args: Any) -> None:
        self.both = [asyncio.new_event_loop(), asyncio.new_event_loop()]
        self.clock = FakeClock(autojump_threshold=None)
        self.doors: dict[int, asyncio.Future[Any]] = {}  # of those inside
        self.tasks: list[dict[int, asyncio.Task[Any]]] = [{}, {}]
        self.bulkhead = limited(self.stay, *args)

    async def stay(self, number: int) -> int:
        door = self.doors[number] = asyncio.get_running_loop().create_future()
        try:
            await door
        finally:
            del self.doors[number]
        return number

    def come(self, which: int, number: int) -> None:
        call = self.bulkhead.execute(number, WorkflowContext(clock=self.clock))
        self.tasks[which][number] = self.both[which].create_task(call)
        self.turn(which)

    def go(self, number: int) -> None:
        """Let the call that is inside leave, and turn its loop."""
        self.doors[number].set_result(None)
        self.turn(int(number in self.tasks[1]))

    def turn(self, which: int) -> None:
        async def ticks() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.both[which].run_until_complete(ticks())

    def waiting(self, which: int) -> list[int]:
        return [n for n, task in self.tasks[which].items() if not task.done() and n not in self.doors]

    def close(self) -> None:
        for which, loop in enumerate(self.both):
            for task in self.tasks[which].values():
                task.cancel()
            self.turn(which)
            for task in self.tasks[which].values():
                assert task.cancelled() or task.exception() is None or isinstance(task.exception(), BulkheadFullError)
            loop.close()
        assert (self.bulkhead.in_use, self.bulkhead.waiting, self.doors) == (0, 0, {})


def test_calls_of_a_loop_that_stands_still_keep_nobody_waiting() -> None:
    """They are passed over, and go back to the front of the line when their loop turns."""
    loops = Loops(bulkhead, 1, 3)
    for which, number in ((0, 1), (1, 2), (0, 3), (0, 4)):
        loops.come(which, number)
    assert (list(loops.doors), loops.bulkhead.waiting) == ([1], 3)
    loops.go(1)
    assert (list(loops.doors), loops.bulkhead.waiting) == ([3], 1)
    loops.turn(1)
    assert (list(loops.doors), loops.bulkhead.waiting) == ([3], 2)
    loops.come(1, 5)
    loops.come(1, 6)
    assert isinstance(loops.tasks[1][6].exception(), BulkheadFullError)
    loops.both[1].is_running = lambda: True  # type: ignore[method-assign]  # at this moment, on its thread
    loops.go(3)
    del loops.both[1].is_running
    loops.turn(1)
    assert list(loops.doors) == [2]
    loops.close()


def test_call_that_was_passed_over_is_let_in_when_there_is_room_by_then() -> None:
    loops = Loops(bulkhead, 1, 3)
    loops.come(0, 1)
    loops.come(1, 2)
    loops.go(1)
    assert loops.bulkhead.in_use == 0
    loops.turn(1)
    assert list(loops.doors) == [2]
    loops.close()


def test_call_that_was_passed_over_is_refused_when_its_time_is_up_by_then() -> None:
    loops = Loops(bulkhead, 1, 3, 5.0)
    loops.come(0, 1)
    loops.come(1, 2)
    loops.go(1)
    loops.clock.jump(5.0)
    loops.turn(1)
    assert isinstance(loops.tasks[1][2].exception(), BulkheadFullError)
    loops.close()


class LoopsMachine(RuleBasedStateMachine):
    """Calls come on two loops, end and are cancelled in any order; nobody waits for what stands still."""

    kind: type[BulkheadPrimitive[Any, Any]] = BulkheadPrimitive

    @initialize(inside=st.integers(1, 2))
    def build(self, inside: int) -> None:
        self.inside = inside
        self.numbers = itertools.count()
        self.loops = Loops(lambda room, *args: self.kind(step(room), *args), inside, 4)

    def teardown(self) -> None:
        if hasattr(self, "loops"):
            self.loops.close()

    def check(self, which: int) -> None:
        assert len(self.loops.doors) <= self.inside
        assert not self.loops.waiting(which) or len(self.loops.doors) == self.inside

    @rule(which=st.integers(0, 1))
    def come(self, which: int) -> None:
        self.loops.come(which, next(self.numbers))
        self.check(which)

    @precondition(lambda self: self.loops.doors)
    @rule(pick=st.integers(0, 1))
    def go(self, pick: int) -> None:
        number = list(self.loops.doors)[pick % len(self.loops.doors)]
        self.loops.go(number)
        self.check(int(number in self.loops.tasks[1]))

    @rule(which=st.integers(0, 1), victim=st.none() | st.integers(0, 9))
    def turn(self, which: int, victim: int | None) -> None:
        tasks = list(self.loops.tasks[which].values())
        if tasks and victim is not None:
            tasks[victim % len(tasks)].cancel()
        self.loops.turn(which)
        self.check(which)


class WaitsForWhatStandsStill(BulkheadPrimitive[Any, Any]):
    """A permit goes to the first in line, whether its loop turns or not."""

    def _leave(self) -> None:
        with self._lock:
            if not self._line:
                self._in_use -= 1
                return
            place = self._line.popleft()
            place.called = True
            place.loop.call_soon_threadsafe(place._wake)


class ForgetsWhomItPassesOver(BulkheadPrimitive[Any, Any]):
    """Who was passed over waits for a call that does not come."""

    def _line_up_again(self, place: Place) -> None: ...


def test_nobody_waits_for_what_stands_still_in_any_order() -> None:
    run_state_machine_as_test(LoopsMachine, settings=EXAMPLES)


@pytest.mark.parametrize("twin", [WaitsForWhatStandsStill, ForgetsWhomItPassesOver])
def test_wrong_twins_keep_somebody_waiting(twin: type[BulkheadPrimitive[Any, Any]]) -> None:
    """The rules above can tell a right bulkhead from a wrong one."""
    check_fails(type("Machine", (LoopsMachine,), {"kind": twin}))


def test_forked_child_starts_with_an_empty_bulkhead() -> None:
    """What the parent's calls hold binds nobody in the child, and a permit from before is not given back twice."""
    limited = bulkhead(lambda data: data, 1)
    limited._in_use = 1
    limited._lock.acquire()
    child = os.fork()
    if not child:
        code = 1
        try:
            limited.execute(1, WorkflowContext()).send(None)
        except StopIteration:
            code = 0 if limited.in_use == 0 else 2
        finally:
            os._exit(code)
    limited._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_permit_taken_before_a_fork_is_not_given_back_in_the_child() -> None:
    """A call that forks inside the step leaves the child's count alone."""

    async def fork(data: Any) -> int:
        return os.fork()

    limited = bulkhead(fork, 2)
    child = asyncio.run(limited.execute(1))
    if not child:
        os._exit(0 if limited.in_use == 0 else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert limited.in_use == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((0,), "max_concurrent"),
        ((1.5,), "max_concurrent"),
        ((True,), "max_concurrent"),
        ((1, -1), "max_queue"),
        ((1, 1, 0), "write max_queue=0"),
        ((1, 1, float("inf")), "max_wait"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_remedy(args: tuple[Any, ...], said: str) -> None:
    """Each mistake is told at construction."""
    with pytest.raises(ConfigurationError, match=said):
        bulkhead(Room(), *args)


def test_peek_raises_when_full_without_a_queue(workflow_events: list[events.Event]) -> None:
    """Nothing could come of a hop; with a queue there is something to wait for."""
    context = WorkflowContext()
    without, queued = bulkhead(Room(), 1, name="api"), bulkhead(Room(), 1, 1)
    assert without.peek(1, context) is MISS
    without._in_use = queued._in_use = 1
    with pytest.raises(BulkheadFullError):
        without.peek(1, context)
    with pytest.raises(BulkheadFullError):
        TimeoutPrimitive(without, 1.0).peek(1, context)
    assert queued.peek(1, context) is MISS
    rejected = workflow_events[0]
    assert isinstance(rejected, events.CallRejected)
    assert (rejected.step, rejected.by) == ("api", "bulkhead")


def test_repr_shows_the_limits() -> None:
    """A workflow can be read."""
    assert repr(bulkhead(Room(), 2)) == "Bulkhead(room, max_concurrent=2)"
    assert repr(bulkhead(Room(), 2, 3)) == "Bulkhead(room, max_concurrent=2, max_queue=3)"


# ---- in any order -----------------------------------------------------


class BulkheadMachine(RuleBasedStateMachine):
    """Calls come, end, fail, give up and are cancelled in any order; who is inside is always as counted by hand."""

    kind: type[BulkheadPrimitive[Any, Any]] = BulkheadPrimitive

    @initialize(inside=st.integers(1, 3), queue=st.integers(0, 4))
    def build(self, inside: int, queue: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = FakeClock(autojump_threshold=None)
        self.doors: dict[int, asyncio.Future[Any]] = {}
        self.tasks: dict[int, asyncio.Task[Any]] = {}
        self.numbers = itertools.count()
        self.limits = inside, queue

        async def stay(number: int) -> Any:
            self.doors[number] = self.loop.create_future()
            try:
                return await self.doors[number]
            finally:
                del self.doors[number]

        self.bulkhead = self.kind(stay, inside, queue, 5.0)
        self.inside: list[int] = []
        self.line: list[tuple[int, float]] = []

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            for task in self.tasks.values():
                task.cancel()
            self.pump()
            self.loop.close()
            assert (self.bulkhead.in_use, self.bulkhead.waiting) == (0, 0), "a permit was lost"

    def pump(self) -> None:
        async def ticks() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(ticks())
        for number, task in list(self.tasks.items()):
            if task.done():
                del self.tasks[number]
                if not task.cancelled():
                    task.exception()

    def move_up(self) -> None:
        while self.line and len(self.inside) < self.limits[0]:
            self.inside.append(self.line.pop(0)[0])

    @rule()
    def come(self) -> None:
        number = next(self.numbers)
        task = self.loop.create_task(self.bulkhead.execute(number, WorkflowContext(clock=self.clock)))
        self.tasks[number] = task
        if len(self.inside) < self.limits[0]:
            self.inside.append(number)
        elif len(self.line) < self.limits[1]:
            self.line.append((number, self.clock.monotonic()))
        self.pump()

    @precondition(lambda self: self.inside)
    @rule(which=st.integers(0, 10), fails=st.booleans())
    def go(self, which: int, fails: bool) -> None:
        number = self.inside.pop(which % len(self.inside))
        if fails:
            self.doors[number].set_exception(OSError())
        else:
            self.doors[number].set_result(number)
        self.move_up()
        self.pump()

    @precondition(lambda self: self.tasks)
    @rule(victims=st.lists(st.integers(0, 10), min_size=1, max_size=3), also_goes=st.booleans())
    def cancel(self, victims: list[int], also_goes: bool) -> None:
        """Cancel some calls, perhaps in the very moment in which another one leaves."""
        if also_goes and self.inside:
            number = self.inside.pop(0)
            self.doors[number].set_result(number)
            self.loop.run_until_complete(asyncio.sleep(0))
            self.move_up()
        for victim in victims:
            number = sorted(self.tasks)[victim % len(self.tasks)]
            self.tasks[number].cancel()
            self.inside = [each for each in self.inside if each != number]
            self.line = [each for each in self.line if each[0] != number]
        self.move_up()
        self.pump()

    @rule(seconds=st.sampled_from([1.0, 3.0, 5.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.jump(seconds)
        now = self.clock.monotonic()
        self.line = [each for each in self.line if each[1] + 5.0 > now]
        self.pump()

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "bulkhead"):
            assert self.bulkhead.in_use == len(self.inside)
            assert self.bulkhead.waiting == len(self.line)
            assert sorted(self.doors) == sorted(self.inside)


def test_bulkhead_agrees_with_a_count_by_hand_in_any_order() -> None:
    """Who is inside and who waits is what the rules say, and in the end nothing stays taken."""
    run_state_machine_as_test(BulkheadMachine, settings=EXAMPLES)


class LosesPermits(BulkheadPrimitive[Any, Any]):
    """A call that is cancelled in the moment in which it is called keeps the permit for ever."""

    def _abandon(self, place: Place) -> bool:
        called = super()._abandon(place)
        task = asyncio.current_task()
        return called and not (task is not None and task.cancelling())


class LeavesGaps(BulkheadPrimitive[Any, Any]):
    """A call that is cancelled stays in the line."""

    def _abandon(self, place: Place) -> bool:
        return place.called


class LastComeFirstServed(BulkheadPrimitive[Any, Any]):
    """The line is a stack."""

    def _leave(self) -> None:
        with self._lock:
            self._line.reverse()
            called = call_next(self._line)
            self._line.reverse()
            if not called:
                self._in_use -= 1


@pytest.mark.parametrize("twin", [LosesPermits, LeavesGaps, LastComeFirstServed])
def test_wrong_twins_fail_the_count(twin: type[BulkheadPrimitive[Any, Any]]) -> None:
    """The count by hand can tell a right bulkhead from a wrong one."""
    check_fails(type("Machine", (BulkheadMachine,), {"kind": twin}))
