"""The clock that jumps: exact moments, real order, no waiting."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest
import uvloop

from tta_sync.context import Deadline, WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.testing import FakeClock


def loops() -> list[Any]:
    return [asyncio.new_event_loop, uvloop.new_event_loop]


def run(coroutine: Coroutine[Any, Any, Any], loop: Any = asyncio.new_event_loop) -> Any:
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(coroutine)


@pytest.mark.parametrize("loop", loops())
def test_sleepers_wake_in_order_at_exactly_their_moments(loop: Any) -> None:
    """Hours pass in no time, and each wake-up is at the very float that was asked for."""
    clock = FakeClock()
    log: list[tuple[str, float]] = []

    async def sleeper(name: str, *naps: float) -> None:
        for nap in naps:
            await clock.sleep(nap)
            log.append((name, clock.monotonic()))

    async def main() -> None:
        await asyncio.gather(sleeper("a", 0.1, 0.2), sleeper("b", 0.15), sleeper("c", 3600))

    began = time.perf_counter()
    run(main(), loop)
    assert log == [("a", 0.1), ("b", 0.15), ("a", 0.1 + 0.2), ("c", 3600.0)]
    assert time.perf_counter() - began < 60


def test_time_stands_still_while_there_is_work() -> None:
    """A task that is busy over many passes of the loop sees one moment."""
    clock = FakeClock(start=5.0)

    async def busy() -> list[float]:
        seen = []
        for _ in range(100):
            await asyncio.sleep(0)
            seen.append(clock.monotonic())
        return seen

    async def main() -> list[float]:
        nap = asyncio.create_task(clock.sleep(1))
        seen = await busy()
        await nap
        return seen

    assert set(run(main())) == {5.0}
    assert clock.monotonic() == 6.0


def test_wall_clock_moves_along() -> None:
    """``time()`` is the epoch plus the virtual time, so a deadline crosses to another process unharmed."""
    clock = FakeClock(epoch=1000.0)
    assert clock.time() == 1000.0
    deadline = Deadline.after(5.0, clock)
    clock.jump(2.0)
    assert clock.time() == 1002.0
    assert deadline.remaining() == 3.0
    assert deadline.expires_at == 1005.0


def test_callback_runs_in_the_variables_of_who_set_it() -> None:
    """As with the loop's own timers, context variables are those of the call."""
    clock = FakeClock()
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: list[tuple[str, float]] = []

    async def setter() -> None:
        variable.set("mine")
        clock.call_at(2.0, lambda: seen.append((variable.get(), clock.monotonic())))

    async def main() -> None:
        await asyncio.create_task(setter())
        await clock.sleep(3)

    run(main())
    assert seen == [("mine", 2.0)]


def test_cancelled_timer_does_not_run_and_does_not_hold_its_arguments() -> None:
    """What was called off never happens, and time does not stop for it."""
    clock = FakeClock()
    seen: list[str] = []

    async def main() -> None:
        timer = clock.call_at(1.0, seen.append, "no")
        clock.call_at(2.0, seen.append, "yes")
        timer.cancel()
        timer.cancel()
        await clock.sleep(3)

    run(main())
    assert seen == ["yes"]


def test_timer_of_the_past_runs_at_once() -> None:
    """A moment that has passed is due now; a sleep of nothing only yields."""
    clock = FakeClock(start=10.0)
    seen: list[float] = []

    async def main() -> None:
        clock.call_at(3.0, lambda: seen.append(clock.monotonic()))
        await clock.sleep(0)
        await clock.sleep(-1)
        await asyncio.sleep(0)

    run(main())
    assert seen == [10.0]


def test_cancelled_sleep_leaves_no_timer() -> None:
    """The clock forgets a sleeper that gave up."""
    clock = FakeClock()

    async def main() -> None:
        nap = asyncio.create_task(clock.sleep(100))
        await asyncio.sleep(0)
        nap.cancel()
        await clock.sleep(1)

    run(main())
    assert clock.monotonic() == 1.0


# ---- by hand ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", loops())
def test_advance_stops_at_each_timer_on_the_way(loop: Any) -> None:
    """By hand, time moves as far as it is told, and all that it wakes runs at its own moment."""
    clock = FakeClock(autojump_threshold=None)
    seen: list[float] = []

    async def ticking() -> None:
        while True:
            await clock.sleep(1)
            seen.append(clock.monotonic())

    async def main() -> None:
        task = asyncio.create_task(ticking())
        await clock.settle()
        assert seen == []
        await clock.advance(2.5)
        assert seen == [1.0, 2.0]
        assert clock.monotonic() == 2.5
        await clock.advance(0.5)
        assert seen == [1.0, 2.0, 3.0]
        task.cancel()

    run(main(), loop)


def test_jump_makes_all_due_that_it_passes() -> None:
    """In plain code: one move, then everything that was due runs in order, at the new time."""
    clock = FakeClock(autojump_threshold=None)
    seen: list[tuple[int, float]] = []

    async def main() -> None:
        for number in (3, 1, 2, 9):
            clock.call_at(float(number), lambda number=number: seen.append((number, clock.monotonic())))
        clock.jump(5)
        await asyncio.sleep(0)

    run(main())
    assert seen == [(1, 5.0), (2, 5.0), (3, 5.0)]


def test_time_does_not_run_backwards() -> None:
    """A negative move is a mistake of the test."""
    clock = FakeClock()
    with pytest.raises(ValueError, match="backwards"):
        clock.jump(-1)
    with pytest.raises(ValueError, match="backwards"):
        run(clock.advance(-1))
    with pytest.raises(ConfigurationError, match="at least 0"):
        FakeClock(autojump_threshold=-1)


# ---- threads and other loops --------------------------------------------------------------------------------------


def test_threshold_waits_for_work_that_the_loop_cannot_see() -> None:
    """A timeout of 5 virtual seconds does not cut a thread's real work short."""
    clock = FakeClock(autojump_threshold=1.0)
    release = threading.Event()

    async def main() -> str:
        limited = asyncio.create_task(asyncio.to_thread(release.wait, 20))
        timer = clock.call_at(5.0, limited.cancel)
        asyncio.get_running_loop().call_later(0.01, release.set)
        await limited
        assert clock.monotonic() == 0.0
        timer.cancel()
        await clock.sleep(1)
        return "whole"

    assert run(main()) == "whole"
    assert clock.monotonic() == 1.0


def test_threshold_begins_anew_when_something_happened_meanwhile() -> None:
    """The loop must have been idle for the whole of it: a task that wakes in between starts it again."""
    clock = FakeClock(autojump_threshold=0.5)
    seen: list[float] = []

    async def main() -> None:
        clock.call_at(100.0, seen.append, 100.0)
        for _ in range(5):
            await asyncio.sleep(0.02)
            clock.call_at(200.0, seen.append, 200.0).cancel()
        assert seen == []
        await clock.sleep(150)

    run(main())
    assert seen == [100.0]


def test_two_loops_share_one_time() -> None:
    """With sleepers in two threads, no loop's jump passes over a moment that the other one waits for."""
    clock = FakeClock()
    both = threading.Barrier(2)
    log: list[tuple[str, float]] = []

    def thread(name: str, nap: float, times: int) -> None:
        async def main() -> None:
            naps = [asyncio.create_task(clock.sleep(nap * number)) for number in range(1, times + 1)]
            await asyncio.sleep(0)
            both.wait(20)
            for task in naps:
                await task
                log.append((name, clock.monotonic()))

        run(main())

    # Both hold their loop until both have set their timers: neither is idle before.
    threads = [threading.Thread(target=thread, args=arguments) for arguments in (("a", 2.0, 3), ("b", 3.0, 3))]
    for each in threads:
        each.start()
    for each in threads:
        each.join(20)
    moments = [when for _, when in log]
    assert moments == sorted(moments)
    assert sorted(log) == [("a", 2.0), ("a", 4.0), ("a", 6.0), ("b", 3.0), ("b", 6.0), ("b", 9.0)]


def test_loop_that_died_with_a_timer_holds_nobody_up() -> None:
    """The timers of a loop that was closed are dropped."""
    clock = FakeClock()

    async def leave_one() -> None:
        clock.call_at(5.0, print)

    run(leave_one())
    run(clock.sleep(10))
    assert clock.monotonic() == 10.0


def test_loop_that_closes_while_its_timer_fires_holds_nobody_up() -> None:
    """The other thread's loop may close between the look and the hand-over; any other refusal is an error."""
    clock = FakeClock(autojump_threshold=None)

    class Closing:
        def __init__(self, *answers: bool) -> None:
            self.answers = iter(answers)

        def is_closed(self) -> bool:
            return next(self.answers)

        def call_soon_threadsafe(self, *arguments: Any, context: Any) -> None:
            raise RuntimeError("refused")

    async def timer(loop: Closing) -> None:
        clock.call_at(clock.monotonic() + 1.0, print).loop = loop  # type: ignore[assignment]

    run(timer(Closing(False, True)))
    clock.jump(1.0)
    run(timer(Closing(False, False)))
    with pytest.raises(RuntimeError, match="refused"):
        clock.jump(1.0)


def test_jump_from_another_thread_wakes_the_loop() -> None:
    """A plain thread may move the time of a loop that sleeps."""
    clock = FakeClock(autojump_threshold=None)
    asleep = threading.Event()

    async def main() -> float:
        asyncio.get_running_loop().call_soon(asleep.set)
        await clock.sleep(5)
        return clock.monotonic()

    results: list[float] = []
    thread = threading.Thread(target=lambda: results.append(run(main())))
    thread.start()
    assert asleep.wait(20)
    clock.jump(7)
    thread.join(20)
    assert results == [7.0]


def test_two_clocks_on_one_loop_do_not_wait_for_each_other() -> None:
    """Each clock looks through the other's looking."""
    one, two = FakeClock(), FakeClock()

    async def main() -> None:
        await asyncio.gather(one.sleep(10), two.sleep(20))

    run(main())
    assert (one.monotonic(), two.monotonic()) == (10.0, 20.0)


def test_clock_does_not_keep_a_loop_alive() -> None:
    """A clock that outlives its loops lets them go."""
    clock = FakeClock()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(clock.sleep(1))
    loop.close()
    gone = weakref.ref(loop)
    del loop
    run(clock.sleep(1))
    gc.collect()
    assert gone() is None


# ---- fixtures -----------------------------------------------------------------------------------------------------


def test_fixtures_give_a_context_on_a_fake_clock(fake_clock: FakeClock, workflow_context: WorkflowContext) -> None:
    """``workflow_context`` runs on ``fake_clock``."""
    assert workflow_context.clock is fake_clock
    assert isinstance(fake_clock, FakeClock)


def test_unknown_name_is_an_attribute_error() -> None:
    """The lazy package is as strict as any."""
    import tta_sync.testing

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        tta_sync.testing.Nothing


def test_package_stays_light_when_pytest_loads_the_plugin() -> None:
    """What pytest imports before coverage measures is only the plugin itself."""
    import subprocess
    import sys

    code = (
        "import sys, tta_sync.testing.plugin\n"
        "print([name for name in sys.modules if name.startswith('tta_sync.testing.') and 'plugin' not in name])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
